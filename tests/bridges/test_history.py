"""Histories and pictures hold what happened."""

from __future__ import annotations

import matplotlib as mpl
import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import (
    History,
    LinearDrift,
    SchrodingerBridge,
    Snapshots,
    plot_history,
    plot_trajectories,
    refine,
)

mpl.use("Agg")


@pytest.fixture(scope="module")
def fit() -> sd.bridges.Refinement:
    g = torch.Generator().manual_seed(0)
    clouds = [torch.randn(15, 2, generator=g, dtype=torch.float64) * 0.5 + i for i in range(3)]
    return refine(Snapshots([0.0, 1.0, 2.0], clouds), LinearDrift(2), 0.5, max_iterations=3, tolerance=1e-09)


def test_records_stack_into_arrays(fit) -> None:
    history = fit.history
    count = len(history)
    assert history.objective.shape == (count + 1,)
    assert history.trace.shape == (2 * count + 1,)
    assert history.trace[::2].equal(history.objective)
    assert history.parameters["matrix"].shape == (count, 2, 2)
    torch.testing.assert_close(history.parameters["shift"][-1], fit.parameters["shift"])
    assert history.marginal_errors.shape == history.seconds.shape == history.diffusion.shape == (count,)
    assert float(history.marginal_errors.max()) < 1e-6
    assert history[-1].objective == float(history.objective[-2])
    assert fit.objective == history.final_objective


def test_the_picture_shows_every_half_step_and_parameter(fit) -> None:
    left, right = fit.history.plot(truth={"missing": 1.0})
    assert len(left.lines[0].get_xdata()) == 2 * len(fit.history)
    assert len(right.lines) == 6
    assert right.get_legend() is not None
    mpl.pyplot.close("all")


def test_known_values_are_drawn() -> None:
    history = History()
    for k in range(3):
        value = torch.tensor(float(k))
        history.iterations.append(sd.bridges.Iteration(3.0 - k, 2.5 - k, 0.0, {"rate": value}, 1.0, 0.1))
    history.final_objective = 0.0
    _, right = plot_history(history, truth={"rate": 2.0})
    assert len(right.lines) == 2
    assert right.lines[1].get_ydata()[0] == 2.0
    mpl.pyplot.close("all")


def test_trajectories_and_snapshots_are_drawn(fit) -> None:
    axis = plot_trajectories(fit.measure, fit.snapshots, 7, held_out=[fit.snapshots[1]])
    assert len(axis.lines) == 7
    assert len(axis.collections) == 4
    mpl.pyplot.close("all")
    line = SchrodingerBridge(Snapshots([0.0, 1.0], torch.zeros(2, 3, 1)), diffusion=1.0).solve()
    assert plot_trajectories(line, line.snapshots, 2).get_xlabel() == "t"
    one = plot_trajectories(
        fit.reference, fit.snapshots, 3, held_out=fit.snapshots[1]
    )  # parameters are part of its graph
    assert len(one.lines) == 3
    mpl.pyplot.close("all")


def test_bad_pictures_are_refused(fit) -> None:
    with pytest.raises(sd.errors.EmptyDataError):
        plot_history(History())
    with pytest.raises(sd.errors.ShapeError, match="component"):
        plot_trajectories(fit.measure, fit.snapshots, components=(0, 5))
