"""Increments have the law that the noise process says, and memory states are carried exactly."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd
from stochdyn.core import NoiseProcess, draw_increments, increment_scale
from stochdyn.core.sde.solvers import remember
from tests.core.laws import F64, EulerMemory, ExactMemory, within


def _noise_map(noise: NoiseProcess, ts: torch.Tensor, memory0: torch.Tensor) -> torch.Tensor:
    """Return the paths of ``Z (T, batch)`` for a batch of unit increments, one channel."""
    steps = noise.steps(ts, dtype=F64)
    width = noise.num_innovations(ts)
    n = ts.shape[0] - 1
    basis = torch.eye(n * width, dtype=F64).reshape(n, width, n * width).movedim(-1, 1)
    z = torch.zeros(n * width, dtype=F64)
    memory = memory0.expand(n * width, 1, -1) if memory0.ndim == 1 else memory0
    path = [z]
    for i in range(n):
        dz, memory = remember(steps, i, memory, basis[i], 1)
        z = z + dz.squeeze(-1)
        path.append(z)
    return torch.stack(path)


def test_brownian_steps_are_differences_in_the_precision_of_the_grid() -> None:
    ts = 1e6 + torch.linspace(0, 1, 1001, dtype=F64)
    steps = sd.Brownian().steps(ts, dtype=torch.float32)
    assert steps.variance.dtype == torch.float32
    torch.testing.assert_close(steps.variance[:, 0], torch.full((1000,), 1e-3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", [[0.0, 0.1, 0.2, 0.4, 1.0], [0.0, 2.0, 5.0]])
def test_memory_gives_the_exact_covariance_at_any_step(grid: list[float]) -> None:
    ts = torch.tensor(grid, dtype=F64)
    noise = ExactMemory([0.3, 2.0, 15.0], [0.5, -0.7, 1.1])
    z = _noise_map(noise, ts, torch.zeros(3, dtype=F64))
    variance = noise.steps(ts, dtype=F64).variance.flatten()
    torch.testing.assert_close((z * variance) @ z.T, noise.covariance(ts), rtol=1e-9, atol=1e-12)


def test_memory_with_all_the_past_gives_the_exact_covariance() -> None:
    ts = torch.tensor([0.0, 0.3, 1.0, 4.0], dtype=F64)
    noise = ExactMemory([0.3, 2.0], [0.5, -0.7], stationary=True)
    new = _noise_map(noise, ts, torch.zeros(2, dtype=F64))
    variance = noise.steps(ts, dtype=F64).variance.flatten()
    factor = noise.initial_factor(dtype=F64, device=torch.device("cpu"))
    steps = noise.steps(ts, dtype=F64)
    memory, old = factor[:, None, :], [torch.zeros(2, dtype=F64)]
    for i in range(3):
        dz, memory = remember(steps, i, memory, torch.zeros(2, 3, dtype=F64), 1)
        old.append(old[-1] + dz.squeeze(-1))
    past = torch.stack(old)
    torch.testing.assert_close(
        (new * variance) @ new.T + past @ past.T, noise.covariance(ts), rtol=1e-9, atol=1e-12
    )


def test_all_steps_at_once_equal_step_by_step() -> None:
    ts = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=F64)
    noise = ExactMemory([0.3, 2.0], [0.5, -0.7])
    steps = noise.steps(ts, dtype=F64)
    memory, e = torch.randn(3, 4, 5, 2, 2, dtype=F64), torch.randn(3, 4, 5, 6, dtype=F64)
    dz, after = remember(steps, slice(None), memory, e, 2)
    for n in range(3):
        one_dz, one_after = remember(steps, n, memory[n], e[n], 2)
        torch.testing.assert_close(dz[n], one_dz)
        torch.testing.assert_close(after[n], one_after)


def test_increments_have_their_variances_channel_by_channel() -> None:
    ts = torch.tensor([0.0, 0.1, 0.5], dtype=F64)
    noise = ExactMemory([0.3, 2.0], [0.5, -0.7])
    sde = sd.SDE(lambda t, x: -x, torch.ones(3, 2, dtype=F64), noise)
    n = 4000
    dw, memory = draw_increments(sde, torch.zeros(n, 3, dtype=F64), ts)
    assert dw.shape == (2, n, 2 * 3)
    assert memory is None
    scale = increment_scale(sde, ts, 2, F64)
    variance = noise.steps(ts, dtype=F64).variance
    for step in range(2):
        per_channel = [variance[step, 0]] * 2 + [*variance[step, 1:], *variance[step, 1:]]
        torch.testing.assert_close(scale[step] ** 2, torch.stack(per_channel))
    truth = scale**2
    # The variance of a sample variance of normals is 2 sigma^4 / n.
    assert within((dw**2).mean(1), truth, truth * (2 / n) ** 0.5)
    correlation = torch.corrcoef(dw.movedim(1, -1).reshape(12, n)[scale.flatten() > 1e-9])
    assert float((correlation - torch.eye(correlation.shape[0])).abs().max()) < 5 / n**0.5


def test_initial_memory_has_its_stationary_law() -> None:
    noise = ExactMemory([0.3, 2.0], [0.5, -0.7], stationary=True)
    sde = sd.SDE(lambda t, x: -x, 1.0, noise)
    n = 5000
    _, memory = draw_increments(sde, torch.zeros(n, 1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64))
    assert memory is not None
    assert memory.shape == (n, 1, 2)
    y = memory[:, 0]
    truth = 1 / (noise.g[:, None] + noise.g)
    products = y[:, :, None] * y[:, None, :]
    assert within(products.mean(0), truth, products.std(0) / n**0.5)


def test_the_generator_decides_and_the_global_one_is_left_alone() -> None:
    sde = sd.SDE(lambda t, x: -x, 1.0, ExactMemory([0.3], [0.5], stationary=True))
    ts, x0 = torch.linspace(0, 1, 5), torch.zeros(3, 1)
    state = torch.get_rng_state()
    first = draw_increments(sde, x0, ts, torch.Generator().manual_seed(3))
    second = draw_increments(sde, x0, ts, torch.Generator().manual_seed(3))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(state, torch.get_rng_state())
    assert first[0].dtype == first[1].dtype == torch.float32


def test_euler_memory_tends_to_the_exact_one() -> None:
    exact = ExactMemory([0.3, 2.0], [0.5, -0.7])
    euler = EulerMemory(exact.g, exact.w.detach())
    errors = []
    for n in (50, 100, 200):
        ts = torch.linspace(0, 1, n + 1, dtype=F64)
        z = _noise_map(euler, ts, torch.zeros(2, dtype=F64))
        covariance = (z * euler.steps(ts, dtype=F64).variance.flatten()) @ z.T
        errors.append(float((covariance - exact.covariance(ts)).abs().max()))
    assert errors[2] < 0.55 * errors[1] < 0.31 * errors[0]
