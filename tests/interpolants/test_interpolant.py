"""Interpolants: ends, derivatives, targets, the user's own paths, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stochdyn import errors
from stochdyn.interpolants import Interpolant
from stochdyn.interpolants.paths import Constant
from tests.interpolants.truths import ALL_PATHS, F64


def points(n: int = 5, d: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    x0, x1, z = (torch.randn(n, d, dtype=F64, generator=g) for _ in range(3))
    return x0, x1, z


@pytest.mark.parametrize("path", ALL_PATHS)
def test_paths_run_from_the_first_point_to_the_second(path: str) -> None:
    x0, x1, z = points()
    it = Interpolant(path)
    start = x1 if it.kind == "mirror" else x0
    torch.testing.assert_close(it.sample(0.0, x0, x1, z), start, rtol=0, atol=1e-14)
    torch.testing.assert_close(it.sample(1.0, x0, x1, z), x1, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("gamma", ["sin2", "parabolic", "sigmoid", "brownian", "zero"])
def test_velocity_targets_are_derivatives_of_the_path(path: str, gamma: str) -> None:
    if (path, gamma) == ("mirror", "zero"):
        return
    x0, x1, z = points()
    it, h = Interpolant(path, gamma, 0.9), 1e-6
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)[:, None]
    difference = (it.sample(t + h, x0, x1, z) - it.sample(t - h, x0, x1, z)) / (2 * h)
    away = (t - 0.5).abs() > 1e-3  # the encoder-decoder has a corner in its second derivative there
    slope = it.target("velocity", t, x0, x1, z)
    torch.testing.assert_close(slope * away, difference * away, rtol=1e-6, atol=1e-6)


def test_a_correction_bends_the_path_but_not_its_ends() -> None:
    x0, x1, z = points()
    net = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 3)).double().requires_grad_(False)
    it = Interpolant("linear", correction=lambda t, a, b: net(torch.cat([t, a, b], -1)))
    torch.testing.assert_close(it.sample(1.0, x0, x1, z), x1)
    t, h = torch.full((5, 1), 0.3, dtype=F64), 1e-6
    straight = Interpolant("linear").mean(t, x0, x1)
    assert float((it.mean(t, x0, x1) - straight).abs().min()) > 1e-4
    difference = (it.mean(t + h, x0, x1) - it.mean(t - h, x0, x1)) / (2 * h)
    torch.testing.assert_close(it.mean_derivative(t, x0, x1), difference, rtol=1e-7, atol=1e-7)


def test_own_paths_are_pairs_of_functions() -> None:
    it = Interpolant((lambda t: 1 - t**2, lambda t: t**2), gamma=lambda t: t * (1 - t))
    x0, x1, z = points()
    expected = 0.75 * x0 + 0.25 * x1 + 0.25 * z
    torch.testing.assert_close(it.sample(0.5, x0, x1, z), expected)
    assert it.kind == "two-sided"
    assert Interpolant((lambda t: 1 - t, lambda t: t), one_sided=True).kind == "one-sided"


def test_drawn_latents_follow_the_generator() -> None:
    x0, x1, _ = points()
    draws = [Interpolant().sample(0.5, x0, x1, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)


def test_optimal_noise_of_one_network_models() -> None:
    t = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    torch.testing.assert_close(Interpolant("one-sided-linear").optimal_epsilon(t), (1 - t) / t)
    torch.testing.assert_close(Interpolant("mirror", "brownian").optimal_epsilon(t), 0.5 * (1 - 2 * t).abs())
    torch.testing.assert_close(Interpolant("vp").optimal_epsilon(t), 1 / t)
    with pytest.raises(errors.InvalidInputError, match="depends on the errors"):
        Interpolant("linear").optimal_epsilon(0.5)


X = torch.zeros(4, 2)
ROWS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an unknown path": (lambda: Interpolant("cubic"), errors.InvalidInputError, "'linear' | 'trig'"),
    "an unknown gamma": (lambda: Interpolant("linear", "wide"), errors.InvalidInputError, "'brownian'"),
    "a path that isn't a pair": (lambda: Interpolant((torch.sin,)), errors.InvalidInputError, "alpha, beta"),  # type: ignore[arg-type]
    "a scale of zero": (
        lambda: Interpolant(scale=0.0),
        errors.InvalidInputError,
        "scale must be greater than 0",
    ),
    "a gamma that doesn't vanish": (
        lambda: Interpolant("linear", lambda t: 1 - t),
        errors.InvalidInputError,
        "gamma must be 0 at time 0 and 0 at time 1",
    ),
    "a constant gamma": (lambda: Interpolant("linear", Constant(0.1)), errors.InvalidInputError, "gamma"),
    "a gamma that turns negative": (
        lambda: Interpolant("linear", lambda t: t * (1 - t) * (0.5 - t)),
        errors.InvalidInputError,
        "positive between the ends",
    ),
    "a path to elsewhere": (
        lambda: Interpolant((lambda t: 1 - t, lambda t: 0.5 * t)),
        errors.InvalidInputError,
        "beta must be 0 at time 0 and 1 at time 1",
    ),
    "times above one": (lambda: Interpolant().sample(1.5, X, X), errors.TimeGridError, "got 1.5"),
    "times below zero": (
        lambda: Interpolant().sample(torch.tensor([[-0.1]]), X, X),
        errors.TimeGridError,
        r"expected \[0, 1\]",
    ),
    "a time that is NaN": (lambda: Interpolant().sample(float("nan"), X, X), errors.NonFiniteError, "nan"),
    "times that don't fit": (
        lambda: Interpolant().sample(torch.full((4,), 0.5), X, X),
        errors.ShapeError,
        r"broadcast to x\[\.\.\., :1\]",
    ),
    "mismatched dimensions": (lambda: Interpolant().sample(0.5, X, X[:, :1]), errors.ShapeError, "axis -1"),
    "mismatched numbers": (lambda: Interpolant().sample(0.5, X[:3], X), errors.ShapeError, "one shape"),
    "no points": (lambda: Interpolant().sample(0.5, X[:0], X[:0]), errors.EmptyDataError, "x0 is empty"),
    "integer points": (lambda: Interpolant().sample(0.5, X.long(), X), errors.InvalidInputError, "floating"),
    "two precisions": (lambda: Interpolant().sample(0.5, X.double(), X), errors.DtypeMismatchError, "x0"),
    "no latent to estimate": (
        lambda: Interpolant("linear", "zero").target("noise_prediction", 0.5, X, X, None),
        errors.InvalidInputError,
        "gamma = 0",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input(row: str) -> None:
    call, error, message = ROWS[row]
    with pytest.raises(error, match=message):
        call()
