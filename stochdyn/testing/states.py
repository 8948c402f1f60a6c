"""What every variational state over outcome strings must satisfy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.core.forward.outcomes import all_configurations, encode

if TYPE_CHECKING:
    from stochdyn.povm.ansatz.base import Ansatz

__all__ = ["AnsatzSuite"]


class AnsatzSuite(ABC):
    """Tests of a :class:`stochdyn.povm.Ansatz`; subclasses implement :meth:`make`.

    Attributes:
        draws: The samples for the test of the sampler.
    """

    draws: int = 20000

    @abstractmethod
    def make(self) -> Ansatz:
        """Return a state in float64 that isn't a product, of few enough sites to list all outcomes."""

    def _every(self, net: Ansatz) -> Tensor:
        return all_configurations(net.num_sites, net.num_outcomes)

    def test_probabilities_sum_to_one(self) -> None:
        """With and without gradients."""
        net = self.make()
        assert abs(float(net.probabilities().sum()) - 1) < 1e-10
        assert abs(float(net.log_prob(self._every(net)).detach().exp().sum()) - 1) < 1e-10

    def test_samples_follow_the_law_that_is_scored(self) -> None:
        """A chi-squared statistic within five standard deviations of its mean; rare outcomes are pooled."""
        net = self.make()
        p = net.probabilities()
        for stratified in (False, True):
            generator = torch.Generator().manual_seed(1)
            a, log_p = net.sample(self.draws, generator=generator, stratified=stratified)
            assert torch.allclose(log_p[:300], net.log_prob(a[:300]).detach(), rtol=0, atol=1e-8)
            counts = torch.bincount(encode(a, net.num_outcomes), minlength=len(p)).double()
            expected = p * self.draws
            rare = expected < 5
            pairs = torch.stack([counts, expected])
            pooled = torch.cat([pairs[:, ~rare], pairs[:, rare].sum(1, keepdim=True)], 1)
            pooled = pooled[:, pooled[1] > 0]
            statistic = float(((pooled[0] - pooled[1]).square() / pooled[1]).sum())
            freedom = pooled.shape[1] - 1
            assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10

    def test_draws_repeat_with_the_generator(self) -> None:
        """The same seed gives the same strings."""
        net = self.make()
        first, second = (net.sample(50, generator=torch.Generator().manual_seed(3))[0] for _ in range(2))
        assert torch.equal(first, second)

    def test_scores_are_gradients_of_single_samples(self) -> None:
        """Against one backward pass per sample; their mean under the law is zero."""
        net = self.make()
        every = self._every(net)
        a = every[:: max(1, len(every) // 5)]
        log_p, scores = net.scores(a)
        assert torch.allclose(log_p, net.log_prob(a).detach(), rtol=0, atol=1e-10)
        parameters = [p for _, p in net.trainable()]
        for row, value in zip(scores, net.log_prob(a), strict=True):
            grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            assert torch.allclose(row, torch.cat([g.reshape(-1) for g in parts]), rtol=0, atol=1e-9)
        log_p, scores = net.scores(every)
        assert float((log_p.exp() @ scores).abs().max()) < 1e-9

    def test_sums_of_scores_are_sums(self) -> None:
        """As asked for by the gradients of rates."""
        net = self.make()
        every = self._every(net)
        a = every[torch.randint(len(every), (3, 4), generator=torch.Generator().manual_seed(2))]
        weights = torch.tensor([1.0, -0.5, 2.0, 0.1], dtype=torch.float64).expand(3, 4)
        wanted = torch.stack([weights[i] @ net.scores(part)[1] for i, part in enumerate(a)])
        assert torch.allclose(net.combined_scores(a, weights), wanted, rtol=0, atol=1e-9)

    def test_product_laws_are_exact(self) -> None:
        """Also where sites differ."""
        net = self.make()
        generator = torch.Generator().manual_seed(0)
        p = torch.rand(net.num_sites, net.num_outcomes, dtype=torch.float64, generator=generator) + 0.1
        p = p / p.sum(1, keepdim=True)
        net.set_site_probabilities(p)
        joint = torch.ones(1, dtype=torch.float64)
        for row in p:
            joint = (joint[:, None] * row).reshape(-1)
        assert torch.allclose(net.probabilities(), joint, rtol=0, atol=1e-12)

    def test_the_symmetry_that_is_claimed_holds(self) -> None:
        """The law is the same read along every string of the group."""
        net = self.make()
        if net.symmetry is None:
            return
        every = self._every(net)
        read = net.symmetry.arrange(every)
        p = net.probabilities()
        for s in range(read.shape[1]):
            assert torch.allclose(p[encode(read[:, s], net.num_outcomes)], p, rtol=0, atol=1e-12)

    def test_parameters_go_round_as_a_vector(self) -> None:
        """And the law with them."""
        net = self.make()
        before, p = net.parameter_vector(), net.probabilities()
        net.set_parameter_vector(before + 0.1)
        assert torch.allclose(net.parameter_vector(), before + 0.1)
        net.set_parameter_vector(before)
        assert torch.equal(net.probabilities(), p)
