"""Log-ratios of path measures: identities, three estimators, and the worked example of a tight guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

import stochdyn as sd
from stochdyn.core import NoiseLaw, density, explicit_stop, rate
from tests.core.laws import F64, EulerMemory, ExactMemory, within

TS = torch.tensor([0.0, 0.15, 0.25, 0.5, 0.8, 1.0], dtype=F64)
START = torch.tensor([0.3, -0.2], dtype=F64)

# The worked example is stated for a noise of few states.
pytestmark = pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")


def base(t: Tensor, x: Tensor) -> Tensor:
    return torch.sin(x).flip(-1) - 0.5 * t


def other(t: Tensor, x: Tensor) -> Tensor:
    return 0.3 * torch.cos(x) - 0.5 * x


def first(channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a bounded control, so that weights have all moments."""
    return lambda t, z: 0.6 * torch.sin(z.sum(-1, keepdim=True) + t + torch.arange(channels))


def second(channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, z: 0.4 * torch.cos(z.sum(-1, keepdim=True) - torch.arange(channels))


def narrow(channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, z: 0.8 + 0.5 * torch.sin(z[..., :1] + torch.arange(channels))


def _pair(diffusion: Any, channels: int, noise: Any = None, precisions: bool = False) -> tuple[Any, Any]:
    law = sd.DiffusionMeasure(START, sd.SDE(base, diffusion, noise))
    p = law.controlled(second(channels), narrow(channels) if precisions else None)
    q = law.controlled(first(channels), narrow(channels) if precisions else None)
    return q, p


def _drifts(diffusion: Any) -> tuple[Any, Any]:
    return (
        sd.DiffusionMeasure(START, sd.SDE(other, diffusion)),
        sd.DiffusionMeasure(START, sd.SDE(base, diffusion)),
    )


MATRIX = torch.tensor([[0.5, 0.2], [0.4, -1.0]], dtype=F64)


def _state(t: Tensor, x: Tensor) -> Tensor:
    return 1 + 0.3 * torch.sin(x + t)


_law = sd.DiffusionMeasure(START, sd.SDE(base, 0.8))
PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "control against none": lambda: (_law.controlled(first(2)), _law),
    "two controls": lambda: _pair(torch.tensor([0.5, 1.5], dtype=F64), 2),
    "two controls and precisions": lambda: _pair(0.8, 2, precisions=True),
    "degenerate noise": lambda: _pair(torch.tensor([[1.0], [0.0]], dtype=F64), 1),
    "degenerate noise and precisions": lambda: _pair(torch.tensor([[1.0], [0.0]], dtype=F64), 1, None, True),
    "more channels than components": lambda: _pair(torch.ones(2, 3, dtype=F64), 3),
    "memory": lambda: _pair(0.8, 2, ExactMemory([0.5, 4.0], [0.7, 0.4])),
    "memory and precisions": lambda: _pair(MATRIX, 2, ExactMemory([0.5, 4.0], [0.7, 0.4], True), True),
    "diffusion of the state": lambda: _pair(_state, 2),
    "two drifts": lambda: _drifts(torch.tensor([0.9, 1.5], dtype=F64)),
    "two drifts, matrix": lambda: _drifts(MATRIX),
    "two drifts, diffusion of the state": lambda: _drifts(_state),
    "two starts": lambda: (
        sd.DiffusionMeasure(Independent(Normal(START, 0.5), 1), sd.SDE(base, 0.8)),
        sd.DiffusionMeasure(Independent(Normal(0 * START, 0.7), 1), sd.SDE(base, 0.8)),
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_weights_average_to_one(case: str) -> None:
    q, p = PAIRS[case]()
    n = 20_000
    weights = q.log_rn(p.sample(TS, (n,)), p).exp()
    assert within(weights.mean(), 1.0, weights.std() / n**0.5)
    assert weights.std() > 0.1


@pytest.mark.parametrize("case", PAIRS)
def test_exchanging_the_laws_changes_the_sign(case: str) -> None:
    q, p = PAIRS[case]()
    for source in (q, p):
        path = source.sample(TS, (50,))
        torch.testing.assert_close(q.log_rn(path, p), -p.log_rn(path, q), rtol=1e-10, atol=1e-11)
        assert q.log_rn(path, q).abs().max() < 1e-12


@pytest.mark.parametrize("case", [c for c in PAIRS if c not in ("two starts", "memory and precisions")])
def test_chain_rule_over_joined_grids(case: str) -> None:
    q, p = PAIRS[case]()
    path = q.sample(TS, (20,))
    total = torch.zeros(20, dtype=F64)
    for a, b in ((0, 2), (2, 5)):
        steps = {"residual", "control", "precision"}
        aux = {k: v[:, a:b] if k in steps else v[:, a : b + 1] for k, v in path.aux.items()}
        part = sd.PathSample(TS[a : b + 1], path.x[:, a : b + 1], path.dw[:, a:b], aux, path.law)
        total = total + q.log_rn(part, p)
    torch.testing.assert_close(total, q.log_rn(path, p))


@pytest.mark.parametrize("case", PAIRS)
def test_a_third_law_in_between(case: str) -> None:
    q, p = PAIRS[case]()
    if case.startswith("two drifts"):
        middle = sd.DiffusionMeasure(START, sd.SDE(lambda t, x: -x, p.sde.diffusion))
    elif case == "two starts":
        middle = sd.DiffusionMeasure(Independent(Normal(START, 1.0), 1), p.sde)
    else:
        middle = p.controlled(first(p.sde.noise_dim(TS[0], START)))
    path = q.sample(TS, (20,))
    torch.testing.assert_close(q.log_rn(path, p), q.log_rn(path, middle) + middle.log_rn(path, p))


@pytest.mark.parametrize(
    "case",
    [
        "control against none",
        "two controls",
        "two controls and precisions",
        "diffusion of the state",
        "two drifts",
        "two drifts, matrix",
        "two drifts, diffusion of the state",
        "two starts",
    ],
)
def test_log_ratio_is_the_difference_of_the_densities(case: str) -> None:
    q, p = PAIRS[case]()
    unknown = q.sample(TS, (50,))
    for path in (unknown, p.sample(TS, (50,)), sd.PathSample(TS, unknown.x, unknown.dw)):
        difference = q.log_prob(path) - p.log_prob(path)
        torch.testing.assert_close(q.log_rn(path, p), difference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("case", PAIRS)
def test_density_and_stl_are_equal_in_value(case: str, recorded: bool) -> None:
    q, p = PAIRS[case]()
    path = q.sample(TS, (20,))
    reference = q.log_rn(path, p)
    for estimator in ("density", "stl"):
        torch.testing.assert_close(q.log_rn(path, p, estimator, recorded=recorded), reference)


@pytest.mark.parametrize("case", PAIRS)
def test_rate_and_density_have_the_same_mean(case: str) -> None:
    q, p = PAIRS[case]()
    n = 20_000
    path = q.sample(TS, (n,))
    gap = q.log_rn(path, p) - q.log_rn(path, p, "rate")
    assert within(gap.mean(), 0.0, gap.std() / n**0.5)
    assert bool((q.log_rn(path, p, "rate", recorded=True) - q.log_rn(path, p, "rate")).abs().max() < 1e-12)


@dataclass(frozen=True)
class Learnt:
    """Two laws with parameters ``(paths, n)``: one backward pass gives a gradient a path."""

    parameters: Tensor
    q: sd.DiffusionMeasure
    p: sd.DiffusionMeasure


def _learnt(case: str, n: int, values: list[float]) -> Learnt:
    w = torch.tensor(values, dtype=F64).expand(n, -1).clone().requires_grad_()
    a, b, c = (w[:, i : i + 1] for i in range(3))
    start = START.expand(n, 2)

    def prior_drift(t: Tensor, x: Tensor) -> Tensor:
        return -(1 + 0.5 * c) * x

    if case == "two drifts":
        p = sd.DiffusionMeasure(start, sd.SDE(prior_drift, 0.8))
        q = sd.DiffusionMeasure(start, sd.SDE(lambda t, x: a - (1 + b) * x, 0.8))
        return Learnt(w, q, p)
    diffusion = {"degenerate": torch.tensor([[1.0], [0.3]], dtype=F64)}.get(case, 0.8)
    noise = ExactMemory([0.5, 4.0], [0.7, 0.4]) if case == "memory" else None
    p = sd.DiffusionMeasure(start, sd.SDE(prior_drift, diffusion, noise))
    m = 1 if case == "degenerate" else 2
    precision = (
        (lambda t, z: (0.5 + c**2) * (1 + z[..., :m] ** 2)) if case in ("precision", "memory") else None
    )
    q = p.controlled(lambda t, z: a * torch.sin(z[..., -m:]) + b * z[..., :m], precision)
    return Learnt(w, q, p)


def _gradients(case: str, n: int, values: list[float], estimator: str, seed: int = 1) -> Tensor:
    """Return the gradient of every path's contribution to the divergence, ``(n, 3)``."""
    laws = _learnt(case, n, values)
    path = laws.q.sample(TS, (), torch.Generator().manual_seed(seed))
    value = laws.q.log_rn(path, laws.p, estimator, recorded=seed % 2 == 0)
    return torch.autograd.grad(value.sum(), laws.parameters)[0]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", ["plain", "precision", "degenerate", "memory", "two drifts"])
def test_all_estimators_have_the_same_mean_gradient(case: str, seed: int) -> None:
    n = 40_000
    gradients = {e: _gradients(case, n, [0.6, 0.3, 0.5], e, seed) for e in ("density", "rate", "stl")}
    for e in ("density", "stl"):
        gap = gradients[e] - gradients["rate"]
        assert within(gap.mean(0), 0.0, gap.std(0) / n**0.5 + 1e-12, 4.5), (
            f"{e}: {gap.mean(0) / gap.std(0) * n**0.5}"
        )
    # They aren't the same estimator by accident.
    assert (gradients["density"] - gradients["rate"]).std() > 0.01
    assert (gradients["stl"] - gradients["rate"]).std() > 0.01


def test_divergence_has_the_gradient_of_its_closed_form() -> None:
    """Two OU laws: KL = sum_n (b - a)^2 v_n h / (2 s^2) with v the second moment of Euler's scheme."""
    n, s = 40_000, 0.8
    for estimator in ("density", "rate", "stl"):
        w = torch.full((n, 1), 0.7, dtype=F64, requires_grad=True)
        p = sd.DiffusionMeasure(torch.ones(n, 1, dtype=F64), sd.SDE(lambda t, x: -1.5 * x, s))
        q = sd.DiffusionMeasure(torch.ones(n, 1, dtype=F64), sd.SDE(lambda t, x, w=w: -w * x, s))
        value = q.log_rn(q.sample(TS), p, estimator).sum()
        gradient = torch.autograd.grad(value, w)[0]
        a = torch.tensor(0.7, dtype=F64, requires_grad=True)
        v, total = torch.tensor(1.0, dtype=F64), torch.tensor(0.0, dtype=F64)
        for h in TS[1:] - TS[:-1]:
            total = total + (1.5 - a) ** 2 * v * h / (2 * s**2)
            v = (1 - a * h) ** 2 * v + s**2 * h
        truth = torch.autograd.grad(total, a)[0]
        assert within(gradient.mean(), truth, gradient.std() / n**0.5), estimator


def test_the_low_noise_gradient_is_silent_at_the_optimum() -> None:
    """A learnt law that equals its target: stl vanishes path by path, density doesn't."""
    gradients = {e: _gradients("two drifts", 2000, [0.0, 0.2, 0.4], e) for e in ("density", "stl")}
    assert gradients["stl"][:, :2].abs().max() < 1e-12
    assert gradients["density"][:, :2].std() > 0.05


def test_the_low_noise_gradient_is_quiet_near_the_optimum() -> None:
    gradients = {e: _gradients("two drifts", 20_000, [0.01, 0.21, 0.4], e) for e in ("density", "stl")}
    ratio = gradients["density"][:, :2].std(0) / gradients["stl"][:, :2].std(0)
    assert (ratio > 20).all(), ratio


def test_an_explicit_stop_keeps_the_value_and_cuts_what_is_not_an_input() -> None:
    w = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor([[[2.0], [5.0]]], requires_grad=True)
    value = explicit_stop(lambda inputs: (w * inputs[0] ** 2).sum((0, -1)), (x,))
    torch.testing.assert_close(value, torch.tensor([12.0, 75.0]))
    slope_x, slope_w = torch.autograd.grad(value.sum(), (x, w), allow_unused=True)
    torch.testing.assert_close(slope_x.flatten(), torch.tensor([12.0, 30.0]))
    assert slope_w is None
    with torch.no_grad():
        assert not explicit_stop(lambda inputs: inputs[0].sum(-1).sum(0), (x,)).requires_grad


def test_one_step_against_the_normal_distribution() -> None:
    dt = torch.tensor([[[0.2]]], dtype=F64)
    q = NoiseLaw(torch.tensor([[[0.7]]], dtype=F64), torch.tensor([[[3.0]]], dtype=F64))
    p = NoiseLaw(torch.tensor([[[-0.4]]], dtype=F64), torch.tensor([[[0.5]]], dtype=F64))
    law_q, law_p = (Normal(u * 0.2, (0.2 / (1 + a * 0.2)) ** 0.5) for u, a in ((0.7, 3.0), (-0.4, 0.5)))
    e = torch.tensor([[[0.3]]], dtype=F64)
    assert density(q, p, e, dt).item() == pytest.approx(float(law_q.log_prob(e) - law_p.log_prob(e)))
    assert rate(q, p, dt).item() == pytest.approx(float(torch.distributions.kl_divergence(law_q, law_p)))


class TerminalBridge:
    """A linear equation with Euler memory and one observation at the end: all in closed form on the grid.

    The last state is linear in state and increments, X_N = a_n . z_n + sum_{j >= n} h_j e_j, and is observed
    with variance s2. On the grid the posterior precision of an increment is (1 + h^2 dt / (s2 + V)) / dt.
    """

    def __init__(self, steps: int) -> None:
        theta, horizon, self.y, self.s2 = 0.7, 2.0, 0.8, 0.01
        speeds = 20.0 ** torch.linspace(-1, 1, 5, dtype=F64)
        weights = sd.fractional.MarkovNoise(0.3, speeds=speeds, horizon=horizon).weights
        self.ts = torch.linspace(0, horizon, steps + 1, dtype=F64)
        self.dt = horizon / steps
        self.law = sd.DiffusionMeasure(
            torch.zeros(1, dtype=F64), sd.SDE(lambda t, x: -theta * x, 1.0, EulerMemory(speeds, weights))
        )
        # Adjoint of one Euler step: x' = (1 - theta dt) x - dt sum w g Y + sum w e, Y' = (1 - g dt) Y + e.
        g = speeds.to(F64)
        a = torch.zeros(6, dtype=F64)
        a[0] = 1.0
        rows, impulses = [a], []
        for _ in range(steps):
            impulses.append(float(a[0] * weights.sum() + a[1:].sum()))
            a = torch.cat(
                [a[:1] * (1 - theta * self.dt), a[1:] * (1 - g * self.dt) - a[0] * self.dt * weights * g]
            )
            rows.append(a)
        self.rows = torch.stack(rows[::-1])
        self.h = torch.tensor(impulses[::-1], dtype=F64)
        later = (self.h**2 * self.dt).flip(0).cumsum(0).flip(0)
        self.later = torch.cat([later, torch.zeros(1, dtype=F64)])

    def evidence(self) -> float:
        """Return the log evidence on the grid."""
        variance = self.later[0] + self.s2
        return float(
            Normal(torch.zeros_like(variance), variance.sqrt()).log_prob(variance.new_tensor(self.y))
        )

    def gap(self) -> float:
        """Return by how much the best guide that shares the diffusion falls short."""
        ratio = self.h**2 * self.dt / (self.s2 + self.later[1:])
        return float(0.5 * (ratio - torch.log1p(ratio)).sum())

    def _index(self, t: Tensor) -> Tensor:
        return (t / self.dt).round().long()

    def control(self, t: Tensor, z: Tensor) -> Tensor:
        n = self._index(t)
        forecast = (self.rows[n] * z).sum(-1, keepdim=True)
        n = n[..., 0] if n.ndim else n
        return self.h[n][..., None] * (self.y - forecast) / (self.later[n][..., None] + self.s2)

    def precision(self, t: Tensor, z: Tensor) -> Tensor:
        n = self._index(t)
        n = n[..., 0] if n.ndim else n
        return (self.h[n] ** 2 / (self.later[n + 1] + self.s2))[..., None].expand(*z.shape[:-1], 1)

    def elbo(self, tight: bool, estimator: str, paths: int) -> Tensor:
        """Return the contributions of sampled paths to the evidence lower bound."""
        guide = self.law.controlled(self.control, self.precision if tight else None)
        with torch.no_grad():
            path = guide.sample(self.ts, (paths,))
            fit = Normal(path.x[:, -1, 0], self.s2**0.5).log_prob(torch.tensor(self.y, dtype=F64))
            return fit - guide.log_rn(path, self.law, estimator, recorded=True)


# The table of the worked example: a shared diffusion loses nats that no training brings back.
WORKED = [(50, -9.81), (100, -5.13), (200, -2.94), (800, -1.53)]


@pytest.mark.parametrize(("steps", "shared"), WORKED)
def test_worked_example_of_a_shared_and_a_tight_guide(steps: int, shared: float) -> None:
    bridge = TerminalBridge(steps)
    assert bridge.evidence() == pytest.approx(-1.196, abs=2e-3)
    assert bridge.evidence() - bridge.gap() == pytest.approx(shared, abs=5.1e-3)
    tight = bridge.elbo(True, "density", 64)
    assert float((tight - bridge.evidence()).abs().max()) < 1e-9
    if steps > 200:
        return
    rates = bridge.elbo(True, "rate", 4000)
    assert within(rates.mean(), bridge.evidence(), rates.std() / 4000**0.5)
    values = bridge.elbo(False, "rate", 4000)
    assert within(values.mean(), bridge.evidence() - bridge.gap(), values.std() / 4000**0.5)


def test_importance_weights_of_the_shared_guide_recover_the_evidence() -> None:
    bridge = TerminalBridge(100)
    weights = (bridge.elbo(False, "density", 20_000) - bridge.evidence()).exp()
    assert within(weights.mean(), 1.0, weights.std() / 20_000**0.5)
    assert math.isfinite(float(weights.std()))
