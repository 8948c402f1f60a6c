"""What the plots of calibration and weights draw."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from stochdyn.diagnostics import SBCResult, ecdf_band, pareto_smooth, plot_coverage, plot_khat, plot_rank_ecdf
from stochdyn.errors import InvalidInputError, ShapeError, TooFewDrawsError
from tests.diagnostics.test_plots import edges, legend


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def result():
    rng = np.random.default_rng(0)
    narrow = (np.clip(rng.normal(0.5, 0.6, 200), 0, 0.999) * 20).astype(int)
    return SBCResult({"exact": rng.integers(0, 20, 200), "narrow": narrow}, num_draws=19)


def test_rank_curves_are_distribution_functions_less_the_diagonal(result):
    ax = plot_rank_ecdf(result)
    curves = {line.get_label(): line.get_data() for line in ax.lines}
    for name in ("exact", "narrow"):
        x, y = curves[name]
        np.testing.assert_allclose(x, np.arange(21) / 20)
        by_hand = [(result.ranks[name] < k).mean() - k / 20 for k in range(21)]
        np.testing.assert_allclose(y, by_hand, atol=1e-12)


def test_the_band_of_rank_curves_is_the_simultaneous_one(result):
    ax = plot_rank_ecdf(result, level=0.9)
    x, low, high = edges(ax.collections[0])
    band = ecdf_band(200, np.arange(1, 20) / 20, 0.9)
    np.testing.assert_allclose(x[1:-1], band.points)
    np.testing.assert_allclose(low[1:-1], band.lower - band.points, atol=1e-12)
    np.testing.assert_allclose(high[1:-1], band.upper - band.points, atol=1e-12)
    assert legend(ax) == ["90 % band", "exact", "narrow"]
    assert ax.get_xlim() == (0, 1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("fractional rank of the truth", "ECDF difference")


def test_the_curve_leaves_the_band_where_the_test_says_so(result):
    ax = plot_rank_ecdf(result)
    _, low, high = edges(ax.collections[0])
    inside = {
        line.get_label(): bool(((line.get_ydata() >= low - 1e-9) & (line.get_ydata() <= high + 1e-9)).all())
        for line in ax.lines[:2]
    }
    assert inside == {name: test.inside for name, test in result.uniformity().items()}
    assert inside == {"exact": True, "narrow": False}


def test_only_the_named_quantities_are_drawn(result):
    assert legend(plot_rank_ecdf(result, ["narrow"])) == ["95 % band", "narrow"]
    assert legend(plot_coverage(result, ["exact"])) == ["± 2 standard errors", "exact"]


def test_coverage_curves_are_the_tables(result):
    ax = plot_coverage(result, num_levels=9)
    tables = result.coverage([i / 10 for i in range(1, 10)])
    curves = {line.get_label(): line for line in ax.lines}
    for name, table in tables.items():
        np.testing.assert_allclose(curves[name].get_xdata(), table.nominal)
        np.testing.assert_allclose(curves[name].get_ydata(), table.observed)
    x, low, high = edges(ax.collections[0])
    np.testing.assert_allclose(x[1:-1], tables["exact"].nominal)
    np.testing.assert_allclose(high[1:-1] - low[1:-1], 4 * tables["exact"].stderr, atol=1e-12)
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("nominal coverage", "observed coverage")


def test_weights_are_drawn_beside_their_smoothed_tail():
    lw = -0.9 * torch.log(torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    ax = plot_khat(lw - 40)
    raw, smooth = ax.lines
    np.testing.assert_allclose(raw.get_xdata(), (np.arange(2000) + 0.5) / 2000)
    weights = np.sort(lw.exp().numpy())[::-1]
    np.testing.assert_allclose(raw.get_ydata(), weights / weights.mean(), rtol=1e-9)
    smoothed, khat = pareto_smooth(lw)
    expected = np.sort(smoothed.exp().numpy())[::-1] / weights.mean()
    np.testing.assert_allclose(smooth.get_ydata(), expected, rtol=1e-9)
    assert ax.get_title() == f"k-hat = {khat:.2f}: unreliable"
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert legend(ax) == ["weights", "Pareto smoothed"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("fraction of draws above", "weight / mean weight")


@pytest.mark.parametrize(("k", "verdict"), [(0.2, "reliable"), (0.6, "usable"), (1.0, "unreliable")])
def test_the_verdict_follows_khat(k, verdict):
    levels = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    assert plot_khat(-k * torch.log(levels)).get_title().endswith(f": {verdict}")


def test_axes_are_taken_and_given_back(result):
    _, axes = plt.subplots(1, 3)
    assert plot_rank_ecdf(result, ax=axes[0]) is axes[0]
    assert plot_coverage(result, ax=axes[1]) is axes[1]
    assert plot_khat(torch.randn(200), ax=axes[2]) is axes[2]
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize("plot", [plot_rank_ecdf, plot_coverage])
def test_an_unknown_quantity_is_named(result, plot):
    with pytest.raises(InvalidInputError, match="no such quantity; got slope; expected exact, narrow"):
        plot(result, ["slope"])


def test_bad_weights_are_named():
    with pytest.raises(ShapeError, match="one axis"):
        plot_khat(torch.zeros(2, 200))
    with pytest.raises(TooFewDrawsError, match="got 50"):
        plot_khat(torch.zeros(50))
