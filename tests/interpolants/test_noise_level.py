"""Strength of the noise: numbers, functions, steps, tables, and bad input."""

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
    assert as_epsilon(torch.sin, it).constant is None
    level = as_epsilon(0.3, it)
    assert as_epsilon(level, it) is level


@pytest.mark.parametrize("path", ["linear", "one-sided-linear"])
def test_epsilon_of_a_step_is_held_where_the_noise_is_small(path: str) -> None:
    """In a step of length h it is the middle's, or ``max_rate`` times the squared scale of the noise over h."""
    it = Interpolant(path)
    middles = 0.5 * (T[1:] + T[:-1])
    wanted = torch.minimum(torch.tensor(0.4), 0.5 * it.noise.square(middles) / 0.1)
    assert as_epsilon(0.4, it).of_steps(T, 0.5) == pytest.approx(wanted.tolist())
    assert as_epsilon(0.4, it).of_steps(T, math.inf) == pytest.approx([0.4] * 10)
    assert as_epsilon(torch.sin, it).of_steps(T.flip(0), math.inf) == pytest.approx(
        middles.sin().flip(0).tolist()
    )


def test_the_optimal_noise_is_capped() -> None:
    it = Interpolant("one-sided-linear")
    level = Epsilon(it.optimal_epsilon, it, 3.0)
    torch.testing.assert_close(level(T), ((1 - T) / T).nan_to_num(posinf=3.0).clamp(max=3.0))
    assert float(as_epsilon("optimal", it)(torch.tensor(0.0))) == 10.0


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
    with pytest.raises(errors.InvalidInputError, match="largest must be greater"):
        Epsilon(0.5, it, largest=0.0)
    with pytest.raises(errors.InvalidInputError, match="must not be negative"):
        as_epsilon(lambda t: t - 0.5, it).of_steps(T, 0.5)
    with pytest.raises(errors.ShapeError, match="one value per time"):
        TabulatedEpsilon([0.0, 1.0], [1.0])
    with pytest.raises(errors.InvalidInputError, match="not be negative"):
        TabulatedEpsilon([0.0, 1.0], [1.0, -1.0])
