"""The branching population: its fork, its growth, reproducibility and bad input."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.datasets import branching_cells


def test_cells_start_undecided_and_end_on_both_branches():
    cells = branching_cells(num_cells=1000)
    shares = [torch.bincount(f, minlength=3) / 1000 for f in cells.fates]
    assert shares[0][0] == 1
    assert shares[-1][0] < 0.1
    assert shares[-1][1:].min() > 0.2
    assert shares[-1][1] > shares[-1][2]  # the branch that divides faster


def test_the_population_grows_at_its_mean_rate():
    # all cells are undecided over the first half day: one division rate for all, less the deaths
    cells = branching_cells(num_cells=4000, times=[0.0, 0.5], growth=0.4)
    rate = math.log(cells.masses[1].item()) / 0.5
    # tanh of a fate with mean near zero averages out; 12 000 cells with 0.3 events each
    assert abs(rate - 0.2) < 0.03


def test_without_growth_the_population_is_constant():
    assert torch.equal(branching_cells(50, growth=0.0).masses, torch.ones(5, dtype=torch.float64))


def test_the_rotation_keeps_distances():
    # in the start all hidden coordinates are independent, so the trace of the covariance is known
    cells = branching_cells(num_cells=5000, times=[0.0], dim=4)
    expected = 2 * 0.15**2 + 2 * 0.3**2
    trace = torch.cov(cells.samples[0].mT).trace().item()
    assert abs(trace / expected - 1) < 0.06


def test_seeds():
    a, b, c = branching_cells(20), branching_cells(20), branching_cells(20, generator=1)
    assert torch.equal(a.samples[4], b.samples[4])
    assert not torch.equal(a.samples[4], c.samples[4])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"times": [1.0, 0.0]}, sd.errors.TimeGridError),
        ({"times": [-1.0]}, sd.errors.TimeGridError),
        ({"num_cells": 0}, sd.errors.InvalidInputError),
        ({"dim": 1}, sd.errors.InvalidInputError),
        ({"growth": -1.0}, sd.errors.InvalidInputError),
        ({"diffusion": 0.0}, sd.errors.DiffusionError),
    ],
)
def test_bad_input(options, error):
    with pytest.raises(error):
        branching_cells(**options)
