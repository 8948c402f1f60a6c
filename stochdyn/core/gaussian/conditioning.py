r"""Linear-Gaussian laws weighted by a Gaussian potential of a later state: pinned ends, soft ends, messages from later data.

A potential of the state at time T is

.. math:: \log h_T(x)=-\tfrac12x^\top Bx+b^\top x+\mathrm{const},\qquad B=V^{-1}C,\quad b=V^{-1}a,

in a form that allows V to vanish: then the state is pinned at :math:`Cx=a`. With :math:`V=I` it is the information form. Under the
reference, :math:`X_T\mid X_s\sim N(\Phi X_s+c,N)`, the potential seen from s is :math:`h_s(x)=E[h_T(X_T)\mid X_s=x]`, and

.. math::
    \nabla\log h_s(x)=\Phi^\top(V+CN)^{-1}\big(a-C(c+\Phi x)\big),

which inverts neither the potential nor the noise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_event_size, check_real, check_type
from stochdyn.core.forward.flow import as_time
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.core.gaussian.constant_steps import Transition
from stochdyn.core.gaussian.law import GaussianPathMeasure
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.gaussian.observations import union_of
from stochdyn.core.gaussian.small import definite_factor, symmetrise, times
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import ShapeError, SingularDiffusionError, TimeGridError

__all__ = ["EndPotential", "PiecewiseMeasure", "TiltedMeasure", "absorb", "reachable"]


@dataclass(frozen=True)
class EndPotential:
    """A Gaussian potential of a state.

    Attributes:
        residual: V, ``(*B, d, d)``.
        pull: C, ``(*B, d, d)``.
        aim: The a, ``(*B, d)``.
    """

    residual: Tensor
    pull: Tensor
    aim: Tensor

    @classmethod
    def pinned(cls, value: Tensor) -> EndPotential:
        """Return the potential that fixes the state at ``value (*B, d)``."""
        eye = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
        return cls(torch.zeros_like(eye), eye, value)

    @classmethod
    def information(cls, precision: Tensor, linear: Tensor) -> EndPotential:
        """Return the potential with ``precision (*B, d, d)`` and ``linear (*B, d)``."""
        return cls(torch.eye(linear.shape[-1], dtype=linear.dtype, device=linear.device), precision, linear)

    def before(self, transition: Transition) -> tuple[Tensor, Tensor]:
        """Return precision ``(*B, d, d)`` and linear part ``(*B, d)`` of the potential seen from before a transition."""
        phi, shift, noise = transition
        left, right = self.pull @ phi, (self.aim - times(self.pull, shift)).unsqueeze(-1)
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        both = torch.cat((left.expand(*batch, *left.shape[-2:]), right.expand(*batch, *right.shape[-2:])), -1)
        ahead = torch.linalg.solve(self.residual + self.pull @ noise, both)
        seen = phi.mT @ ahead
        return symmetrise(seen[..., :-1]), seen[..., -1]

    def tilt(self, step: Transition, onward: Tensor, whole: Transition) -> Transition:
        r"""Return a step of the reference under the potential.

        .. math::
            A=\Phi-GC\Phi_T,\quad c=c_0+G(a-Cc_T),\quad Q=Q_0-GC\Phi_{t,T}Q_0,\qquad
            G=Q_0\Phi_{t,T}^\top(V+CN)^{-1}

        Args:
            step: The reference's transition over the step.
            onward: The matrix of the transition from the end of the step to the potential's time.
            whole: The transition from the start of the step to the potential's time.
        """
        phi, shift, noise = step
        far, lead, spread = whole
        gain = torch.linalg.solve((self.residual + self.pull @ spread).mT, onward @ noise.mT).mT
        aim = self.aim - times(self.pull, lead)
        return (
            phi - gain @ self.pull @ far,
            shift + times(gain, aim),
            symmetrise(noise - gain @ self.pull @ onward @ noise),
        )


def absorb(mean: Tensor, cov: Tensor, precision: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the moments of a Gaussian multiplied by :math:`\exp(-\tfrac12x^\top\Lambda x+\eta^\top x)`; ``cov`` may be singular."""
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    right = torch.cat((cov, (mean + times(cov, linear)).unsqueeze(-1)), -1)
    after = torch.linalg.solve(eye + cov @ precision, right)
    return after[..., -1], symmetrise(after[..., :-1])


class TiltedMeasure(GaussianPathMeasure):
    r"""A linear-Gaussian law whose paths are weighted by a Gaussian potential of their end.

    Bridges between Gaussians and processes pinned at an end are of this kind. The law starts from a given Gaussian, so the
    reference's own start plays no part.

    Use it to pin a linear law at its end, or to weigh that end by a likelihood.

    Args:
        reference: The linear law.
        horizon: The time from the reference's start to the potential, T.
        potential: The potential of the end.
        initial_mean: The mean of the start, ``(*B, d)``.
        initial_cov: The covariance of the start, ``(*B, d, d)``.

    Raises:
        SingularDiffusionError: If the reference's noise can't move some direction within the horizon.

    Example:
        >>> walk = LinearGaussianMeasure.brownian(initial_mean=torch.zeros(1))
        >>> bridge = TiltedMeasure(walk, 2.0, EndPotential.pinned(torch.ones(1)), torch.zeros(1), torch.zeros(1, 1))
        >>> bridge.mean(torch.tensor([1.0])), bridge.covariance(torch.tensor([1.0])).flatten()
        (tensor([[0.5000]]), tensor([0.5000]))
    """

    _residual: Tensor
    _pull: Tensor
    _aim: Tensor
    _initial_mean: Tensor
    _initial_cov: Tensor

    def __init__(
        self,
        reference: LinearGaussianMeasure,
        horizon: float,
        potential: EndPotential,
        initial_mean: Tensor,
        initial_cov: Tensor,
    ) -> None:
        super().__init__()
        check_type(reference, LinearGaussianMeasure, "reference")
        check_type(potential, EndPotential, "potential")
        check_real(horizon, "horizon", above=0.0, fixed=True)
        dim, like = reference.dim, reference.like
        initial_mean = as_tensor(initial_mean, "initial_mean", like=like)
        initial_cov = as_tensor(initial_cov, "initial_cov", like=like)
        parts = (
            ("initial_mean", initial_mean, 1),
            ("initial_cov", initial_cov, 2),
            ("potential", potential.pull, 2),
        )
        for name, value, event in parts:
            if value.ndim < event or value.shape[value.ndim - event :] != (dim,) * event:
                raise ShapeError(
                    f"{name} doesn't fit the reference", got=tuple(value.shape), expected=f"d={dim}"
                )
        self.reference, self.horizon, self.dim = reference, float(horizon), dim
        self._set_ends(potential, initial_mean, initial_cov)
        reachable(reference, self.horizon)

    def _set_ends(self, potential: EndPotential, initial_mean: Tensor, initial_cov: Tensor) -> None:
        parts = {
            "residual": potential.residual,
            "pull": potential.pull,
            "aim": potential.aim,
            "initial_mean": initial_mean,
            "initial_cov": initial_cov,
        }
        for name, value in parts.items():
            self.register_buffer(f"_{name}", value if value.requires_grad else value.detach().clone())
        self.batch_shape = torch.broadcast_shapes(
            self.reference.batch_shape,
            initial_mean.shape[:-1],
            initial_cov.shape[:-2],
            potential.aim.shape[:-1],
            potential.pull.shape[:-2],
        )

    @property
    def potential(self) -> EndPotential:
        """The potential of the end."""
        return EndPotential(self._residual, self._pull, self._aim)

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device of the law."""
        return self.reference.like

    def clock(self, t: Tensor) -> Tensor:
        """Return times since the start, clamped to the span; subtracted in the precision of ``t``.

        Raises:
            TimeGridError: For times outside ``[0, horizon]``.
        """
        elapsed = t - self.reference.initial_time
        slack = 1e-6 * self.horizon
        if bool(((elapsed < -slack) | (elapsed > self.horizon + slack)).any()):
            raise TimeGridError(
                "t must lie inside the bridge",
                got=f"t from {float(t.min()):g} to {float(t.max()):g}",
                expected=f"[{self.reference.initial_time:g}, {self.reference.initial_time + self.horizon:g}]",
            )
        # Times that differ from the ends by their rounding are the ends.
        near = 8 * torch.finfo(t.dtype).eps * (t.detach().abs() + abs(self.reference.initial_time))
        elapsed = torch.where(
            (elapsed.detach() - self.horizon).abs() <= near, self.horizon + 0 * elapsed, elapsed
        )
        return elapsed.clamp(0.0, self.horizon)

    def transition(self, start: Tensor, stop: Tensor) -> Transition:
        """Return the law of the state at ``stop (N,)`` given that at ``start (N,)``, both since the law's start.

        See :meth:`LinearGaussianMeasure.transition` for the shapes.
        """
        # The reference's transition over the step times the potential seen from its end: Doob's transform.
        origin, end = self.reference.initial_time, torch.full_like(stop, self.horizon)
        step = self._reference(start + origin, stop + origin)
        onward = self._reference(stop + origin, end + origin)[0]
        whole = self._reference(start + origin, end + origin)
        return self.potential.tilt(step, onward, whole)

    def _reference(self, start: Tensor, stop: Tensor) -> Transition:
        """Return the reference's transitions, with as many batch axes as the law has."""
        phi, shift, noise = self.reference.transition(start, stop)
        lead = len(self.batch_shape)
        return _batched(phi, lead, 2), _batched(shift, lead, 1), _batched(noise, lead, 2)

    def moments_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return means ``(*s, *B, d)`` and covariances ``(*s, *B, d, d)`` at times ``t (*s,)`` in any order."""
        clock = self.clock(t).reshape(-1)
        phi, shift, noise = self.transition(torch.zeros_like(clock), clock)
        mean, cov = self._initial_mean, self._initial_cov
        mean = times(phi, mean) + shift
        cov = symmetrise(phi @ cov @ phi.mT + noise)
        return mean.reshape(*t.shape, *mean.shape[1:]), cov.reshape(*t.shape, *cov.shape[1:])

    def chain(self, ts: Tensor) -> GaussianChain:
        """Return the chain of the law at times ``ts (T,)``."""
        clock = self.clock(ts)
        mean, cov = (x[0] for x in self.moments_at(ts[:1]))
        if bool(clock[0] == 0) and not ts.requires_grad:
            mean, cov = self._initial_mean, self._initial_cov
        return GaussianChain(mean, cov, *self.transition(clock[:-1], clock[1:]))

    def certain(self, chain: GaussianChain, ts: Tensor) -> Tensor:
        """Return ``(T, *B)``, True at a fixed start and at a pinned end."""
        out = super().certain(chain, ts)
        if not bool(self._residual.any()):
            out = out.clone()
            out[-1] |= bool(self.clock(ts[-1:])[0] >= self.horizon)
        return out

    def affine_drift(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drift's matrix ``(*s, *B, d, d)`` and offset ``(*s, *B, d)`` at times ``t (*s,)``, before a pinned end."""
        clock = self.clock(t).reshape(-1)
        origin = self.reference.initial_time
        # h_t(x) = exp(-x' P x / 2 + l' x) with P, l the potential seen from t: the drift gains S grad log h = S (l - P x).
        whole = self._reference(clock + origin, torch.full_like(clock, self.horizon) + origin)
        precision, linear = self.potential.before(whole)
        lead = len(self.batch_shape)
        a, b, s = self.reference.coefficients((clock + origin).to(self.like.dtype))
        a, b, s = _batched(a, lead, 2), _batched(b, lead, 1), _batched(s, lead, 2)
        slope, offset = a - s @ precision, b + times(s, linear)
        return slope.reshape(*t.shape, *slope.shape[1:]), offset.reshape(*t.shape, *offset.shape[1:])

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the drift :math:`Ax+b+GG^\top\nabla\log h_t(x)`, ``(..., d)`` at ``x (..., *B, d)``."""
        time = as_time(t, x)
        check_event_size(x, self.dim, "x")
        flat = time[..., 0] if time.ndim else time
        slope, offset = self.affine_drift(flat)
        return times(slope, x) + offset

    def covariance_rate(self, t: Tensor) -> Tensor:
        r"""Return :math:`GG^\top (n, *B, d, d)` of a diffusion at times ``t (n,)``."""
        return self.reference.covariance_rate(t)

    def to_sde(self) -> SDE:
        """Return the equation of the law; its drift is infinite at a pinned end."""
        return SDE(self.drift, self.reference.to_sde().diffusion)


class PiecewiseMeasure(GaussianPathMeasure):
    """A Gaussian Markov law whose transitions are known within each of the intervals between some times.

    Subclasses say what they are (:meth:`step`), and what the law is at the start of each interval (:meth:`start_of`).

    Attributes:
        times: The ends ``(I,)`` of the intervals, in increasing order; they keep their precision when the law moves.
    """

    times: Tensor

    @abstractmethod
    def step(self, index: int, start: Tensor, stop: Tensor) -> Transition:
        """Return the law of the state at ``stop (N,)`` given that at ``start (N,)``, both since ``times[index]``, within that interval."""

    @abstractmethod
    def start_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mean ``(d,)`` and covariance ``(d, d)`` at ``times[index]``."""

    @abstractmethod
    def affine_drift_in(self, index: int, elapsed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drift's matrix ``(n, d, d)`` and offset ``(n, d)`` at times ``elapsed (n,)`` since ``times[index]``."""

    @property
    @abstractmethod
    def driven(self) -> LinearGaussianMeasure:
        """The linear law whose noise drives this one, on the clock of the first interval."""

    def place(self, t: Tensor, after: bool = False) -> tuple[Tensor, Tensor]:
        """Return the interval of every time ``t (*s,)`` and the time since its start; ends count to the interval before, or after.

        Raises:
            TimeGridError: For times outside.
        """
        clock = t.to(torch.promote_types(t.dtype, self.times.dtype))
        low, high = self.times[0], self.times[-1]
        slack = 1e-6 * (high - low)
        if bool(((clock < low - slack) | (clock > high + slack)).any()):
            raise TimeGridError(
                "t must lie inside the snapshots",
                got=f"t from {float(t.min()):g} to {float(t.max()):g}",
                expected=f"[{float(low):g}, {float(high):g}]",
            )
        clock = clock.clamp(low, high)
        index = torch.searchsorted(self.times, clock.detach().contiguous(), right=after)
        index = index.clamp(1, len(self.times) - 1) - 1
        return index, clock - self.times[index]

    def _by_interval(
        self, t: Tensor, after: bool, what: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Ask for a pair of values at times ``t (*s,)``, interval by interval."""
        index, elapsed = (x.reshape(-1) for x in self.place(t, after))
        parts, places = [], []
        for k in index.unique().tolist():
            here = (index == k).nonzero()[:, 0]
            parts.append(what(k, elapsed[here]))
            places.append(here)
        back = torch.argsort(torch.cat(places))
        one, two = (torch.cat(x)[back] for x in zip(*parts, strict=True))
        return one.reshape(*t.shape, *one.shape[1:]), two.reshape(*t.shape, *two.shape[1:])

    def moments_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return means ``(*s, d)`` and covariances ``(*s, d, d)`` at times ``t (*s,)`` in any order."""

        def moments(k: int, clock: Tensor) -> tuple[Tensor, Tensor]:
            phi, shift, noise = self.step(k, torch.zeros_like(clock), clock)
            mean, cov = self.start_of(k)
            return times(phi, mean) + shift, symmetrise(phi @ cov @ phi.mT + noise)

        return self._by_interval(t, True, moments)

    def mean(self, ts: Tensor | float) -> Tensor:
        """Return the means ``(*s, d)`` at times ``ts (*s,)``, in any order."""
        return self.moments_at(as_tensor(ts, "ts", like=self.times))[0]

    def covariance(self, ts: Tensor | float) -> Tensor:
        """Return the marginal covariances ``(*s, d, d)`` at times ``ts (*s,)``, in any order."""
        return self.moments_at(as_tensor(ts, "ts", like=self.times))[1]

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` at times ``t`` that broadcast to ``x[..., :1]``; at an end that of the interval after it."""
        check_event_size(x, self.dim, "x")
        time = as_time(t, x)
        flat = time[..., 0] if time.ndim else time
        slope, offset = self._by_interval(flat, True, self.affine_drift_in)
        return times(slope, x) + offset

    def covariance_rate(self, t: Tensor) -> Tensor:
        r"""Return :math:`GG^\top (n, *B, d, d)` of a diffusion at times ``t (n,)``."""
        return self.driven.covariance_rate(t - self.times[0].to(t.dtype))

    def to_sde(self) -> SDE:
        """Return the equation of the law."""
        return SDE(self.drift, self.driven.to_sde().diffusion)

    def chain(self, ts: Tensor) -> GaussianChain:
        """Return the chain of the law at times ``ts (T,)``."""
        ts = ts.to(torch.promote_types(ts.dtype, self.times.dtype))
        self.place(ts)
        inner = self.times[(self.times > ts[0]) & (self.times < ts[-1])]
        nodes = union_of(ts, inner)
        mean, cov = (x[0] for x in self.moments_at(nodes[:1]))
        parts = []
        for k in range(len(self.times) - 1):
            low, high = self.times[k], self.times[k + 1]
            first = torch.searchsorted(nodes, low, right=False)
            mine = nodes[first : int(torch.searchsorted(nodes, high, right=True))]
            # An interval's steps are those whose both ends lie in it; the outer ones reach as far as the rounding of ts does.
            if k == 0 and float(nodes[0]) < float(low):
                mine = torch.cat((nodes[:1], mine)) if first > 0 else mine
            if len(mine) > 1:
                clock = (mine - low).clamp(torch.zeros_like(low), high - low)
                parts.append(self.step(k, clock[:-1], clock[1:]))
        like = mean
        if parts:
            phi, shift, noise = (torch.cat(x) for x in zip(*parts, strict=True))
        else:
            phi, shift, noise = (
                like.new_zeros(0, self.dim, self.dim),
                like.new_zeros(0, self.dim),
                like.new_zeros(0, self.dim, self.dim),
            )
        whole = GaussianChain(mean, cov, phi, shift, noise)
        return whole.at(torch.searchsorted(nodes.detach(), ts.detach()))


def reachable(reference: LinearGaussianMeasure, horizon: float) -> Tensor:
    """Return the factor of the noise ``(*B, d, d)`` of a reference over the horizon.

    Raises:
        SingularDiffusionError: If it doesn't reach every direction.
    """
    ends = reference.like.new_tensor([0.0, horizon]) + reference.initial_time
    noise = reference.transition(ends[:1], ends[1:])[2][0]
    try:
        return definite_factor(noise, "the reference's noise over the horizon")
    except SingularDiffusionError:
        smallest = float(torch.linalg.eigvalsh(noise.detach()).min())
        raise SingularDiffusionError(
            "the reference's noise doesn't reach every direction within the horizon",
            got=f"smallest eigenvalue {smallest:.3g} of the transition covariance",
            hint="give a diffusion of full rank, or a drift that carries the noise on",
        ) from None


def _batched(x: Tensor, lead: int, event: int) -> Tensor:
    """Give ``x (N, *b, *event)`` at least ``lead`` batch axes."""
    missing = lead - (x.ndim - 1 - event)
    return x if missing <= 0 else x.reshape(x.shape[0], *(1,) * missing, *x.shape[1:])
