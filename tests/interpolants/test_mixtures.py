"""The exact interpolant of Gaussian mixtures: every identity to 1e-10, in 2 and 128 dimensions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from stochdyn import errors
from stochdyn.core import ContinuityEquation, gradient
from stochdyn.interpolants import GaussianMixture, GaussianMixtureInterpolant, Interpolant
from stochdyn.testing import MarginalFlowSuite
from tests.interpolants.truths import ALL_PATHS, F64, fields_of, mixture, truth

TIMES = torch.tensor([0.15, 0.5, 0.85], dtype=F64)[:, None, None]


class TestTwoDimensions(MarginalFlowSuite):
    def make(self) -> GaussianMixtureInterpolant:
        return truth("linear", 2)


class TestCommuting(MarginalFlowSuite):
    def make(self) -> GaussianMixtureInterpolant:
        return truth("one-sided-linear", 3)


def _case(path: str, dim: int) -> tuple[GaussianMixtureInterpolant, torch.Tensor, torch.Tensor]:
    flow = truth(path, dim)
    t = TIMES if path != "encoder-decoder" else torch.tensor([0.15, 0.4, 0.85], dtype=F64)[:, None, None]
    return flow, t, flow.sample(t[:, 0, 0], 6, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dim", [2, 128])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_means_of_ends_and_latent_add_up_to_the_point(path: str, dim: int) -> None:
    flow, t, x = _case(path, dim)
    it = flow.interpolant
    total = it.beta.value(t) * flow.data_prediction(t, x)
    if it.kind != "mirror":
        total = total + it.alpha.value(t) * flow.start_prediction(t, x)
    if it.has_latent:
        total = total + it.gamma.value(t) * flow.noise_prediction(t, x)
    assert float((total - x).abs().max()) < 1e-10


@pytest.mark.parametrize("dim", [2, 128])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_velocity_is_the_mean_rate(path: str, dim: int) -> None:
    flow, t, x = _case(path, dim)
    it = flow.interpolant
    smooth = it.beta.derivative(t) * flow.data_prediction(t, x)
    if it.kind != "mirror":
        smooth = smooth + it.alpha.derivative(t) * flow.start_prediction(t, x)
    assert float((flow.path_velocity(t, x) - smooth).abs().max()) < 1e-10
    rate = smooth + it.gamma.derivative(t) * flow.noise_prediction(t, x) if it.has_latent else smooth
    assert float((flow.velocity(t, x) - rate).abs().max()) < 1e-10
    # b = v - gamma gamma' s
    half = 0.5 * it.gamma.square_derivative(t)
    other = flow.path_velocity(t, x) - half * flow.score(t, x)
    assert float((flow.velocity(t, x) - other).abs().max()) < 1e-10


@pytest.mark.parametrize("dim", [2, 128])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_score_is_the_gradient_and_minus_the_latent_over_its_scale(path: str, dim: int) -> None:
    flow, t, x = _case(path, dim)
    slope = gradient(lambda y: flow.log_prob(t, y), x)
    assert float((flow.score(t, x) - slope).abs().max()) < 1e-10
    if "noise_prediction" in fields_of(flow):
        scale = flow.interpolant.noise.value(t)
        assert float((flow.score(t, x) + flow.noise_prediction(t, x) / scale).abs().max()) < 1e-10


@pytest.mark.parametrize("dim", [2, 128])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_velocity_carries_the_density(path: str, dim: int) -> None:
    """The transport equation with the time derivative by automatic differentiation of the log density."""
    flow, t, x = _case(path, dim)
    from stochdyn.core.forward.flow import time_derivative

    change = time_derivative(flow.log_prob, t.expand(*x.shape[:-1], 1), x)
    assert float((change - flow.time_derivative(t, x)).abs().max()) < 1e-10 * dim
    residual = ContinuityEquation(flow.velocity).residual(flow, t, x)
    assert float(residual.abs().max()) < 1e-10 * dim


@pytest.mark.parametrize("dim", [2, 128])
def test_both_ways_of_solving_agree(dim: int) -> None:
    """A common eigenbasis and a factorisation for every time give the same numbers."""
    flow = truth("linear", dim, isotropic=True)
    assert flow.commuting
    x = flow.sample(TIMES[:, 0, 0], 5)
    names = (
        "log_prob",
        "score",
        "velocity",
        "path_velocity",
        "start_prediction",
        "data_prediction",
        "noise_prediction",
    )
    fast = {n: getattr(flow, n)(TIMES, x) for n in names}
    flow.commuting = False
    for n in names:
        assert float((getattr(flow, n)(TIMES, x) - fast[n]).abs().max()) < 1e-10


def test_one_time_a_point_agrees_with_one_time_for_all() -> None:
    for commuting in (True, False):
        flow = truth("linear", 3, isotropic=commuting)
        x = flow.sample(0.3, 7)
        each = torch.full((7, 1), 0.3, dtype=F64)
        torch.testing.assert_close(flow.velocity(0.3, x), flow.velocity(each, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 128])
@pytest.mark.parametrize("distance", [1e2, 1e4, 1e6])
def test_nothing_overflows_far_from_the_modes(dim: int, distance: float) -> None:
    flow = truth("linear", dim)
    x = torch.full((1, dim), distance, dtype=F64)
    for t in (0.0, 1e-6, 0.5, 1.0):
        for value in (
            flow.log_prob(t, x),
            flow.score(t, x),
            flow.velocity(t, x),
            flow.start_prediction(t, x),
            flow.data_prediction(t, x),
        ):
            assert bool(torch.isfinite(value).all())
    # one component dominates there, so the score is that of a single Gaussian: linear
    s = flow.score(0.5, torch.cat([x, 2 * x, 3 * x]))
    bend = (s[2] - 2 * s[1] + s[0]).norm() / s[1].norm()
    assert float(bend) < 1e-8


@pytest.mark.parametrize("path", ALL_PATHS)
def test_ends_are_the_given_laws(path: str) -> None:
    flow = truth(path, 2)
    x = torch.randn(5, 2, dtype=F64)
    torch.testing.assert_close(flow.log_prob(1.0, x), flow.target.log_prob(x), rtol=0, atol=1e-12)
    first = flow.target if flow.interpolant.kind == "mirror" else flow.base
    torch.testing.assert_close(flow.log_prob(0.0, x), first.log_prob(x), rtol=0, atol=1e-12)
    for t in (0.0, 1.0):
        assert bool(torch.isfinite(flow.velocity(t, x)).all())


def test_encoder_decoder_passes_through_the_standard_normal() -> None:
    flow = truth("encoder-decoder", 2)
    x = torch.randn(5, 2, dtype=F64)
    normal = Independent(Normal(torch.zeros(2, dtype=F64), 1.0), 1)
    torch.testing.assert_close(flow.log_prob(0.5, x), normal.log_prob(x), rtol=0, atol=1e-12)


def test_a_gaussian_has_linear_fields() -> None:
    """One component on either side: b = m' + C'/2 C^-1 (x - m), s = -C^-1 (x - m)."""
    c0, c1 = mixture(2, 1, 4), mixture(2, 1, 5)
    flow = GaussianMixtureInterpolant(Interpolant("linear"), c0, c1)
    t, x = 0.3, torch.randn(4, 2, dtype=F64)
    m = 0.7 * c0.means[0] + 0.3 * c1.means[0]
    c = 0.49 * c0.covariances[0] + 0.09 * c1.covariances[0] + 0.21 * torch.eye(2, dtype=F64)
    dc = -1.4 * c0.covariances[0] + 0.6 * c1.covariances[0] + 0.4 * torch.eye(2, dtype=F64)
    y = torch.linalg.solve(c, (x - m).mT).mT
    torch.testing.assert_close(flow.score(t, x), -y, rtol=0, atol=1e-12)
    slope = c1.means[0] - c0.means[0] + 0.5 * y @ dc
    torch.testing.assert_close(flow.velocity(t, x), slope, rtol=0, atol=1e-12)
    mean, covariance = flow.moments(t)
    torch.testing.assert_close(mean, m, rtol=0, atol=1e-12)
    torch.testing.assert_close(covariance, c, rtol=0, atol=1e-12)


def test_laws_may_be_given_in_several_forms() -> None:
    eye = torch.eye(2, dtype=F64)
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64)
    weights = torch.tensor([0.25, 0.75], dtype=F64)
    forms = [
        GaussianMixture(weights, means, 0.5),
        (weights, means, 0.5),
        MixtureSameFamily(Categorical(weights), MultivariateNormal(means, 0.5 * eye)),
        MixtureSameFamily(Categorical(weights), Independent(Normal(means, math.sqrt(0.5)), 1)),
        GaussianMixture(weights, means, 0.5 * eye),
        GaussianMixture(weights, means, torch.full((2,), 0.5, dtype=F64)),
    ]
    x = torch.randn(3, 2, dtype=F64)
    values = [GaussianMixtureInterpolant(Interpolant(), None, f).log_prob(0.4, x) for f in forms]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-12)


def test_bad_mixtures() -> None:
    means = torch.zeros(2, 3)
    half = torch.full((2,), 0.5)
    with pytest.raises(errors.InvalidInputError, match=r"sum to one; got sum 0\.9"):
        GaussianMixture(torch.tensor([0.5, 0.4]), means, 1.0)
    with pytest.raises(errors.InvalidInputError, match=r"minimum -0\.5"):
        GaussianMixture(torch.tensor([1.5, -0.5]), means, 1.0)
    with pytest.raises(errors.ShapeError, match="one weight per mean"):
        GaussianMixture(torch.ones(1), means, 1.0)
    with pytest.raises(errors.SingularDiffusionError, match="least eigenvalue"):
        GaussianMixture(half, means, torch.ones(3, 3))
    with pytest.raises(errors.SingularDiffusionError, match="symmetric"):
        GaussianMixture(half, means, torch.eye(3) + torch.tensor([[0.0, 0.5, 0.0], [0.0] * 3, [0.0] * 3]))
    with pytest.raises(errors.ShapeError, match="covariances don't fit"):
        GaussianMixture(half, means, torch.eye(2))
    with pytest.raises(errors.EmptyDataError):
        GaussianMixture(torch.zeros(0), torch.zeros(0, 2), 1.0)
    ok = GaussianMixture(half, means, 1.0)
    with pytest.raises(errors.ShapeError, match="different dimensions; got 2 and 3"):
        GaussianMixtureInterpolant(Interpolant(), GaussianMixture(half, torch.zeros(2, 2), 1.0), ok)
    with pytest.raises(errors.InvalidInputError, match="starts in the standard normal"):
        GaussianMixtureInterpolant(Interpolant("vp"), GaussianMixture(half, means + 1, 2.0), ok)
    with pytest.raises(errors.InvalidInputError, match="a Gaussian or a mixture"):
        GaussianMixtureInterpolant(Interpolant(), None, Normal(0.0, 1.0))
    flow = GaussianMixtureInterpolant(Interpolant(), None, ok)
    with pytest.raises(errors.TimeGridError, match=r"got 1\.1"):
        flow.velocity(1.1, torch.zeros(1, 3))
    with pytest.raises(errors.ShapeError, match="wrong size"):
        flow.score(0.5, torch.zeros(1, 2))
    with pytest.raises(errors.UnavailableError, match="no latent"):
        GaussianMixtureInterpolant(Interpolant("linear", "zero"), None, ok).noise_prediction(
            0.5, torch.zeros(1, 3)
        )
