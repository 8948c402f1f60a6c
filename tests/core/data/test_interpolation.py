"""Inputs over time: exact values, every form of time, gaps, doses that no grid steps over, and the paths that they drive."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.interpolate import PchipInterpolator

import stochdyn as sd
from stochdyn import testing
from stochdyn.core import Doses, Interpolation
from tests.core.laws import F64

NAN = float("nan")
TIMES = torch.tensor([0.0, 1.0, 3.0, 3.5], dtype=F64)
VALUES = torch.tensor([1.0, 2.0, -1.0, 4.0], dtype=F64)
ASK = torch.linspace(-1, 5, 61, dtype=F64)


def truth(kind: str, times: np.ndarray, values: np.ndarray, ask: np.ndarray) -> np.ndarray:
    held = np.clip(ask, times[0], times[-1])
    if kind == "linear":
        return np.interp(ask, times, values)
    if kind == "cubic":
        return np.asarray(PchipInterpolator(times, values)(held))
    return values[np.clip(np.searchsorted(times, ask, side="right") - 1, 0, len(times) - 1)]


@pytest.mark.parametrize("kind", ["linear", "previous", "cubic"])
def test_values_are_those_of_numpy_and_scipy(kind: str) -> None:
    found = Interpolation(TIMES, VALUES, kind).at(ASK)[:, 0]
    wanted = truth(kind, TIMES.numpy(), VALUES.numpy(), ASK.numpy())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "previous", "cubic"])
def test_gaps_are_filled_by_the_values_around_them(kind: str) -> None:
    """Each component as if its missing times had never been, in the middle and at both ends."""
    times = torch.linspace(0, 5, 6, dtype=F64)
    table = torch.tensor([[NAN, 1.0], [2.0, NAN], [NAN, NAN], [3.0, 5.0], [0.5, 4.0], [NAN, 2.0]], dtype=F64)
    found = Interpolation(times, table, kind).at(ASK)
    for j in range(2):
        known = ~table[:, j].isnan()
        wanted = truth(kind, times[known].numpy(), table[known, j].numpy(), ASK.numpy())
        np.testing.assert_allclose(found[:, j].numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "previous", "cubic"])
@pytest.mark.parametrize("own", [False, True])
def test_series_are_read_one_by_one(kind: str, own: bool) -> None:
    """Times of no axes, leading times, draws between, and a grid per series: as each series by itself."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 4, 2, dtype=F64, generator=generator)
    times = TIMES + torch.tensor([[0.0], [0.3], [-0.2]], dtype=F64) if own else TIMES
    whole = Interpolation(times, table, kind)
    parts = [Interpolation(times[i] if own else times, table[i], kind) for i in range(3)]
    wanted = torch.stack([part.at(ASK) for part in parts], 1)
    torch.testing.assert_close(whole.at(ASK), wanted)
    torch.testing.assert_close(whole(ASK[:, None, None]), wanted)
    torch.testing.assert_close(whole(ASK[:, None, None, None]), wanted[:, None])
    torch.testing.assert_close(whole(ASK[7]), wanted[7])
    grids = torch.stack([ASK, ASK + 0.1, ASK - 0.1], 1).unsqueeze(-1)
    each = torch.stack([part(grids[:, i]) for i, part in enumerate(parts)], 1)
    torch.testing.assert_close(whole(grids), each)
    torch.testing.assert_close(whole(grids[5]), each[5])


def test_a_time_on_a_knot_has_its_value_in_single_precision() -> None:
    """Rounded to float32, .7 lies before .7: it must not fall to the value before."""
    times = torch.arange(100, dtype=F64) / 10
    u = Interpolation(times, torch.arange(100.0), "previous")
    assert torch.equal(u.at(times.float())[:, 0], torch.arange(100.0))


def test_gradients_in_values_and_times() -> None:
    testing.check_gradients(
        lambda values, t: Interpolation(TIMES, values).at(t),
        VALUES.clone(),
        torch.tensor([0.3, 2.2], dtype=F64),
    )
    slope = torch.tensor([0.3, 2.2], dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(Interpolation(TIMES, VALUES, "cubic").at(slope).sum(), slope)
    wanted = PchipInterpolator(TIMES.numpy(), VALUES.numpy())(slope.detach().numpy(), 1)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
    with pytest.raises(sd.errors.InvalidInputError, match="isn't differentiable"):
        Interpolation(TIMES, VALUES.clone().requires_grad_(), "cubic")


@pytest.mark.parametrize("kind", ["linear", "previous", "cubic"])
def test_units_of_inputs(kind: str) -> None:
    testing.check_units(lambda c: Interpolation(c * TIMES, VALUES, kind).at(c * ASK))
    testing.check_units(lambda c: Interpolation(TIMES, c * VALUES, kind).at(ASK) / c)


def test_company_precision_and_forms_of_inputs() -> None:
    testing.check_company(
        lambda v: Interpolation(TIMES, v).at(ASK[::7]).movedim(0, 1), VALUES[:, None].clone()
    )
    testing.check_precision(lambda dtype: Interpolation(TIMES.to(dtype), VALUES.to(dtype)).at(ASK.to(dtype)))
    testing.check_forms(lambda data: Interpolation(TIMES, data).at(ASK).double(), VALUES.clone())
    testing.check_device(Interpolation(TIMES, VALUES, "cubic"))
    testing.check_storage(Interpolation(TIMES, VALUES, "cubic"), lambda u: u.at(ASK))


def test_panels_give_inputs_by_series_with_dates() -> None:
    frame = pd.DataFrame(
        {
            "site": ["a", "a", "a", "b", "b"],
            "date": pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-04", "2024-01-01", "2024-01-03"]),
            "flow": [1.0, 2.0, 3.0, 4.0, 5.0],
            "rain": [0.0, NAN, 6.0, 1.0, 3.0],
        }
    )
    panel = sd.Panel(frame, "site", "date", "flow", "rain", dtype=F64)
    rain = Interpolation(panel.times, panel.covariates)
    found = rain(panel.times.mT.unsqueeze(-1))[..., 0]
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 2.0, 6.0], dtype=F64))
    torch.testing.assert_close(found[:2, 1], torch.tensor([1.0, 3.0], dtype=F64))
    start = panel.times_of(["2024-01-01", "2024-01-03 12:00"])
    torch.testing.assert_close(start, torch.tensor([0.0, 2.5], dtype=F64))
    torch.testing.assert_close(rain.at(start)[1, 0, 0], torch.tensor(5.0, dtype=F64))


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: Interpolation([1.0, 0.0], [1.0, 2.0]), sd.errors.TimeGridError, "times"),
        (lambda: Interpolation([0.0, 1.0], [1.0, 2.0, 3.0]), sd.errors.ShapeError, "one row per time"),
        (lambda: Interpolation(torch.zeros(2, 3).cumsum(-1) + torch.arange(3), torch.zeros(3, 3, 1)), sd.errors.ShapeError, "batch"),
        (lambda: Interpolation([0.0, 1.0], [NAN, NAN]), sd.errors.InvalidInputError, "NaN throughout"),
        (lambda: Interpolation([0.0, 1.0], [1.0, 2.0], "nearest"), sd.errors.InvalidInputError, "kind"),
        (lambda: Interpolation([0.0, 1.0], [1.0, 2.0])(torch.zeros(3)), sd.errors.ShapeError, "at\\(times\\)"),
        (lambda: Doses([0.0], [1.0, 2.0, 3.0]).rate([0.0, 1.0]) and Doses([0.0, 1.0], [1.0, 2.0, 3.0]), sd.errors.ShapeError, "fit each other"),
        (lambda: Doses([0.0], 1.0, -1.0), sd.errors.InvalidInputError, "durations"),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


# Doses.


def test_every_dose_is_given_once_on_any_grid() -> None:
    """The integral of the rate is what was given before the end, for boluses and infusions, on coarse and fine grids."""
    doses = Doses([0.0, 0.33, 1.7, 2.5, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 0.9, 0.0, 0.0])
    for count in (2, 3, 7, 100, 1001):
        ts = torch.linspace(0, 4, count, dtype=F64)
        for grid in (ts, doses.grid(ts)):
            rate = doses.rate(grid).at(grid)[:-1, 0]
            assert abs(float((rate * (grid[1:] - grid[:-1])).sum()) - 10) < 1e-5


def test_a_grid_has_all_events_once() -> None:
    doses = Doses(torch.tensor([0.5, 0.3, 2.0], dtype=F64), 1.0, torch.tensor([0.25, 0.0, 5.0], dtype=F64))
    grid = doses.grid(torch.linspace(0, 1, 11, dtype=F64))
    wanted = sorted([*(n / 10 for n in range(11)), 0.75])
    torch.testing.assert_close(grid, torch.tensor(wanted, dtype=F64))
    rate = doses.rate(grid)
    # A bolus at .3 acts in the step from .3 on, though .3 is not 3 * .1 to the bit.
    assert float(rate.at([0.2999])[0, 0]) == 0
    assert abs(float(rate.at([0.3])[0, 0]) - 10) < 1e-9


def test_doses_by_series_have_grids_by_series() -> None:
    doses = Doses([[0.25, NAN], [0.3, 0.6]], [[1.0, NAN], [2.0, 3.0]])
    grid = doses.grid(torch.linspace(0, 1, 5, dtype=F64))
    assert grid.shape == (2, 7)
    assert bool((grid[:, 1:] > grid[:, :-1]).all())
    given = (doses.rate(grid)(grid.mT[:-1].unsqueeze(-1))[..., 0] * (grid.mT[1:] - grid.mT[:-1])).sum(0)
    torch.testing.assert_close(given.double(), torch.tensor([1.0, 5.0], dtype=F64))
    alone = [Doses([0.25], [1.0]), Doses([0.3, 0.6], [2.0, 3.0])]
    assert all(
        set(d.grid(torch.linspace(0, 1, 5, dtype=F64)).tolist()) <= set(g.tolist())
        for d, g in zip(alone, grid, strict=True)
    )


def test_units_and_gradients_of_doses() -> None:
    at, grid = torch.tensor([0.3, 1.1], dtype=F64), torch.linspace(0, 2, 9, dtype=F64)
    testing.check_units(
        lambda c: c * Doses(c * at, 2.0, c * torch.tensor([0.0, 0.5], dtype=F64)).rate(c * grid).values
    )
    testing.check_gradients(
        lambda amounts: Doses(at, amounts, 0.4).rate(grid).values, torch.ones(2, dtype=F64)
    )


@pytest.mark.parametrize("durations", [0.0, 0.4])
def test_concentrations_after_doses_tend_to_the_exact_ones(durations: float) -> None:
    """A compartment with elimination: sums of exponentials, with an error of order one in the step."""
    rate, at = 0.7, torch.tensor([0.3, 1.0, 2.2], dtype=F64)
    doses = Doses(at, torch.tensor([1.0, 2.0, 1.5], dtype=F64), durations)

    def exact(t: float) -> float:
        total = 0.0
        for begin, amount in zip(at.tolist(), (1.0, 2.0, 1.5), strict=True):
            if t <= begin:
                continue
            if durations:
                length = min(t - begin, durations)
                level = amount / durations / rate * (1 - math.exp(-rate * length))
                total += level * math.exp(-rate * (t - begin - length))
            else:
                total += amount * math.exp(-rate * (t - begin))
        return total

    errors = []
    for n in (150, 300):
        ts = doses.grid(torch.linspace(0, 3, n + 1, dtype=F64))
        u = doses.rate(ts)
        sde = sd.SDE(lambda t, x, u=u: u(t) - rate * x, 1e-9)
        x = sd.DiffusionMeasure(torch.zeros(1, dtype=F64), sde).sample(ts, generator=0).x[..., 0]
        errors.append(
            max(
                abs(float(v) - exact(float(t)))
                for t, v in zip(ts[2:], x[2:], strict=True)
                if float((t - at).abs().min()) > 0.1
            )
        )
    assert errors[0] < 0.05
    assert 1.7 < errors[0] / errors[1] < 2.3


def test_inputs_in_plates_and_particles() -> None:
    """A drift with an input per series works in loops, with time leading, and beside draws."""
    table = torch.randn(3, 4, 1, dtype=F64)
    u = Interpolation(TIMES, table)
    law = sd.DiffusionMeasure(torch.zeros(3, 1, dtype=F64), sd.SDE(lambda t, x: u(t) - x, 0.5))
    path = law.sample(torch.linspace(0, 3, 13, dtype=F64), (5,), 0)
    assert path.x.shape == (5, 3, 13, 1)
    other = law.controlled(lambda t, x: torch.ones_like(x))
    parts = [Interpolation(TIMES, table[i]) for i in range(3)]
    alone = [
        sd.DiffusionMeasure(torch.zeros(1, dtype=F64), sd.SDE(lambda t, x, v=part: v(t) - x, 0.5))
        for part in parts
    ]
    for i, single in enumerate(alone):
        part = sd.PathSample(path.ts, path.x[:, i], path.dw[:, i])
        torch.testing.assert_close(single.log_prob(part), law.log_prob(path)[:, i])
        torch.testing.assert_close(
            single.controlled(lambda t, x: torch.ones_like(x)).log_rn(part, single),
            other.log_rn(path, law)[:, i],
        )


def test_a_linear_law_with_switched_inputs_is_exact() -> None:
    """With the times of the switches among those asked for, the mean is that of the exact solution."""
    u = Interpolation([0.0, 1.0, 2.0], torch.tensor([1.0, -1.0, 0.5], dtype=F64), "previous")
    law = sd.LinearGaussianMeasure(
        -torch.eye(1, dtype=F64), lambda t: u.at(t), 0.3, torch.zeros(1, dtype=F64)
    )
    mean = law.mean(torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64))[:, 0]
    first = 1 - math.exp(-1)
    second = -1 + (first + 1) * math.exp(-1)
    wanted = [1 - math.exp(-0.5), first, second, 0.5 + (second - 0.5) * math.exp(-1)]
    torch.testing.assert_close(mean, torch.tensor(wanted, dtype=F64), rtol=1e-10, atol=1e-10)
