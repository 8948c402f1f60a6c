"""Chaotic paths keep the identities that every path on the attractor has, and instruments read them as said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stochdyn import errors
from stochdyn.datasets import ChaoticSeries, lorenz63, lorenz96, rossler


def _weather(x: Tensor) -> Tensor:
    """Half of d/dt sum x^2: the quadratic terms of Lorenz-96 keep the energy."""
    return (8 * x - x.square()).sum(-1)


# g and dg/dt, written from the equations: the mean of dg/dt is (g(T) - g(0)) / T.
IDENTITIES: dict[
    str, tuple[Callable[[], ChaoticSeries], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
] = {
    "z of lorenz63": (
        lambda: lorenz63(8000, 0.01),
        lambda x: x[..., 2],
        lambda x: x[..., 0] * x[..., 1] - 8 / 3 * x[..., 2],
    ),
    "x^2 of lorenz63": (
        lambda: lorenz63(8000, 0.01),
        lambda x: 0.5 * x[..., 0].square(),
        lambda x: 10 * (x[..., 0] * x[..., 1] - x[..., 0].square()),
    ),
    "y of rossler": (
        lambda: rossler(8000, 0.02),
        lambda x: x[..., 1],
        lambda x: x[..., 0] + 0.2 * x[..., 1],
    ),
    "x of rossler": (lambda: rossler(8000, 0.02), lambda x: x[..., 0], lambda x: -x[..., 1] - x[..., 2]),
    "energy of lorenz96": (
        lambda: lorenz96(4000, 0.01),
        lambda x: 0.5 * x.square().sum(-1),
        _weather,
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_means_are_what_the_equations_say(name: str) -> None:
    """The fundamental theorem of calculus along the path, by Simpson's rule, to 1e-4 of the size of what is integrated."""
    make, primitive, slope = IDENTITIES[name]
    series = make()
    x, dt = series.x[: len(series.x) - 1 + len(series.x) % 2], float(series.times[1])
    values = slope(x)
    integral = dt / 3 * (values[0] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum() + values[-1])
    assert float(integral) == pytest.approx(
        float(primitive(x[-1]) - primitive(x[0])), abs=1e-4 * dt * float(values.abs().sum())
    )


@pytest.mark.parametrize("make", [lorenz63, rossler, lorenz96])
def test_velocities_are_those_of_the_path(make: Callable[..., ChaoticSeries]) -> None:
    series = make(400, 0.002)
    x, dt = series.x, float(series.times[1])
    # central differences of fourth order
    slope = (8 * (x[3:-1] - x[1:-3]) - (x[4:] - x[:-4])) / (12 * dt)
    torch.testing.assert_close(slope, series.velocity(x)[2:-2], rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def test_lorenz96_on_other_circles() -> None:
    series = lorenz96(10, dim=5, force=2.0)
    assert series.x.shape == (10, 5)
    assert torch.equal(series.velocity(torch.full((5,), 2.0)), torch.zeros(5))


def test_a_seed_gives_the_same_path() -> None:
    assert torch.equal(lorenz63(20, generator=3).x, lorenz63(20, generator=3).x)
    assert not torch.equal(lorenz63(20, generator=3).x, lorenz63(20, generator=4).x)


def test_readings_have_the_error_and_the_gaps_that_were_asked_for() -> None:
    """Five binomial and chi-square errors: false alarms once in a million."""
    series = rossler(3000)
    y = series.observe(0.1, share=0.3, generator=1)
    seen = ~y.isnan()
    total = y.numel()
    assert abs(float(seen.double().mean()) - 0.3) < 5 * (0.3 * 0.7 / total) ** 0.5
    error = ((y - series.x) / series.x.std(0))[seen]
    assert abs(float(error.std()) - 0.1) < 5 * 0.1 / (2 * seen.sum()) ** 0.5
    assert torch.equal(series.observe(0.0), series.x)


def test_bad_input() -> None:
    for call in (
        lambda: lorenz63(1),
        lambda: lorenz63(10, dt=0.0),
        lambda: lorenz96(10, dim=3),
        lambda: lorenz63(10).observe(-1.0),
        lambda: lorenz63(10).observe(0.1, share=0.0),
    ):
        with pytest.raises(errors.StochdynError):
            call()
