"""What the plots of learned scores draw."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError
from stochdyn.interpolants import FunctionPotential, PotentialNetwork, ScoreMatching
from stochdyn.interpolants.score_plots import plot_laws, plot_residual_profile
from tests.interpolants.laws import F64, gaussian, processes


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def model(d: int):
    truth = gaussian(processes()["ou"], d)
    phi = PotentialNetwork(truth.process, d, 4, 1, truth.means[0], 0.2).double()
    return ScoreMatching(truth.process, phi), truth.sample(torch.tensor(0.01, dtype=F64), 3000)


def test_laws_on_the_line_are_normalised_histograms() -> None:
    diff, data = model(1)
    (ax,) = plot_laws(diff.generator(), data, num_samples=3000, num_steps=10, bins=30, bound=5.0)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["data", "ODE", "SDE"]
    for patch in ax.patches:
        corners = patch.get_xy()
        area = 0.5 * abs(
            np.dot(corners[:, 0], np.roll(corners[:, 1], 1))
            - np.dot(corners[:, 1], np.roll(corners[:, 0], 1))
        )
        assert area == pytest.approx(1.0, abs=0.02)
        height, middle = corners[:, 1].max(), corners[corners[:, 1].argmax(), 0]
        assert middle == pytest.approx(1.3, abs=0.5)
        assert height == pytest.approx((2 * np.pi * 0.21) ** -0.5, rel=0.25)


def test_laws_in_the_plane_are_three_maps() -> None:
    diff, data = model(2)
    axes = plot_laws(diff.generator(), data, num_samples=500, num_steps=5, bins=8)
    assert [ax.get_title() for ax in axes] == ["data", "ODE", "SDE"]
    assert all(ax.collections[0].get_array().size == 64 for ax in axes)


def test_profile_shows_the_residual_in_its_units() -> None:
    truth = gaussian(processes()["ou"], 1)
    process = truth.process

    def drifting(t, x):
        return truth.log_prob(t, x) + 0.5 * process.log_snr(t).squeeze(-1)

    diff = ScoreMatching(process, FunctionPotential(process, drifting))
    ax = plot_residual_profile(diff, truth.sample(torch.tensor(0.0, dtype=F64), 20), num_levels=5)
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(y, 0.5, rtol=1e-6)
    np.testing.assert_allclose(x, process.log_snr(process.grid(4)).numpy())


def test_bad_input() -> None:
    diff, data = model(2)
    with pytest.raises(ShapeError):
        plot_laws(diff.generator(), data[:, :1])
    with pytest.raises(EmptyDataError):
        plot_laws(diff.generator(), data[:0])
    with pytest.raises(InvalidInputError, match="dimension"):
        plot_laws(model(3)[0].generator(), model(3)[1])
    with pytest.raises(InvalidInputError, match="num_levels"):
        plot_residual_profile(diff, data, num_levels=1)
