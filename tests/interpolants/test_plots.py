"""Pictures show the numbers that they are given."""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch

from stochdyn import errors
from stochdyn.interpolants.plots import plot_densities, plot_trajectories

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close() -> object:
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def test_histograms_and_densities_share_a_scale() -> None:
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    laws = {"draws": x, "density": lambda y: -0.5 * y.square().sum(-1) - math.log(2 * math.pi)}
    axes = plot_densities(laws, (-3.0, 3.0, -4.0, 4.0), bins=16)
    images = [np.asarray(ax.images[0].get_array()) for ax in axes]
    assert [ax.get_title() for ax in axes] == ["draws", "density"]
    assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim()
    error = np.sqrt(images[1] / (20_000 * (6 / 16) * (8 / 16)))
    assert np.all(np.abs(images[0] - images[1]) < 5 * error + 0.012)


def test_paths_run_from_start_to_end() -> None:
    path = torch.randn(6, 9, 2)
    ax = plot_trajectories(path, num_paths=4)
    assert len(ax.lines) == 4
    np.testing.assert_allclose(ax.collections[0].get_offsets(), path[0, :4])
    np.testing.assert_allclose(ax.collections[1].get_offsets(), path[-1, :4])


def test_bad_input() -> None:
    with pytest.raises(errors.ShapeError, match="on the plane"):
        plot_densities({"a": torch.zeros(3, 3)}, (0, 1, 0, 1))
    with pytest.raises(errors.InvalidInputError, match="left, right, bottom, top"):
        plot_densities({"a": torch.zeros(3, 2)}, (1, 0, 0, 1))
    with pytest.raises(errors.EmptyDataError):
        plot_densities({}, (0, 1, 0, 1))
    with pytest.raises(errors.ShapeError, match="on the plane"):
        plot_trajectories(torch.zeros(3, 2, 3))
