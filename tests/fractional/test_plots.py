"""What the plot of a Hurst curve draws."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from stochdyn.errors import ShapeError
from stochdyn.fractional import HurstCurve
from stochdyn.fractional.plots import plot_hurst_curve

TS = torch.linspace(0, 1, 5)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_a_curve_and_its_truth() -> None:
    curve = HurstCurve(torch.tensor([-1.0, 1.0]), horizon=1.0)
    ax = plot_hurst_curve(TS, curve, truth=lambda t: 0.3 + 0.4 * t)
    mine, truth = ax.get_lines()
    np.testing.assert_allclose(mine.get_ydata(), curve(TS).numpy())
    np.testing.assert_allclose(truth.get_ydata(), 0.3 + 0.4 * TS.numpy(), rtol=1e-6)
    assert ax.get_ylim() == (0.0, 1.0)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["posterior", "truth"]


def test_draws_become_a_median_and_an_interval() -> None:
    draws = 0.5 + 0.01 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    ax = plot_hurst_curve(TS, draws, level=0.8)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.5 - 1.28 * 0.01, abs=0.003)
    assert band.max() == pytest.approx(0.5 + 1.28 * 0.01, abs=0.003)
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), draws.median(1).values.numpy(), atol=1e-4)


def test_given_axes_are_used_and_sizes_checked() -> None:
    _, ax = plt.subplots()
    assert plot_hurst_curve(TS, torch.full((5,), 0.5), ax=ax) is ax
    with pytest.raises(ShapeError):
        plot_hurst_curve(TS, torch.full((4,), 0.5))
