"""Marginal flows: densities, scores and samples against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stochdyn.core import GaussianFlow, LearnedFlow, LinearGaussianMeasure, MarginalFlow, MixtureFlow, as_time
from stochdyn.errors import InvalidInputError, ShapeError, SingularDiffusionError, UnavailableError
from stochdyn.testing import MarginalFlowSuite

F64 = torch.float64


def ou_flow(d: int = 2, mean0: float = 1.0, var0: float = 0.3) -> GaussianFlow:
    """dX = -X dt + dW from N(mean0, var0): mean e^-t m, variance e^-2t v + (1 - e^-2t) / 2."""

    def mean(t: Tensor) -> Tensor:
        return (mean0 * (-t).exp())[..., None].expand(*t.shape, d).to(F64)

    def covariance(t: Tensor) -> Tensor:
        var = var0 * (-2 * t).exp() + 0.5 * (1 - (-2 * t).exp())
        return var[..., None, None].to(F64) * torch.eye(d, dtype=F64)

    return GaussianFlow(mean, covariance)


class TestGaussianFlow(MarginalFlowSuite):
    """A Gaussian flow keeps the contract of flows."""

    def make(self) -> MarginalFlow:
        """Return the flow of an OU process."""
        return ou_flow()


class TestMixtureFlow(MarginalFlowSuite):
    """A mixture keeps the contract of flows."""

    def make(self) -> MarginalFlow:
        """Return a mixture of two OU flows."""
        return MixtureFlow([ou_flow(2, 2.0), ou_flow(2, -1.0)], torch.tensor([0.3, 0.7], dtype=F64))


class TestLearnedFlow(MarginalFlowSuite):
    """A learned flow keeps the contract of flows."""

    def make(self) -> MarginalFlow:
        """Return a function that happens to be the standard normal."""
        normal = -0.5 * math.log(2 * math.pi)

        def sampler(t: Tensor, n: int, g: torch.Generator | None) -> Tensor:
            return torch.randn(*t.shape, n, 2, dtype=F64, generator=g)

        return LearnedFlow(lambda t, x: (-0.5 * x.square() + normal).sum(-1), sampler=sampler)


@pytest.mark.parametrize("d", [1, 3])
def test_gaussian_density_matches_torch(d: int) -> None:
    root = torch.randn(d, d, dtype=F64)
    cov, mean = root @ root.T + torch.eye(d), torch.randn(d, dtype=F64)
    flow = GaussianFlow(lambda t: mean.expand(*t.shape, d), lambda t: (1 + t)[..., None, None] * cov)
    x, t = torch.randn(4, 5, d, dtype=F64), torch.rand(4, 1, 1, dtype=F64)
    truth = torch.distributions.MultivariateNormal(mean, (1 + t[..., None]) * cov).log_prob(x)
    torch.testing.assert_close(flow.log_prob(t, x), truth)
    truth0 = torch.distributions.MultivariateNormal(mean, 1.5 * cov).log_prob(x)
    torch.testing.assert_close(flow.log_prob(0.5, x), truth0)


def test_linear_measure_gives_its_marginals_in_any_order_of_times() -> None:
    lin = LinearGaussianMeasure.ornstein_uhlenbeck(
        torch.tensor([1.0, 2.0], dtype=F64), 0.5, initial_mean=torch.ones(2, dtype=F64)
    )
    flow = GaussianFlow.from_measure(lin)
    t = torch.tensor([0.7, 0.2, 0.7], dtype=F64)
    grid, order = torch.tensor([0.2, 0.7], dtype=F64), [1, 0, 1]
    torch.testing.assert_close(flow.mean(t), lin.mean(grid)[order])
    torch.testing.assert_close(flow.covariance(t), lin.covariance(grid)[order])


def test_linear_measure_flow_has_the_right_time_derivative() -> None:
    lin = LinearGaussianMeasure.ornstein_uhlenbeck(1.0, initial_mean=torch.ones(1, dtype=F64))
    flow, x, h = GaussianFlow.from_measure(lin), torch.randn(5, 1, dtype=F64), 1e-5
    difference = (flow.log_prob(0.6 + h, x) - flow.log_prob(0.6 - h, x)) / (2 * h)
    torch.testing.assert_close(flow.time_derivative(0.6, x), difference, rtol=1e-7, atol=1e-8)
    repeated = torch.full((5, 1), 0.6, dtype=F64)
    torch.testing.assert_close(flow.time_derivative(repeated, x), difference, rtol=1e-7, atol=1e-8)


def test_batched_measure_is_refused() -> None:
    lin = LinearGaussianMeasure.ornstein_uhlenbeck(1.0, initial_mean=torch.ones(3, 1))
    with pytest.raises(ShapeError, match="a flow is one law"):
        GaussianFlow.from_measure(lin)


def test_samples_of_a_point_mass_are_that_point() -> None:
    flow = GaussianFlow(lambda t: torch.ones(*t.shape, 2), lambda t: torch.zeros(*t.shape, 2, 2))
    assert torch.equal(flow.sample(0.0, 3), torch.ones(3, 2))
    with pytest.raises(SingularDiffusionError, match="positive definite"):
        flow.log_prob(0.0, torch.ones(3, 2))


def test_mixture_samples_have_its_mean() -> None:
    flow = MixtureFlow([ou_flow(1, 2.0), ou_flow(1, -1.0)], torch.tensor([1.0, 3.0], dtype=F64))
    x = flow.sample(torch.tensor([0.0, 1.0], dtype=F64), 20_000, torch.Generator().manual_seed(3))
    truth = -0.25 * torch.exp(-torch.tensor([0.0, 1.0], dtype=F64))
    error = (x.mean(1)[:, 0] - truth).abs() / (x.std(1)[:, 0] / 20_000**0.5)
    assert float(error.max()) < 5


def test_learned_score_with_reference_adds_both() -> None:
    x = torch.randn(3, 2, dtype=F64)
    flow = LearnedFlow(lambda t, y: 0 * y + t, predicts="score", reference=ou_flow())
    torch.testing.assert_close(flow.score(0.5, x), ou_flow().score(0.5, x) + 0.5)
    torch.testing.assert_close(
        flow.score_time_derivative(0.5, x), ou_flow().score_time_derivative(0.5, x) + 1
    )
    density = LearnedFlow(lambda t, y: (t * y).sum(-1, keepdim=True), reference=ou_flow())
    torch.testing.assert_close(density.log_prob(0.5, x), ou_flow().log_prob(0.5, x) + 0.5 * x.sum(-1))


def test_score_network_knows_no_density_and_no_samples() -> None:
    flow = LearnedFlow(lambda t, x: -x, predicts="score")
    with pytest.raises(UnavailableError, match="no log density"):
        flow.log_prob(0.0, torch.zeros(1, 2))
    with pytest.raises(UnavailableError, match="no sampler"):
        flow.sample(0.0, 2)


def test_times_must_broadcast_to_the_points() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ShapeError, match=r"time per point is t\[:, None\]"):
        as_time(torch.zeros(3), x)
    with pytest.raises(ShapeError, match="broadcast"):
        as_time(torch.zeros(1, 1, 1), x)
    assert as_time(0.5, x).dtype == torch.float32
    assert as_time(torch.tensor(0.5, dtype=F64), x).dtype == F64


def test_bad_construction_raises() -> None:
    with pytest.raises(ShapeError, match="one weight per component"):
        MixtureFlow([ou_flow()], torch.ones(2))
    with pytest.raises(InvalidInputError, match="weights must be positive"):
        MixtureFlow([ou_flow(), ou_flow()], torch.tensor([1.0, 0.0]))
    with pytest.raises(InvalidInputError, match="predicts is unknown"):
        LearnedFlow(lambda t, x: x, predicts="magic")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="wrong dimension"):
        ou_flow(2).log_prob(0.0, torch.zeros(3, 4, dtype=F64))
    with pytest.raises(InvalidInputError, match="functions of time"):
        GaussianFlow(torch.zeros(2), torch.eye(2))  # type: ignore[arg-type]
