"""Figures show what they should."""

from __future__ import annotations

import dataclasses

import matplotlib
import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.povm import Evolution, FullTable, plot_evolution, plot_phase_diagram

matplotlib.use("Agg")


@pytest.fixture
def run() -> Evolution:
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    steps = {"t": torch.linspace(0.1, 1, 10), "residual": torch.linspace(0, 0.1, 10)}
    expect = {"Z": torch.cos(times), "X": torch.sin(times)}
    stderr = {"Z": torch.full((5,), 0.01), "X": torch.zeros(5)}
    return Evolution(times, expect, stderr, times, torch.zeros(5, 4), steps, FullTable(1), "tdvp")


def test_an_evolution_is_drawn_with_bars_and_residual(run: Evolution) -> None:
    figure = run.plot()
    top, bottom = figure.axes
    assert [t.get_text() for t in top.get_legend().get_texts()] == ["Z", "X"]
    bars = top.containers[0].lines
    assert bars[0].get_ydata().tolist() == run.expect["Z"].tolist()
    low, high = bars[1][0].get_ydata()[2], bars[1][1].get_ydata()[2]
    assert float(high - low) == pytest.approx(0.04, abs=1e-6)
    assert bottom.lines[0].get_xdata().tolist() == run.steps["t"].tolist()
    matplotlib.pyplot.close(figure)


def test_exact_answers_are_lines_behind_points(run: Evolution) -> None:
    class Exact:
        times = run.times
        expect = {"Z": run.expect["Z"] + 0.1}  # noqa: RUF012

    figure = plot_evolution(run, Exact())
    drawn = [
        line.get_ydata().tolist() for line in figure.axes[0].lines if hasattr(line.get_ydata(), "tolist")
    ]
    assert (run.expect["Z"] + 0.1).tolist() in drawn
    matplotlib.pyplot.close(figure)
    with pytest.raises(InvalidInputError, match="two axes"):
        plot_evolution(run, axes=[None])


def test_a_phase_diagram_has_points_lines_and_names() -> None:
    figure = plot_phase_diagram(
        [0.5, 1.0], {"Z": [-0.9, -0.8]}, {"Z": [0.01, 0.02]}, {"Z": [-0.91, -0.81]}, "g"
    )
    axes = figure.axes[0]
    assert axes.get_xlabel() == "g"
    assert list(axes.lines[0].get_ydata()) == [-0.91, -0.81]
    assert list(axes.containers[0].lines[0].get_ydata()) == [-0.9, -0.8]
    matplotlib.pyplot.close(figure)
    with pytest.raises(InvalidInputError, match="one value for each parameter"):
        plot_phase_diagram([0.5, 1.0], {"Z": [0.0]})


def test_complex_means_are_drawn_by_their_parts(run: Evolution) -> None:
    z = torch.exp(1j * run.times)
    complex_run = dataclasses.replace(run, expect={"a": z}, stderr={"a": torch.full((5,), 0.01)})
    figure = plot_evolution(complex_run, complex_run)
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["Re a", "Im a"]
    bars = figure.axes[0].containers
    assert bars[1].lines[0].get_ydata().tolist() == z.imag.tolist()
    matplotlib.pyplot.close(figure)
    figure = plot_phase_diagram([0.5, 1.0], {"a": [1 + 2j, 3 - 1j]}, {"a": [0.1, 0.1]}, {"a": [1j, 2j]})
    drawn = [list(one.lines[0].get_ydata()) for one in figure.axes[0].containers]
    assert drawn == [[1, 3], [2, -1]]
    matplotlib.pyplot.close(figure)


def test_a_phase_diagram_over_names_and_tables() -> None:
    pandas = pytest.importorskip("pandas")
    figure = plot_phase_diagram(["weak", "strong"], {"Z": [-0.9, -0.8]})
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["weak", "strong"]
    days = pandas.Series(pandas.to_datetime(["2024-01-01", "2024-01-02"]))
    dated = plot_phase_diagram(days, pandas.DataFrame({"Z": [-0.9, -0.8]}))
    assert list(dated.axes[0].containers[0].lines[0].get_ydata()) == [-0.9, -0.8]
    matplotlib.pyplot.close("all")
