"""What a trained generator makes of exact fields: full order at the ends, for every prediction, path and method."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from stochdyn.interpolants import (
    Adaptive,
    GaussianMixture,
    GaussianMixtureInterpolant,
    Heun,
    Interpolant,
    InterpolantGenerator,
    InterpolantRegression,
)
from stochdyn.interpolants.sampling import samplers
from tests.interpolants.truths import F64

TWO_SIDED = [
    ("velocity", "noise_prediction"),
    ("velocity", "score"),
    ("path_velocity", "noise_prediction"),
    ("path_velocity", "score"),
    ("start_prediction", "data_prediction"),
    ("velocity", "data_prediction"),
    ("noise_prediction", "data_prediction"),
    ("score", "start_prediction"),
]
ONE_SIDED = [
    ("velocity",),
    ("noise_prediction",),
    ("score",),
    ("data_prediction",),
    ("start_prediction",),
]
MIRROR = [("noise_prediction",), ("score",), ("data_prediction",)]
CASES = [
    *((path, names) for path in ("linear", "trig", "encoder-decoder") for names in TWO_SIDED),
    *((path, names) for path in ("one-sided-linear", "one-sided-trig", "vp") for names in ONE_SIDED),
    *(("mirror", names) for names in MIRROR),
]


def exact(
    path: Any, names: tuple[str, ...], mean: float = 1.0, variance: float = 0.5
) -> tuple[InterpolantGenerator, Normal, Normal]:
    """Return a generator with exact fields, and the laws of its starts and of the data."""
    it = path if isinstance(path, Interpolant) else Interpolant(path)
    law = GaussianMixture(torch.ones(1, dtype=F64), torch.full((1, 1), mean, dtype=F64), variance)
    truth = GaussianMixtureInterpolant(it, None, law)
    one = torch.ones(1, dtype=F64)
    end = Normal(mean * one, variance**0.5 * one)
    start = end if it.kind == "mirror" else Normal(0 * one, one)
    fields: dict[str, Any] = {name: getattr(truth, name) for name in names}
    return InterpolantRegression(it, **fields, base=Independent(start, 1)).generator(), start, end


@contextmanager
def noise_as_rows() -> Iterator[None]:
    """Let row n + 2 of the state feel the noise of step n alone, with the value one; all fields are affine in the state."""
    count, original = [0], samplers._add_noise

    def add(x: Tensor, spread: float, generator: Any) -> Tensor:
        if spread == 0.0:
            return x
        y = x.clone()
        y[count[0] + 2] += spread
        count[0] += 1
        return y

    samplers._add_noise = add  # type: ignore[assignment]
    try:
        yield
    finally:
        samplers._add_noise = original


def moments(
    model: InterpolantGenerator, start: Normal, num_steps: int, **options: Any
) -> tuple[float, float]:
    """Return the exact mean and variance of ``model.sample``."""
    x0 = torch.zeros(num_steps + 2, 1, dtype=F64)
    x0[1] = 1.0
    with noise_as_rows():
        y = model.sample(num_steps + 2, num_steps=num_steps, x0=x0, **options)[:, 0]
    rows = y[1:] - y[0]
    mean = y[0] + rows[0] * start.mean
    return float(mean), float(rows[0].square() * start.variance + rows[1:].square().sum())


def assert_order_two(model: InterpolantGenerator, start: Normal, **options: Any) -> None:
    errors = []
    for n in (20, 60):
        mean, variance = moments(model, start, n, **options)
        errors.append(math.hypot(mean - 1.0, variance - 0.5))
    # where the last error is this small, signs cross and there is no slope
    assert errors[1] < 5e-5 or math.log(errors[0] / errors[1], 3) > 1.6, errors


@pytest.mark.parametrize(("path", "names"), CASES)
def test_sampler_is_of_weak_order_two(path: str, names: tuple[str, ...]) -> None:
    model, start, _ = exact(path, names)
    assert_order_two(model, start, epsilon=0.5)


@pytest.mark.parametrize("path", ["linear", "trig", "encoder-decoder", "vp", "mirror"])
def test_splitting_and_schedules_of_noise_are_of_weak_order_two(path: str) -> None:
    names = ("noise_prediction",) if path in ("vp", "mirror") else ("velocity", "noise_prediction")
    model, start, _ = exact(path, names)
    assert_order_two(model, start, epsilon=0.5, method="strang")
    assert_order_two(model, start, epsilon=lambda t: 0.2 + 0.5 * t)


@pytest.mark.parametrize(("path", "names"), CASES)
def test_twenty_steps_are_within_a_hundredth(path: str, names: tuple[str, ...]) -> None:
    model, start, _ = exact(path, names)
    for epsilon in (0.0, 1.0):
        mean, variance = moments(model, start, 20, epsilon=epsilon)
        assert abs(mean - 1.0) < 0.01
        assert abs(variance / 0.5 - 1.0) < 0.01


@pytest.mark.parametrize(("path", "names"), CASES)
def test_flow_and_its_density_are_of_full_order(path: str, names: tuple[str, ...]) -> None:
    model, start, end = exact(path, names)
    grid = torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    x0, x1 = start.mean + start.stddev * grid, end.mean + end.stddev * grid
    for method, order in (("euler", 1), ("heun", 2), ("ralston", 2), ("rk4", 4)):
        # the small error of Ralston's method changes sign at few steps
        steps = (40, 80) if method == "ralston" else (20, 40)
        errors = [float((model.push(x0, n, method) - x1).abs().max()) for n in steps]
        back = [float((model.push(x1, n, method, backward=True) - x0).abs().max()) for n in steps]
        for pair in (errors, back):
            assert pair[1] < 1e-6 or math.log2(pair[0] / pair[1]) > order - 0.6, (method, pair)
    error = (model.log_prob(x1, num_steps=40) - end.log_prob(x1)[:, 0]).abs().max()
    assert float(error) < 1e-4


@pytest.mark.parametrize("names", [("velocity",), ("noise_prediction",), ("data_prediction",)])
def test_adaptive_methods_stay_inside(names: tuple[str, ...]) -> None:
    model, start, end = exact("one-sided-trig", names)
    grid = torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    x0, x1 = start.mean + start.stddev * grid, end.mean + end.stddev * grid
    adaptive = model.push(x0, method=Adaptive("dopri5", rtol=1e-8, atol=1e-8))
    assert float((adaptive - x1).abs().max()) < 1e-6
    path = model.push(x0, 4, Adaptive("dopri5", rtol=1e-8, atol=1e-8), trajectory=True)
    assert path.shape == (5, 5, 1)
    torch.testing.assert_close(path[-1], x1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", ONE_SIDED)
@pytest.mark.parametrize("path", ["one-sided-linear", "vp"])
def test_data_far_from_the_origin_leave_no_bias(path: str, names: tuple[str, ...]) -> None:
    """Seventeen standard deviations away, on the scale of the data a hundred and seventy."""
    model, start, end = exact(path, names, 170.0, 100.0)
    for epsilon in (0.0, 1.0):
        mean, variance = moments(model, start, 60, epsilon=epsilon)
        assert abs(mean - 170.0) < 0.05
        assert abs(variance / 100 - 1) < 0.01
    assert float(model.log_prob(end.mean[None], num_steps=60) - end.log_prob(end.mean)) == pytest.approx(
        0, abs=1e-3
    )


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_units_of_the_data(scale: float) -> None:
    """Two-sided paths in other units of length: ends and noise in these units, epsilon in their square."""
    law = [
        GaussianMixture(torch.ones(1, dtype=F64), torch.full((1, 1), m * scale, dtype=F64), v * scale**2)
        for m, v in ((0.0, 1.0), (1.0, 0.5))
    ]
    it = Interpolant("linear", scale=scale)
    truth = GaussianMixtureInterpolant(it, *law)
    base = Independent(Normal(torch.zeros(1, dtype=F64), scale * torch.ones(1, dtype=F64)), 1)
    model = InterpolantRegression(
        it, velocity=truth.velocity, noise_prediction=truth.noise_prediction, base=base
    ).generator()
    mean, variance = moments(model, base.base_dist, 20, epsilon=0.5 * scale**2)
    plain, start, _ = exact("linear", ("velocity", "noise_prediction"))
    wanted = moments(plain, start, 20, epsilon=0.5)
    assert mean / scale == pytest.approx(wanted[0], rel=1e-6)
    assert variance / scale**2 == pytest.approx(wanted[1], rel=1e-6)


def test_noise_that_explicit_steps_cannot_follow_is_held_back() -> None:
    """Data on a point: the score grows without bound, and any epsilon is stable all the same."""
    x1 = torch.full((1, 1), 2.0, dtype=F64)
    for it, field in (
        (Interpolant("one-sided-linear"), {"data_prediction": lambda t, x: x1.expand_as(x)}),
        (Interpolant("linear"), {"start_prediction": _start_of, "data_prediction": lambda t, x: x1.expand_as(x)}),
    ):  # fmt: skip
        base = Independent(Normal(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)), 1)
        model = InterpolantRegression(it, **field, base=base, anchored=False).generator()  # type: ignore[arg-type]
        for epsilon in (0.1, 1.0, 20.0):
            for method in ("heun", "euler", "strang"):
                x = model.sample(500, epsilon, 20, method, generator=0)
                assert float((x - 2.0).abs().max()) < 2.5, (epsilon, method)
        close = model.sample(500, 1.0, 20, "heun", generator=0)
        assert float(close.std()) < 0.12


def _start_of(t: Tensor, x: Tensor) -> Tensor:
    """Mean of a standard normal start given the point, on the linear path with the Brownian latent to the point 2."""
    return (x - 2.0 * t) / ((1 - t) + t)


def test_noise_and_drift_share_one_epsilon() -> None:
    """An epsilon that jumps inside the interval costs nothing."""
    model, start, _ = exact("linear", ("velocity", "score"))

    def jump(t: Tensor) -> Tensor:
        return torch.where(t < 0.43, 0.05, 1.5)

    errors = [abs(moments(model, start, n, epsilon=jump)[1] - 0.5) for n in (40, 160)]
    assert math.log2(errors[0] / errors[1]) / 2 > 1.6
    free = moments(model, start, 20, epsilon=1.0, method=Heun(max_rate=math.inf))
    assert abs(free[1] - 0.5) < 0.005


def test_errors_of_a_data_prediction_are_not_enlarged_at_the_end() -> None:
    """A prediction one per cent off: the log density moves by about the error itself, not by what a division by 1 - t makes of it."""
    it = Interpolant("one-sided-linear")
    law = GaussianMixture(torch.ones(1, dtype=F64), torch.ones(1, 1, dtype=F64), 0.25)
    truth = GaussianMixtureInterpolant(it, None, law)
    net = lambda t, x: 1.01 * truth.data_prediction(t, x)  # noqa: E731
    model = InterpolantRegression(it, data_prediction=net).generator()
    x = torch.linspace(0, 2, 9, dtype=F64)[:, None]
    assert float((model.log_prob(x, num_steps=50) - law.log_prob(x)).abs().max()) < 0.1
