"""Simulated oscillators: laws that can be computed otherwise, reproducibility and bad input."""

from __future__ import annotations

import pytest
import torch
from scipy.integrate import solve_ivp

import stochdyn as sd
from stochdyn.datasets import lotka_volterra, repressilator


def lv_field(t, x):
    return [x[0] - 0.4 * x[0] * x[1], 0.1 * x[0] * x[1] - 0.4 * x[1]]


def repressilator_field(t, x):
    return [10 / (1 + x[i - 1] ** 3) - x[i] for i in range(3)]


@pytest.mark.parametrize(
    ("simulate", "field", "start"),
    [(lotka_volterra, lv_field, [5.05, 4.05]), (repressilator, repressilator_field, [1.05, 1.05, 2.05])],
)
def test_without_noise_particles_follow_the_equation(simulate, field, start):
    data = simulate(400, times=[0.0, 0.7, 2.0], diffusion=1e-6, dt=1e-3)
    truth = solve_ivp(field, (0, 2), start, t_eval=[0.0, 0.7, 2.0], rtol=1e-9).y.T
    for sample, exact in zip(data.samples, truth, strict=True):
        error = sample.mean(0) - torch.as_tensor(exact)
        # the spread of the start, carried on, and the Euler error of the step
        assert error.abs().max() < 5 * sample.std(0).max() / 20 + 5e-3


def test_noise_has_the_given_strength_and_snapshots_are_independent():
    data = lotka_volterra(20000, times=[0.0, 0.01], diffusion=0.3, dt=0.01)
    drift = torch.tensor(lv_field(0.0, [5.05, 4.05]))
    moved = data.samples[1] - torch.tensor([5.05, 4.05]) - 0.01 * drift
    expected = 0.01 * 0.09 + 0.01 / 12
    assert (moved.var(0) / expected - 1).abs().max() < 0.05
    joint = torch.corrcoef(torch.cat((data.samples[0], data.samples[1]), 1).mT)[:2, 2:]
    assert joint.abs().max() < 5 / 20000**0.5


def test_a_later_first_snapshot_starts_from_the_same_law():
    data = lotka_volterra(50, times=[1.0, 2.0])
    assert abs(data.samples[0][:, 0].mean().item() - 2.68) < 0.1


def test_seeds_and_generators():
    assert torch.equal(lotka_volterra(5).samples[3], lotka_volterra(5).samples[3])
    assert not torch.equal(lotka_volterra(5).samples[3], lotka_volterra(5, generator=1).samples[3])
    g = torch.Generator().manual_seed(3)
    first = repressilator(5, generator=g).samples[1]
    assert not torch.equal(first, repressilator(5, generator=g).samples[1])
    state = torch.get_rng_state()
    repressilator(5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"times": [0.0, 0.0]}, sd.errors.TimeGridError),
        ({"times": [-1.0, 0.0]}, sd.errors.TimeGridError),
        ({"num_particles": 0}, sd.errors.InvalidInputError),
        ({"diffusion": 0.0}, sd.errors.DiffusionError),
        ({"dt": -1.0}, sd.errors.InvalidInputError),
    ],
)
def test_bad_input(options, error):
    with pytest.raises(error):
        lotka_volterra(**options)
