"""A path site as the model presents it on one run: its equation, its start, and paths it can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.core.sde.coefficients import Coefficient, Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.solvers import full_state, increment_scale, integrate
from stochdyn.errors import InvalidInputError
from stochdyn.infer.distributions import DiffusionPath, PathIncrements, start_of
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.start import StartPrior, is_unconstrained

__all__ = ["SiteView", "driven_path", "view_site"]


@dataclass(frozen=True)
class SiteView:
    """A path site as the model presents it on one run.

    Attributes:
        fn: the site's distribution.
        path_name: the site that holds the path itself.
        x0: ``(*batch, d)`` start, the prior mean where it is random.
        memory0: ``(*batch, m, K)`` initial memory, or None.
        scale: ``(N, M)`` prior standard deviations of the increments.
        start: what is random at the start and belongs to this site, or None.
    """

    fn: DiffusionPath | PathIncrements
    path_name: str
    x0: Tensor
    memory0: Tensor | None
    scale: Tensor
    start: StartPrior | None = None

    @property
    def dim(self) -> int:
        """``d``."""
        return self.x0.shape[-1]

    @property
    def state_size(self) -> int:
        """``Z``, components of the full state."""
        channels = self.scale.shape[-1] // self.fn.sde.noise.num_innovations(self.fn.ts)
        return self.dim + channels * self.fn.sde.noise.num_states

    def batch(self) -> torch.Size:
        """Return the batch shape of a path."""
        return torch.broadcast_shapes(self.fn.batch_shape, self.x0.shape[:-1])

    def run(self, e: Tensor, start: Tensor | None = None, feedback: Feedback | None = None) -> Tensor:
        """Return the full states ``(T, *batch, Z)`` along increments, from a start of its own if given."""
        x0, memory0 = (
            (self.x0, self.memory0) if start is None or self.start is None else self.start.states(start)
        )
        sde = self.fn.sde.with_control(feedback)
        run = integrate(sde, x0.expand(*self.batch(), self.dim), self.fn.ts, e, memory0)
        return full_state(run.x, run.memory)

    def zero_increments(self) -> Tensor:
        """Return increments that are all zero."""
        return self.x0.new_zeros(self.scale.shape[0], *self.batch(), self.scale.shape[-1])

    def reference(self) -> Tensor:
        """Return the path without noise, cut off from the graph."""
        with torch.no_grad():
            return self.run(self.zero_increments())

    def value(self) -> Tensor:
        """Return the path without noise (or its increments) in the layout of the site."""
        if isinstance(self.fn, PathIncrements):
            return self.zero_increments().movedim(0, -2)
        return self.reference()[..., : self.dim].movedim(0, -2)

    def follow(self, feedback: Feedback, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean increments ``(N, *batch, M)`` and the full states ``(T, *batch, Z)`` they drive."""
        z = self.run(self.zero_increments(), start, feedback)
        t = self.fn.ts[:-1].to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1))
        scale = self.scale.reshape(self.scale.shape[0], *(1,) * (z.ndim - 2), -1)
        return feedback.mean(t, z[:-1]) * scale, z


def view_site(
    fn: DiffusionPath | PathIncrements, path_name: str, start_law: Any = None, past: bool = False
) -> SiteView:
    """Gather what a guide needs from a site's distribution.

    Args:
        fn: the site's distribution.
        path_name: the site that holds the path.
        start_law: law of a random start that the guide treats with an increments site.
        past: whether it treats the past of the noise too.
    """
    if isinstance(fn, PathIncrements):
        x0, memory0, scale = fn.x0, fn.memory0, fn.scale
        channels = scale.shape[-1] // fn.sde.noise.num_innovations(fn.ts)
        factor = fn.sde.noise.initial_factor(dtype=x0.dtype, device=x0.device) if past else None
    else:
        fn = _square(fn)
        x0 = start_of(fn.initial) if not fn.initial.fixed else fn.initial.draw((), None)
        channels = fn.sde.noise_dim(fn.ts[0].to(x0.dtype), x0)
        scale, memory0, factor = increment_scale(fn.sde, fn.ts, channels, x0.dtype), None, None
        start_law = getattr(fn.initial, "distribution", None)
        if start_law is not None and not is_unconstrained(start_law):
            raise InvalidInputError(
                "a path in state space needs a start that may be any vector",
                got=f"support {start_law.support} at site {path_name!r}",
                hint="sample the path in noise space: noise_space=True, or NoiseReparam",
            )
    batch = torch.broadcast_shapes(fn.batch_shape, x0.shape[:-1])
    return SiteView(fn, path_name, x0, memory0, scale, StartPrior.of(start_law, x0, factor, channels, batch))


def _square(fn: DiffusionPath) -> DiffusionPath:
    """Return the same law with no more noise channels than components: a path tells no more apart."""

    def root(g: Coefficient) -> Coefficient:
        return Matrix(torch.linalg.cholesky(g.covariance(dim)))

    sde, dim = fn.sde, fn.event_shape[-1]
    probe = start_of(fn.initial)
    constant = sde.diffusion(fn.ts[0].to(probe.dtype), probe)
    if constant.noise_dim(dim) <= dim:
        return fn
    varying = sde.state_dependent
    diffusion = (lambda t, x: root(sde.diffusion(t, x))) if varying else root(constant)
    return DiffusionPath(SDE(sde.drift, diffusion), fn.initial, fn.ts, fn.method).expand(fn.batch_shape)


def driven_path(view: SiteView, increments: Tensor) -> Tensor:
    """Return the path ``(*batch, T, d)`` that increments drive."""
    driven = getattr(increments, "_stochdyn_driven", None)
    if driven is not None:
        return driven.x.movedim(0, -2)
    # Somebody else has set the increments (by conditioning the guide, say).
    x0 = view.x0.expand(*increments.shape[:-2], view.dim)
    run = integrate(view.fn.sde, x0, view.fn.ts, increments.movedim(-2, 0), view.memory0)
    return run.x.movedim(0, -2)
