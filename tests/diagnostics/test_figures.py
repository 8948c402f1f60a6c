"""Tests of what all figures share."""

import matplotlib.pyplot as plt
import pytest

from stochdyn.diagnostics.figures import add_legend, as_axes


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def drawn(ax, entries):
    for k in range(entries):
        ax.plot([0, 1], [k, k + 1], label=f"curve {k}")
    add_legend(ax)
    ax.figure.canvas.draw()
    return ax.get_legend().get_window_extent(), ax.get_window_extent(), ax.figure.bbox


@pytest.mark.parametrize("entries", [1, 2, 4, 5, 6, 8, 12])
@pytest.mark.parametrize("title", ["", "a title"])
def test_a_legend_covers_no_data_and_stays_in_the_figure(entries, title):
    ax = as_axes(None)
    drawn(ax, entries)
    ax.set_title(title)  # after the plot, as one does
    ax.figure.canvas.draw()
    legend, axes, figure = ax.get_legend().get_window_extent(), ax.get_window_extent(), ax.figure.bbox
    assert legend.x0 >= axes.x1 - 1
    assert not legend.overlaps(ax.title.get_window_extent())
    assert legend.x0 >= figure.x0
    assert legend.x1 <= figure.x1 + 1
    assert legend.y1 <= figure.y1 + 1


def test_axes_without_a_layout_engine_keep_their_legend_inside():
    _, ax = plt.subplots()
    legend, axes, _ = drawn(ax, 2)
    assert axes.x0 <= legend.x0
    assert legend.x1 <= axes.x1
    assert legend.y1 <= axes.y1


def test_given_axes_are_kept_and_a_legend_without_entries_is_none():
    ax = as_axes(None, (3, 2))
    assert as_axes(ax) is ax
    assert tuple(ax.figure.get_size_inches()) == (3, 2)
    add_legend(ax)
    assert ax.get_legend() is None
