"""Fixed-grid integrators: one time loop, whose step is prepared for all steps at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from stochdyn.core.sde._steps import Problem, Row, Step, full_state, remember
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.methods import METHODS, Method, as_method

__all__ = [
    "METHODS",
    "Trajectory",
    "draw_increments",
    "full_state",
    "increment_scale",
    "integrate",
    "remember",
    "step_everywhere",
]


@dataclass(frozen=True)
class Trajectory:
    """What the time loop returns, time leading.

    Attributes:
        x: ``(T, *batch, d)`` states.
        memory: ``(T, *batch, m, K)``, or None.
        control: ``(N, *batch, m)`` drift that a plain control gave to the noise in every step, or None.
        precision: likewise its precision.
    """

    x: Tensor
    memory: Tensor | None
    control: Tensor | None = None
    precision: Tensor | None = None


def increment_scale(sde: SDE, ts: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return the standard deviations ``(N, m * R)`` of the increments of every step, in the layout of NoiseProcess."""
    steps = sde.noise.steps(ts, dtype=dtype)
    brownian = steps.variance[:, :1].expand(-1, channels)
    residual = steps.variance[:, None, 1:].expand(-1, channels, -1).reshape(brownian.shape[0], -1)
    return torch.cat([brownian, residual], -1).sqrt()


def draw_increments(
    sde: SDE, x0: Tensor, ts: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Draw the increments ``(N, *batch, m * R)`` and the initial memory ``(*batch, m, K)`` (None if it starts at 0)."""
    channels = sde.noise_dim(ts[0].to(x0), x0)
    scale = increment_scale(sde, ts, channels, x0.dtype)
    batch = x0.shape[:-1]
    shape = (scale.shape[0], *batch, scale.shape[-1])
    normal = torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)
    scale = scale.reshape(scale.shape[0], *(1,) * len(batch), -1)
    # In place where nothing needs the standard normals any more: large fresh tensors cost more than the product.
    dw = normal * scale if scale.requires_grad else normal.mul_(scale)
    factor = sde.noise.initial_factor(dtype=x0.dtype, device=x0.device)
    if factor is None:
        return dw, None
    past = torch.randn(
        (*batch, channels, factor.shape[0]), generator=generator, dtype=x0.dtype, device=x0.device
    )
    return dw, past @ factor


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
        sde: the equation, with its control.
        x0: ``(*batch, d)`` start.
        ts: ``(T,)`` grid.
        dw: ``(T-1, *batch, m * R)`` increments under the controlled law, in the layout of :class:`NoiseProcess`.
        memory0: ``(*batch, m, K)`` initial memory, zero if None.
        method: :class:`~stochdyn.core.sde.Euler`, :class:`~stochdyn.core.sde.Heun` or
            :class:`~stochdyn.core.sde.Milstein`, or the name of one.
        checkpoint: takes the place of the method's own ``checkpoint`` unless it is False.

    Returns:
        The trajectory, time leading.

    Raises:
        InvalidInputError: for ``"milstein"`` with noise that doesn't commute, or an unknown method.

    Reference:
        Kloeden and Platen, "Numerical solution of stochastic differential equations", 1992, chapters 10 and 11.
    """
    scheme = as_method(method)
    if scheme.cuda_graph and x0.is_cuda and sde.noise.num_states == 0:
        from stochdyn.core.sde.cuda_graphs import integrate_graphed

        return Trajectory(integrate_graphed(sde, x0, ts, dw, scheme.name), None)
    dt = (ts[1:] - ts[:-1]).tolist()
    return run_loop(sde, x0, ts, dt, dw, memory0, scheme.name, checkpoint or scheme.checkpoint)


def run_loop(
    sde: SDE,
    x0: Tensor,
    ts: Tensor,
    dt: list[float],
    dw: Tensor,
    memory0: Tensor | None,
    method: str,
    checkpoint: bool | int,
) -> Trajectory:
    """Prepare the problem and run the loop; ``dt`` are the steps as numbers, so that nothing here waits for a device."""
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
        sde: the equation; its control is ignored.
        ts: ``(T,)``.
        z: ``(T-1, *batch, d + m K)`` full states before each step.
        e: ``(T-1, *batch, m R)`` increments.

    Returns:
        Full states after each step, ``(T-1, *batch, d + m K)``; differentiable, also forward.
    """
    states = sde.noise.num_states
    t = ts[:-1].to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1))
    dt = (ts[1:] - ts[:-1]).to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1))
    channels = e.shape[-1] // sde.noise.num_innovations(ts)
    x = z[..., : z.shape[-1] - channels * states]
    if not states:
        return x + sde.drift(t, x) * dt + sde.diffusion(t, x).apply(e)
    memory = z[..., x.shape[-1] :].unflatten(-1, (channels, states))
    dz, memory = remember(sde.noise.steps(ts, dtype=z.dtype), slice(None), memory, e, channels)
    return full_state(x + sde.drift(t, x) * dt + sde.diffusion(t, x).apply(dz), memory)
