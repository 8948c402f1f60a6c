"""Pulses are never stepped over, rates are caught where they turn negative, and no answer depends on the unit of time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stochdyn.errors import InvalidInputError, LindbladianError
from stochdyn.povm import (
    Lindbladian,
    Propagator,
    SampledCoefficient,
    Tetrahedral,
    exact,
    mean_field,
    systems,
    trajectories,
)
from stochdyn.povm.master import make_schedule

POVM = Tetrahedral()
END = 20 + math.pi / 2


def square(t):
    return 1.0 if 20 <= t <= END else 0.0


def small(t):
    """A tall pulse early, and one of a hundredth of its height late."""
    return 3.0 * (1 <= t <= 1.1) + 0.03 * (22 <= t <= 23)


def gauss(t):
    return 10 * math.exp(-0.5 * ((t - 17.3) / 0.02) ** 2)


def stepwise(t):
    return np.floor(t / 3) % 2


SAMPLED = SampledCoefficient([0, 11.0, 11.3, 30], [0, 2.0, 0, 0], method="constant")
AREAS = {
    "square": math.pi / 2,
    "small": 0.33,
    "gauss": 0.2 * math.sqrt(2 * math.pi),
    "stepwise": 15.0,
    "sampled": 0.6,
}
PULSES = {"square": square, "small": small, "gauss": gauss, "stepwise": stepwise, "sampled": SAMPLED}


def answers(model, grid):
    found = {b: float(exact.evolve(model, "down", grid, ["Z"], backend=b).expect["Z"][-1]) for b in BACKENDS}
    found["propagate"] = float(exact.propagate(model, POVM, "down", grid)[-1] @ POVM.coefficients("Z"))
    found["mean field"] = float(mean_field.evolve(model, "down", grid, ["Z"]).expect["Z"][-1])
    return found


BACKENDS = ("matrix", "qutip")


@pytest.mark.parametrize("name", PULSES)
def test_pulses_are_met_whatever_the_output_grid(name) -> None:
    pytest.importorskip("qutip")
    model = Lindbladian(1, [(PULSES[name], "X", 0)])
    # a lone qubit turns about x by twice the area of the pulse
    truth = -math.cos(2 * AREAS[name])
    for grid in ([0.0, 30.0], [0.0, 20.0, END, 30.0]):
        for which, value in answers(model, grid).items():
            assert abs(value - truth) < 1e-8, (which, grid)


def test_breaks_and_max_step_reach_what_the_looks_miss() -> None:
    """A pulse of a millionth of the span is seen where its place is said."""
    area = math.pi / 2
    model = Lindbladian(1, [(lambda t: area / 1e-5 if 3.3 < t < 3.3 + 1e-5 else 0.0, "X", 0)])
    with_breaks = exact.evolve(model, "down", [0.0, 10.0], ["Z"], backend="matrix", breaks=[3.3, 3.3 + 1e-5])
    assert float(with_breaks.expect["Z"][-1]) == pytest.approx(1, abs=1e-6)
    with pytest.raises(InvalidInputError, match="max_step"):
        exact.evolve(model, "down", [0.0, 10.0], ["Z"], max_step=-1)


@pytest.mark.parametrize("rate", [math.cos, torch.cos, np.cos, lambda t: 1 - 2 * (3 < t < 3.01)])
@pytest.mark.parametrize("which", ["matrix", "qutip", "propagate", "mean field"])
def test_a_rate_that_turns_negative_between_outputs_is_refused(rate, which) -> None:
    if which == "qutip":
        pytest.importorskip("qutip")
    model = Lindbladian(1, [(0.3, "X", 0)], [(rate, "sigma-", 0)])
    grid = [0.0, 2 * math.pi]
    solve = {
        "propagate": lambda: exact.propagate(model, POVM, "up", grid),
        "mean field": lambda: mean_field.evolve(model, "up", grid),
    }.get(which, lambda: exact.evolve(model, "up", grid, backend=which))
    with pytest.raises(LindbladianError, match="becomes negative at time 3"):
        solve()


@pytest.mark.parametrize("unit", [1e-12, 1e-9, 1e6, 1e12])
def test_the_unit_of_time_is_of_no_influence(unit) -> None:
    def model(u):
        return Lindbladian(
            2,
            [(0.5 / u, "ZZ", (0, 1)), (lambda t: math.cos(2 * t / u) / u, "X", "all")],
            [(1 / u, "sigma-", "all")],
        )

    ts = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    for solve in (
        lambda m, t: exact.evolve(m, "up", t, ["Z"], backend="matrix").expect["Z"],
        lambda m, t: exact.propagate(m, POVM, "up", t),
        lambda m, t: mean_field.evolve(m, "up", t, ["Z"]).expect["Z"],
    ):
        torch.testing.assert_close(solve(model(unit), ts * unit), solve(model(1.0), ts), atol=1e-9, rtol=0)
    steady = [exact.steady_state(systems.ising(2, 2 / u, 1 / u, 1 / u), ["Z"]) for u in (1.0, unit)]
    assert float(steady[0].expect["Z"]) == pytest.approx(float(steady[1].expect["Z"]), abs=1e-10)


def test_segments_join_at_jumps_and_reach_every_output() -> None:
    model = Lindbladian(1, [(square, "X", 0)])
    schedule = make_schedule(model, torch.tensor([0.0, 7.0, 30.0], dtype=torch.float64))
    assert [s.output for s in schedule.segments if s.output is not None] == [1, 2]
    for before, after in zip(schedule.segments[:-1], schedule.segments[1:], strict=True):
        assert 0 <= after.start - before.end < 1e-14 * 30
    values = {square(s.start) for s in schedule.segments} | {square(s.end) for s in schedule.segments}
    assert values == {0.0, 1.0}
    assert all(square(s.start) == square(s.end) for s in schedule.segments)


def test_evolutions_without_end_are_refused_before_work() -> None:
    with pytest.raises(InvalidInputError, match="too long"):
        exact.evolve(systems.ising(2), "up", [0.0, 1e9], backend="matrix")
    with pytest.raises(InvalidInputError, match="too long"):
        exact.propagate(systems.ising(2, decay=1e30), POVM, "up", [0.0, 1.0])


def test_trajectories_and_the_propagator_have_no_unit_of_time() -> None:
    def answers_in(unit: float) -> torch.Tensor:
        driven = Lindbladian(
            1, [(lambda t: math.cos(3 * t / unit) / unit, "X", 0)], [(1 / unit, "sigma-", 0)]
        )
        walk = trajectories.evolve(
            driven, "up", [0.0, unit], ["Z"], num_trajectories=20, generator=0, progress=False
        )
        named = Lindbladian(1, [("g*cos(w*t)", "X", 0)], [("k", "sigma-", 0)])
        law = Propagator(named, POVM, "up", [0.5 * unit, unit])
        p = law(g=1 / unit, w=2 / unit, k=0.5 / unit)
        return torch.cat([walk.expect["Z"], p.reshape(-1)])

    for unit in (1e-12, 1e12):
        torch.testing.assert_close(answers_in(unit), answers_in(1.0), atol=1e-9, rtol=0)


def test_a_jump_doesn_t_shorten_the_steps_beside_it() -> None:
    model = Lindbladian(1, [(lambda t: math.cos(2 * t) + (0.3 < t < 0.4), "X", 0)])
    schedule = make_schedule(model, torch.tensor([0.0, 1.0], dtype=torch.float64))
    longest = [schedule.longest(segment.start) for segment in schedule.segments]
    assert min(longest) > 0.02


def test_a_rate_is_met_where_it_is_evaluated() -> None:
    """A dip too narrow for the looks at coefficients is refused by whatever integrator comes upon it."""
    model = Lindbladian(1, [(0.3, "X", 0)], [(lambda t: -1.0 if t == 0.4567 else 1.0, "sigma-", 0)])
    operator = model.master_operator(POVM)
    p = torch.full((4,), 0.25, dtype=torch.float64)
    operator.apply(p, 0.4)
    with pytest.raises(LindbladianError, match=r"becomes negative at time 0\.4567"):
        operator.apply(p, 0.4567)


def test_negative_rates_of_parameters_are_refused() -> None:
    still = Propagator(Lindbladian(1, [], [("2*gamma", "sigma-", 0)]), POVM, "up", [1.0])
    moving = Propagator(Lindbladian(1, [], [("gamma*cos(w*t)", "sigma-", 0)]), POVM, "up", [1.0])
    with pytest.raises(LindbladianError, match="negative"):
        still(gamma=torch.tensor([0.5, -0.1], dtype=torch.float64))
    assert moving(gamma=1.0, w=1.0).shape == (1, 4)
    with pytest.raises(LindbladianError, match="becomes negative at time"):
        moving(gamma=1.0, w=torch.tensor([1.0, 2.0], dtype=torch.float64))
