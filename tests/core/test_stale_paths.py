"""Log ratios are of the laws as they are now, on paths that were drawn before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.errors import DiffusionError, DiffusionMismatchError, InvalidInputError
from tests.core.laws import F64, ExactMemory

TS = torch.linspace(0, 1, 11, dtype=F64)


class Slope(nn.Module):
    """A function with one parameter."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(value, dtype=F64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.a * (1 - z)


def make(what: str) -> tuple[sd.DiffusionMeasure, sd.DiffusionMeasure, nn.Parameter]:
    """Return Q, P and the parameter that changes."""
    start = torch.zeros(2, dtype=F64)
    drift, u = Slope(1.0), Slope(0.7)
    strength = nn.Parameter(torch.tensor([0.5, 0.8], dtype=F64))
    p = sd.DiffusionMeasure(start, sd.SDE(drift, strength))
    precision = (lambda t, z: u.a.square().expand_as(z)) if what == "precision" else None
    q = p.controlled(u, precision)
    return q, p, {"control": u.a, "precision": u.a, "drift": drift.a, "diffusion": strength}[what]


def by_states(q: sd.DiffusionMeasure, p: sd.DiffusionMeasure, x: Tensor) -> Tensor:
    path = sd.PathSample(TS, x, torch.zeros(*x.shape[:-2], 10, 2, dtype=F64))
    return q.log_prob(path) - p.log_prob(path)


@pytest.mark.parametrize("estimator", ["density", "stl"])
@pytest.mark.parametrize("drawn_by", ["Q", "P"])
@pytest.mark.parametrize("what", ["control", "precision", "drift", "diffusion"])
def test_a_change_of_a_parameter_counts(what: str, drawn_by: str, estimator: str) -> None:
    q, p, parameter = make(what)
    path = (q if drawn_by == "Q" else p).sample(TS, 4, 0).detach()
    torch.testing.assert_close(q.log_rn(path, p, estimator), by_states(q, p, path.x))
    with torch.no_grad():
        parameter.mul_(-0.5 if what != "diffusion" else 1.3)
    torch.testing.assert_close(q.log_rn(path, p, estimator), by_states(q, p, path.x))
    torch.testing.assert_close(p.log_rn(path, q), -by_states(q, p, path.x))


@pytest.mark.parametrize("what", ["control", "precision", "drift", "diffusion"])
def test_gradients_on_given_paths_are_those_of_the_densities(what: str) -> None:
    """In every parameter, also those that both laws share."""
    q, p, parameter = make(what)
    path = q.sample(TS, 4, 0).detach()
    got, want = (
        torch.autograd.grad(value.sum(), parameter)[0]
        for value in (q.log_rn(path, p), by_states(q, p, path.x))
    )
    torch.testing.assert_close(got, want)


def test_recorded_is_what_the_law_noted() -> None:
    q, p, parameter = make("control")
    path = q.sample(TS, 4, 0).detach()
    before = q.log_rn(path, p)
    torch.testing.assert_close(q.log_rn(path, p, recorded=True), before)
    with torch.no_grad():
        parameter.fill_(-1.0)
    torch.testing.assert_close(q.log_rn(path, p, recorded=True), before)


def test_closures_count_too() -> None:
    a = torch.tensor(1.0, dtype=F64)
    p = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sd.SDE(lambda t, x: -a * x, 0.5))
    q = p.controlled(lambda t, z: torch.ones_like(z))
    path = q.sample(TS, 4, 0)
    a.fill_(3.0)
    torch.testing.assert_close(q.log_rn(path, p), by_states(q, p, path.x))


HARD: dict[str, Callable[[Slope], Any]] = {
    "memory": lambda drift: (sd.SDE(drift, 0.5, ExactMemory([1.0], [0.5])), "euler"),
    "another method": lambda drift: (sd.SDE(drift, 0.5), "heun"),
    "more channels than components": lambda drift: (sd.SDE(drift, torch.ones(2, 3, dtype=F64)), "euler"),
}


@pytest.mark.parametrize("case", HARD)
def test_where_states_do_not_tell_the_noise_a_change_is_refused(case: str) -> None:
    drift = Slope(1.0)
    sde, method = HARD[case](drift)
    p = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sde, method=method)
    channels = 3 if "channels" in case else 2
    q = p.controlled(lambda t, z: (0.1 + 0 * z[..., :1]).expand(*z.shape[:-1], channels))
    path = q.sample(TS, 4, 0)
    assert bool(torch.isfinite(q.log_rn(path, p)).all())
    with torch.no_grad():
        drift.a.mul_(2.0)
    with pytest.raises(InvalidInputError, match="changed since"):
        q.log_rn(path, p)


def test_a_path_that_the_law_can_no_longer_draw_is_refused() -> None:
    speed = nn.Parameter(torch.ones((), dtype=F64))
    drift = lambda t, x: torch.stack([speed * x[..., 1], -x[..., 0]], -1)  # noqa: E731
    matrix = torch.tensor([[0.0], [1.0]], dtype=F64)
    p = sd.DiffusionMeasure(torch.ones(2, dtype=F64), sd.SDE(drift, matrix))
    q = p.controlled(lambda t, x: torch.ones_like(x[..., :1]))
    path = q.sample(TS, 4, 0)
    q.log_rn(path, p)
    with torch.no_grad():
        speed.mul_(2.0)
    with pytest.raises(DiffusionMismatchError, match="impossible under both"):
        q.log_rn(path, p)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_laws_are_compared_in_the_unit_of_their_states(scale: float) -> None:
    """Diffusions that differ by a tenth are told apart in any unit, beside a larger component or member."""

    def law(g: Tensor) -> sd.DiffusionMeasure:
        return sd.DiffusionMeasure(torch.zeros(2, 2, dtype=F64), sd.SDE(lambda t, x: -x, sd.Diagonal(g)))

    g = scale * torch.tensor([[1.0, 1e8], [1e-8, 1.0]], dtype=F64)
    other = g.clone()
    other[1, 0] *= 1.1
    path = law(g).sample(TS, 3, 0)
    assert float(law(g).log_rn(path, law(g)).abs().max()) == 0.0
    with pytest.raises(DiffusionMismatchError, match="different diffusions"):
        law(g).log_rn(path, law(other))


def test_a_diffusion_that_vanishes_on_the_way_has_no_density() -> None:
    """A state that is absorbed at zero: no density, and weights where the laws agree there."""
    sde = sd.SDE(lambda t, x: 0 * x, lambda t, x: sd.Diagonal(x.clamp(min=0.0)))
    p = sd.DiffusionMeasure(torch.full((1,), 0.5, dtype=F64), sde)
    x = torch.tensor([[0.5], [0.2], [0.0], [0.0]], dtype=F64)
    observed = sd.PathSample([0.0, 0.1, 0.2, 0.3], x)
    with pytest.raises(DiffusionError, match="positive"):
        p.log_prob(observed)
    q = p.controlled(lambda t, x: torch.ones_like(x))
    assert bool(torch.isfinite(q.log_rn(observed, p)).all())


@pytest.mark.parametrize("diffusion", [[0.5, 0.7], np.array([[0.5, 0.1], [0.0, 0.7]]), 1, np.float64(0.5)])
def test_diffusions_are_data_of_any_kind(diffusion: Any) -> None:
    law = sd.DiffusionMeasure(torch.zeros(2), sd.SDE(lambda t, x: -x, torch.as_tensor(diffusion).float()))
    other = sd.DiffusionMeasure(
        torch.zeros(2),
        sd.SDE(
            lambda t, x: -x,
            np.asarray(diffusion, dtype=np.float32) if not isinstance(diffusion, list) else diffusion,
        ),
    )
    ts = torch.linspace(0, 1, 4)
    torch.testing.assert_close(other.sample(ts, 2, 0).x, law.sample(ts, 2, 0).x)


@pytest.mark.parametrize("bad", [None, "loud", True, {"a": 1}, [[1.0], [1.0, 2.0]]])
def test_diffusions_of_another_kind_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidInputError, match="diffusion"):
        sd.SDE(lambda t, x: -x, bad)
