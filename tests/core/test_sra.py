"""The Runge-Kutta scheme for additive noise: its strong order against exact solutions, its areas, and everything that carries them."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import stochdyn as sd
from stochdyn import testing
from stochdyn.core import SRA, Brownian, draw_increments, integrate
from stochdyn.testing.noise import NoiseProcessSuite
from tests.core.laws import F64, log_log_slope, within

AREAS = Brownian(areas=True)
FINEST, PATHS = 14, 200
LEVELS = (4, 5, 6, 7, 8)


class TestBrownianWithAreas(NoiseProcessSuite):
    """The suite of all noise."""

    def make(self) -> Brownian:
        return Brownian(areas=True)


def fine_path() -> tuple[Tensor, Tensor]:
    """Return increments ``(N, paths, 1)`` and areas of a Brownian path on the finest grid."""
    h = 2.0**-FINEST
    dw = torch.randn(2**FINEST, PATHS, 1, dtype=F64) * h**0.5
    return dw, torch.randn_like(dw) * (h / 12) ** 0.5


def coarsened(dw: Tensor, area: Tensor, level: int) -> Tensor:
    """Return the innovations ``(2^level, paths, 2)`` of the same path on a coarser grid, exactly."""
    h = 2.0**-FINEST
    parts = 2 ** (FINEST - level)
    steps, areas = (v.reshape(2**level, parts, PATHS, 1) for v in (dw, area))
    total = steps.sum(1)
    before = steps.cumsum(1) - steps
    # The integral of the path over a coarse step, from its start, over the length of the step.
    mean = (h * (before + 0.5 * steps + areas)).sum(1) / (h * parts)
    return torch.cat([total, mean - 0.5 * total], -1)


def logistic_end(dw: Tensor, growth: float, strength: float) -> Tensor:
    """Log of a population that grows logistically, dY = Y (a - Y) dt + s Y dW, whose solution is known."""
    w = torch.cat([torch.zeros_like(dw[:1]), dw.cumsum(0)])
    s = torch.linspace(0, 1, w.shape[0], dtype=F64)[:, None, None]
    factor = torch.exp((growth - strength**2 / 2) * s + strength * w)
    area = torch.trapezoid(factor, dx=1.0 / (w.shape[0] - 1), dim=0)
    return (factor[-1] / (1 + area)).log()


def test_strong_order_is_three_halves_on_a_nonlinear_drift() -> None:
    a, s = 1.0, 2.0
    sde = sd.SDE(lambda t, z: a - s**2 / 2 - z.exp(), s, AREAS)
    dw, area = fine_path()
    truth = logistic_end(dw, a, s)
    orders = {}
    for method in ("euler", "sra"):
        errors = []
        for level in LEVELS:
            e = coarsened(dw, area, level)
            ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
            with torch.no_grad():
                x = integrate(sde, torch.zeros(PATHS, 1, dtype=F64), ts, e, method=method).x[-1]
            errors.append(float((x - truth).square().mean().sqrt()))
        orders[method] = log_log_slope([2.0**-n for n in LEVELS], errors)
    assert abs(orders["sra"] - 1.5) < 0.15, f"orders {orders}"
    assert abs(orders["euler"] - 1.0) < 0.15, f"orders {orders}"


def test_strong_order_with_noise_that_depends_on_time() -> None:
    """X = exp(-t) (x0 + int e^s g(s) dW), by parts on the fine grid; a linear drift has no term of order 3/2, so the order is 2."""
    sde = sd.SDE(lambda t, x: -x, lambda t, x: sd.Scalar(1 + t + 0 * x[..., 0]), AREAS)
    dw, area = fine_path()
    w = torch.cat([torch.zeros_like(dw[:1]), dw.cumsum(0)])[:-1]
    s = torch.linspace(0, 1, 2**FINEST + 1, dtype=F64)[:-1, None, None]
    h = 2.0**-FINEST
    # int f dW = f(1) W(1) - int f' W ds with f = e^s (1 + s): f' = e^s (2 + s) at the middle of each step.
    slope = torch.exp(s + h / 2) * (2 + s + h / 2)
    integral = math.e * 2 * dw.sum(0) - (slope * h * (w + 0.5 * dw + area)).sum(0)
    truth = math.exp(-1) * (0.5 + integral)
    errors = []
    for level in LEVELS:
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        with torch.no_grad():
            x = integrate(
                sde, torch.full((PATHS, 1), 0.5, dtype=F64), ts, coarsened(dw, area, level), method="sra"
            ).x[-1]
        errors.append(float((x - truth).square().mean().sqrt()))
    order = log_log_slope([2.0**-n for n in LEVELS], errors)
    assert abs(order - 2) < 0.15, f"order {order:.3f}, errors {errors}"


def test_areas_have_their_law_and_leave_other_methods_alone() -> None:
    ts = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    sde = sd.SDE(lambda t, x: -x, torch.eye(2, dtype=F64), AREAS)
    e, memory = draw_increments(sde, torch.zeros(20_000, 2, dtype=F64), ts, torch.Generator().manual_seed(0))
    assert memory is None
    assert e.shape == (2, 20_000, 4)
    wanted = torch.tensor([[0.5] * 2 + [0.5 / 12] * 2, [1.5] * 2 + [1.5 / 12] * 2], dtype=F64)
    assert within(e.square().mean(1), wanted, e.square().std(1) / 20_000**0.5)
    x0 = torch.ones(5, 2, dtype=F64)
    plain = sd.SDE(sde.drift, torch.eye(2, dtype=F64))
    for method in ("euler", "heun", "milstein"):
        with_areas = integrate(sde, x0, ts, e[:, :5], method=method).x
        assert torch.equal(with_areas, integrate(plain, x0, ts, e[:, :5, :2], method=method).x)


def test_laws_carry_areas_and_weigh_paths_exactly() -> None:
    """A control is a constant drift of the noise within a step: weights have mean one on any grid."""
    sde = sd.SDE(lambda t, x: torch.sin(x), 0.7, AREAS)
    p = sd.DiffusionMeasure(torch.zeros(1, dtype=F64), sde, method=SRA())
    q = p.controlled(lambda t, x: torch.cos(2 * x), lambda t, x: torch.ones_like(x))
    ts = torch.linspace(0, 1, 5, dtype=F64)
    path = p.sample(ts, 20_000, 0)
    assert path.aux["residual"].shape == (20_000, 4, 1)
    weight = q.log_rn(path, p).exp()
    assert within(weight.mean(), torch.tensor(1.0, dtype=F64), weight.std() / 20_000**0.5)
    again = q.sample(ts, 20_000, 1)
    moved = (weight * path.x[:, -1, 0]).mean()
    error = ((weight * path.x[:, -1, 0]).var() + again.x[:, -1, 0].var()).sqrt() / 20_000**0.5
    assert within(moved, again.x[:, -1, 0].mean(), error)
    e = torch.cat([path.dw, path.aux["residual"]], -1).movedim(-2, 0)
    torch.testing.assert_close(p.drive(ts, torch.zeros(20_000, 1, dtype=F64), e).x, path.x)


def test_units_series_grids_and_gradients() -> None:
    e = torch.randn(5, 3, 2, dtype=F64)

    def answer(c: float) -> Tensor:
        ts = torch.linspace(0, c, 6, dtype=F64)
        sde = sd.SDE(lambda t, x: torch.sin(x / c) - t / c, c**0.5, AREAS)
        return integrate(sde, c * torch.ones(3, 1, dtype=F64), ts, c**0.5 * e, method="sra").x / c

    testing.check_units(answer)
    grids = torch.stack([torch.linspace(0, 1, 6, dtype=F64), torch.linspace(0, 2, 6, dtype=F64)])
    sde = sd.SDE(lambda t, x: torch.sin(x) * t, 0.5, AREAS)
    both = integrate(sde, torch.ones(2, 1, dtype=F64), grids, e[:, :2], method="sra").x
    parts = [
        integrate(sde, torch.ones(1, 1, dtype=F64), g, e[:, i : i + 1], method="sra").x[:, 0]
        for i, g in enumerate(grids)
    ]
    torch.testing.assert_close(both, torch.stack(parts, 1))
    testing.check_gradients(
        lambda rate, x0: (
            integrate(sd.SDE(lambda t, x: -rate * x**3, 0.5, AREAS), x0, grids[0], e, method="sra").x
        ),
        torch.tensor(0.7, dtype=F64),
        torch.ones(3, 1, dtype=F64),
    )


@pytest.mark.parametrize("feedback", ["fitted", "recomputed"])
def test_a_guide_is_exact_on_a_linear_model(feedback: str) -> None:
    """The bound is the evidence of the scheme's own Gaussian chain, whose moments are found by its linearity."""
    pyro.set_rng_seed(0)
    ts, y = torch.linspace(0, 1, 6, dtype=F64), torch.tensor([0.8, 0.1], dtype=F64)
    sde = sd.SDE(lambda t, x: -1.5 * x, 0.6, AREAS)

    def model() -> None:
        x = sd.infer.sample_path("x", sde, torch.ones(1, dtype=F64), ts, method="sra")
        pyro.sample("y", dist.Normal(x[..., [2, 5], 0], 0.1).to_event(1), obs=y)

    guide = sd.infer.AutoPathGuide(model, hidden=(), feedback=feedback)
    bound = -Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0).loss(model, guide)
    unit = torch.eye(10, dtype=F64).reshape(10, 5, 2).movedim(0, 1)
    scale = torch.tensor([0.2**0.5, (0.2 / 12) ** 0.5], dtype=F64)
    still = integrate(sde, torch.ones(1, 1, dtype=F64), ts, torch.zeros(5, 1, 2, dtype=F64), method="sra").x[
        :, 0, 0
    ]
    image = (
        integrate(sde, torch.ones(10, 1, dtype=F64), ts, unit * scale, method="sra").x[..., 0]
        - still[:, None]
    )
    read = image[[2, 5]]
    truth = torch.distributions.MultivariateNormal(
        still[[2, 5]], read @ read.mT + 0.01 * torch.eye(2, dtype=F64)
    )
    assert abs(bound - float(truth.log_prob(y))) < 1e-6


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (lambda: sd.SDE(lambda t, x: x, 1.0), "draws areas"),
        (lambda: sd.SDE(lambda t, x: x, lambda t, x: 1 + x**2, AREAS), "doesn't depend on the state"),
    ],
)
def test_equations_that_do_not_suit_are_refused(sde: Any, message: str) -> None:
    law = sd.DiffusionMeasure(torch.ones(1), sde(), method="sra")
    with pytest.raises(sd.errors.InvalidInputError, match=message):
        law.sample([0.0, 1.0])
