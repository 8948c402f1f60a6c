"""Integrators of probability-flow ODEs and of SDEs with additive noise, as pure functions of a grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_finite, check_positive, check_positive_int
from stochdyn.errors import InvalidInputError, TimeGridError

__all__ = [
    "ADAPTIVE",
    "ODE_METHODS",
    "SDE_METHODS",
    "integrate_ode",
    "integrate_sde",
    "integrate_strang",
    "time_grid",
]

Field = Callable[[Tensor, Tensor], Tensor]
Noise = float | Tensor | Callable[[Tensor], Tensor]
Step = Callable[[int, Tensor], Tensor]

ODE_METHODS = ("euler", "midpoint", "heun", "rk4")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")
SDE_METHODS = ("euler", "heun", "strang")


def time_grid(
    steps: int, start: float = 0.0, stop: float = 1.0, *, power: float = 1.0, like: Tensor | None = None
) -> Tensor:
    """Return ``steps + 1`` times from ``start`` to ``stop``, either of which may be the later one.

    Args:
        steps: number of steps.
        start: first time.
        stop: last time.
        power: 1 for equal steps; above 1 the steps shrink towards ``stop`` like ``(1 - u)**power``.
        like: a tensor whose precision and device the grid takes.

    Raises:
        InvalidInputError: if ``steps`` isn't a positive integer, or ``power`` isn't positive.
        TimeGridError: if both times are the same.

    Example:
        >>> time_grid(2, 1.0, 0.0)
        tensor([1.0000, 0.5000, 0.0000])
    """
    check_positive_int(steps, "steps")
    check_positive(power, "power")
    if start == stop:
        raise TimeGridError("a grid needs two different ends", got=f"{start:g} and {stop:g}")
    dtype = torch.get_default_dtype() if like is None else like.dtype
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    shrunk = 1 - (1 - u) ** power if power != 1 else u
    grid = start + (stop - start) * shrunk
    grid[-1] = stop
    return grid.to(dtype=dtype, device=None if like is None else like.device)


def _steps_of(ts: Tensor, x: Tensor) -> tuple[tuple[Tensor, ...], list[float]]:
    """Check a grid that may run either way; return times beside ``x`` and the steps as numbers."""
    if not isinstance(ts, Tensor) or ts.ndim != 1 or ts.shape[0] < 2 or not ts.is_floating_point():
        got = f"shape {tuple(ts.shape)} {ts.dtype}" if isinstance(ts, Tensor) else type(ts).__name__
        raise TimeGridError("ts must be a floating tensor of at least two times", got=got)
    check_finite(ts, "ts")
    steps = (ts[1:] - ts[:-1]).tolist()
    if not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise TimeGridError("ts must increase strictly, or decrease strictly", got=ts.tolist()[:8])
    return ts.to(x).unbind(0), steps


def _run(step: Step, x: Tensor, count: int, trajectory: bool) -> Tensor:
    if not trajectory:
        for n in range(count):
            x = step(n, x)
        return x
    states = [x]
    for n in range(count):
        states.append(step(n, states[-1]))
    return torch.stack(states)


def integrate_ode(
    velocity: Field,
    x: Tensor,
    ts: Tensor,
    method: str = "heun",
    *,
    trajectory: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    r"""Integrate :math:`\dot x=b(t,x)` along a grid.

    Args:
        velocity: ``b(t, x) -> (..., d)``, called with a time of no axes.
        x: ``(..., d)`` state at ``ts[0]``.
        ts: ``(T,)`` times, strictly increasing or strictly decreasing.
        method: ``"euler"``, ``"midpoint"``, ``"heun"`` (order 2) or ``"rk4"`` with one step an interval; or one of
            torchdiffeq's adaptive methods, such as ``"dopri5"``.
        trajectory: return the states at all times, ``(T, ..., d)``, instead of the last one.
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.

    Returns:
        ``(..., d)``; differentiable unless gradients are off.

    Raises:
        TimeGridError: if the grid isn't strictly monotone.
        InvalidInputError: if the method is unknown.

    Example:
        >>> integrate_ode(lambda t, x: -x, torch.ones(1), time_grid(10), "rk4")
        tensor([0.3679])
    """
    check_choice(method, (*ODE_METHODS, *ADAPTIVE), "method")
    times, dts = _steps_of(ts, x)
    if method in ADAPTIVE:
        from torchdiffeq import odeint

        # without step_t the last step overshoots the last time, where the field may not exist
        path = odeint(
            velocity, x, ts.to(x), method=method, rtol=rtol, atol=atol, options={"step_t": ts.to(x)}
        )
        return cast(Tensor, path if trajectory else path[-1])
    return _run(_ode_step(velocity, times, dts, method), x, len(dts), trajectory)


def _ode_step(velocity: Field, times: tuple[Tensor, ...], dts: list[float], method: str) -> Step:
    if method == "euler":
        return lambda n, x: torch.add(x, velocity(times[n], x), alpha=dts[n])

    def heun(n: int, x: Tensor) -> Tensor:
        slope = velocity(times[n], x)
        ahead = velocity(times[n + 1], torch.add(x, slope, alpha=dts[n]))
        return torch.add(x, slope + ahead, alpha=0.5 * dts[n])

    if method == "heun":
        return heun
    middles = [0.5 * (a + b) for a, b in itertools.pairwise(times)]

    def midpoint(n: int, x: Tensor) -> Tensor:
        half = torch.add(x, velocity(times[n], x), alpha=0.5 * dts[n])
        return torch.add(x, velocity(middles[n], half), alpha=dts[n])

    def rk4(n: int, x: Tensor) -> Tensor:
        h, middle = dts[n], middles[n]
        k1 = velocity(times[n], x)
        k2 = velocity(middle, torch.add(x, k1, alpha=0.5 * h))
        k3 = velocity(middle, torch.add(x, k2, alpha=0.5 * h))
        k4 = velocity(times[n + 1], torch.add(x, k3, alpha=h))
        return torch.add(x, k1 + 2 * (k2 + k3) + k4, alpha=h / 6)

    return midpoint if method == "midpoint" else rk4


def step_noise(noise: Noise, ts: Tensor, dts: list[float]) -> list[float]:
    """Return the standard deviation of the noise of every step, from the coefficient in its middle."""
    middles = 0.5 * (ts[1:] + ts[:-1]).double()
    value = noise(middles) if callable(noise) else noise
    values = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    values = values.expand(len(dts)) if values.ndim == 0 else values
    if values.shape != (len(dts),):
        raise InvalidInputError(
            "noise must be a number, one number a step, or a function of time",
            got=f"shape {tuple(values.shape)}",
        )
    check_finite(values, "noise")
    if bool((values < 0).any()):
        raise InvalidInputError("noise must not be negative", got=f"minimum {float(values.min()):g}")
    steps = torch.tensor(dts, dtype=torch.float64).abs()
    return cast(list[float], (values * steps.sqrt()).tolist())


def integrate_sde(
    drift: Field,
    noise: Noise,
    x: Tensor,
    ts: Tensor,
    method: Literal["euler", "heun"] = "heun",
    *,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    last_noise: bool = True,
) -> Tensor:
    r"""Integrate :math:`dX=f(t,X)\,dt+g(t)\,dW` along a grid, forwards or backwards in time.

    ``"euler"`` is Euler-Maruyama, of weak order 1. ``"heun"`` is of weak order 2 with two evaluations a step: the noise
    of the step is part of the predictor,

    .. math:: \hat x=x+hf(t,x)+\xi,\qquad x'=x+\tfrac h2\big[f(t,x)+f(t+h,\hat x)\big]+\xi .

    On a decreasing grid the step is negative and the noise is that of the backward equation.

    Args:
        drift: ``f(t, x) -> (..., d)``, called with a time of no axes.
        noise: ``g``: a number, one number a step ``(T-1,)``, or a function of times ``(T-1,)``.
        x: ``(..., d)`` state at ``ts[0]``.
        ts: ``(T,)`` times, strictly monotone.
        method: ``"heun"`` or ``"euler"``.
        generator: source of randomness; torch's global one if None.
        trajectory: return the states at all times, ``(T, ..., d)``.
        last_noise: False leaves out the noise of the last step, which is customary where the last time is that of clean
            data.

    Returns:
        ``(..., d)``.

    Raises:
        TimeGridError: if the grid isn't strictly monotone.
        InvalidInputError: if the method is unknown, or the noise is negative.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = integrate_sde(lambda t, x: -x, 2**0.5, torch.zeros(4000, 1), time_grid(20, 0.0, 3.0), generator=g)
        >>> round(float(x.var()), 1)
        1.0

    Reference:
        Kloeden and Platen, "Numerical solution of stochastic differential equations", 1992, chapter 15.
    """
    check_choice(method, ("euler", "heun"), "method")
    times, dts = _steps_of(ts, x)
    spread = step_noise(noise, ts, dts)
    if not last_noise:
        spread[-1] = 0.0

    def kick(n: int, x: Tensor) -> Tensor:
        if spread[n] == 0.0:
            return x
        xi = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return torch.add(x, xi, alpha=spread[n])

    def euler(n: int, x: Tensor) -> Tensor:
        return torch.add(kick(n, x), drift(times[n], x), alpha=dts[n])

    def heun(n: int, x: Tensor) -> Tensor:
        kicked, slope = kick(n, x), drift(times[n], x)
        ahead = drift(times[n + 1], torch.add(kicked, slope, alpha=dts[n]))
        return torch.add(kicked, slope + ahead, alpha=0.5 * dts[n])

    return _run(heun if method == "heun" else euler, x, len(dts), trajectory)


def integrate_strang(
    velocity: Field,
    score: Field,
    epsilon: Noise,
    x: Tensor,
    ts: Tensor,
    *,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
) -> Tensor:
    r"""Integrate :math:`dX=(b+\varepsilon s)\,dt+\sqrt{2\varepsilon}\,dW` by splitting transport from Langevin dynamics.

    Half a step of the ODE (Heun), a step of Langevin dynamics in the density at the middle of the step (two stages),
    half a step of the ODE. Of weak order 2, with an error constant several times less than that of Heun's method on
    the whole equation, at four evaluations of ``b`` and two of ``s``. On a decreasing grid the Langevin step runs with
    the size of the step, so the law at every time stays the same.

    Args:
        velocity: ``b(t, x) -> (..., d)``.
        score: ``s(t, x) -> (..., d)``.
        epsilon: a number, one number a step, or a function of times ``(T-1,)``.
        x: ``(..., d)`` state at ``ts[0]``.
        ts: ``(T,)`` times, strictly monotone.
        generator: source of randomness; torch's global one if None.
        trajectory: return the states at all times, ``(T, ..., d)``.

    Returns:
        ``(..., d)``.

    Raises:
        TimeGridError: if the grid isn't strictly monotone.
        InvalidInputError: if epsilon is negative.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> still = lambda t, x: torch.zeros_like(x)
        >>> x = integrate_strang(still, lambda t, x: -x, 1.0, torch.zeros(4000, 1), time_grid(20, 0.0, 3.0), generator=g)
        >>> round(float(x.var()), 1)
        1.0

    Reference:
        Strang, "On the construction and comparison of difference schemes", 1968.
    """
    times, dts = _steps_of(ts, x)
    # standard deviations of sqrt(2 epsilon) dW, step by step
    root = _root_of_twice(epsilon)
    spread = step_noise(root, ts, dts)
    middles = [0.5 * (a + b) for a, b in itertools.pairwise(times)]

    def half(start: Tensor, stop: Tensor, h: float, x: Tensor) -> Tensor:
        slope = velocity(start, x)
        return torch.add(x, slope + velocity(stop, torch.add(x, slope, alpha=h)), alpha=0.5 * h)

    def step(n: int, x: Tensor) -> Tensor:
        h, middle, rate = 0.5 * dts[n], middles[n], 0.5 * spread[n] ** 2
        x = half(times[n], middle, h, x)
        if spread[n] > 0:
            xi = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            kicked, pull = torch.add(x, xi, alpha=spread[n]), score(middle, x)
            x = torch.add(kicked, pull + score(middle, torch.add(kicked, pull, alpha=rate)), alpha=0.5 * rate)
        return half(middle, times[n + 1], h, x)

    return _run(step, x, len(dts), trajectory)


def _root_of_twice(epsilon: Noise) -> Noise:
    if callable(epsilon):
        return lambda t: (2 * torch.as_tensor(epsilon(t))).sqrt()
    value = torch.as_tensor(epsilon, dtype=torch.float64)
    if bool((value < 0).any()):
        raise InvalidInputError("epsilon must not be negative", got=f"minimum {float(value.min()):g}")
    return (2 * value).sqrt()
