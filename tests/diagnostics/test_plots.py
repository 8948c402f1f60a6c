"""What the plots draw: artists, their data, labels, legends and limits."""

from __future__ import annotations

import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from scipy.integrate import trapezoid

import stochdyn as sd
from stochdyn.diagnostics import plot_density, plot_paths, plot_training
from stochdyn.errors import (
    EmptyDataError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TimeGridError,
    TooFewDrawsError,
)
from stochdyn.run import FitResult

TS = torch.linspace(0.0, 2.0, 9)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def draws():
    return torch.randn(300, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(-1)


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def edges(collection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Abscissa, lower and upper edge of a filled band."""
    vertices = collection.get_paths()[0].vertices
    x = np.unique(vertices[:, 0])
    low = np.array([vertices[vertices[:, 0] == at, 1].min() for at in x])
    high = np.array([vertices[vertices[:, 0] == at, 1].max() for at in x])
    return x, low, high


# ------------------------------------------------------------------------------------------------ paths


def test_bands_of_the_fan_are_the_quantiles(draws):
    ax = plot_paths(TS, draws, levels=(0.5, 0.9))
    assert len(ax.collections) == 2
    for collection, level in zip(ax.collections, (0.9, 0.5), strict=True):  # the wide one lies below
        x, low, high = edges(collection)
        np.testing.assert_allclose(x, TS.numpy(), atol=1e-6)
        np.testing.assert_allclose(low, np.quantile(draws, (1 - level) / 2, axis=0), atol=1e-9)
        np.testing.assert_allclose(high, np.quantile(draws, (1 + level) / 2, axis=0), atol=1e-9)


def test_the_line_of_the_fan_is_the_median(draws):
    ax = plot_paths(TS, draws)
    assert len(ax.lines) == 1
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.quantile(draws, 0.5, axis=0), atol=1e-9)


def test_the_fan_names_what_it_shows(draws):
    ax = plot_paths(
        TS, draws, observations=([0.5], [1.0]), forecast_from=1.5, levels=(0.8,), label="smoothed"
    )
    assert legend(ax) == ["smoothed: 80 %", "smoothed: median", "data", "forecast"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time", "value")
    assert ax.get_xlim() == (0.0, 2.0)


def test_data_are_points_on_top_and_missing_ones_are_left_out(draws):
    when, what = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, torch.nan, 9.0])
    ax = plot_paths(TS, draws, observations=(when, what))
    data = ax.lines[-1]
    np.testing.assert_array_equal(data.get_xydata(), [[0.0, 3.0], [2.0, 9.0]])
    assert (data.get_marker(), data.get_linestyle()) == (".", "None")
    assert data.get_zorder() > max(c.get_zorder() for c in ax.collections)
    assert ax.get_ylim()[1] > 9.0


def test_the_forecast_is_shaded_from_its_start_to_the_end(draws):
    ax = plot_paths(TS, draws, forecast_from=1.25)
    (patch,) = ax.patches
    box = patch.get_extents().transformed(ax.transData.inverted())
    assert (box.x0, box.x1) == pytest.approx((1.25, 2.0))
    bottom, top = ax.get_ylim()
    assert (box.y0, box.y1) == pytest.approx((bottom, top))


def test_some_draws_can_be_drawn_as_lines(draws):
    ax = plot_paths(TS, draws, num_lines=3)
    assert len(ax.lines) == 4
    np.testing.assert_array_equal(ax.lines[2].get_ydata(), draws[1].numpy())
    assert len(legend(ax)) == 3


def test_two_fans_share_axes(draws):
    ax = plot_paths(TS, draws, label="one", levels=(0.5,))
    again = plot_paths(TS, draws + 10, label="two", levels=(0.5,), colour="C1", ax=ax)
    assert again is ax
    assert legend(ax) == ["one: 50 %", "one: median", "two: 50 %", "two: median"]
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ts": TS.flip(0)}, TimeGridError, "increase strictly"),
        ({"ts": TS[:4]}, ShapeError, r"draws don't fit ts; got shape \(300, 9\); expected \(draws, 4\)"),
        ({"draws": torch.zeros(5, 8, 2)}, ShapeError, "draws don't fit"),
        ({"draws": torch.zeros(1, 9)}, TooFewDrawsError, "got 1"),
        ({"draws": torch.full((4, 9), torch.nan)}, NonFiniteError, "draws"),
        ({"levels": (0.5, 1.0)}, InvalidInputError, "levels"),
        ({"levels": ()}, InvalidInputError, "levels"),
        ({"observations": ([1.0], [1.0, 2.0])}, ShapeError, "observations don't fit"),
        ({"num_lines": -1}, InvalidInputError, "num_lines"),
        ({"forecast_from": 3.0}, TimeGridError, r"forecast_from must lie inside.*expected \[0, 2\]"),
    ],
)
def test_bad_fans_are_refused_before_anything_is_drawn(draws, change, error, message):
    _, ax = plt.subplots()
    with pytest.raises(error, match=message):
        plot_paths(**{"ts": TS, "draws": draws, "ax": ax, **change})
    assert not ax.lines
    assert not ax.collections


# ------------------------------------------------------------------------------------------------ training


def test_a_training_curve_shows_each_step_and_the_running_mean():
    losses = torch.arange(10.0) ** 2
    ax = plot_training(losses, window=4)
    raw, smooth = ax.lines
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(1, 11))
    np.testing.assert_array_equal(raw.get_ydata(), losses.numpy())
    np.testing.assert_array_equal(smooth.get_xdata(), np.arange(4, 11))
    np.testing.assert_allclose(smooth.get_ydata(), np.convolve(losses, np.ones(4) / 4, "valid"))
    assert legend(ax) == ["each step", "mean of 4 steps"]
    assert ax.get_xlabel() == "step"


@pytest.mark.parametrize(
    ("bound", "label"),
    [
        ("evidence_lower", "negative ELBO (nats)"),
        ("kl_upper", "upper bound on the divergence (nats)"),
        ("residual", "residual"),
        ("surrogate", "loss"),
        (None, "loss"),
    ],
)
def test_a_training_curve_says_what_the_loss_means(bound, label):
    assert plot_training(torch.rand(20), bound=bound).get_ylabel() == label


def test_a_result_of_fit_brings_its_own_meaning():
    result = FitResult(torch.rand(100), torch.nn.Identity(), 1.0, bound="evidence_lower")
    ax = plot_training(result)
    assert ax.get_ylabel() == "negative ELBO (nats)"
    np.testing.assert_allclose(ax.lines[0].get_ydata(), result.losses.numpy())
    assert legend(ax)[1] == "mean of 2 steps"


def test_the_first_losses_do_not_squash_the_rest():
    losses = torch.cat([torch.full((10,), 1e6), torch.rand(190)])
    assert plot_training(losses, window=1).get_ylim()[1] > 1e6  # a smoothed loss is always in sight
    assert plot_training(losses[5:], window=40).get_ylim()[1] < 2e5


def test_infinite_losses_leave_gaps():
    losses = torch.rand(50)
    losses[20] = torch.inf
    ax = plot_training(losses, window=1)
    assert ax.get_ylim()[1] < 2


@pytest.mark.parametrize(
    ("losses", "options", "error", "message"),
    [
        (torch.zeros(0), {}, EmptyDataError, "losses is empty"),
        (torch.zeros(3, 2), {}, ShapeError, r"expected \(steps,\)"),
        (torch.zeros(3), {"bound": "elbo"}, InvalidInputError, "bound is unknown; got 'elbo'"),
        (torch.zeros(3), {"window": 0}, InvalidInputError, "window"),
    ],
)
def test_bad_curves_are_named(losses, options, error, message):
    with pytest.raises(error, match=message):
        plot_training(losses, **options)


# ------------------------------------------------------------------------------------------------ densities


def test_a_density_integrates_to_one_and_its_shade_to_the_level(draws):
    sample = draws[:, -1]
    ax = plot_density(sample, level=0.8, xlabel="rate")
    x, y = ax.lines[0].get_data()
    assert trapezoid(y, x) == pytest.approx(1, abs=2e-3)
    shade_x, low, high = edges(ax.collections[0])
    np.testing.assert_allclose(shade_x[[0, -1]], np.quantile(sample, [0.1, 0.9]))
    assert (low == 0).all()
    assert trapezoid(high, shade_x) == pytest.approx(0.8, abs=0.06)  # the kernel widens
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rate", "density")
    assert ax.get_ylim()[0] == 0


def test_references_are_named_vertical_lines(draws):
    ax = plot_density(draws[:, -1], references={"truth": 0.5, "maximum likelihood": -1.0}, label="ours")
    assert legend(ax) == ["ours", "90 %", "truth", "maximum likelihood"]
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [0.5, -1.0]
    assert ax.lines[1].get_linestyle() != ax.lines[2].get_linestyle()


def test_chains_are_joined(draws):
    ax = plot_density(draws[:, -1].reshape(3, 100))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), plot_density(draws[:, -1]).lines[0].get_ydata())


@pytest.mark.parametrize(
    ("sample", "options", "error", "message"),
    [
        (torch.zeros(9), {}, TooFewDrawsError, "got 9"),
        (torch.zeros(20), {}, InvalidInputError, "all draws are equal"),
        (torch.full((20,), torch.nan), {}, NonFiniteError, "draws"),
        (torch.rand(20), {"level": 0.0}, InvalidInputError, "levels"),
    ],
)
def test_bad_densities_are_named(sample, options, error, message):
    with pytest.raises(error, match=message):
        plot_density(sample, **options)


def test_importing_the_plots_imports_no_matplotlib():
    code = "import sys, stochdyn.diagnostics.plots as p; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------ laws and forms


def test_a_fan_of_a_law_is_that_of_its_paths():
    law = sd.DiffusionMeasure(torch.zeros(2), sd.SDE(lambda t, x: -x, 1.0))
    path = law.sample(TS, 500, generator=3)
    by_law = plot_paths(TS, law, num_samples=500, generator=3, component=1)
    by_path = plot_paths(TS.tolist(), path, component=1)
    by_array = plot_paths(TS.numpy(), path.x[..., 1].numpy())
    for ax in (by_law, by_path):
        for found, expected in zip(ax.collections, by_array.collections, strict=True):
            for a, b in zip(edges(found), edges(expected), strict=True):
                np.testing.assert_allclose(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"component": 2}, "no such component; got 2; expected below 2"),
        ({"component": -1}, "component must be"),
        ({"num_samples": 1}, "num_samples must be"),
        ({"levels": 0.9}, "levels must be a list"),
        ({"levels": ("a",)}, "levels must be a real number"),
        ({"observations": 3}, "observations must be a pair"),
        ({"forecast_from": "late"}, "forecast_from must be a real number"),
        ({"generator": "seed"}, "generator must be"),
    ],
)
def test_bad_options_of_a_fan_are_named(change, message):
    law = sd.DiffusionMeasure(torch.zeros(2), sd.SDE(lambda t, x: -x, 1.0))
    with pytest.raises(InvalidInputError, match=message):
        plot_paths(TS, law, **change)
