"""Numerics at the limits: many and fast states in single precision, extreme Hurst indices, channels of their own."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.core import draw_increments, integrate, step_everywhere
from stochdyn.core.sde.solvers import full_state
from stochdyn.errors import InvalidInputError
from stochdyn.fractional import MarkovNoise, geometric_speeds

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")


@pytest.mark.parametrize("hurst", [0.1, 0.5, 0.9])
def test_sixteen_states_and_fast_speeds_in_single_precision(hurst: float) -> None:
    """Speeds up to 1e4 a step: the same increments give the same path in both precisions."""
    ts = torch.linspace(0, 1, 101, dtype=D)
    noise = MarkovNoise(hurst, speeds=geometric_speeds(16, 0.1, 1e6))
    assert float(noise.speeds[-1] * 0.01) == pytest.approx(1e4)
    sde = sd.SDE(lambda t, x: -x, 1.0, noise)
    x0 = torch.zeros(200, 1, dtype=D)
    dw, _ = draw_increments(sde, x0, ts, torch.Generator().manual_seed(0))
    double = integrate(sde, x0, ts, dw).x
    single = integrate(sde, x0.float(), ts, dw.float()).x
    assert single.dtype == torch.float32
    error = (single.double() - double).abs().max()
    assert float(error / double.std()) < 2e-5


@pytest.mark.parametrize("hurst", [0.01, 0.99])
def test_the_reported_error_is_true_at_extreme_indices(hurst: float) -> None:
    """Against quadrature of the kernels, in a variable that takes the singularity away."""
    noise = MarkovNoise(hurst, 8, horizon=1.0, dt=1e-3)
    power = max(1.0, 1.0 / (2 * hurst))
    v = (torch.arange(400000, dtype=D) + 0.5) / 400000
    # u = v^power; du = power u / v dv, and the kernel is u^(hurst - 1/2) / Gamma, normalised
    log_u = power * v.log()
    u = log_u.exp()
    kernel = math.sqrt(2 * hurst) * ((hurst - 0.5) * log_u).exp()
    response = (noise.weights * torch.exp(-u[:, None] * noise.speeds)).sum(-1)
    measure = power * u / v * (1 - u)
    ratio = float((measure * (kernel - response) ** 2).mean() / (measure * kernel**2).mean())
    assert noise.relative_error == pytest.approx(math.sqrt(ratio), rel=2e-2)
    assert 0 < noise.relative_error < math.sqrt(2)  # that of an independent path


def test_channels_with_indices_of_their_own_are_separate_equations() -> None:
    hurst = torch.tensor([0.3, 0.8])
    both = MarkovNoise(hurst, 5, 2.0, 0.02, per_channel=True)
    ts = torch.linspace(0, 2, 51, dtype=D)
    strength = torch.tensor([1.0, 2.0], dtype=D)
    sde = sd.SDE(lambda t, x: -x, strength, both)
    x0 = torch.zeros(4, 2, dtype=D)
    dw, _ = draw_increments(sde, x0, ts, torch.Generator().manual_seed(0))
    run = integrate(sde, x0, ts, dw)
    extra = both.num_innovations(ts) - 1
    for c in range(2):
        alone = sd.SDE(lambda t, x: -x, float(strength[c]), MarkovNoise(float(hurst[c]), 5, 2.0, 0.02))
        e = torch.cat([dw[..., c : c + 1], dw[..., 2 + c * extra : 2 + (c + 1) * extra]], -1)
        torch.testing.assert_close(integrate(alone, x0[:, :1], ts, e).x[..., 0], run.x[..., c])
    z = full_state(run.x, run.memory)
    torch.testing.assert_close(step_everywhere(sde, ts, z[:-1], dw), z[1:])
    varying = sd.SDE(lambda t, x: -x, lambda t, x: sd.Diagonal(1 + 0.1 * x**2), both)
    for method in ("heun", "milstein"):
        assert bool(torch.isfinite(integrate(varying, x0, ts, dw, method=method).x).all())


def test_itos_correction_of_channels_of_their_own() -> None:
    """Milstein's step of dX = X dB: x (1 + dz + (dz^2 - v) / 2), v the variance of what is new in the step."""
    noise = MarkovNoise(torch.tensor([0.7, 0.9]), 4, 1.0, 0.1, per_channel=True)
    ts = torch.tensor([0.0, 0.1], dtype=D)
    sde = sd.SDE(lambda t, x: 0.0 * x, lambda t, x: sd.Diagonal(x), noise)
    x0 = torch.tensor([[1.0, 2.0]], dtype=D)
    dw, _ = draw_increments(sde, x0, ts, torch.Generator().manual_seed(0))
    steps = noise.steps(ts, dtype=D)
    rest = dw[0, 0, 2:].reshape(2, -1)
    dz = steps.gain[0, :, 0] * dw[0, 0, :2] + (steps.gain[0, :, 1:] * rest).sum(-1)
    new = (steps.gain[0] ** 2 * steps.variance[0]).sum(-1)
    expected = x0[0] * (1 + dz + 0.5 * (dz**2 - new))
    torch.testing.assert_close(integrate(sde, x0, ts, dw, method="milstein").x[-1, 0], expected)


def test_bad_channels() -> None:
    with pytest.raises(InvalidInputError, match="one Hurst index per channel"):
        MarkovNoise(0.7, per_channel=True)
    matrix = sd.SDE(
        lambda t, x: -x,
        lambda t, x: sd.Matrix(torch.diag_embed(1 + 0.0 * x)),
        MarkovNoise(torch.tensor([0.6, 0.7]), 4, 1.0, 0.1, per_channel=True),
    )
    x0, ts = torch.zeros(1, 2), torch.linspace(0, 1, 3)
    dw, _ = draw_increments(matrix, x0, ts)
    with pytest.raises(InvalidInputError, match="noise of different kinds"):
        integrate(matrix, x0, ts, dw, method="milstein")
