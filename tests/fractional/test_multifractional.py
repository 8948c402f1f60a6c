"""Noise with a Hurst index that depends on time: exact covariances, both definitions, recovery of the curve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.core import NoiseProcess
from stochdyn.errors import ApproximationWarning, HurstRangeError, InvalidInputError, ShapeError
from stochdyn.fractional import (
    AffineDrift,
    GaussianELBO,
    GaussianPosterior,
    HurstCurve,
    MarkovNoise,
    MultifractionalNoise,
    fbm_covariance,
    multifractional_covariance,
)
from stochdyn.testing import NoiseProcessSuite

D = torch.float64


def _ramp(t: Tensor) -> Tensor:
    return 0.55 + 0.25 * t


def _implied_covariance(noise: NoiseProcess, ts: Tensor) -> Tensor:
    """Covariance of Z at the grid points, by carrying the response to every innovation forward."""
    steps = noise.steps(ts, dtype=D)
    count, r = steps.variance.shape
    response = torch.zeros(steps.load.shape[-1], count * r, dtype=D)
    level, rows = torch.zeros(count * r, dtype=D), []
    for n in range(count):
        level = level + steps.recall[n] @ response
        level[n * r : (n + 1) * r] += steps.gain[n]
        response = steps.decay[n][:, None] * response
        response[:, n * r : (n + 1) * r] += steps.load[n].T
        rows.append(level)
    factor = torch.stack(rows) * steps.variance.flatten().sqrt()
    return factor @ factor.T


class TestProcess(NoiseProcessSuite):
    """The conformance suite."""

    def make(self) -> NoiseProcess:
        """See the suite."""
        return MultifractionalNoise(_ramp, 6, horizon=1.0, dt=0.02)


class TestIncrements(NoiseProcessSuite):
    """The conformance suite."""

    def make(self) -> NoiseProcess:
        """See the suite."""
        return MultifractionalNoise(_ramp, 12, horizon=1.0, dt=0.02, definition="increments", kind="I")


def test_covariance_of_multifractional_brownian_motion() -> None:
    """The Markov approximation against the closed form."""
    ts = torch.linspace(0, 1, 41, dtype=D)
    noise = MultifractionalNoise(_ramp, 14, horizon=1.0, dt=1e-4)
    exact = multifractional_covariance(ts[1:], _ramp(ts[1:]))
    torch.testing.assert_close(_implied_covariance(noise, ts), exact, rtol=0, atol=2e-3)
    torch.testing.assert_close(exact.diagonal(), ts[1:] ** (2 * _ramp(ts[1:])))


def test_the_closed_form_agrees_with_quadrature() -> None:
    s, t, hs, ht = 0.4, 1.1, 0.3, 0.8
    # s - u = s v^4 takes the singularity away
    v = (torch.arange(200000, dtype=D) + 0.5) / 200000
    rest = s * v**4
    integrand = rest ** (hs - 0.5) * (t - s + rest) ** (ht - 0.5) * 4 * s * v**3
    exact = 2 * math.sqrt(hs * ht) * float(integrand.mean())
    cov = multifractional_covariance(torch.tensor([s, t], dtype=D), torch.tensor([hs, ht], dtype=D))
    assert float(cov[0, 1]) == pytest.approx(exact, rel=1e-5)
    assert float(cov[1, 0]) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("definition", ["process", "increments"])
def test_a_constant_index_gives_fractional_noise(definition: str) -> None:
    ts = torch.linspace(0, 1, 11, dtype=D)
    noise = MultifractionalNoise(lambda t: torch.full_like(t, 0.7), 6, 1.0, 0.02, definition)  # type: ignore[arg-type]
    mine, theirs = noise.steps(ts, dtype=D), MarkovNoise(0.7, 6, 1.0, 0.02).steps(ts, dtype=D)
    for name in ("variance", "gain", "recall", "decay", "load"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-12, atol=1e-12)


def test_the_definitions_differ_by_the_drift_that_a_change_of_index_causes() -> None:
    """After H has jumped and stayed, increments agree; at the jump the process moves and the increments don't."""
    ts = torch.linspace(0, 1, 21, dtype=D)

    def jump(t: Tensor) -> Tensor:
        return torch.where(t < 0.5, 0.4, 0.8).to(D)

    process = MultifractionalNoise(jump, 6, 1.0, 0.02).steps(ts, dtype=D)
    increments = MultifractionalNoise(jump, 6, 1.0, 0.02, "increments").steps(ts, dtype=D)
    gap = (process.recall - increments.recall).abs().sum(-1)
    assert gap.argmax() == 9
    assert float(gap[[n for n in range(20) if n != 9]].max()) < 1e-9


def test_increments_of_type_one_have_the_law_of_their_index() -> None:
    """Increments far from a change have the variance of fractional Gaussian noise with the present index."""
    noise = MultifractionalNoise(
        lambda t: torch.where(t < 0.5, 0.6, 0.7).to(D), 20, 1.0, 1e-3, "increments", "I"
    )
    ts = torch.linspace(0, 1, 101, dtype=D)
    steps = noise.steps(ts, dtype=D)
    factor = noise.initial_factor(dtype=D, device=torch.device("cpu"))
    assert factor is not None
    cov = factor.T @ factor  # stationary
    for n, hurst in ((10, 0.6), (90, 0.7)):
        variance = steps.recall[n] @ cov @ steps.recall[n] + (steps.gain[n] ** 2 * steps.variance[n]).sum()
        assert float(variance) == pytest.approx(0.01 ** (2 * hurst), rel=0.02)


def test_gradients_reach_the_curve() -> None:
    ts = torch.linspace(0, 1, 6, dtype=D)
    logits = torch.tensor([-0.3, 0.2, 0.6], dtype=D, requires_grad=True)

    def coefficients(x: Tensor) -> tuple[Tensor, Tensor]:
        steps = MultifractionalNoise(HurstCurve(x, 1.0), 5, 1.0, 0.1).steps(ts, dtype=D)
        return steps.gain, steps.recall

    assert torch.autograd.gradcheck(coefficients, (logits,))


def test_a_batch_of_curves_and_a_curve_for_each_channel() -> None:
    logits = torch.tensor([[-0.5, 0.5], [0.5, -0.5]], dtype=D)
    ts = torch.linspace(0, 1, 6, dtype=D)
    batch = MultifractionalNoise(HurstCurve(logits, 1.0), 4, 1.0, 0.1)
    channels = MultifractionalNoise(HurstCurve(logits, 1.0), 4, 1.0, 0.1, per_channel=True)
    assert batch.steps(ts, dtype=D).parameter_batch == (2,)
    assert channels.steps(ts, dtype=D).parameter_batch == ()
    single = MultifractionalNoise(HurstCurve(logits[1], 1.0), 4, 1.0, 0.1).steps(ts, dtype=D)
    torch.testing.assert_close(batch.steps(ts, dtype=D).gain[:, 1], single.gain)
    x0 = torch.zeros(3, 2, dtype=D)
    path = sd.DiffusionMeasure(x0, sd.SDE(lambda t, x: -x, 1.0, channels)).sample(ts)
    assert path.x.shape == (3, 6, 2)


def test_the_curve_is_recovered_from_a_path() -> None:
    """Noisy values of one path; the bound is exact, so its maximum is that of the evidence."""
    n, noise_scale = 400, 0.01
    ts = torch.linspace(0, 1, n + 1, dtype=D)

    def truth(t: Tensor) -> Tensor:
        return 0.35 + 0.4 * t

    cov = multifractional_covariance(ts[1:], truth(ts[1:]))
    g = torch.Generator().manual_seed(0)
    x = torch.linalg.cholesky(cov) @ torch.randn(n, generator=g, dtype=D)
    y = x + noise_scale * torch.randn(n, generator=g, dtype=D)
    curve = HurstCurve(4, 1.0)
    noise = MultifractionalNoise(curve, 6, 1.0, 1 / n, speeds=torch.logspace(-1, 3.5, 6, dtype=D))
    prior = sd.DiffusionMeasure(
        torch.zeros(1, dtype=D), sd.SDE(AffineDrift(torch.zeros(1, 1, dtype=D)), 1.0, noise)
    )
    data = sd.GaussianObservations(ts, ts[1:], y, noise_scale)
    objective = GaussianELBO(GaussianPosterior(prior, ts), data)
    optimiser = torch.optim.Adam(curve.parameters(), lr=0.15)
    for step in range(14):
        # the posterior is put to its optimum, so the gradient is that of the evidence
        objective.posterior.linearise(data)
        optimiser.zero_grad()
        objective(None).loss.backward()
        optimiser.step()
        if step == 8:
            optimiser.param_groups[0]["lr"] = 0.05
    at = torch.linspace(0.1, 0.9, 9, dtype=D)
    error = (curve(at) - truth(at)).detach().abs()
    assert float(error.mean()) < 0.05
    assert float(error.max()) < 0.12


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="type II"):
        MultifractionalNoise(_ramp, kind="I")
    with pytest.raises(InvalidInputError, match="function of time"):
        MultifractionalNoise(0.7)  # type: ignore[arg-type]
    with pytest.raises(HurstRangeError):
        MultifractionalNoise(lambda t: 2 * t + 0.5)
    with pytest.raises(ShapeError):
        MultifractionalNoise(lambda t: torch.tensor(0.5))
    with pytest.raises(InvalidInputError):
        HurstCurve(1, 1.0)
    with pytest.warns(ApproximationWarning, match="nats per step"):
        MultifractionalNoise(lambda t: torch.full_like(t, 0.05), 3, 1.0)


def test_covariance_of_constant_index_is_that_of_type_two() -> None:
    ts = torch.linspace(0.1, 1, 5, dtype=D)
    torch.testing.assert_close(
        multifractional_covariance(ts, torch.tensor(0.7, dtype=D)),
        fbm_covariance(ts, 0.7, kind="II"),
        rtol=1e-7,
        atol=1e-9,
    )
