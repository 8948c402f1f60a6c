"""Bridges against conditioned joint Gaussians and quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from stochdyn.core import LinearGaussianMeasure, PathSample, PinnedProcess
from stochdyn.errors import (
    DtypeMismatchError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TimeGridError,
)

F64 = torch.float64
TS = torch.tensor([0.25, 0.3, 0.8, 1.7, 2.2], dtype=F64)  # between 0.2 and 2.5


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def _bridge(rate: float = 1.3, **kwargs) -> PinnedProcess:
    return PinnedProcess(_t(0.5), _t(-1.0), rate, 0.4, 0.7, start_time=0.2, end_time=2.5, **kwargs)


def _exact(rate: float, ts: Tensor = TS) -> MultivariateNormal:
    """The OU law on (ts, 2.5) from 0.5 at 0.2, conditioned on its last value by dense algebra."""
    every = torch.cat((ts, _t(2.5)))
    law = LinearGaussianMeasure(_t(-rate)[None], _t(rate * 0.4), 0.7, _t(0.5), initial_time=0.2)
    mean, cov = law.mean(every)[:, 0], law.joint_covariance(every)
    gain = cov[:-1, -1] / cov[-1, -1]
    return MultivariateNormal(
        mean[:-1] + gain * (-1.0 - mean[-1]), cov[:-1, :-1] - gain[:, None] * cov[-1, :-1]
    )


@pytest.mark.parametrize("rate", [0.0, 1e-7, 1.3, -0.8])
def test_moments_and_density_equal_the_conditioned_process(rate: float) -> None:
    bridge, exact = _bridge(rate), _exact(rate)
    torch.testing.assert_close(bridge.mean(TS)[:, 0], exact.mean, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(bridge.variance(TS)[:, 0], exact.variance, rtol=1e-10, atol=1e-11)
    path = bridge.sample(TS, 20, torch.Generator().manual_seed(0))
    torch.testing.assert_close(bridge.log_prob(path), exact.log_prob(path.x[..., 0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_samples_have_the_joint_law(rate: float) -> None:
    n = 40_000
    x = _bridge(rate).sample(TS, n, torch.Generator().manual_seed(1)).x[..., 0]
    exact = _exact(rate)
    var, cov = exact.variance, exact.covariance_matrix
    assert ((x.mean(0) - exact.mean).abs() <= 5 * (var / n).sqrt()).all()
    centred = x - exact.mean
    stderr = ((var[:, None] * var + cov**2) / n).sqrt()
    assert ((centred.T @ centred / n - cov).abs() <= 5 * stderr).all()


def test_ends_are_hit_and_carry_no_density() -> None:
    bridge = _bridge()
    ts = torch.cat((_t(0.2), TS, _t(2.5)))
    path = bridge.sample(ts, 7)
    x = path.x
    assert torch.equal(x[:, 0, 0], torch.full((7,), 0.5, dtype=F64))
    torch.testing.assert_close(x[:, -1, 0], torch.full((7,), -1.0, dtype=F64))
    assert not bridge.variance(ts)[[0, -1]].any()
    torch.testing.assert_close(bridge.log_prob(path), bridge.log_prob(PathSample.of_states(TS, x[:, 1:-1])))


def test_brownian_bridge_has_its_textbook_moments() -> None:
    bridge = PinnedProcess(_t(1.0, 0.0), _t(3.0, 5.0), diffusion=_t(1.0, 2.0), end_time=4.0)
    ts = _t(1.0, 3.0)
    torch.testing.assert_close(bridge.mean(ts), torch.stack((_t(1.5, 1.25), _t(2.5, 3.75))))
    torch.testing.assert_close(bridge.variance(ts), torch.stack((_t(0.75, 3.0), _t(0.75, 3.0))))


def test_strong_reversion_over_long_times_neither_overflows_nor_loses_the_stationary_law() -> None:
    bridge = PinnedProcess(_t(5.0), _t(-5.0), 100.0, 1.0, 2.0, end_time=1000.0)
    ts = torch.linspace(0, 1000, 4001, dtype=F64)
    middle = _t(500.0)
    torch.testing.assert_close(bridge.mean(middle), _t(1.0)[None])
    torch.testing.assert_close(bridge.variance(middle), _t(4 / 200)[None])
    x = bridge.sample(ts, 20, torch.Generator().manual_seed(0)).x
    inner = x[:, 1:-1]  # steps of 25 relaxation times: independent draws of the stationary law
    assert torch.isfinite(x).all()
    assert abs(float(inner.mean()) - 1) <= 5 * math.sqrt(0.02 / inner.numel())
    assert abs(float(inner.var()) / 0.02 - 1) <= 5 * math.sqrt(2 / inner.numel())


@pytest.mark.parametrize("rate", [0.0, 1.3])
def test_transitions_compose_and_agree_with_the_density(rate: float) -> None:
    bridge = _bridge(rate)
    x = _t(0.1)
    mean, variance = bridge.transition(0.6, x, 2.0)
    half, spread = bridge.transition(0.6, x, 1.1)
    gain = bridge.transition(1.1, half + 1, 2.0)[0] - bridge.transition(1.1, half, 2.0)[0]
    onward, rest = bridge.transition(1.1, half, 2.0)
    torch.testing.assert_close(onward, mean)
    torch.testing.assert_close(gain**2 * spread + rest, variance)
    whole, spread = bridge.transition(0.2, _t(0.5), 2.0)
    torch.testing.assert_close(whole, bridge.mean(_t(2.0))[0])
    torch.testing.assert_close(spread, bridge.variance(_t(2.0))[0])


@pytest.mark.parametrize("rate", [0.0, 1.3])
def test_drift_is_the_slope_of_the_mean_given_the_present(rate: float) -> None:
    bridge, x, h = _bridge(rate), _t(0.3), 1e-4
    one, two = (bridge.transition(0.9, x, 0.9 + k * h)[0] for k in (1, 2))
    slope = (-3 * x + 4 * one - two) / (2 * h)
    torch.testing.assert_close(bridge.drift(0.9, x), slope, rtol=1e-6, atol=1e-6)


def test_drift_is_doobs_transform_of_the_free_process() -> None:
    """theta (mu-x) + sigma^2 d/dx log p(T, x_T | t, x), by automatic differentiation."""
    bridge = _bridge(1.3)
    x = _t(0.3).requires_grad_()
    span = 2.5 - 0.9
    mean = 0.4 + (x - 0.4) * math.exp(-1.3 * span)
    variance = 0.49 * -math.expm1(-2.6 * span) / 2.6
    (slope,) = torch.autograd.grad((-0.5 * (-1.0 - mean) ** 2 / variance).sum(), x)
    torch.testing.assert_close(bridge.drift(0.9, x).detach(), 1.3 * (0.4 - x.detach()) + 0.49 * slope)


def test_bridge_equals_the_linear_posterior_with_an_exact_observation() -> None:
    free = LinearGaussianMeasure.ornstein_uhlenbeck(_t(1.3), 0.4, 0.7, initial_mean=_t(0.5), initial_time=0.2)
    pinned = free.posterior(_t(2.5), _t(-1.0)[:, None], 0.0, TS)
    torch.testing.assert_close(_bridge().mean(TS), pinned.mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(_bridge().variance(TS), pinned.variance, rtol=1e-9, atol=1e-10)


def test_batches_of_bridges() -> None:
    starts, ends = torch.randn(3, 2, dtype=F64), torch.randn(4, 1, 2, dtype=F64)
    many = PinnedProcess(starts, ends, _t(0.0, 2.0), end_time=3.0)
    path = many.sample(TS, 5)
    x = path.x
    assert x.shape == (5, 4, 3, 5, 2)
    assert many.log_prob(path).shape == (5, 4, 3)
    one = PinnedProcess(starts[1], ends[2, 0], _t(0.0, 2.0), end_time=3.0)
    torch.testing.assert_close(many.mean(TS)[2, 1], one.mean(TS))
    torch.testing.assert_close(
        many.log_prob(path)[:, 2, 1], one.log_prob(PathSample.of_states(TS, x[:, 2, 1]))
    )
    torch.testing.assert_close(many.drift(1.0, x[..., 0, :])[:, 2, 1], one.drift(1.0, x[:, 2, 1, 0]))


def test_sde_of_the_bridge_reaches_its_law() -> None:
    """Euler with 400 steps: the marginal at 2.2 within 5 standard errors plus 2 % for the step."""
    bridge = _bridge(1.3)
    sde = bridge.to_sde()
    ts = torch.linspace(0.2, 2.2, 401, dtype=F64)
    g = torch.Generator().manual_seed(0)
    x = torch.full((4000, 1), 0.5, dtype=F64)
    for t, dt in zip(ts[:-1], ts.diff(), strict=True):
        noise = torch.randn(x.shape, dtype=F64, generator=g) * dt.sqrt()
        x = x + sde.drift(t, x) * dt + sde.diffusion(t, x).apply(noise)
    mean, var = bridge.mean(ts[-1:])[0, 0], bridge.variance(ts[-1:])[0, 0]
    assert abs(x.mean() - mean) <= 5 * (var / 4000).sqrt() + 0.02 * var.sqrt()
    assert abs(x.var() / var - 1) <= 5 * math.sqrt(2 / 4000) + 0.02


@pytest.mark.parametrize("rate", [0.0, 1e-6, 1.3])
def test_gradients(rate: float) -> None:
    def everything(start, end, scale, centre, ts):
        bridge = PinnedProcess(start, end, rate, centre, scale, end_time=3.0)
        path = bridge.sample(ts, 2, torch.Generator().manual_seed(0))
        x = path.x
        return (
            bridge.mean(ts),
            bridge.variance(ts),
            bridge.log_prob(path),
            x,
            bridge.drift(1.0, x[..., 0, :]),
        )

    inputs = [_t(0.5), _t(-1.0), _t(0.7), _t(0.2), TS.clone()]
    assert torch.autograd.gradcheck(everything, [x.requires_grad_() for x in inputs])


def test_gradient_in_the_rate_is_even_around_brownian_motion() -> None:
    def variance(rate):
        return PinnedProcess(_t(0.0), _t(1.0), rate, end_time=3.0).variance(TS)

    assert torch.autograd.gradcheck(variance, [_t(0.8).requires_grad_()])
    zero = _t(0.0).requires_grad_()
    (slope,) = torch.autograd.grad(variance(zero).sum(), zero)
    assert not slope.any()  # an even function of the rate


def test_float32_state_with_float64_times() -> None:
    bridge = PinnedProcess(
        torch.tensor([0.5]), torch.tensor([-1.0]), 1.3, 0.4, 0.7, start_time=0.2, end_time=2.5
    )
    assert bridge.mean(TS).dtype == torch.float32
    assert bridge.sample(TS, 2).x.dtype == torch.float32
    torch.testing.assert_close(bridge.mean(TS).double(), _bridge().mean(TS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: PinnedProcess(_t(0.0), _t(1.0), diffusion=-1.0),
            InvalidInputError,
            "diffusion must be positive",
        ),
        (lambda: PinnedProcess(_t(0.0), _t(1.0, 2.0)), ShapeError, "same size"),
        (lambda: PinnedProcess(_t(0.0), torch.ones(1)), DtypeMismatchError, "final torch.float32"),
        (lambda: PinnedProcess(_t(math.nan), _t(1.0)), NonFiniteError, "initial"),
        (lambda: PinnedProcess(_t(0.0), _t(1.0), end_time=0.0), TimeGridError, "after start_time"),
        (lambda: PinnedProcess(0.0, _t(1.0)), ShapeError, "initial must be"),
        (lambda: _bridge().mean(_t(0.1, 1.0)), TimeGridError, "inside the span"),
        (lambda: _bridge().mean(_t(1.0, 0.5)), TimeGridError, "increase strictly"),
        (lambda: _bridge().drift(2.5, _t(1.0)), TimeGridError, "singular"),
        (lambda: _bridge().transition(1.0, _t(1.0), 0.5), TimeGridError, "don't fit"),
        (
            lambda: _bridge().log_prob(PathSample.of_states(TS, torch.zeros(4, 1, dtype=F64))),
            ShapeError,
            "path.x has the wrong",
        ),
        (
            lambda: _bridge().log_prob(PathSample.of_states(TS, torch.full((5, 1), math.inf, dtype=F64))),
            NonFiniteError,
            "path.x must be",
        ),
        (lambda: _bridge().sample(TS, 0), InvalidInputError, "sample_shape must be"),
    ],
)
def test_bad_input_is_rejected(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
