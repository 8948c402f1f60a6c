"""Integrators of probability-flow ODEs and of SDEs with additive noise, as pure functions of a grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_callable,
    check_choice,
    check_finite,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn._transforms import ordinarily
from stochdyn.errors import InvalidInputError, TimeGridError
from stochdyn.interpolants.sampling.methods import (
    FLOW_METHODS,
    Adaptive,
    Euler,
    FlowMethod,
    Heun,
    Midpoint,
    Ralston,
    Strang,
    as_method,
)

__all__ = [
    "flow_step",
    "integrate_marginals",
    "integrate_ode",
    "integrate_sde",
    "integrate_strang",
    "time_grid",
]

Field = Callable[[Tensor, Tensor], Tensor]
Noise = float | Tensor | Callable[[Tensor], Tensor]
Step = Callable[[int, Tensor], Tensor]


def time_grid(
    num_steps: int,
    start: float = 0.0,
    stop: float = 1.0,
    *,
    power: float = 1.0,
    shift: float = 1.0,
    like: Tensor | None = None,
) -> Tensor:
    """Return ``num_steps + 1`` times from ``start`` to ``stop``, either of which may be the later one.

    Args:
        num_steps: The number of steps.
        start: The first time.
        stop: The last time.
        power: The power of the spacing: 1 for equal steps; above 1 the steps shrink towards ``stop`` like ``(1 - u)**power``.
        shift: The shift of the spacing: 1 for none; above 1 the steps shrink towards ``start``, as high-resolution models need it:
            ``u / (shift + (1 - shift) * u)``.
        like: A tensor whose precision and device the grid takes.

    Raises:
        InvalidInputError: If ``num_steps`` isn't a positive integer, or ``power`` or ``shift`` isn't positive.
        TimeGridError: If both times are the same.

    Example:
        >>> time_grid(2, 1.0, 0.0)
        tensor([1.0000, 0.5000, 0.0000])
    """
    check_positive_int(num_steps, "num_steps")
    for name, value in (("start", start), ("stop", stop)):
        check_real(value, name)
    check_real(power, "power", above=0.0)
    check_real(shift, "shift", above=0.0)
    if start == stop:
        raise TimeGridError("a grid needs two different ends", got=f"{start:g} and {stop:g}")
    dtype = torch.get_default_dtype() if like is None else like.dtype
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    u = u / (shift + (1 - shift) * u)
    shrunk = 1 - (1 - u) ** power if power != 1 else u
    grid = start + (stop - start) * shrunk
    grid[-1] = stop
    return grid.to(dtype=dtype, device=None if like is None else like.device)


def _steps_of(ts: Tensor, x: Tensor) -> tuple[tuple[Tensor, ...], list[float]]:
    """Check a grid that may run either way; return times beside ``x`` and the steps as numbers."""
    check_type(x, Tensor, "x")
    if not x.is_floating_point() or x.ndim < 1:
        raise InvalidInputError(
            "x must be floating states (..., d)", got=f"{x.dtype} of shape {tuple(x.shape)}"
        )
    check_finite(x.detach(), "x")
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


@ordinarily
def integrate_ode(
    velocity: Field,
    x: Tensor,
    ts: Tensor,
    method: str | FlowMethod = "heun",
    *,
    trajectory: bool = False,
    inside: tuple[bool, bool] = (False, False),
) -> Tensor:
    r"""Integrate :math:`\dot x=b(t,x)` along a grid.

    Args:
        velocity: The velocity as a function ``b(t, x) -> (..., d)``, called with a time of no axes.
        x: The state at ``ts[0]``, ``(..., d)``.
        ts: The times, strictly increasing or strictly decreasing, ``(T,)``.
        method: ``"euler"``, ``"midpoint"``, ``"ralston"``, ``"heun"`` (order 2), ``"rk4"`` with one step per interval, an adaptive method
            such as ``"dopri5"``, or an object such as :class:`~stochdyn.interpolants.Adaptive` that carries options.
        trajectory: Whether to return the states at all times, ``(T, ..., d)``, instead of the last one.
        inside: Whether the first and the last step must evaluate the velocity strictly inside, since it is known at their
            outer end only as a limit. The order of the method stays the same.

    Returns:
        ``(..., d)``; differentiable unless gradients are off.

    Raises:
        TimeGridError: If the grid isn't strictly monotone.
        InvalidInputError: If the method is unknown.

    Example:
        >>> integrate_ode(lambda t, x: -x, torch.ones(1), time_grid(10), "rk4")
        tensor([0.3679])
    """
    chosen = as_method(method, FLOW_METHODS, "flows")
    check_callable(velocity, "velocity", "a function of time and state")
    times, dts = _steps_of(ts, x)
    if isinstance(chosen, Adaptive):
        return _adaptive(velocity, x, ts.to(x), chosen, trajectory, inside)
    return _run(flow_step(velocity, times, dts, chosen, inside), x, len(dts), trajectory)


#: How much of the span of an adaptive method lies beside an end at which the velocity is known as a limit only.
_MARGIN = 5e-3


def _adaptive(
    velocity: Field, x: Tensor, ts: Tensor, method: Adaptive, trajectory: bool, inside: tuple[bool, bool]
) -> Tensor:
    from torchdiffeq import odeint

    grid, first, last = ts, x, None
    span = _MARGIN * (ts[-1] - ts[0])
    if inside[0]:
        grid = torch.cat(
            [(ts[0] + torch.minimum(span.abs(), 0.5 * (ts[1] - ts[0]).abs()) * span.sign())[None], grid[1:]]
        )
        first = _first_step(velocity, ts[0], float(grid[0] - ts[0]), x, 4)
    if inside[1]:
        last = ts[-1] - torch.minimum(span.abs(), 0.5 * (grid[-1] - grid[-2]).abs()) * span.sign()
        grid = torch.cat([grid[:-1], last[None]])
    atol = method.atol
    if atol is None:
        with torch.no_grad():
            size = (
                first.square().mean().sqrt()
                + velocity(grid[0], first).square().mean().sqrt() * span.abs() / _MARGIN
            )
        atol = max(method.rtol * float(size), torch.finfo(x.dtype).tiny)
    # without step_t the last step overshoots the last time, where the field may not exist
    path = odeint(
        velocity,
        first,
        grid,
        method=method.name,
        rtol=method.rtol,
        atol=atol,
        options={"step_t": grid},
    )
    path = torch.cat([x[None], path[1:]]) if inside[0] else path
    if last is not None:
        path = torch.cat([path[:-1], _last_step(velocity, last, float(ts[-1] - last), path[-1], 4)[None]])
    return cast(Tensor, path if trajectory else path[-1])


def _first_step(velocity: Field, t: Tensor, h: float, x: Tensor, order: int) -> Tensor:
    """Take a step whose slopes all lie inside, by Gauss's collocation with fixed-point sweeps from the start itself."""
    if order < 4:
        middle = t + 0.5 * h
        slope = velocity(middle, x)
        for _ in range(2 if order > 1 else 0):
            slope = velocity(middle, torch.add(x, slope, alpha=0.5 * h))
        return torch.add(x, slope, alpha=h)
    # Gauss's nodes 1/2 -+ sqrt(3)/6 and weights 1/2; three sweeps of the fixed point leave a local error of order h^5
    root = 3**0.5 / 6
    early, late = t + (0.5 - root) * h, t + (0.5 + root) * h
    k1, k2 = velocity(early, x), velocity(late, x)
    for _ in range(3):
        k1, k2 = (
            velocity(early, x + h * (0.25 * k1 + (0.25 - root) * k2)),
            velocity(late, x + h * ((0.25 + root) * k1 + 0.25 * k2)),
        )
    return torch.add(x, k1 + k2, alpha=0.5 * h)


def _last_step(velocity: Field, t: Tensor, h: float, x: Tensor, order: int) -> Tensor:
    """Take an explicit step that stops short of its end: Euler's, the midpoint rule, or Ralston's method of order 3.

    One step of local order h^4 leaves the order 4 of the others.
    """
    slope = velocity(t, x)
    if order == 1:
        return torch.add(x, slope, alpha=h)
    middle = velocity(t + 0.5 * h, torch.add(x, slope, alpha=0.5 * h))
    if order == 2:
        return torch.add(x, middle, alpha=h)
    # Ralston's method of order 3: nodes 0, 1/2, 3/4 and weights 2/9, 1/3, 4/9
    late = velocity(t + 0.75 * h, torch.add(x, middle, alpha=0.75 * h))
    return torch.add(x, 2 * slope + 3 * middle + 4 * late, alpha=h / 9)


def flow_step(
    velocity: Field,
    times: tuple[Tensor, ...],
    dts: list[float],
    method: FlowMethod,
    inside: tuple[bool, bool] = (False, False),
) -> Step:
    """Return the steps of a flow, ``step(n, x)``; see :func:`integrate_ode`."""
    plain, order, last = _plain_step(velocity, times, dts, method), method.order, len(dts) - 1
    if not any(inside):
        return plain

    def step(n: int, x: Tensor) -> Tensor:
        if n == 0 and inside[0]:
            return _first_step(velocity, times[0], dts[0], x, order)
        if n == last and inside[1]:
            return _last_step(velocity, times[n], dts[n], x, order)
        return plain(n, x)

    return step


def _plain_step(velocity: Field, times: tuple[Tensor, ...], dts: list[float], method: FlowMethod) -> Step:
    if isinstance(method, Euler):
        return lambda n, x: torch.add(x, velocity(times[n], x), alpha=dts[n])

    def heun(n: int, x: Tensor) -> Tensor:
        # the trapezoidal rule, with Euler's step in place of the unknown end
        slope = velocity(times[n], x)
        ahead = velocity(times[n + 1], torch.add(x, slope, alpha=dts[n]))
        return torch.add(x, slope + ahead, alpha=0.5 * dts[n])

    if isinstance(method, Heun):
        return heun
    if isinstance(method, Ralston):
        late = [torch.lerp(a, b, 2 / 3) for a, b in itertools.pairwise(times)]

        def ralston(n: int, x: Tensor) -> Tensor:
            # weights 1/4 and 3/4 on the slopes at the start and at two thirds of the step
            slope = velocity(times[n], x)
            ahead = velocity(late[n], torch.add(x, slope, alpha=2 / 3 * dts[n]))
            return torch.add(x, slope + 3 * ahead, alpha=0.25 * dts[n])

        return ralston
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

    return midpoint if isinstance(method, Midpoint) else rk4


def step_noise(noise: Noise, ts: Tensor, dts: list[float]) -> list[float]:
    """Return the standard deviation of the noise of every step, from the coefficient in its middle."""
    middles = 0.5 * (ts[1:] + ts[:-1]).double()
    value = noise(middles) if callable(noise) else noise
    values = as_tensor(value, "noise", finite=False).detach().double().cpu()
    values = values.expand(len(dts)) if values.ndim == 0 else values
    if values.shape != (len(dts),):
        raise InvalidInputError(
            "noise must be a number, one number per step, or a function of time",
            got=f"shape {tuple(values.shape)}",
        )
    check_finite(values, "noise")
    if bool((values < 0).any()):
        raise InvalidInputError("noise must not be negative", got=f"minimum {float(values.min()):g}")
    steps = torch.tensor(dts, dtype=torch.float64).abs()
    return cast(list[float], (values * steps.sqrt()).tolist())


@ordinarily
def integrate_sde(
    drift: Field,
    noise: Noise,
    x: Tensor,
    ts: Tensor,
    method: Literal["euler", "heun"] = "heun",
    *,
    generator: torch.Generator | int | None = None,
    trajectory: bool = False,
    last_noise: bool = True,
) -> Tensor:
    r"""Integrate :math:`dX=f(t,X)\,dt+g(t)\,dW` along a grid, forwards or backwards in time.

    ``"euler"`` is Euler-Maruyama, of weak order 1. ``"heun"`` is of weak order 2 with two evaluations per step: the noise
    of the step is part of the predictor,

    .. math:: \hat x=x+hf(t,x)+\xi,\qquad x'=x+\tfrac h2\big[f(t,x)+f(t+h,\hat x)\big]+\xi .

    On a decreasing grid the step is negative and the noise is that of the backward equation.

    Args:
        drift: The drift as a function ``f(t, x) -> (..., d)``, called with a time of no axes.
        noise: The strength g of the noise: a number, one number per step ``(T-1,)``, or a function of times ``(T-1,)``.
        x: The state at ``ts[0]``, ``(..., d)``.
        ts: The times, strictly monotone, ``(T,)``.
        method: How to take a step: ``"heun"``, of order 2, or ``"euler"``, of order 1.
        generator: The source of randomness; torch's global one if None.
        trajectory: Whether to return the states at all times, ``(T, ..., d)``.
        last_noise: Whether the last step has noise; leaving it out is customary where the last time is that of clean
            data.

    Returns:
        ``(..., d)``.

    Raises:
        TimeGridError: If the grid isn't strictly monotone.
        InvalidInputError: If the method is unknown, or the noise is negative.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = integrate_sde(lambda t, x: -x, 2**0.5, torch.zeros(4000, 1), time_grid(20, 0.0, 3.0), generator=g)
        >>> round(float(x.var()), 1)
        1.0

    Reference:
        Kloeden and Platen, "Numerical solution of stochastic differential equations", 1992, chapter 15.
    """
    check_choice(method, ("euler", "heun"), "method")
    check_callable(drift, "drift", "a function of time and state")
    times, dts = _steps_of(ts, x)
    spread = step_noise(noise, ts, dts)
    source = as_generator(generator, x.device)
    if not last_noise:
        spread[-1] = 0.0

    def euler(n: int, x: Tensor) -> Tensor:
        return torch.add(_add_noise(x, spread[n], source), drift(times[n], x), alpha=dts[n])

    def heun(n: int, x: Tensor) -> Tensor:
        return _noisy_heun(drift, times[n], times[n + 1], dts[n], spread[n], x, source)

    return _run(heun if method == "heun" else euler, x, len(dts), trajectory)


def _add_noise(x: Tensor, spread: float, generator: torch.Generator | None) -> Tensor:
    if spread == 0.0:
        return x
    xi = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return torch.add(x, xi, alpha=spread)


def _noisy_heun(
    drift: Field,
    t: Tensor,
    later: Tensor,
    h: float,
    spread: float,
    x: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    # the noise is part of the predictor: added afterwards, the scheme would be of weak order 1
    noisy, slope = _add_noise(x, spread, generator), drift(t, x)
    ahead = drift(later, torch.add(noisy, slope, alpha=h))
    return torch.add(noisy, slope + ahead, alpha=0.5 * h)


@ordinarily
def integrate_strang(
    velocity: Field,
    score: Field,
    epsilon: Noise,
    x: Tensor,
    ts: Tensor,
    *,
    generator: torch.Generator | int | None = None,
    trajectory: bool = False,
) -> Tensor:
    r"""Integrate :math:`dX=(b+\varepsilon s)\,dt+\sqrt{2\varepsilon}\,dW` by splitting transport from Langevin dynamics.

    Half a step of the ODE (Heun), a step of Langevin dynamics in the density at the middle of the step (two stages),
    half a step of the ODE. Of weak order 2, with an error constant several times less than that of Heun's method on
    the whole equation, at four evaluations of ``b`` and two of ``s``. On a decreasing grid the Langevin step runs with
    the size of the step, so the law at every time stays the same.

    Args:
        velocity: The velocity as a function ``b(t, x) -> (..., d)``.
        score: The score as a function ``s(t, x) -> (..., d)``.
        epsilon: A number, one number per step, or a function of times ``(T-1,)``.
        x: The state at ``ts[0]``, ``(..., d)``.
        ts: The times, strictly monotone, ``(T,)``.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        trajectory: Whether to return the states at all times, ``(T, ..., d)``.

    Returns:
        ``(..., d)``.

    Raises:
        TimeGridError: If the grid isn't strictly monotone.
        InvalidInputError: If epsilon is negative.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> still = lambda t, x: torch.zeros_like(x)
        >>> x = integrate_strang(still, lambda t, x: -x, 1.0, torch.zeros(4000, 1), time_grid(20, 0.0, 3.0), generator=g)
        >>> round(float(x.var()), 1)
        1.0

    Reference:
        Strang, "On the construction and comparison of difference schemes", 1968.
    """
    check_callable(velocity, "velocity", "a function of time and state")
    check_callable(score, "score", "a function of time and state")
    times, dts = _steps_of(ts, x)
    spread = step_noise(_root_of_twice(epsilon), ts, dts)
    step = _strang_step(velocity, score, times, dts, spread, as_generator(generator, x.device))
    return _run(step, x, len(dts), trajectory)


def _strang_step(
    velocity: Field,
    score: Field,
    times: tuple[Tensor, ...],
    dts: list[float],
    spread: list[float],
    generator: torch.Generator | None,
    inside: tuple[bool, bool] = (False, False),
) -> Step:
    """Return the steps of the splitting; ``spread`` are the standard deviations of the noise, step by step."""

    def step(n: int, x: Tensor) -> Tensor:
        h, rate = 0.5 * dts[n], 0.5 * spread[n] ** 2
        middle = 0.5 * (times[n] + times[n + 1])
        first, last = n == 0 and inside[0], n == len(dts) - 1 and inside[1]
        x = flow_step(velocity, (times[n], middle), [h], Heun(), (first, False))(0, x)
        if spread[n] > 0:
            # Heun's method for dX = epsilon s(middle, X) dt + sqrt(2 epsilon) dW, which keeps the density of the middle
            noisy, pull = _add_noise(x, spread[n], generator), score(middle, x)
            x = torch.add(noisy, pull + score(middle, torch.add(noisy, pull, alpha=rate)), alpha=0.5 * rate)
        return flow_step(velocity, (middle, times[n + 1]), [h], Heun(), (False, last))(0, x)

    return step


@ordinarily
def integrate_marginals(
    fields: tuple[Field, Field, Callable[[float], Field]],
    strengths: list[float],
    x: Tensor,
    ts: Tensor,
    method: FlowMethod,
    *,
    inside: tuple[bool, bool] = (False, False),
    noise_inside: tuple[bool, bool] = (False, False),
    generator: torch.Generator | None = None,
    trajectory: bool = False,
) -> Tensor:
    r"""Integrate :math:`dX=(b+\varepsilon s)\,dt+\sqrt{2\varepsilon}\,dW` with one epsilon per step, in drift and noise alike.

    Within a step of constant epsilon the equation keeps the marginals of exact fields, whatever the epsilons of the other steps:
    an epsilon that jumps from step to step costs no accuracy. In a first or last step at whose end a field is known as a limit only,
    flow and noise are split, so that nothing is evaluated there.

    Args:
        fields: The velocity, the score, and the drift for a given epsilon, ``drift(epsilon)(t, x)``.
        strengths: The strength epsilon of the noise in every step.
        x: The state at ``ts[0]``, ``(..., d)``.
        ts: The times, strictly monotone, ``(T,)``.
        method: How to take a step.
        inside: Whether the velocity is known at the first and at the last time as a limit only.
        noise_inside: Whether the drift is known at the first and at the last time as a limit only.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        trajectory: Whether to return the states at all times, ``(T, ..., d)``.
    """
    velocity, score, drift = fields
    times, dts = _steps_of(ts, x)
    spread = [(2 * e * abs(h)) ** 0.5 for e, h in zip(strengths, dts, strict=True)]
    split = _strang_step(velocity, score, times, dts, spread, generator, inside)
    last = len(dts) - 1

    def step(n: int, x: Tensor) -> Tensor:
        at_first, at_last = n == 0 and noise_inside[0], n == last and noise_inside[1]
        if isinstance(method, Strang) or at_first or (at_last and isinstance(method, Heun)):
            return split(n, x)
        forward = drift(strengths[n])
        if isinstance(method, Euler):
            return torch.add(_add_noise(x, spread[n], generator), forward(times[n], x), alpha=dts[n])
        return _noisy_heun(forward, times[n], times[n + 1], dts[n], spread[n], x, generator)

    return _run(step, x, len(dts), trajectory)


def _root_of_twice(epsilon: Noise) -> Noise:
    if callable(epsilon):
        return lambda t: (2 * torch.as_tensor(epsilon(t))).sqrt()
    value = as_tensor(epsilon, "epsilon", finite=False).double()
    if bool((value < 0).any()):
        raise InvalidInputError("epsilon must not be negative", got=f"minimum {float(value.min()):g}")
    return (2 * value).sqrt()
