"""Linear feedback laws: the exact posterior of a linear-Gaussian model, its moments and its evidence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.core import GaussianChain, LinearSteps
from stochdyn.core.gaussian import FeedbackLaw, LiftedStart, feedback_given

F64 = torch.float64


def _model(steps: int, batch: tuple[int, ...]) -> tuple[LinearSteps, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    a = torch.eye(3, dtype=F64) + 0.2 * normal(steps, *batch, 3, 3)
    root = normal(steps + 1, *batch, 2, 2)
    return (
        LinearSteps(a, normal(steps, *batch, 3, 2), normal(steps, *batch, 3)),
        root @ root.mT,
        normal(steps + 1, *batch, 2),
    )


@pytest.mark.parametrize("steps", [1, 6, 40])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_feedback_law_is_the_smoother_and_closes_the_bound(steps: int, batch: tuple[int, ...]) -> None:
    linear_steps, precision, linear = _model(steps, batch)
    prior = LiftedStart.of_prior(
        torch.tensor([0.0, 0.0, 0.7], dtype=F64),
        torch.eye(3, 2, dtype=F64),
        torch.tensor([0.3, -0.2], dtype=F64),
        2 * torch.eye(2, dtype=F64),
    )
    feedback, (first, *_), (pull, *_) = feedback_given(linear_steps, precision, linear)
    start = prior.given(first, pull)
    mean = start.moments()[0]
    # The law about its own mean: move the centre there.
    means = [mean]
    for n in range(steps):
        a, b, c = linear_steps.transition[n], linear_steps.load[n], linear_steps.offset[n]
        shift = feedback.offset[n] + (feedback.gain[n] @ means[-1][..., None])[..., 0]
        means.append((a @ means[-1][..., None] + b @ shift[..., None])[..., 0] + c)
    centre = torch.stack(means)
    offset = feedback.offset + (feedback.gain @ centre[:-1, ..., None])[..., 0]
    law = FeedbackLaw(linear_steps, type(feedback)(offset, feedback.gain, feedback.factor), start)

    # The same data as observations y = x + N(0, H^{-1}) with y = H^{-1} h.
    noise = torch.linalg.inv(precision)
    y = (noise @ linear[..., None])[..., 0]
    chain = GaussianChain(
        *prior.moments(),
        linear_steps.transition,
        linear_steps.offset,
        linear_steps.load @ linear_steps.load.mT,
    )
    exact = chain.smooth(y, torch.eye(2, 3, dtype=F64), noise)
    torch.testing.assert_close(law.moments[0], exact.mean, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(law.moments[1], exact.cov, rtol=1e-6, atol=1e-7)

    mean, cov = law.moments[0][..., :2], law.moments[1][..., :2, :2]
    gap = y - mean
    fit = torch.distributions.MultivariateNormal(torch.zeros_like(y), noise).log_prob(gap)
    fit = (fit - 0.5 * (precision * cov).sum((-2, -1))).sum(0)
    torch.testing.assert_close(fit - law.divergence(), exact.log_evidence, rtol=1e-8, atol=1e-8)


def test_densities_and_rates_are_those_of_the_draws() -> None:
    linear_steps, precision, linear = _model(5, ())
    feedback, _, _ = feedback_given(linear_steps, precision, linear)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4000, 3, dtype=F64, generator=g)
    standard = torch.randn(5, 4000, 2, dtype=F64, generator=g)
    e = feedback.mean(z) + (feedback.factor[:, None] @ standard[..., None])[..., 0]
    normal = torch.distributions.Normal(torch.zeros_like(e), 1.0).log_prob(e).sum(-1).sum(0)
    ratio = feedback.log_prob(e, z) - normal - feedback.divergence_rate(z)
    assert abs(ratio.mean()) <= 5 * ratio.std() / 4000**0.5
