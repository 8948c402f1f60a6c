"""The gap between ODE and SDE: none for Gaussians, a known one on the line, and the floor of sampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.errors import EmptyDataError, InvalidInputError, NonFiniteError, ShapeError
from stochdyn.interpolants import OU, ReverseDiffusion, histogram_w2, ode_sde_gap
from tests.interpolants.laws import F64, gaussian, processes


def shifted(c: float) -> ReverseDiffusion:
    """Stationary OU with its score off by a constant: ODE and SDE shift by different, known amounts."""
    process = OU(horizon=3.0, start=1e-3).double()
    return ReverseDiffusion(process, lambda t, x: -2 * x + c, 1, torch.empty(0, dtype=F64))


def test_gap_of_a_constant_error_is_known() -> None:
    """dX = (-x + 2x - c)..: backwards the SDE obeys m' = -m + c and the ODE m' = c / 2 for the mean."""
    rev, c = shifted(0.8), 0.8
    span = torch.tensor(rev.process.horizon - rev.process.start, dtype=F64)
    want = abs(0.5 * c * span - c * (1 - (-span).exp()))
    g = torch.Generator().manual_seed(0)
    made = ode_sde_gap(rev, 4000, num_steps=300, details=True, denoise=False, generator=g)
    assert not isinstance(made, float)
    # Both laws have the variance 1/2, so the distance is that of the means: standard error sqrt(2 * (1/2) / n).
    assert abs(made.distance - want) < 5 / 4000**0.5 + 0.01
    assert abs(made.corrected - want) < 5 / 4000**0.5 + 0.01
    assert made.floor < 0.1


def test_an_exact_score_leaves_the_floor() -> None:
    truth = gaussian(processes()["ou"])
    rev = ReverseDiffusion(truth.process, truth.score, 2, torch.empty(0, dtype=F64))
    g = torch.Generator().manual_seed(0)
    made = ode_sde_gap(rev, 400, num_steps=60, details=True, generator=g)
    assert not isinstance(made, float)
    assert made.distance < 1.5 * made.floor
    assert made.corrected < 0.7 * made.distance


def test_histograms_measure_shifts_and_ignore_what_is_outside() -> None:
    torch.manual_seed(0)
    x = 0.5 * torch.randn(200_000, 2)
    assert histogram_w2(x, x) < 1e-6
    moved = histogram_w2(x, x + torch.tensor([0.4, -0.4]), bound=4.0, bins=40)  # two cells either way
    assert moved == pytest.approx(0.4 * 2**0.5, abs=1e-3)
    outlier = torch.cat([x, torch.full((1000, 2), 50.0)])
    assert histogram_w2(x, outlier, bins=16) < 1e-6


def test_bad_input() -> None:
    rev = shifted(0.0)
    with pytest.raises(InvalidInputError, match="num_samples must"):
        ode_sde_gap(rev, 1)
    with pytest.raises(InvalidInputError, match="steps"):
        ode_sde_gap(rev, 10, num_steps=0)
    x: Tensor = torch.zeros(3, 2)
    with pytest.raises(ShapeError):
        histogram_w2(x, torch.zeros(3, 3))
    with pytest.raises(EmptyDataError):
        histogram_w2(x, x[:0])
    with pytest.raises(NonFiniteError):
        histogram_w2(x, x + float("nan"))
    with pytest.raises(InvalidInputError, match="bound"):
        histogram_w2(x, x, bound=0.0)
    with pytest.raises(InvalidInputError, match="square"):
        histogram_w2(x, x + 9)
