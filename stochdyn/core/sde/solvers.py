"""Fixed-grid integrators: one time loop, whose step is prepared for all steps at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from stochdyn._checks import as_generator
from stochdyn._transforms import ordinarily
from stochdyn.core.sde._steps import Problem, Row, Step, check_method, full_state, remember
from stochdyn.core.sde.control import Control
from stochdyn.core.sde.cuda_graphs import replayed
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import (
    first_steps,
    first_time,
    noise_steps,
    remembered,
    step_sizes,
    steps_of,
    time_column,
)
from stochdyn.core.sde.methods import METHODS, Euler, Exact, Method, as_method
from stochdyn.core.sde.noise import NoiseSteps
from stochdyn.errors import ShapeError

__all__ = [
    "METHODS",
    "Trajectory",
    "batch_shape_of",
    "draw_increments",
    "full_state",
    "increment_scale",
    "integrate",
    "remember",
    "step_everywhere",
    "stepped",
]


@dataclass(frozen=True)
class Trajectory:
    """What the time loop returns, time leading.

    Attributes:
        x: The states ``(T, *batch, d)``.
        memory: The memory states ``(T, *batch, m, K)``, or None.
        control: The drift ``(N, *batch, m)`` that a plain control gave to the noise in every step, or None.
        precision: The precision of the control, in the same layout.
    """

    x: Tensor
    memory: Tensor | None
    control: Tensor | None = None
    precision: Tensor | None = None


def increment_scale(sde: SDE, ts: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return the standard deviations of the increments of every step, in the layout of NoiseProcess.

    ``(N, m * R)``, or ``(N, *batch, m * R)`` where every series has a grid of its own.
    """
    variance = noise_steps(sde.noise, ts, dtype).variance
    brownian = variance[..., :1].expand(*variance.shape[:-1], channels)
    residual = variance[..., None, 1:].expand(*variance.shape[:-1], channels, -1).flatten(-2)
    return torch.cat([brownian, residual], -1).sqrt()


def batch_shape_of(sde: SDE, x0: Tensor, ts: Tensor, steps: NoiseSteps | None = None) -> torch.Size:
    """Return the batch shape that start ``x0 (*batch, d)``, drift, diffusion, control, noise and grid broadcast to.

    ``steps`` is the recursion of the noise, where it is known already.

    Raises:
        ShapeError: If they don't.
    """
    with torch.no_grad():
        t = first_time(ts, x0)
        channels = sde.noise_dim(t, x0)
        still = x0.new_zeros(channels)
        shapes = [x0.shape[:-1], ts.shape[:-1], sde.drift(t, x0).shape[:-1]]
        shapes.append(sde.diffusion(t, x0).apply(still).shape[:-1])
        if sde.noise.num_states:
            # The noise may have a batch of parameters, such as one Hurst index per particle.
            steps = first_steps(sde.noise, ts, x0.dtype) if steps is None else steps
            shapes.append(steps.parameter_batch)
        if sde.control is not None and type(sde.control).shape_increment is Control.shape_increment:
            z = torch.cat([x0, x0.new_zeros(*x0.shape[:-1], channels * sde.noise.num_states)], -1)
            shapes += [value.shape[:-1] for value in sde.control.at(t, z) if value is not None]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise ShapeError(
            "start, drift, diffusion and grid have batch axes that don't fit each other",
            got=", ".join(str(tuple(s)) for s in shapes),
        ) from error


def draw_increments(
    sde: SDE, x0: Tensor, ts: Tensor, generator: torch.Generator | int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Draw the increments ``(N, *batch, m * R)`` and the initial memory ``(*batch, m, K)`` (None if it starts at 0)."""
    generator = as_generator(generator, x0.device)
    channels = sde.noise_dim(first_time(ts, x0), x0)
    scale = increment_scale(sde, ts, channels, x0.dtype)
    batch = torch.broadcast_shapes(x0.shape[:-1], ts.shape[:-1])
    shape = (scale.shape[0], *batch, scale.shape[-1])
    normal = torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)
    scale = scale.reshape(scale.shape[0], *(1,) * (len(batch) - scale.ndim + 2), *scale.shape[1:])
    # In place where nothing needs the standard normals any more: large fresh tensors cost more than the product.
    dw = normal * scale if scale.requires_grad else normal.mul_(scale)
    factor = sde.noise.initial_factor(dtype=x0.dtype, device=x0.device)
    if factor is None:
        return dw, None
    past = torch.randn(
        (*batch, channels, factor.shape[0]), generator=generator, dtype=x0.dtype, device=x0.device
    )
    return dw, past @ factor


@ordinarily
def integrate(
    sde: SDE,
    x0: Tensor,
    ts: Tensor,
    dw: Tensor,
    memory0: Tensor | None = None,
    *,
    method: Method | str = "euler",
    checkpoint: bool | int = False,
) -> Trajectory:
    r"""Integrate an SDE, in the Itô sense, along given increments on a fixed grid.

    Args:
        sde: The equation, with its control.
        x0: The start ``(*batch, d)``.
        ts: The grid ``(T,)``, or ``(*batch, T)`` where every series has its own. Results are differentiable in it.
        dw: The increments under the controlled law ``(T-1, *batch, m * R)``, in the layout of :class:`NoiseProcess`.
        memory0: The initial memory ``(*batch, m, K)``, zero if None.
        method: :class:`~stochdyn.core.sde.Euler`, :class:`~stochdyn.core.sde.Heun`,
            :class:`~stochdyn.core.sde.Milstein` or :class:`~stochdyn.core.sde.Exact`, or the name of one.
        checkpoint: A number of steps that takes the place of the method's own ``checkpoint`` unless it is False.

    Returns:
        The trajectory, time leading.

    Raises:
        InvalidInputError: For ``"milstein"`` with noise that doesn't commute, or an unknown method.

    Reference:
        Kloeden and Platen, "Numerical solution of stochastic differential equations", 1992, chapters 10 and 11.
    """
    scheme = as_method(method)
    if isinstance(scheme, Exact):
        sde, scheme = stepped(sde, scheme, ts), Euler(scheme.checkpoint, scheme.cuda_graph)
    check_method(sde, x0, ts, scheme.name)
    dt = step_sizes(ts, x0.dtype)
    numbers = not any(isinstance(h, Tensor) for h in dt[:1])
    if scheme.cuda_graph and x0.is_cuda and sde.noise.num_states == 0 and numbers:
        times = remembered(ts, "times", lambda: tuple(ts.tolist()))
        return Trajectory(
            replayed(sde, x0, dw, (scheme.name, times), lambda: _Loop(sde, ts, scheme.name)), None
        )
    return run_loop(sde, x0, ts, dt, dw, memory0, scheme.name, checkpoint or scheme.checkpoint)


def stepped(sde: SDE, method: Method, ts: Tensor) -> SDE:
    """Return the equation whose Euler steps have the densities that belong to a method: another one for exact steps alone.

    Args:
        sde: The equation.
        method: The integration method.
        ts: The grid of times.
    """
    if not isinstance(method, Exact):
        return sde
    from stochdyn.core.gaussian.exact_steps import exact_steps

    return exact_steps(sde, ts)


class _Loop(nn.Module):
    """The time loop of an equation without memory, as a module."""

    def __init__(self, sde: SDE, ts: Tensor, method: str) -> None:
        super().__init__()
        self.sde, self.ts, self.method = sde, ts, method
        self.dt = (ts[1:] - ts[:-1]).tolist()

    def forward(self, x0: Tensor, dw: Tensor) -> Tensor:
        return run_loop(self.sde, x0, self.ts, self.dt, dw, None, self.method, False).x


def run_loop(
    sde: SDE,
    x0: Tensor,
    ts: Tensor,
    dt: list[float] | list[Tensor],
    dw: Tensor,
    memory0: Tensor | None,
    method: str,
    checkpoint: bool | int,
) -> Trajectory:
    """Prepare the problem and run the loop; ``dt`` are the steps, so that nothing here waits for a device."""
    problem = Problem(sde, x0, ts, dt, dw, method)
    start = problem.start(x0, memory0)
    if (path := problem.run_in_place(start)) is not None:
        return Trajectory(path, None)
    rows = _loop(problem.step(), start, problem.num_steps, checkpoint)
    states, *records = zip(*rows, strict=True)
    z = torch.stack([start, *states])
    control = iter([torch.stack(r) for r in records])
    plain = sde.control if records else None
    u = next(control) if plain is not None and plain.drift is not None else None
    precision = next(control) if plain is not None and plain.precision is not None else None
    if not problem.num_states:
        return Trajectory(z, None, u, precision)
    memory = z[..., problem.dim :].unflatten(-1, (problem.channels, problem.num_states))
    return Trajectory(z[..., : problem.dim], memory, u, precision)


def _loop(step: Step, z: Tensor, num_steps: int, checkpoint: bool | int) -> list[Row]:
    """Run THE time loop, in recomputed segments if asked."""

    def segment(start: int, stop: int, z: Tensor) -> list[Row]:
        rows = []
        for n in range(start, stop):
            row = step(n, z)
            z = row[0]
            rows.append(row)
        return rows

    if not checkpoint or not torch.is_grad_enabled():
        return segment(0, num_steps, z)
    length = max(1, round(num_steps**0.5)) if checkpoint is True else int(checkpoint)
    rows: list[Row] = []
    for start in range(0, num_steps, length):
        stop = min(start + length, num_steps)
        rows += recompute(segment, start, stop, rows[-1][0] if rows else z, use_reentrant=False)
    return rows


def step_everywhere(sde: SDE, ts: Tensor, z: Tensor, e: Tensor) -> Tensor:
    """Take the uncontrolled Euler step from every grid point at once.

    Args:
        sde: The equation; its control is ignored.
        ts: The grid of times of a path, ``(T,)`` or ``(*batch, T)``.
        z: The full states ``(T-1, *batch, d + m K)`` before each step.
        e: The increments ``(T-1, *batch, m R)``.

    Returns:
        Full states after each step, ``(T-1, *batch, d + m K)``; differentiable, also forward.
    """
    states = sde.noise.num_states
    t, dt = time_column(ts[..., :-1], z), steps_of(ts, z)
    channels = e.shape[-1] // sde.noise.num_innovations(ts)
    x = z[..., : z.shape[-1] - channels * states]
    if not states:
        return x + sde.drift(t, x) * dt + sde.diffusion(t, x).apply(e[..., :channels])
    memory = z[..., x.shape[-1] :].unflatten(-1, (channels, states))
    dz, memory = remember(noise_steps(sde.noise, ts, z.dtype), slice(None), memory, e, channels)
    return full_state(x + sde.drift(t, x) * dt + sde.diffusion(t, x).apply(dz), memory)
