"""Strength of the noise: numbers, functions, the taper, tables, and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from stochdyn import errors
from stochdyn.interpolants import Epsilon, Interpolant, TabulatedEpsilon
from stochdyn.interpolants.sampling import as_epsilon

T = torch.linspace(0, 1, 11, dtype=torch.float64)


def test_numbers_and_functions() -> None:
    it = Interpolant()
    assert as_epsilon(0.3, it)(T).tolist() == [0.3] * 11
    assert as_epsilon(torch.tensor(0.25), it)(T).tolist() == [0.25] * 11
    torch.testing.assert_close(as_epsilon(torch.sin, it)(T), T.sin())
    assert as_epsilon(0.0, it).vanishes
    assert as_epsilon(0.3, it).constant == 0.3
    assert as_epsilon(0.3, it, taper=0.1).constant is None
    level = as_epsilon(0.3, it)
    assert as_epsilon(level, it) is level


@pytest.mark.parametrize("path", ["linear", "one-sided-linear"])
def test_the_taper_keeps_the_score_term_bounded(path: str) -> None:
    """Epsilon over the scale of the noise is the same throughout the taper; inside nothing changes."""
    it = Interpolant(path)
    level = Epsilon(0.5, it, taper=0.1)
    t = torch.tensor([0.92, 0.95, 0.99, 0.9999], dtype=torch.float64)
    ratio = level(t) / it.noise.value(t)
    torch.testing.assert_close(ratio, ratio[:1].expand(4), rtol=1e-10, atol=0)
    assert float(level(torch.tensor(1.0))) == 0.0
    assert level(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)).tolist() == pytest.approx([0.5] * 3)


def test_the_optimal_noise_is_capped() -> None:
    level = as_epsilon("optimal", Interpolant("one-sided-linear"), largest=3.0)
    torch.testing.assert_close(level(T), ((1 - T) / T).nan_to_num(posinf=3.0).clamp(max=3.0))


def test_tables_are_interpolated_and_held_outside() -> None:
    table = TabulatedEpsilon([0.2, 0.4, 0.8], [1.0, 3.0, 0.0])
    values = table(torch.tensor([[0.0, 0.2], [0.3, 0.6], [0.8, 1.0]]))
    torch.testing.assert_close(values, torch.tensor([[1.0, 1.0], [2.0, 1.5], [0.0, 0.0]]))


def test_bad_input() -> None:
    it = Interpolant()
    for value in (-0.1, math.nan):
        with pytest.raises(errors.InvalidInputError):
            as_epsilon(value, it)
    with pytest.raises(errors.InvalidInputError, match="one number or a function"):
        as_epsilon(torch.ones(2), it)
    with pytest.raises(errors.InvalidInputError, match="taper must lie"):
        Epsilon(0.5, it, taper=0.6)
    with pytest.raises(errors.ShapeError, match="one value a time"):
        TabulatedEpsilon([0.0, 1.0], [1.0])
    with pytest.raises(errors.InvalidInputError, match="not be negative"):
        TabulatedEpsilon([0.0, 1.0], [1.0, -1.0])
