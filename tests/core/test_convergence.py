"""Strong and weak orders, fitted over step sizes on shared increments, and the limit against torchsde."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchsde
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.core import integrate
from tests.core.laws import F64, EulerMemory, ExactMemory, log_log_slope

LEVELS = (4, 5, 6, 7, 8)  # 16 to 256 steps
FINEST = 11
PATHS = 400


@dataclass(frozen=True)
class Problem:
    """An Itô equation on [0, 1] with its solution as a function of the fine Brownian path.

    Attributes:
        drift, diffusion: as SDE takes them.
        start: ``(d,)``.
        channels: number of Brownian motions.
        exact: maps ``w (T, paths, m)`` on the finest grid to the solution at time 1, ``(paths, d)``.
    """

    drift: Callable[[Tensor, Tensor], Tensor]
    diffusion: Any
    start: list[float]
    channels: int
    exact: Callable[[Tensor], Tensor]


def spiral(a: float, b: float) -> Tensor:
    """Return ``a I + b J``: such matrices commute."""
    return torch.tensor([[a, -b], [b, a]], dtype=F64)


def spiral_exp(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Return ``exp(a I + b J) x``."""
    c, s = torch.cos(b), torch.sin(b)
    return torch.exp(a)[:, None] * torch.stack([c * x[0] - s * x[1], s * x[0] + c * x[1]], -1)


def _ou_end(w: Tensor) -> Tensor:
    # X(1) = e^-1 (x0 + sigma int e^s dW), by parts so that the fine grid enters at second order.
    s = torch.linspace(0, 1, w.shape[0], dtype=F64)[:, None, None]
    integrand = torch.exp(s) * w
    area = (integrand.sum(0) - 0.5 * (integrand[0] + integrand[-1])) / (w.shape[0] - 1)
    return math.exp(-1) * (1 + 1.5 * (math.e * w[-1] - area))


def _two_channels_end(w: Tensor) -> Tensor:
    w1, w2 = w[-1, :, 0], w[-1, :, 1]
    # exp((A - (B1^2 + B2^2) / 2) + B1 W1 + B2 W2) with B1 = 0.6 I, B2 = 0.2 I + 0.8 J, A = -0.5 I + J.
    square_a, square_b = 0.36 + (0.04 - 0.64), 2 * 0.2 * 0.8
    a = -0.5 - square_a / 2 + 0.6 * w1 + 0.2 * w2
    b = 1.0 - square_b / 2 + 0.8 * w2
    return spiral_exp(a, b, torch.tensor([1.0, -0.5], dtype=F64))


A, B1, B2 = spiral(-0.5, 1.0), spiral(0.6, 0.0), spiral(0.2, 0.8)
STRENGTHS = torch.tensor([0.8, 0.4], dtype=F64)

PROBLEMS = {
    "Ornstein-Uhlenbeck": Problem(lambda t, x: -x, 1.5, [1.0], 1, _ou_end),
    "geometric": Problem(
        lambda t, x: 0.5 * x,
        lambda t, x: x,
        [1.0],
        1,
        lambda w: torch.exp(w[-1]),
    ),
    "hyperbolic sine": Problem(
        lambda t, x: 0.5 * x + 0.5 * torch.sqrt(1 + x**2),
        lambda t, x: torch.sqrt(1 + x**2),
        [0.3],
        1,
        lambda w: torch.sinh(math.asinh(0.3) + 0.5 + w[-1]),
    ),
    "two geometric": Problem(
        lambda t, x: -0.2 * x,
        lambda t, x: STRENGTHS * x,
        [1.0, 2.0],
        2,
        lambda w: (
            torch.tensor([1.0, 2.0], dtype=F64) * torch.exp(-0.2 - STRENGTHS**2 / 2 + STRENGTHS * w[-1])
        ),
    ),
    "matrix of one channel": Problem(
        lambda t, x: x @ A.T,
        lambda t, x: (x @ B2.T).unsqueeze(-1),
        [1.0, -0.5],
        1,
        lambda w: spiral_exp(
            -0.5 - (0.04 - 0.64) / 2 + 0.2 * w[-1, :, 0],
            1.0 - 0.16 + 0.8 * w[-1, :, 0],
            torch.tensor([1.0, -0.5], dtype=F64),
        ),
    ),
    "matrix of two commuting channels": Problem(
        lambda t, x: x @ A.T,
        lambda t, x: torch.stack([x @ B1.T, x @ B2.T], -1),
        [1.0, -0.5],
        2,
        _two_channels_end,
    ),
}

# Theory: Kloeden and Platen (1992), theorems 10.2.2, 10.3.5 and section 11.1.
STRONG = [
    ("Ornstein-Uhlenbeck", "euler", 1.0),
    ("Ornstein-Uhlenbeck", "milstein", 1.0),
    ("Ornstein-Uhlenbeck", "heun", 1.0),
    ("geometric", "euler", 0.5),
    ("geometric", "milstein", 1.0),
    ("geometric", "heun", 1.0),
    ("hyperbolic sine", "euler", 0.5),
    ("hyperbolic sine", "milstein", 1.0),
    ("hyperbolic sine", "heun", 1.0),
    ("two geometric", "euler", 0.5),
    ("two geometric", "milstein", 1.0),
    ("two geometric", "heun", 1.0),
    ("matrix of one channel", "euler", 0.5),
    ("matrix of one channel", "milstein", 1.0),
    ("matrix of one channel", "heun", 1.0),
    ("matrix of two commuting channels", "euler", 0.5),
    ("matrix of two commuting channels", "milstein", 1.0),
    ("matrix of two commuting channels", "heun", 1.0),
]


def _strong_errors(problem: Problem, method: str) -> list[float]:
    dw = torch.randn(2**FINEST, PATHS, problem.channels, dtype=F64) * 2 ** (-FINEST / 2)
    w = torch.cat([torch.zeros_like(dw[:1]), dw.cumsum(0)])
    end = problem.exact(w)
    sde = sd.SDE(problem.drift, problem.diffusion)
    x0 = torch.tensor(problem.start, dtype=F64).expand(PATHS, -1)
    errors = []
    for level in LEVELS:
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        coarse = dw.reshape(2**level, -1, PATHS, problem.channels).sum(1)
        with torch.no_grad():
            x = integrate(sde, x0, ts, coarse, method=method).x[-1]
        errors.append(float((x - end).square().sum(-1).mean().sqrt()))
    return errors


@pytest.mark.parametrize(("name", "method", "theory"), STRONG)
def test_strong_order(name: str, method: str, theory: float) -> None:
    errors = _strong_errors(PROBLEMS[name], method)
    order = log_log_slope([2.0**-level for level in LEVELS], errors)
    # Four hundred paths leave about 0.05 of noise in the slope, the finite step sizes about as much again.
    assert abs(order - theory) < 0.15, f"order {order:.3f}, errors {errors}"


def test_strong_order_with_memory() -> None:
    """Exact memory steps leave the error of the drift alone: order 1 for additive noise."""
    noise, finest = ExactMemory([0.5, 4.0], [0.8, 0.6]), 11
    sde = sd.SDE(lambda t, x: torch.sin(3 * x), 1.0, EulerMemory(noise.g, noise.w.detach()))
    dw = torch.randn(2**finest, 200, 1, dtype=F64) * 2 ** (-finest / 2)
    x0 = torch.full((200, 1), 0.5, dtype=F64)

    def end(level: int) -> Tensor:
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        with torch.no_grad():
            return integrate(sde, x0, ts, dw.reshape(2**level, -1, 200, 1).sum(1)).x[-1]

    truth = end(finest)
    # Against the finest grid the error of order 1 is h - h_min.
    levels = (4, 5, 6, 7, 8)
    errors = [float((end(level) - truth).square().mean().sqrt()) for level in levels]
    order = log_log_slope([2.0**-level - 2.0**-finest for level in levels], errors)
    assert abs(order - 1) < 0.15, f"order {order:.3f}, errors {errors}"


def _expectation(sde: sd.SDE, f: Callable[[Tensor], Tensor], start: float, steps: int, method: str) -> float:
    """Return E f(X_1) by enumeration, for three-point increments with five moments of a normal law."""
    points = [(-math.sqrt(3.0), 1 / 6), (0.0, 2 / 3), (math.sqrt(3.0), 1 / 6)]
    nodes = torch.tensor([p for p, _ in points], dtype=F64)
    weights = torch.tensor([w for _, w in points], dtype=F64)
    index = torch.tensor(list(itertools.product(range(3), repeat=steps)))
    dw = nodes[index].T[..., None] / steps**0.5
    ts = torch.linspace(0, 1, steps + 1, dtype=F64)
    with torch.no_grad():
        x = integrate(sde, torch.full((index.shape[0], 1), start, dtype=F64), ts, dw, method=method).x[
            -1, :, 0
        ]
    return float((weights[index].prod(1) * f(x)).sum())


WEAK = {
    # E X^2 of dX = a X dt + b X dW is exp(2 a + b^2), of dX = -X dt / 2 + c dW from 1 is 1/e + c^2 (1 - 1/e).
    "geometric, Euler": (
        lambda: sd.SDE(lambda t, x: 0.2 * x, lambda t, x: 0.4 * x),
        "euler",
        math.exp(0.4 + 0.16),
        1.0,
    ),
    "geometric, Milstein": (
        lambda: sd.SDE(lambda t, x: 0.2 * x, lambda t, x: 0.4 * x),
        "milstein",
        math.exp(0.4 + 0.16),
        1.0,
    ),
    "Ornstein-Uhlenbeck, Euler": (
        lambda: sd.SDE(lambda t, x: -0.5 * x, 0.8),
        "euler",
        math.exp(-1) + 0.64 * (1 - math.exp(-1)),
        1.0,
    ),
    "Ornstein-Uhlenbeck, Heun": (
        lambda: sd.SDE(lambda t, x: -0.5 * x, 0.8),
        "heun",
        math.exp(-1) + 0.64 * (1 - math.exp(-1)),
        2.0,
    ),
}


@pytest.mark.parametrize("case", WEAK)
def test_weak_order_by_the_second_moment(case: str) -> None:
    build, method, truth, theory = WEAK[case]
    counts = (4, 5, 6, 7, 8, 9)
    errors = [abs(_expectation(build(), torch.square, 1.0, n, method) - truth) for n in counts]
    order = log_log_slope([1 / n for n in counts], errors)
    # No sampling here: the distance from theory is that of the finite step sizes.
    assert abs(order - theory) < 0.15, f"order {order:.3f}, errors {errors}"


def test_moments_of_gaussian_increments_are_those_of_the_scheme() -> None:
    """E X and E X^2 of Euler's geometric motion are (1 + a h)^n and ((1 + a h)^2 + b^2 h)^n."""
    n, paths = 20, 20_000
    law = sd.DiffusionMeasure(torch.ones(1, dtype=F64), sd.SDE(lambda t, x: 0.2 * x, lambda t, x: 0.4 * x))
    x = law.sample(torch.linspace(0, 1, n + 1, dtype=F64), (paths,)).x[:, -1, 0]
    for power, truth in ((1, (1 + 0.2 / n) ** n), (2, ((1 + 0.2 / n) ** 2 + 0.16 / n) ** n)):
        values = x**power
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / paths**0.5


class _Replay:
    """Our increments behind the interface that torchsde asks of a Brownian motion."""

    levy_area_approximation = "none"

    def __init__(self, ts: Tensor, dw: Tensor) -> None:
        self.w = torch.cat([torch.zeros_like(dw[:1]), dw.cumsum(0)])
        self.ts = ts
        self.shape = dw.shape[1:]
        self.dtype, self.device = dw.dtype, dw.device

    def size(self) -> torch.Size:
        return self.shape

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Tensor:
        first, last = (int((self.ts - t).abs().argmin()) for t in (ta, tb))
        return self.w[last] - self.w[first]


class _Theirs(nn.Module):
    def __init__(self, f: Any, g: Any, noise_type: str, sde_type: str) -> None:
        super().__init__()
        self.f, self.g = f, g
        self.noise_type, self.sde_type = noise_type, sde_type


def _nonlinear(t: Tensor, x: Tensor) -> Tensor:
    return torch.sin(x.flip(-1)) - t * x


def _own_strength(t: Tensor, x: Tensor) -> Tensor:
    return 1.2 + torch.sin(x + t)


def _corrected(t: Tensor, x: Tensor) -> Tensor:
    # Stratonovich drift b - g g' / 2 of the diagonal equation.
    return _nonlinear(t, x) - 0.5 * _own_strength(t, x) * torch.cos(x + t)


LIMITS = {
    "Euler, diagonal": ("euler", _own_strength, _nonlinear, "diagonal", "ito", "euler"),
    "Milstein, diagonal": ("milstein", _own_strength, _nonlinear, "diagonal", "ito", "milstein"),
    "Heun, diagonal": ("heun", _own_strength, _corrected, "diagonal", "stratonovich", "heun"),
    "Euler, matrix": (
        "euler",
        lambda t, x: torch.stack([torch.sin(x), torch.cos(x) + t, 1 + x.flip(-1)], -1),
        _nonlinear,
        "general",
        "ito",
        "euler",
    ),
    "Milstein, one channel": (
        "milstein",
        lambda t, x: torch.sin(x + t).unsqueeze(-1),
        _nonlinear,
        "scalar",
        "ito",
        "milstein",
    ),
}


@pytest.mark.parametrize("case", LIMITS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_same_path_as_torchsde_on_the_same_increments(case: str) -> None:
    method, g, their_drift, noise_type, sde_type, their_method = LIMITS[case]
    ts = torch.linspace(0, 1, 65, dtype=F64)
    x0 = torch.randn(16, 2, dtype=F64)
    channels = g(ts[0], x0).shape[-1]
    dw = torch.randn(64, 16, channels, dtype=F64) / 8
    ours = integrate(sd.SDE(_nonlinear, g), x0, ts, dw, method=method).x
    theirs = torchsde.sdeint(
        _Theirs(their_drift, g, noise_type, sde_type),
        x0,
        ts,
        bm=_Replay(ts, dw),
        method=their_method,
        dt=1 / 64,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_limit_agrees_with_torchsde_by_another_scheme() -> None:
    """Our Euler paths tend to torchsde's Milstein path on a fine grid, with order 1/2."""
    finest, paths = 11, 200
    dw = torch.randn(2**finest, paths, 2, dtype=F64) * 2 ** (-finest / 2)
    x0 = torch.randn(paths, 2, dtype=F64)
    fine = torch.linspace(0, 1, 2**finest + 1, dtype=F64)
    with torch.no_grad():
        truth = torchsde.sdeint(
            _Theirs(_nonlinear, _own_strength, "diagonal", "ito"),
            x0,
            fine[[0, -1]],
            bm=_Replay(fine, dw),
            method="milstein",
            dt=2.0**-finest,
        )[-1]
        errors = []
        for level in LEVELS:
            ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
            coarse = dw.reshape(2**level, -1, paths, 2).sum(1)
            x = integrate(sd.SDE(_nonlinear, _own_strength), x0, ts, coarse).x[-1]
            errors.append(float((x - truth).square().mean().sqrt()))
    order = log_log_slope([2.0**-level for level in LEVELS], errors)
    assert abs(order - 0.5) < 0.15, f"order {order:.3f}, errors {errors}"
