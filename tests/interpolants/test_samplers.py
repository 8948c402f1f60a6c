"""Integrators: orders of convergence from moments without Monte Carlo noise, laws, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stochdyn import errors
from stochdyn.interpolants import (
    Adaptive,
    GaussianMixture,
    GaussianMixtureInterpolant,
    Interpolant,
    integrate_ode,
    integrate_sde,
    integrate_strang,
    time_grid,
)
from tests.interpolants.truths import F64

# Gauss-Hermite-like nodes: sums over them are exact means of polynomials of degree below four
NODES = torch.tensor([-math.sqrt(3.0), 0.0, math.sqrt(3.0)], dtype=F64)
MASS = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=F64)


def gaussian_pair() -> GaussianMixtureInterpolant:
    """The case of the convergence table: N(0, 1) to N(2, 0.05) on the linear path with gamma^2 = t(1 - t)."""
    one = torch.ones(1, dtype=F64)
    first = GaussianMixture(one, torch.zeros(1, 1, dtype=F64), 1.0)
    return GaussianMixtureInterpolant(
        Interpolant(), first, GaussianMixture(one, 2 * torch.ones(1, 1, dtype=F64), 0.05)
    )


class _Nodes:
    """Replaces torch.randn: a step then maps (mean, variance) to their exact images, since all drifts are linear."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "randn", lambda shape, **_: NODES.repeat_interleave(3)[:, None])


def exact_moments(step: Callable[[Tensor, Tensor], Tensor], steps: int) -> tuple[float, float]:
    """Propagate mean and variance of a linear-Gaussian scheme step by step: ``step(x, pair of times)``."""
    mean, var = 0.0, 1.0
    ts = torch.linspace(0, 1, steps + 1, dtype=F64)
    mass = (MASS[:, None] * MASS[None, :]).flatten()
    for n in range(steps):
        # noise varies slowly, the state quickly: all nine pairs of nodes
        x = (mean + math.sqrt(var) * NODES.repeat(3))[:, None]
        y = step(x, ts[n : n + 2])[:, 0]
        mean = float((mass * y).sum())
        var = float((mass * (y - mean).square()).sum())
    return mean, var


def errors_of(method: str, epsilon: float, steps: int) -> tuple[float, float]:
    flow = gaussian_pair()
    g = math.sqrt(2 * epsilon)

    def drift(t: Tensor, x: Tensor) -> Tensor:
        return flow.forward_drift(t, x, epsilon)

    def step(x: Tensor, ts: Tensor) -> Tensor:
        if method == "strang":
            return integrate_strang(flow.velocity, flow.score, epsilon, x, ts)
        if method == "reference":
            # kick first, then two slopes at the end of the step: the variant of the paper's code
            h = float(ts[1] - ts[0])
            x = x + g * math.sqrt(h) * torch.randn(x.shape)
            k1 = drift(ts[1], x)
            return x + 0.5 * h * (k1 + drift(ts[1], x + h * k1))
        return integrate_sde(drift, g, x, ts, method)  # type: ignore[arg-type]

    mean, var = exact_moments(step, steps)
    return mean - 2.0, var - 0.05


def slope(method: str, epsilon: float, which: int, sizes: tuple[int, ...] = (160, 320, 640)) -> float:
    values = [abs(errors_of(method, epsilon, n)[which]) for n in sizes]
    x = torch.tensor(sizes, dtype=F64).log()
    y = torch.tensor(values, dtype=F64).log()
    return float(-((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("strang", 2), ("reference", 1)])
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_weak_orders(monkeypatch: pytest.MonkeyPatch, method: str, order: int, epsilon: float) -> None:
    """Errors of the variance shrink with the order of the scheme; the reference code's variant is of order one."""
    _Nodes(monkeypatch)
    assert abs(slope(method, epsilon, 1) - order) < 0.35


def test_means_are_exact_but_for_the_reference_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean moves along a straight line, which both schemes of order two follow exactly."""
    _Nodes(monkeypatch)
    for method in ("heun", "strang"):
        assert abs(errors_of(method, 1.0, 40)[0]) < 1e-12
    assert abs(slope("reference", 1.0, 0) - 1) < 0.35


@pytest.mark.parametrize(
    ("method", "epsilon", "steps", "expected"),
    [
        ("euler", 0.1, 40, 7.0e-3),
        ("euler", 1.0, 320, 2.3e-3),
        ("heun", 0.1, 320, -1.5e-5),
        ("heun", 1.0, 320, -1.1e-4),
        ("strang", 0.1, 320, -2.3e-6),
        ("strang", 1.0, 320, -2.7e-5),
        ("reference", 0.1, 320, -1.7e-3),
        ("reference", 1.0, 320, -4.4e-3),
    ],
)
def test_errors_are_those_measured_independently(
    monkeypatch: pytest.MonkeyPatch, method: str, epsilon: float, steps: int, expected: float
) -> None:
    _Nodes(monkeypatch)
    assert errors_of(method, epsilon, steps)[1] == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_orders_of_the_flow(method: str, order: int) -> None:
    x = torch.tensor([[1.0]], dtype=F64)
    exact = math.exp(math.sin(2.0))

    def error(n: int) -> float:
        ts = torch.linspace(0, 2, n + 1, dtype=F64)
        return abs(float(integrate_ode(lambda t, y: t.cos() * y, x, ts, method)) - exact)

    assert abs(math.log2(error(40) / error(80)) - order) < 0.25


def test_flow_moments_of_gaussian_ends_are_exact() -> None:
    flow = gaussian_pair()
    x0 = NODES[:, None]
    for backward in (False, True):
        ts = time_grid(200, 1.0, 0.0, like=x0) if backward else time_grid(200, like=x0)
        start = 2 + math.sqrt(0.05) * x0 if backward else x0
        x = integrate_ode(flow.velocity, start, ts, "rk4")[:, 0]
        mean = float((MASS * x).sum())
        var = float((MASS * (x - mean).square()).sum())
        assert (mean, var) == pytest.approx((0.0, 1.0) if backward else (2.0, 0.05), abs=2e-6)


def test_adaptive_methods_agree_with_fixed_ones() -> None:
    flow, x = gaussian_pair(), torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    ts = time_grid(100, like=x)
    fixed = integrate_ode(flow.velocity, x, ts, "rk4")
    adaptive = integrate_ode(flow.velocity, x, ts[[0, -1]], Adaptive("dopri5", 1e-8, 1e-8))
    torch.testing.assert_close(fixed, adaptive, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["euler", "heun", "strang"])
@pytest.mark.parametrize("backward", [False, True])
def test_samplers_keep_the_marginals_both_ways(method: str, backward: bool) -> None:
    """A mixture, sampled forwards with b + eps s and backwards with b - eps s."""
    law = GaussianMixture(torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([[-2.0], [1.0]], dtype=F64), 0.2)
    flow = GaussianMixtureInterpolant(Interpolant(), None, law)
    g, n, eps = torch.Generator().manual_seed(4), 20_000, 0.5
    start = flow.sample(1.0 if backward else 0.0, n, g)
    ts = time_grid(300, 1.0, 0.0, like=start) if backward else time_grid(300, like=start)
    sign = -1.0 if backward else 1.0
    if method == "strang":
        x = integrate_strang(flow.velocity, flow.score, eps, start, ts, generator=g)
    else:
        x = integrate_sde(
            lambda t, y: flow.forward_drift(t, y, sign * eps),
            math.sqrt(2 * eps),
            start,
            ts,
            method,
            generator=g,
        )  # type: ignore[arg-type]
    mean, cov = flow.moments(0.0 if backward else 1.0)
    share = 0.0 if backward else 0.3
    assert abs(float(x.mean() - mean)) < 5 * float(cov.sqrt()) / n**0.5 + 0.003
    assert float(x.var()) == pytest.approx(float(cov), rel=0.05)
    if share:
        assert float((x < -0.8).double().mean()) == pytest.approx(share, abs=5 * (0.21 / n) ** 0.5 + 0.003)


def test_trajectories_and_generators() -> None:
    x, ts = torch.zeros(4, 2), time_grid(5)
    still = torch.zeros_like
    for run in (
        lambda **k: integrate_sde(lambda t, y: still(y), 1.0, x, ts, **k),
        lambda **k: integrate_strang(lambda t, y: still(y), lambda t, y: -y, 1.0, x, ts, **k),
    ):
        before = torch.get_rng_state()
        a, b = (run(generator=torch.Generator().manual_seed(1), trajectory=True) for _ in range(2))
        assert a.shape == (6, 4, 2)
        assert torch.equal(a, b)
        assert torch.equal(before, torch.get_rng_state())
    assert integrate_ode(lambda t, y: y, x, ts, trajectory=True).shape == (6, 4, 2)
    quiet = integrate_sde(lambda t, y: still(y), 1.0, x, ts[:2], last_noise=False)
    assert float(quiet.abs().max()) == 0.0


def test_noise_may_vary_in_time() -> None:
    """Variance of a pure noise with g(t) = t is 1/3, from a function or from numbers."""
    x, ts = torch.zeros(20_000, 1, dtype=F64), time_grid(50).double()
    middles = 0.5 * (ts[1:] + ts[:-1])
    g = torch.Generator().manual_seed(0)
    for noise in (lambda t: t, middles):
        out = integrate_sde(lambda t, y: torch.zeros_like(y), noise, x, ts, "euler", generator=g)
        assert float(out.var()) == pytest.approx(1 / 3, rel=5 * (2 / 20_000) ** 0.5)


def test_grids_may_condense_at_the_end() -> None:
    ts = time_grid(10, power=2.0)
    steps = ts[1:] - ts[:-1]
    assert bool((steps[1:] < steps[:-1]).all())
    assert float(ts[-1]) == 1.0


def test_gradients_flow_through_all_methods() -> None:
    x = torch.ones(2, 1, requires_grad=True)
    for method in ("euler", "midpoint", "heun", "rk4"):
        (grad,) = torch.autograd.grad(integrate_ode(lambda t, y: -y, x, time_grid(20), method).sum(), x)
        assert float(grad[0]) == pytest.approx(math.exp(-1), rel=0.03)


X = torch.zeros(2, 1)
ROWS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an unknown method": (
        lambda: integrate_ode(lambda t, x: x, X, time_grid(3), "rk5"),
        errors.InvalidInputError,
        "'rk4'",
    ),
    "a grid with a repeat": (
        lambda: integrate_ode(lambda t, x: x, X, torch.tensor([0.0, 0.5, 0.5])),
        errors.TimeGridError,
        "strictly",
    ),
    "a grid that turns": (
        lambda: integrate_sde(lambda t, x: x, 1.0, X, torch.tensor([0.0, 1.0, 0.5])),
        errors.TimeGridError,
        "decrease strictly",
    ),
    "one time": (
        lambda: integrate_ode(lambda t, x: x, X, torch.zeros(1)),
        errors.TimeGridError,
        "at least two",
    ),
    "times as a list": (lambda: integrate_ode(lambda t, x: x, X, [0.0, 1.0]), errors.TimeGridError, "list"),  # type: ignore[arg-type]
    "NaN among times": (
        lambda: integrate_ode(lambda t, x: x, X, torch.tensor([0.0, float("nan")])),
        errors.NonFiniteError,
        r"ts\[1\]",
    ),
    "negative noise": (
        lambda: integrate_sde(lambda t, x: x, -1.0, X, time_grid(3)),
        errors.InvalidInputError,
        "not be negative",
    ),
    "negative epsilon": (
        lambda: integrate_strang(lambda t, x: x, lambda t, x: x, -1.0, X, time_grid(3)),
        errors.InvalidInputError,
        "epsilon must not be negative",
    ),
    "noise of another length": (
        lambda: integrate_sde(lambda t, x: x, torch.ones(5), X, time_grid(3)),
        errors.InvalidInputError,
        "one number per step",
    ),
    "no steps": (lambda: time_grid(0), errors.InvalidInputError, "at least 1"),
    "a grid of one point": (lambda: time_grid(3, 0.5, 0.5), errors.TimeGridError, "two different ends"),
}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input(row: str) -> None:
    call, error, message = ROWS[row]
    with pytest.raises(error, match=message):
        call()
