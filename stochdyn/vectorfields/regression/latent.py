"""Noisily observed trajectories: the evidence lower bound of latent paths on a manifold, and of the field that drives them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from stochdyn._checks import (
    check_event_size,
    check_finite,
    check_ndim,
    check_positive,
    check_positive_int,
    check_time_grid,
)
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError
from stochdyn.objectives.base import Objective, ObjectiveValue
from stochdyn.objectives.elbo import PathELBO
from stochdyn.vectorfields.geometry.surface import TangentDiffusion, TangentDrift
from stochdyn.vectorfields.regression._input import as_float_tensor
from stochdyn.vectorfields.regression.engines import SpectralEngine
from stochdyn.vectorfields.regression.rvgp import RVGP

__all__ = ["BridgeControl", "TrajectoryELBO"]


class BridgeControl(nn.Module):
    r"""A control that leads paths from one observation to the next.

    Given the next observation y at time :math:`t'`, with noise of scale s, Brownian motion with constant drift b has the extra drift

    .. math:: \frac{y-x-(t'-t)\,b}{t'-t+s^2/\sigma^2}.

    and a step Δ of it the variance :math:`\Delta/(1+\alpha\Delta)` with :math:`\alpha=1/(t'-t-\Delta+s^2/\sigma^2)`, which
    the grid needs for a tight bound. That is the start; gains for each interval and a shift of each observation are learnt.

    Args:
        drift: The drift of the prior.
        diffusion: The tangent noise of the prior.
        times: The times ``(n,)`` of the readings.
        values: The readings ``(P, n, D)`` of P paths.
        obs_scale: The standard deviation s of a coordinate's reading.
        step: The length Δ of the Euler steps.
    """

    times: Tensor
    values: Tensor

    def __init__(
        self,
        drift: TangentDrift,
        diffusion: TangentDiffusion,
        times: Tensor,
        values: Tensor,
        obs_scale: float,
        step: float,
    ) -> None:
        super().__init__()
        self.drift, self.diffusion = drift, diffusion
        self.register_buffer("times", times)
        self.register_buffer("values", values)
        self.slack, self.step = (obs_scale / diffusion.diffusion) ** 2, step
        self.log_gain = nn.Parameter(torch.zeros(len(times), dtype=values.dtype, device=values.device))
        self.log_narrowing = nn.Parameter(torch.zeros_like(self.log_gain))
        self.shift = nn.Parameter(torch.zeros_like(values))

    def _next(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which reading comes next, how long until then, and whether there is one; as ``t`` broadcasts with ``z``."""
        last = len(self.times) - 1
        # slightly later, so that the reading at t itself has been passed
        lead = (t.reshape(-1) if t.ndim else t[None]).to(self.times) + 1e-6 * self.step
        after = torch.searchsorted(self.times, lead.contiguous(), right=True)
        ahead = (after <= last).to(z)
        after = after.clamp(max=last)
        rest = (self.times[after] - lead).clamp(min=0)
        if not t.ndim:
            return after[0], rest[0], ahead[0]
        shape = (len(lead), *(1,) * (z.ndim - 1))
        return after, rest.reshape(shape), ahead.reshape(shape)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the drift of the noise ``(..., P, m)`` in the channels of the tangent noise."""
        after, rest, ahead = self._next(t, z)
        # The control g⁻¹ gain (y - x - (t' - t) b) / (t' - t + s²/σ²), in the channels of the noise.
        target = (self.values + self.shift)[:, after]
        gain = self.log_gain[after].exp()
        if t.ndim:
            target = target.movedim(1, 0)
            target = target.reshape(len(target), *(1,) * (z.ndim - 3), *target.shape[1:])
            gain = gain.reshape(rest.shape)
        way = ahead * gain / (rest + self.slack) * (target - z - rest * self.drift(t, z))
        frames = self.diffusion(t, z)
        return (frames.mT @ way.unsqueeze(-1)).squeeze(-1) / self.diffusion.diffusion**2

    def precision(self, t: Tensor, z: Tensor) -> Tensor:
        """Return α, ``(..., P, m)``."""
        after, rest, ahead = self._next(t, z)
        factor = self.log_narrowing[after].exp()
        if t.ndim:
            factor = factor.reshape(rest.shape)
        # α = 1 / (t' - t - Δ + s²/σ²), times what is learnt for the interval.
        alpha = ahead * factor / ((rest - self.step).clamp(min=0) + self.slack)
        return alpha.expand(*z.shape[:-1], self.diffusion.surface.dim)


class _Readings(nn.Module):
    """Gaussian observations ``(P, n, D)`` of P paths at times of the grid, the first left out: it made the start."""

    def __init__(self, ts: Tensor, times: Tensor, values: Tensor, scale: float) -> None:
        super().__init__()
        self.ts, self.values, self.scale = ts, values, scale
        self.at = (torch.searchsorted(ts, times.contiguous() - 1e-9 * (ts[-1] - ts[0]))).clamp(
            max=len(ts) - 1
        )

    def forward(self, path: PathSample, batch: Any = None) -> Tensor:
        seen = path.x[..., self.at[1:], :]
        return Normal(seen, self.scale).log_prob(self.values[:, 1:]).sum((-2, -1))


class TrajectoryELBO(Objective):
    r"""Minus the evidence lower bound of trajectories that were observed with noise, and of their vector field.

    .. math:: \log p(y)\ \ge\ \mathbb E_q\big[\log p(y\mid x)\big]-\mathrm{KL}\big(Q(x\mid v)\,\|\,P(x\mid v)\big)-\mathrm{KL}\big(q(v)\,\|\,p(v)\big)

    The first two terms are :class:`~stochdyn.PathELBO` of the latent paths, with P the law of the SDE on the manifold whose drift is v.
    With ``learn_field`` the field's weights have a Gaussian posterior that starts at that of a regression; otherwise v is its mean. Train it by
    :func:`stochdyn.fit`, and take the field from :meth:`vectors`.

    Args:
        gp: A field fitted with the spectral backend, for example by :meth:`RVGP.fit_paths` on the readings themselves.
        times: The increasing times ``(n,)`` of the readings.
        values: The readings ``(P, n, D)``, or ``(n, D)``; the first reading of each path, with its noise, is the law of the
            start.
        obs_scale: The standard deviation of a coordinate's reading.
        diffusion: The strength σ of the tangent noise; ``gp.diffusion`` if None.
        steps: The number of Euler steps between successive readings.
        learn_field: Whether the field is inferred too.
        num_particles: The number of paths drawn for each trajectory.

    Raises:
        InvalidInputError: If the field wasn't fitted, or not in feature space.
        ShapeError, TimeGridError, NonFiniteError: If the readings don't fit.

    Reference:
        Li, Wong, Chen and Duvenaud, "Scalable gradients for stochastic differential equations", 2020, section 5.
    """

    def __init__(
        self,
        gp: RVGP,
        times: Any,
        values: Any,
        obs_scale: float,
        diffusion: float | None = None,
        *,
        steps: int = 4,
        learn_field: bool = True,
        num_particles: int = 4,
    ) -> None:
        super().__init__()
        engine = gp.engine
        if not isinstance(engine, SpectralEngine) or engine.posterior is None:
            raise InvalidInputError(
                "the field must be fitted with a kernel that has features", hint="RVGP(cloud).fit(...)"
            )
        clock = as_float_tensor(times, "times").detach().double().contiguous()
        check_time_grid(clock, "times")
        y = as_float_tensor(values, "values").detach().double()
        check_ndim(y, (2, 3), "values", "(P, n, D)")
        y = y if y.ndim == 3 else y[None]
        check_event_size(y, gp.cloud.ambient_dim, "values")
        check_event_size(y, clock.shape[0], "values", axis=-2)
        check_finite(y, "values")
        check_positive(obs_scale, "obs_scale")
        check_positive_int(steps, "steps")
        sigma = gp.diffusion if diffusion is None else diffusion
        fractions = torch.arange(steps, dtype=torch.float64) / steps
        inner = clock[:-1, None] + fractions * (clock[1:] - clock[:-1])[:, None]
        ts = torch.cat([inner.reshape(-1), clock[-1:]])
        everywhere = gp.cloud.sites(slice(None))
        with torch.no_grad():
            features = engine.features(everywhere)
            s = (engine.amplitude * engine.prior_variances()).sqrt()
            s = s.clamp(min=1e-10 * float(s.max()))  # modes without prior variance have none to learn
            lifted = torch.einsum("nda,nak->ndk", everywhere.frames, features) * s
            law = engine.posterior
            mean, spread = law.mean[:, 0] / s, law.root.norm(dim=1) / s
        self.register_buffer("lifted", lifted, persistent=False)
        self.learn_field = learn_field
        self.loc = nn.Parameter(mean.clone(), requires_grad=learn_field)
        self.log_scale = nn.Parameter(spread.clamp(min=1e-6).log(), requires_grad=learn_field)
        step = float((clock[1:] - clock[:-1]).min()) / steps
        self.drift = TangentDrift(gp.cloud, lifted @ mean, step)
        noise = TangentDiffusion(gp.cloud, float(sigma))
        start = Independent(Normal(y[:, 0], float(obs_scale)), 1)
        prior = DiffusionMeasure(start, SDE(self.drift, noise))
        self.control = BridgeControl(self.drift, noise, clock, y, float(obs_scale), step)
        posterior = prior.controlled(self.control, self.control.precision)
        readings = _Readings(ts, clock, y, float(obs_scale))
        self.paths = PathELBO(prior, posterior, readings, num_particles, ts=ts)

    def vectors(self) -> Tensor:
        """Return the posterior mean of the field at the nodes, ``(n, D)``."""
        return cast(Tensor, self.lifted) @ self.loc.detach()

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Draw a field and paths, and evaluate the bound."""
        lifted = cast(Tensor, self.lifted)
        cost = self.loc.new_zeros(())
        if self.learn_field:
            scale = self.log_scale.exp()
            self.drift.vectors = lifted @ (
                self.loc + scale * torch.randn_like(scale, memory_format=torch.contiguous_format)
            )
            cost = 0.5 * (scale**2 + self.loc**2 - 1.0).sum() - self.log_scale.sum()
        value = self.paths(batch)
        if self.learn_field:
            self.drift.vectors = self.drift.vectors.detach()
        elbo = value.terms["elbo"] - cost.detach()
        return ObjectiveValue(
            value.loss + cost, {**value.terms, "elbo": elbo, "kl_field": cost.detach()}, value.bound
        )
