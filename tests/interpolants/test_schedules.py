"""Schedules: values at the ends, derivatives, and squares that stay finite."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.interpolants import CustomSchedule, Schedule
from stochdyn.interpolants.paths import (
    BrownianLatent,
    Constant,
    Cosine,
    CosineSquared,
    HalfPower,
    Linear,
    ParabolicLatent,
    Remaining,
    SigmoidLatent,
    Sine,
    SineSquaredLatent,
    VariancePreserving,
    as_schedule,
)

F64 = torch.float64
ALL = {
    "linear": Linear(),
    "remaining": Remaining(),
    "constant": Constant(0.3),
    "cosine": Cosine(),
    "sine": Sine(),
    "cosine beside a latent": Cosine(BrownianLatent()),
    "sine beside a latent": Sine(ParabolicLatent(2.0)),
    "first half": CosineSquared(True),
    "second half": CosineSquared(False),
    "vp": VariancePreserving(),
    "brownian": BrownianLatent(1.3),
    "parabolic": ParabolicLatent(0.7),
    "sine squared": SineSquaredLatent(),
    "sigmoid": SigmoidLatent(1.1),
    "half power": HalfPower(0.8),
    "custom": CustomSchedule(lambda t: t.exp() * t),
}


@pytest.mark.parametrize("name", ALL)
def test_derivatives_are_limits_of_differences(name: str) -> None:
    schedule, h = ALL[name], 1e-6
    t = torch.linspace(0.013, 0.983, 25, dtype=F64)
    for value, slope in (("value", "derivative"), ("square", "square_derivative")):
        f, df = getattr(schedule, value), getattr(schedule, slope)
        difference = (f(t + h) - f(t - h)) / (2 * h)
        torch.testing.assert_close(df(t), difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "latent", [BrownianLatent, ParabolicLatent, SineSquaredLatent, SigmoidLatent, HalfPower]
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_latents_vanish_at_the_ends_exactly_and_their_squares_have_finite_slopes(
    latent: type[Schedule], dtype: torch.dtype
) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    schedule = latent()
    assert schedule.value(ends).tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(schedule.square_derivative(ends)).all())
    assert bool((schedule.value(torch.linspace(0.01, 0.99, 50, dtype=dtype)) > 0).all())


def test_brownian_slope_at_the_ends_is_that_of_a_bridge() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    assert (0.5 * BrownianLatent(2.0).square_derivative(ends)).tolist() == [2.0, -2.0]


def test_trigonometric_paths_keep_the_variance() -> None:
    gamma = BrownianLatent(1.7)
    t = torch.linspace(0, 1, 21, dtype=F64)
    total = Cosine(gamma).square(t) + Sine(gamma).square(t) + gamma.square(t)
    torch.testing.assert_close(total, torch.ones_like(t), rtol=0, atol=1e-14)


def test_a_latent_of_one_leaves_no_room_for_a_trigonometric_path() -> None:
    with pytest.raises(InvalidInputError, match="below 1"):
        Cosine(BrownianLatent(2.0))


def test_custom_schedules_take_a_derivative_or_find_it() -> None:
    t = torch.tensor([0.25, 0.5])
    assert CustomSchedule(torch.square).derivative(t).tolist() == [0.5, 1.0]
    assert CustomSchedule(torch.square, lambda t: t * 0 + 9).derivative(t).tolist() == [9.0, 9.0]
    with torch.no_grad():
        assert not CustomSchedule(torch.square).derivative(t).requires_grad


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="alpha must be a Schedule"):
        as_schedule("linear", "alpha")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="scale must be positive"):
        BrownianLatent(0.0)
    with pytest.raises(InvalidInputError, match="derivative must be callable"):
        CustomSchedule(torch.square, 1.0)  # type: ignore[arg-type]
    assert as_schedule(0.0, "alpha").is_zero
