"""Fixed-grid integrators: one time loop, whose step is a closure over coefficients prepared for all steps at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from stochdyn._checks import check_choice
from stochdyn.core.coefficients import Diagonal, Matrix, Scalar
from stochdyn.core.noise import NoiseSteps
from stochdyn.core.sde import SDE
from stochdyn.errors import InvalidInputError

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

METHODS = ("euler", "heun", "milstein")

Carry = tuple[Tensor, ...]
Step = Callable[[int, Carry], Carry]


@dataclass(frozen=True)
class Trajectory:
    """What the time loop returns, time leading: states ``x (T, *batch, d)`` and memory ``(T, *batch, m, K)`` or None."""

    x: Tensor
    memory: Tensor | None


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
    dw = normal * scale.reshape(scale.shape[0], *(1,) * len(batch), -1)
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
    method: str = "euler",
    checkpoint: bool | int = False,
    cuda_graph: bool = False,
) -> Trajectory:
    r"""Integrate an SDE along given increments on a fixed grid.

    Methods, all in the Itô sense:

    - ``"euler"``: strong order 1/2, and 1 for additive noise.
    - ``"milstein"``: strong order 1 for commutative noise (refused for other noise).
    - ``"heun"``: trapezoidal drift and noise on the Stratonovich form of the equation, converted from Itô by
      :math:`-\tfrac12\sum_k (\partial G_k) G_k`; weak order 2 in the drift for additive noise, and strong order 1 for commutative noise.

    Args:
        sde: the equation, with its control.
        x0: ``(*batch, d)`` start.
        ts: ``(T,)`` grid.
        dw: ``(T-1, *batch, m * R)`` increments under the controlled law, in the layout of :class:`NoiseProcess`.
        memory0: ``(*batch, m, K)`` initial memory, zero if None.
        method: see above.
        checkpoint: store only every so many steps and recompute between them when back-propagating; True takes
            the square root of the number of steps.
        cuda_graph: capture the loop in a CUDA graph; ignored off CUDA.

    Returns:
        The trajectory, time leading.

    Raises:
        InvalidInputError: for ``"milstein"`` with noise that doesn't commute, or an unknown method.

    Reference:
        Kloeden and Platen, "Numerical solution of stochastic differential equations", 1992, chapters 10 and 11.
    """
    check_choice(method, METHODS, "method")
    if cuda_graph and x0.is_cuda and sde.noise.num_states == 0:
        from stochdyn.core.cuda_graphs import integrate_graphed

        return Trajectory(integrate_graphed(sde, x0, ts, dw, method), None)
    dt = (ts[1:] - ts[:-1]).tolist()
    return run_loop(sde, x0, ts, dt, dw, memory0, method, checkpoint)


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
    problem = _Problem(sde, x0, ts, dt, dw, method)
    if problem.memory_free:
        carry: Carry = (x0.expand(problem.state_shape),)
    else:
        shape = (*problem.state_shape[:-1], problem.channels, sde.noise.num_states)
        start = x0.new_zeros(shape) if memory0 is None else memory0.expand(shape)
        carry = (x0.expand(problem.state_shape), start)
    states = _loop(problem.step(), carry, problem.num_steps, checkpoint)
    return Trajectory(*(torch.stack(list(column)) for column in zip(*states, strict=True)), *(None,) * (2 - len(carry)))


def _loop(step: Step, carry: Carry, num_steps: int, checkpoint: bool | int) -> list[Carry]:
    """Run THE time loop, in recomputed segments if asked."""

    def segment(start: int, stop: int, *carry: Tensor) -> list[Carry]:
        out = []
        for n in range(start, stop):
            carry = step(n, carry)
            out.append(carry)
        return out

    if not checkpoint or not torch.is_grad_enabled():
        return [carry, *segment(0, num_steps, *carry)]
    length = max(1, round(num_steps**0.5)) if checkpoint is True else int(checkpoint)
    states = [carry]
    for start in range(0, num_steps, length):
        stop = min(start + length, num_steps)
        states += recompute(segment, start, stop, *states[-1], use_reentrant=False)
    return states


class _Problem:
    """An equation on a grid, with everything that doesn't depend on the running state computed for all steps at once."""

    def __init__(self, sde: SDE, x0: Tensor, ts: Tensor, dt: list[float], dw: Tensor, method: str) -> None:
        self.sde = sde
        self.drift = sde.drift
        self.method = method
        self.dt = dt
        self.num_steps = len(dt)
        self.times = ts.to(x0.dtype).unbind(0)
        self.coefficient = None if sde.state_dependent else sde.diffusion(self.times[0], x0)
        self.channels = sde.noise_dim(self.times[0], x0)
        self.memory_free = sde.noise.num_states == 0
        self.state_shape = torch.broadcast_shapes(x0.shape, (*dw.shape[1:-1], x0.shape[-1]))
        self.steps: NoiseSteps = sde.noise.steps(ts, dtype=x0.dtype)
        self.increments = dw.unbind(0)
        # Without memory and control, what the noise adds in a step is known for all steps at once.
        self.kicks: tuple[Tensor, ...] | None = None
        if self.coefficient is not None and self.memory_free and sde.control is None:
            self.kicks = self.coefficient.apply(dw).unbind(0)
        if method != "euler" and self.coefficient is None:
            _check_commutative(sde, self.times[0], x0, self.channels, method)

    def step(self) -> Step:
        if self.kicks is not None:
            return self._additive_heun if self.method == "heun" else self._additive_euler
        return self._general

    def _additive_euler(self, n: int, carry: Carry) -> Carry:
        (x,) = carry
        return (torch.add(x + self.kicks[n], self.drift(self.times[n], x), alpha=self.dt[n]),)  # type: ignore[index]

    def _additive_heun(self, n: int, carry: Carry) -> Carry:
        (x,) = carry
        dt, t, following = self.dt[n], self.times[n], self.times[n + 1]
        kicked = x + self.kicks[n]  # type: ignore[index]
        slope = self.drift(t, x)
        guess = torch.add(kicked, slope, alpha=dt)
        return (torch.add(kicked, slope + self.drift(following, guess), alpha=0.5 * dt),)

    def _general(self, n: int, carry: Carry) -> Carry:
        """One step with any mixture of control, memory and state-dependent diffusion."""
        x = carry[0]
        t, dt = self.times[n], self.dt[n]
        e = self.increments[n]
        if self.sde.control is not None:
            e = self.sde.control.shape_increment(n, t, dt, full_state(*carry), e, self.channels)
        if self.memory_free:
            dz, carried = e, ()
        else:
            dz, memory = remember(self.steps, n, carry[1], e, self.channels)
            carried = (memory,)
        slope = self.drift(t, x)
        g = self.coefficient or self.sde.diffusion(t, x)
        kick = g.apply(dz)
        if self.method == "heun":
            x = self._heun(n, x, slope, kick, dz, g)
        else:
            x_next = torch.add(x + kick, slope, alpha=dt)
            if self.method == "milstein" and self.coefficient is None:
                x_next = x_next + self._milstein(n, x, kick, dz)
            x = x_next
        return (x, *carried)

    def _variance_rate(self, n: int) -> Tensor:
        """Variance of the noise increment that is new in step n: ``dt`` for Brownian motion."""
        s = self.steps
        return (s.gain[n] ** 2 * s.variance[n]).sum(-1)

    def _heun(self, n: int, x: Tensor, slope: Tensor, kick: Tensor, dz: Tensor, g: object) -> Tensor:
        dt, t, following = self.dt[n], self.times[n], self.times[n + 1]
        variance = self._variance_rate(n)
        shift = self._correction(t, x, variance)
        guess = torch.add(x + kick - shift, slope, alpha=dt)
        slope_next = self.drift(following, guess)
        drifted = torch.add(x, slope + slope_next, alpha=0.5 * dt)
        if self.coefficient is not None:
            return drifted + kick
        kick_next = self.sde.diffusion(following, guess).apply(dz)
        shift_next = self._correction(following, guess, variance)
        return drifted + 0.5 * (kick + kick_next) - 0.5 * (shift + shift_next)

    def _correction(self, t: Tensor, x: Tensor, variance: Tensor) -> Tensor | float:
        if self.coefficient is not None:
            return 0.0
        return 0.5 * _self_advection(self.sde, t, x, self.channels) * variance.unsqueeze(-1)

    def _milstein(self, n: int, x: Tensor, kick: Tensor, dz: Tensor) -> Tensor:
        # For commutative noise the iterated integrals collapse to products: 1/2 sum_kl (dG_k) G_l (dz_k dz_l - delta_kl dt).
        t = self.times[n]
        along = torch.func.jvp(lambda y: _kick(self.sde, t, y, dz), (x,), (kick.expand_as(x),))[1]
        advection = _self_advection(self.sde, t, x, self.channels)
        return 0.5 * (along - advection * self._variance_rate(n).unsqueeze(-1))


def remember(steps: NoiseSteps, n: int | slice, memory: Tensor, e: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Advance the memory states exactly, in step ``n`` or in all steps at once.

    Args:
        steps: coefficients of the recursion.
        n: the step; ``slice(None)`` takes all, with time leading in ``memory`` and ``e``.
        memory: ``(*batch, m, K)``.
        e: ``(*batch, m R)`` increments.
        channels: ``m``.

    Returns:
        The noise increment ``dz (*batch, m)`` and the next memory states.
    """
    gain, recall, decay, load = steps.gain[n], steps.recall[n], steps.decay[n], steps.load[n]
    if isinstance(n, slice):
        # Per-step coefficients without batch axes get them between time and channel.
        extra = memory.ndim - 3
        gain, recall = _pad(gain, extra), _pad(recall, extra)
        decay = decay.reshape(decay.shape[0], *(1,) * (extra + 1), -1)
        load = load.reshape(load.shape[0], *(1,) * extra, *load.shape[1:])
    dw = e[..., :channels]
    dz = (memory * recall.unsqueeze(-2)).sum(-1) + dw * gain[..., :1]
    memory = memory * decay + dw.unsqueeze(-1) * load[..., :1, :]
    if e.shape[-1] > channels:
        rest = e[..., channels:].unflatten(-1, (channels, -1))
        dz = dz + (rest * gain[..., None, 1:]).sum(-1)
        memory = memory + rest @ load[..., 1:, :]
    return dz, memory


def _pad(x: Tensor, batch_axes: int) -> Tensor:
    """Insert axes after time until ``x (N, *b, R)`` has ``batch_axes`` of them."""
    while x.ndim - 2 < batch_axes:
        x = x.unsqueeze(1)
    return x


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


def full_state(x: Tensor, memory: Tensor | None = None) -> Tensor:
    """Return ``x`` followed by its memory states, ``(..., d + m K)``."""
    return x if memory is None else torch.cat([x, memory.flatten(-2)], -1)


def _kick(sde: SDE, t: Tensor, x: Tensor, dz: Tensor) -> Tensor:
    return sde.diffusion(t, x).apply(dz).expand_as(x)


def _self_advection(sde: SDE, t: Tensor, x: Tensor, channels: int) -> Tensor:
    r"""Return :math:`\sum_k (\partial G_k) G_k`, the Itô-Stratonovich correction without its factor 1/2."""
    g = sde.diffusion(t, x)
    if isinstance(g, Scalar | Diagonal):
        # Commuting diagonal noise has g_i depending on x_i alone, so one derivative along g serves all channels.
        strength = g.apply(torch.ones_like(x))
        return torch.func.jvp(lambda y: _kick(sde, t, y, torch.ones_like(y)), (x,), (strength,))[1]
    total = torch.zeros_like(x)
    unit = torch.eye(channels, dtype=x.dtype, device=x.device)
    for k in range(channels):
        column = unit[k].expand(*x.shape[:-1], channels)
        along = g.apply(column).expand_as(x)
        total = total + torch.func.jvp(lambda y, c=column: _kick(sde, t, y, c), (x,), (along,))[1]
    return total


def _check_commutative(sde: SDE, t: Tensor, x0: Tensor, channels: int, method: str) -> None:
    """Raise unless (dG_k) G_l = (dG_l) G_k for all channels, tried at the start and at a shifted state."""
    with torch.no_grad():
        shift = torch.linspace(0.1, 0.3, x0.shape[-1], dtype=x0.dtype, device=x0.device)
        unit = torch.eye(channels, dtype=x0.dtype, device=x0.device)
        for x in (x0, x0 + shift):
            g = sde.diffusion(t, x)
            columns = [unit[k].expand(*x.shape[:-1], channels) for k in range(channels)]
            along = [g.apply(c).expand_as(x) for c in columns]
            for k in range(channels):
                for other in range(k):
                    forward = _derivative(sde, t, x, columns[k], along[other])
                    backward = _derivative(sde, t, x, columns[other], along[k])
                    # A state outside the domain of the diffusion (a square root, say) tells nothing.
                    gap = (forward - backward).abs().nan_to_num(0.0).max()
                    size = forward.abs().nan_to_num(0.0).max() + backward.abs().nan_to_num(0.0).max()
                    if bool(gap > 1e-4 * size + 1e-12):
                        raise InvalidInputError(
                            f"method {method!r} needs commutative noise",
                            got=f"channels {other} and {k} that don't commute",
                            hint="use method='euler'",
                        )


def _derivative(sde: SDE, t: Tensor, x: Tensor, channel: Tensor, direction: Tensor) -> Tensor:
    return torch.func.jvp(lambda y: _kick(sde, t, y, channel), (x,), (direction,))[1]
