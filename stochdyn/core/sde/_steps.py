"""One step of a fixed-grid integrator; what doesn't depend on the running state is computed beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from stochdyn._transforms import transforms_are_active
from stochdyn.core.sde._derivatives import (
    check_additive,
    check_commutative,
    self_advection,
    strength_along,
)
from stochdyn.core.sde.coefficients import Coefficient, Matrix, Scalar
from stochdyn.core.sde.control import Control, Rest, plus
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import first_steps, first_time, noise_steps
from stochdyn.core.sde.noise import Brownian, NoiseSteps
from stochdyn.errors import InvalidInputError

__all__ = ["Problem", "Row", "Step", "full_state", "remember"]

#: The full state after a step, and the drift and the precision of the control during it, where it has them.
Row = tuple[Tensor, ...]
Step = Callable[[int, Tensor], Row]

# Up to this many components the linear part of a step is one small matrix product; beyond, that costs more
# than products by element.
_DENSE = 32


def check_method(sde: SDE, x0: Tensor, ts: Tensor, method: str) -> None:
    """Raise unless the equation suits the scheme; values are read here, before the loop."""
    if method == "sra":
        if not (isinstance(sde.noise, Brownian) and sde.noise.areas):
            raise InvalidInputError(
                "method 'sra' needs a Brownian motion that draws areas",
                got=type(sde.noise).__name__,
                hint="SDE(..., noise=stochdyn.core.Brownian(areas=True))",
            )
        if sde.state_dependent:
            check_additive(sde, first_time(ts, x0), x0, method, _span(ts))
        return
    if method == "euler" or not sde.state_dependent:
        return
    t = first_time(ts, x0)
    start = sde.diffusion(t, x0)
    check_commutative(sde, t, x0, start.noise_dim(x0.shape[-1]), method, _span(ts))
    if isinstance(start, Matrix) and first_steps(sde.noise, ts, x0.dtype).per_channel:
        raise InvalidInputError(
            f"{method} can't correct a matrix diffusion whose channels have noise of different kinds",
            hint="take a diagonal diffusion, or method='euler'",
        )


def _span(ts: Tensor) -> Tensor:
    """Return the length of a grid, of no axes or ``(*batch, 1)``."""
    span = (ts[..., -1] - ts[..., 0]).detach()
    return span if ts.ndim == 1 else span.unsqueeze(-1)


class Problem:
    """An equation on a grid. The running state is the full state ``z (*batch, d + m K)``.

    Args:
        sde: The equation.
        x0: The points from which paths start, ``(*batch, d)``.
        ts: The grid of times of a path, ``(T,)`` or ``(*batch, T)``.
        dt: The steps of the grid: numbers, or tensors where the grid is differentiated or every series has its own.
        dw: The increments ``(N, *batch, m R)``.
        method: The name of the scheme.
    """

    def __init__(
        self, sde: SDE, x0: Tensor, ts: Tensor, dt: list[float] | list[Tensor], dw: Tensor, method: str
    ) -> None:
        self.sde = sde
        # Modules look their members up slowly; the loop shouldn't.
        self.drift = sde.drift
        self.control = sde.control
        self.heun, self.milstein, self.sra = method == "heun", method == "milstein", method == "sra"
        self.dt = dt
        self.num_steps = len(dt)
        self.dim = x0.shape[-1]
        whole = ts.to(x0.dtype)
        self.times = (whole if ts.ndim == 1 else whole.movedim(-1, 0).unsqueeze(-1)).unbind(0)
        start = sde.diffusion(self.times[0], x0)
        self.coefficient = None if sde.state_dependent else start
        self.channels = start.noise_dim(self.dim)
        self.num_states = sde.noise.num_states
        self.batch = torch.broadcast_shapes(x0.shape[:-1], dw.shape[1:-1], ts.shape[:-1])
        self.steps: NoiseSteps = noise_steps(sde.noise, ts, x0.dtype)
        self.rows: list[MemoryRow] | None = None
        if not self.num_states and not self.sra:
            # Areas are for the method that asks for them.
            dw = dw[..., : self.channels]
        self.dw = dw
        self.increments = dw.unbind(0)

    def start(self, x0: Tensor, memory0: Tensor | None) -> Tensor:
        """Return the full state at the first time."""
        x0 = x0.expand(*self.batch, self.dim)
        if not self.num_states:
            return x0
        shape = (*self.batch, self.channels, self.num_states)
        return full_state(x0, x0.new_zeros(shape) if memory0 is None else memory0.expand(shape))

    def run_in_place(self, start: Tensor) -> Tensor | None:
        """Run an uncontrolled Euler scheme of additive noise straight into its result.

        Returns:
            ``(T, *batch, d)``, or None where gradients are recorded or the equation needs :meth:`step`.
        """
        plain = self.control is None and not self.num_states and not self.heun and not self.sra
        if self.coefficient is None or not plain or not _are_numbers(self.dt):
            return None
        if not _may_overwrite(start, self.dw, self.times[0]):
            return None
        number = self.sde.strength
        g_dw = self.increments if number is not None else self.coefficient.apply(self.dw).unbind(0)
        # x_{n+1} = x_n + f(t_n, x_n) dt_n + G dW_n, with G dW_n known for all steps.
        scale = 1.0 if number is None else number
        states = start.new_empty(self.num_steps + 1, *start.shape)
        states[0] = start
        x, *following = states.unbind(0)
        drift, times, dt = self.drift, self.times, self.dt
        for n, ahead in enumerate(following):
            # The drift comes last: it may depend on x alone, and x isn't touched again.
            torch.add(x, g_dw[n], alpha=scale, out=ahead)
            ahead.add_(drift(times[n], x), alpha=dt[n])
            x = ahead
        return states

    def step(self) -> Step:
        """Return the fastest step that this problem allows."""
        if self.sra:
            return self._additive_runge_kutta
        if self.coefficient is None:
            return self._general
        small = self.dim + self.channels * self.num_states <= _DENSE
        if small and not self.heun and not self.steps.per_series and self.control is not None:
            affine = self.control.affine(self.dw)
            if affine is not None:
                return self._closed_loop(*affine)
        if self.num_states == 0:
            if self.control is None:
                return self._additive_heun() if self.heun else self._additive_euler()
            return self._general if self.heun or not self._plain_drift else self._additive_euler()
        batched = bool(self.steps.parameter_batch) or self.steps.per_series or _batched(self.coefficient)
        return self._linear_euler() if small and not batched and not self.heun else self._general

    @property
    def _plain_drift(self) -> bool:
        """Whether the control does nothing but add a drift."""
        control = self.control
        return (
            control is not None
            and _is_plain(control)
            and control.precision is None
            and control.drift is not None
        )

    def _additive_euler(self) -> Step:
        """Without memory, what the noise adds in a step is known beforehand for all steps at once."""
        assert self.coefficient is not None
        drift, times, dt, spread = self.drift, self.times, self.dt, self.coefficient.apply
        number = self.sde.strength
        if self.control is None and number is not None:
            increments = self.increments
            return lambda n, x: (plus(torch.add(x, increments[n], alpha=number), drift(times[n], x), dt[n]),)
        g_dw = self.coefficient.apply(self.dw).unbind(0)
        if self.control is None:
            return lambda n, x: (plus(x + g_dw[n], drift(times[n], x), dt[n]),)
        u = self.control.drift
        assert u is not None

        # x_{n+1} = x_n + (f + G u) dt_n + G dW_n.
        def controlled(n: int, x: Tensor) -> Row:
            control = u(times[n], x)
            slope = drift(times[n], x) + spread(control)
            return plus(x + g_dw[n], slope, dt[n]), control

        return controlled

    def _additive_heun(self) -> Step:
        assert self.coefficient is not None
        g_dw = self.coefficient.apply(self.dw).unbind(0)
        drift, times, dts = self.drift, self.times, self.dt

        # Heun for additive noise: x* = x_n + f(t_n, x_n) dt + G dW, x_{n+1} = x_n + (f(t_n, x_n) + f(t_{n+1}, x*)) dt / 2 + G dW.
        def step(n: int, x: Tensor) -> Row:
            noisy, slope = x + g_dw[n], drift(times[n], x)
            guess = plus(noisy, slope, dts[n])
            return (plus(noisy, slope + drift(times[n + 1], guess), 0.5 * dts[n]),)

        return step

    def _closed_loop(self, shift: Tensor, gain: Tensor, rest: Rest | None) -> Step:
        """With increments affine in the state, all of a step but the drift is one affine map, known beforehand."""
        # Increments e = k_n + K_n z (shift and gain) in z_{n+1} = z_n A_n + e B_n + f dt (row vectors) give the one affine map
        # z_n (A_n + K_n B_n) + k_n B_n; keep and load are A_n and B_n.
        keep, load = (_lead(x, shift.ndim + 1) for x in self._batched_maps())
        maps, g_dw = keep + gain @ load, (shift.unsqueeze(-2) @ load).squeeze(-2)
        batched = maps.ndim > 3
        wide = load.shape[1:-2].numel() > 1
        load = load if wide else load.reshape(load.shape[0], *load.shape[-2:])
        forth, ahead, loads = maps.unbind(0), g_dw.unbind(0), load.unbind(0)
        drift, times, dt, dim, memory = self.drift, self.times, self.dt, self.dim, keep.shape[-1] - self.dim

        def step(n: int, z: Tensor) -> Row:
            moved = (z.unsqueeze(-2) @ forth[n]).squeeze(-2) if batched else z @ forth[n]
            if rest is not None:
                more = rest(n, times[n], z)
                moved = moved + ((more.unsqueeze(-2) @ loads[n]).squeeze(-2) if wide else more @ loads[n])
            slope = drift(times[n], z[..., :dim] if memory else z)
            if memory:
                slope = torch.nn.functional.pad(slope.expand(*z.shape[:-1], dim), (0, memory))
            return (plus(moved + ahead[n], slope, dt[n]),)

        return step

    def _batched_maps(self) -> tuple[Tensor, Tensor]:
        """Return the matrices of :meth:`_linear_maps` where coefficients and parameters of the noise have batch axes too."""
        assert self.coefficient is not None
        m, k, like = self.channels, self.num_states, self.steps.load
        size, width = m * k, self.dw.shape[-1]
        batch = torch.broadcast_shapes(
            self.steps.parameter_batch, self.coefficient.apply(self.dw.new_zeros(m)).shape[:-1]
        )
        # A step is linear in memory and increments: its matrix is its image of the basis vectors.
        basis = torch.eye(size + width, dtype=like.dtype, device=like.device)
        # One row per unit of memory or increment, on an axis between time and batch.
        basis = basis.reshape(1, -1, *(1,) * len(batch), size + width)
        basis = basis.expand(self.num_steps, *basis.shape[1:])
        memory, e = basis[..., :size].unflatten(-1, (m, k)), basis[..., size:]
        dz, memory = remember(self.steps, slice(None), memory, e, m)
        g_dz = self.coefficient.apply(dz)
        rows = torch.broadcast_shapes(g_dz.shape[:-1], memory.shape[:-2])
        image = full_state(g_dz.expand(*rows, self.dim), memory.expand(*rows, m, k)).movedim(1, -2)
        still = torch.eye(self.dim, self.dim + size, dtype=like.dtype, device=like.device)
        still = still.expand(*image.shape[:-2], self.dim, self.dim + size)
        return torch.cat([still, image[..., :size, :]], -2), image[..., size:, :]

    def _linear_euler(self) -> Step:
        """With memory and a constant coefficient a step is linear in state, increments and drifts."""
        # z_{n+1} = z_n A_n + e_n B_n + (f(t_n, x_n) dt_n, 0), and a control adds u dt_n to the Brownian part of e_n.
        keep_maps, spread = self._linear_maps()
        keep, load = keep_maps.unbind(0), spread.unbind(0)
        steps = _as_column(self.dt, spread)
        drift_load = (
            torch.eye(self.dim, keep_maps.shape[-1], dtype=spread.dtype, device=spread.device) * steps
        ).unbind(0)
        drift, times, dim, control = self.drift, self.times, self.dim, self.control

        def drifted(n: int, z: Tensor, ahead: Tensor) -> Tensor:
            x = z[..., :dim]
            return _affine(ahead, drift(times[n], x).expand_as(x), drift_load[n])

        if control is None or self._plain_drift:
            loads = spread.reshape(spread.shape[0], *(1,) * (len(self.batch) - 1), *spread.shape[1:])
            g_dw = (self.dw @ loads if self.batch else (self.dw.unsqueeze(-2) @ spread).squeeze(-2)).unbind(0)
            if control is None:
                return lambda n, z: (drifted(n, z, _affine(g_dw[n], z, keep[n])),)
            u, control_load = control.drift, (spread[:, : self.channels] * steps).unbind(0)
            assert u is not None

            def controlled(n: int, z: Tensor) -> Row:
                value = u(times[n], z)
                ahead = _affine(_affine(g_dw[n], z, keep[n]), value, control_load[n])
                return drifted(n, z, ahead), value

            return controlled

        def shaped(n: int, z: Tensor) -> Row:
            e, *record = self._shape(n, z)
            return drifted(n, z, _affine(z @ keep[n], e, load[n])), *record

        return shaped

    def _linear_maps(self) -> tuple[Tensor, Tensor]:
        """Return what takes state and increments one step on, ``(N, d + m K, d + m K)`` and ``(N, m R, d + m K)``."""
        assert self.coefficient is not None
        m, k = self.channels, self.num_states
        like = self.steps.load
        size, width = m * k, self.dw.shape[-1]
        # The images of the basis vectors of memory and increments under one exact step, stacked as rows.
        basis = torch.eye(size + width, dtype=like.dtype, device=like.device).expand(self.num_steps, -1, -1)
        memory, e = basis[..., :size].unflatten(-1, (m, k)), basis[..., size:]
        dz, memory = remember(self.steps, slice(None), memory, e, m)
        image = full_state(self.coefficient.apply(dz), memory)
        still = torch.eye(self.dim, image.shape[-1], dtype=like.dtype, device=like.device)
        return torch.cat([still.expand(self.num_steps, -1, -1), image[:, :size]], 1), image[:, size:]

    def _shape(self, n: int, z: Tensor) -> Row:
        """Return the increments of step ``n`` under the control, and the record of the control."""
        control, e = self.control, self.increments[n]
        if control is None:
            return (e,)
        t, dt = self.times[n], self.dt[n]
        if not _is_plain(control):
            return (control.shape_increment(n, t, dt, z, e, self.channels),)
        u, precision = control.at(t, z)
        shaped = control.tilt(u, precision, dt, e, self.channels)
        return shaped, *[value for value in (u, precision) if value is not None]

    def _general(self, n: int, z: Tensor) -> Row:
        """One step with any mixture of control, memory and state-dependent diffusion."""
        t, dt = self.times[n], self.dt[n]
        e, *record = self._shape(n, z)
        if self.num_states:
            x = z[..., : self.dim]
            memory = z[..., self.dim :].unflatten(-1, (self.channels, self.num_states))
            dz, memory = _advance(self._rows()[n], memory, e, self.channels)
        else:
            x, dz, memory = z, e, None
        slope = self.drift(t, x)
        g = self.coefficient or self.sde.diffusion(t, x)
        g_dz = g.apply(dz)
        if self.heun:
            ahead = self._heun(n, x, slope, g_dz, dz)
        else:
            ahead = plus(x + g_dz, slope, dt)
            if self.milstein and self.coefficient is None:
                ahead = ahead + self._milstein(n, x, g_dz, dz, g)
        return full_state(ahead, memory), *record

    def _additive_runge_kutta(self, n: int, x: Tensor) -> Row:
        # SRA1: I = dW / 2 + H, stage x + 3/4 f dt + 3/2 G I, then 1/3 and 2/3 of the drifts; the noise by parts in time.
        t, dt = self.times[n], self.dt[n]
        e, *record = self._shape(n, x)
        dw, mean = e[..., : self.channels], 0.5 * e[..., : self.channels] + e[..., self.channels :]
        g = self.coefficient or self.sde.diffusion(t, x)
        slope, pushed = self.drift(t, x), g.apply(mean)
        stage = plus(x + 1.5 * pushed, slope, 0.75 * dt)
        later = t + 0.75 * (self.times[n + 1] - t)
        ahead = plus(plus(x, slope, dt / 3), self.drift(later, stage), 2 * dt / 3)
        if self.coefficient is not None:
            return ahead + g.apply(dw), *record
        following = self.sde.diffusion(self.times[n + 1], x)
        return ahead + following.apply(dw) + pushed - following.apply(mean), *record

    def _rows(self) -> list[MemoryRow]:
        if self.rows is None:
            self.rows = memory_rows(self.steps)
        return self.rows

    def _variance_rate(self, n: int) -> Tensor:
        """Variance of the noise increment that is new in step n, ``(*batch, 1)`` or one per channel: ``dt`` if Brownian."""
        s = self.steps
        return (s.gain[n] ** 2 * s.variance[n]).sum(-1, keepdim=not s.per_channel)

    def _heun(self, n: int, x: Tensor, slope: Tensor, g_dz: Tensor, dz: Tensor) -> Tensor:
        # Heun's scheme converges to Stratonovich's integral; c = (dG) G var(dz) / 2 turns it into Itô's:
        # x* = x + (f dt + G dz - c), x_{n+1} = x + (f + f*) dt / 2 + (G + G*) dz / 2 - (c + c*) / 2.
        dt, t, following = self.dt[n], self.times[n], self.times[n + 1]
        variance = self._variance_rate(n)
        shift = self._correction(t, x, variance)
        guess = plus(x + g_dz - shift, slope, dt)
        drifted = plus(x, slope + self.drift(following, guess), 0.5 * dt)
        if self.coefficient is not None:
            return drifted + g_dz
        g_dz_next = self.sde.diffusion(following, guess).apply(dz)
        shift_next = self._correction(following, guess, variance)
        return drifted + 0.5 * (g_dz + g_dz_next) - 0.5 * (shift + shift_next)

    def _correction(self, t: Tensor, x: Tensor, variance: Tensor) -> Tensor | float:
        if self.coefficient is not None:
            return 0.0
        return 0.5 * self_advection(self.sde, t, x, self.channels) * variance

    def _milstein(self, n: int, x: Tensor, g_dz: Tensor, dz: Tensor, g: Coefficient) -> Tensor:
        # For commutative noise the iterated integrals collapse to products:
        # 1/2 sum_kl (dG_k) G_l (dz_k dz_l - delta_kl dt).
        t = self.times[n]
        advection = self_advection(self.sde, t, x, self.channels)
        if not isinstance(g, Matrix):
            return 0.5 * advection * (dz**2 - self._variance_rate(n))
        along = strength_along(self.sde, t, x, dz, g_dz.expand_as(x))
        return 0.5 * (along - advection * self._variance_rate(n))


def _may_overwrite(*inputs: Tensor) -> bool:
    """Whether results may be written in place: nothing records derivatives or maps over axes."""
    return not torch.is_grad_enabled() and not transforms_are_active() and len({x.dtype for x in inputs}) == 1


def _are_numbers(dt: list[float] | list[Tensor]) -> TypeGuard[list[float]]:
    return not any(isinstance(h, Tensor) for h in dt[:1])


def _as_column(dt: list[float] | list[Tensor], like: Tensor) -> Tensor:
    """Return steps that all series share as ``(N, 1, 1)``."""
    if _are_numbers(dt):
        return torch.tensor(dt, dtype=like.dtype, device=like.device)[:, None, None]
    return torch.stack(cast("list[Tensor]", dt))[:, None, None]


def _batched(coefficient: Coefficient) -> bool:
    own = 0 if isinstance(coefficient, Scalar) else 2 if isinstance(coefficient, Matrix) else 1
    return coefficient.value.ndim > own


def _is_plain(control: Control) -> bool:
    return type(control).shape_increment is Control.shape_increment


def _affine(shift: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``shift + x @ matrix``, in one kernel where there is one batch axis."""
    if x.ndim == 2 and shift.ndim == 2 and x.shape[0] == shift.shape[0]:
        return torch.addmm(shift, x, matrix)
    return shift + x @ matrix


def full_state(x: Tensor, memory: Tensor | None = None) -> Tensor:
    """Return ``x`` followed by its memory states, ``(..., d + m K)``."""
    return x if memory is None else torch.cat([x, memory.flatten(-2)], -1)


def remember(
    steps: NoiseSteps, n: int | slice, memory: Tensor, e: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """Advance the memory states exactly, in step ``n`` or in all steps at once.

    Args:
        steps: The coefficients of the recursion.
        n: The step; ``slice(None)`` takes all, with time leading in ``memory`` and ``e``.
        memory: The memory states ``(*batch, m, K)``.
        e: The increments ``(*batch, m R)``.
        channels: The number ``m`` of noise channels.

    Returns:
        The noise increment ``dz (*batch, m)`` and the next memory states.
    """
    gain, recall, decay, load = steps.gain[n], steps.recall[n], steps.decay[n], steps.load[n]
    if not steps.per_channel:
        gain, recall = gain.unsqueeze(-2), recall.unsqueeze(-2)
    if isinstance(n, slice):
        # Per-step coefficients without batch axes get them between time and channel.
        extra = memory.ndim - 3
        gain, recall = _pad(gain, extra), _pad(recall, extra)
        if steps.per_series:
            decay, load = _pad(decay, extra), _pad(load, extra)
        else:
            decay = decay.reshape(decay.shape[0], *(1,) * (extra + 1), -1)
            load = load.reshape(load.shape[0], *(1,) * extra, *load.shape[1:])
    return _advance(MemoryRow(gain, recall, decay, load), memory, e, channels)


class MemoryRow(NamedTuple):
    """The coefficients of one step: gain ``(*b, 1 or m, R)``, recall ``(*b, 1 or m, K)``, decay and load."""

    gain: Tensor
    recall: Tensor
    decay: Tensor
    load: Tensor


def memory_rows(steps: NoiseSteps) -> list[MemoryRow]:
    """Return the rows of all steps; unbound once, as the derivative of indexing costs a tensor of all steps."""
    gain, recall = steps.gain, steps.recall
    if not steps.per_channel:
        gain, recall = gain.unsqueeze(-2), recall.unsqueeze(-2)
    rows = zip(*(x.unbind(0) for x in (gain, recall, steps.decay, steps.load)), strict=True)
    return [MemoryRow(*row) for row in rows]


def _advance(row: MemoryRow, memory: Tensor, e: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    # Memory states y of a channel and its noise increment, exact over the step:
    # dz = recall . y + gain . e,  y' = decay y + load^T e, with e = (dW, residuals).
    gain, recall, decay, load = row
    dw = e[..., :channels]
    dz = (memory * recall).sum(-1) + dw * gain[..., 0]
    memory = memory * decay + dw.unsqueeze(-1) * load[..., :1, :]
    if e.shape[-1] > channels:
        rest = e[..., channels:].unflatten(-1, (channels, -1))
        dz = dz + (rest * gain[..., 1:]).sum(-1)
        memory = memory + rest @ load[..., 1:, :]
    return dz, memory


def _lead(x: Tensor, ndim: int) -> Tensor:
    """Give ``x (N, *b, ...)`` axes after time until it has ``ndim`` of them."""
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])


def _pad(x: Tensor, batch_axes: int) -> Tensor:
    """Insert axes after time until ``x (N, *b, m, R)`` has ``batch_axes`` of them."""
    while x.ndim - 3 < batch_axes:
        x = x.unsqueeze(1)
    return x
