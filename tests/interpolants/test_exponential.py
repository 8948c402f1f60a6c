"""Exponential integrators: orders and laws on Gaussians, whose reversal is known, and the shift of mean reversion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError, TimeGridError
from stochdyn.interpolants import (
    OU,
    AffineProcess,
    MeanReverting,
    NoisedMixture,
    exponential_ode,
    exponential_sde,
)
from tests.interpolants.laws import F64, gaussian, processes


def ends(kind: str) -> tuple:
    """A process, its Gaussian truth, points at the horizon and where the exact flow takes them."""
    process = processes()[kind]
    truth = gaussian(process)
    t = torch.tensor([process.horizon, process.start], dtype=F64)[:, None]
    mean = process.location(t, truth.means)
    var = process.scale(t) ** 2 * 0.2 + process.variance(t)
    x = mean[0] + var[0].sqrt() * torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    return process, truth, x, mean[1] + (var[1] / var[0]).sqrt() * (x - mean[0]), mean, var


@pytest.mark.parametrize("kind", ["ou", "vp", "ve", "reverting"])
@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("order", [1, 2])
def test_order_of_the_ode_solver(kind: str, prediction: str, order: int) -> None:
    process, truth, x, want, *_ = ends(kind)
    counts = [40, 80, 160]
    errors = [
        (exponential_ode(process, truth.score, x, process.grid(n), order=order, prediction=prediction) - want)
        .abs()
        .max()
        .item()
        for n in counts
    ]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.2


def impulse_responses(
    monkeypatch: pytest.MonkeyPatch, process: AffineProcess, truth: NoisedMixture, n: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the solver's law on a Gaussian: its steps are affine in the noise, so no samples are needed."""
    kicks = iter(torch.cat([torch.zeros(1, n, dtype=F64), torch.eye(n, dtype=F64)]).T[..., None])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, **_: next(kicks))
        ends = exponential_sde(process, truth.score, START.expand(n + 1, 1), process.grid(n), **options)
    return ends[0], (ends[1:] - ends[0]).square().sum(0)


START = torch.tensor([[0.0]], dtype=F64)


@pytest.mark.parametrize(("order", "prediction"), [(1, "data"), (1, "noise"), (2, "data"), (2, "noise")])
def test_weak_order_of_the_sde_solver_by_exact_propagation(
    monkeypatch: pytest.MonkeyPatch, order: int, prediction: str
) -> None:
    process = OU(rate=0.7, diffusion=1.3, horizon=3.0, start=0.05).double()
    truth = gaussian(process, 1)
    t = torch.tensor([process.horizon, process.start], dtype=F64)
    var_t = process.scale(t) ** 2 * 0.2 + process.variance(t)
    mean_t = process.location(t[:, None], truth.means)[:, 0]
    # The exact reversal from a point is the Gaussian law of the start given the end.
    gain = process.kernel(t[1], t[0])[0] * var_t[1] / var_t[0]
    mean, var = mean_t[1] + gain * (START - mean_t[0]), var_t[1] - gain**2 * var_t[0]
    counts, errors = [40, 80, 160], []
    for n in counts:
        m, v = impulse_responses(monkeypatch, process, truth, n, order=order, prediction=prediction)
        errors.append(float((m - mean).abs().max() + (v - var).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.4


def test_mean_reversion_is_a_shift() -> None:
    centered = MeanReverting(0.0, start=0.01).double()
    shifted = MeanReverting(torch.tensor([3.0, -2.0]), start=0.01).double()
    mu = torch.tensor([3.0, -2.0], dtype=F64)
    x, times = torch.randn(4, 2, dtype=F64), shifted.grid(9)

    def score(t: Tensor, x: Tensor) -> Tensor:
        return -torch.tanh(x) - t * x

    def moved(t: Tensor, x: Tensor) -> Tensor:
        return score(t, x - mu)

    for solve in (
        exponential_ode,
        lambda *a: exponential_sde(*a, generator=torch.Generator().manual_seed(3)),
    ):
        plain, there = solve(centered, score, x, times), solve(shifted, moved, x + mu, times)
        torch.testing.assert_close(there - mu, plain)


def test_first_order_steps_are_those_in_print() -> None:
    """The four one-step solvers of MaRS, written out with their mean."""
    process = MeanReverting(torch.tensor([0.7]), spread=0.6, start=0.01).double()
    times = torch.tensor([0.8, 0.5], dtype=F64)
    (a0, a1), (s0, s1) = process.scale(times), process.std(times)
    h = (a1 / s1).log() - (a0 / s0).log()
    mu, x = torch.tensor([0.7], dtype=F64), torch.tensor([[0.3]], dtype=F64)

    def score(t: Tensor, x: Tensor) -> Tensor:
        return -2 * x

    z = -s0 * score(times[0], x)
    x0 = (x - (1 - a0) * mu - s0 * z) / a0
    ratio = s1 / s0
    want = ratio * x + a1 * (1 - (-h).exp()) * x0 + mu * (1 - ratio + ratio * a0 - a1)
    torch.testing.assert_close(exponential_ode(process, score, x, times), want)
    want = a1 / a0 * x - s1 * h.expm1() * z + mu * (1 - a1 / a0)
    torch.testing.assert_close(exponential_ode(process, score, x, times, prediction="noise"), want)
    xi = torch.randn(1, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    shrink = 1 - (-2 * h).exp()
    want = ratio * (-h).exp() * x + a1 * shrink * x0 + s1 * shrink.sqrt() * xi
    want = want + mu * (1 - a1 / a0 * (-2 * h).exp() - a1 * shrink)
    torch.testing.assert_close(exponential_sde(process, score, x, times, generator=g), want)
    g = torch.Generator().manual_seed(0)
    want = a1 / a0 * x - 2 * s1 * h.expm1() * z + mu * (1 - a1 / a0) + s1 * (2 * h).expm1().sqrt() * xi
    got = exponential_sde(process, score, x, times, prediction="noise", generator=g)
    torch.testing.assert_close(got, want)


def test_bad_input() -> None:
    process, x = OU(), torch.zeros(2, 1)
    with pytest.raises(TimeGridError, match="-times"):
        exponential_ode(process, lambda t, x: -x, x, torch.tensor([0.1, 1.0]))
    with pytest.raises(InvalidInputError, match="order"):
        exponential_ode(process, lambda t, x: -x, x, process.grid(3), order=3)
    with pytest.raises(InvalidInputError, match="prediction"):
        exponential_sde(process, lambda t, x: -x, x, process.grid(3), prediction="velocity")
