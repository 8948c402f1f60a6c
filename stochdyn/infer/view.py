"""A path site as the model presents it on one run: its equation, its start, and paths it can take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stochdyn.core.gaussian.affine import LinearSteps
from stochdyn.core.law.initial import DistributionStart
from stochdyn.core.sde.coefficients import Coefficient, Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import first_time, steps_of, time_column
from stochdyn.core.sde.methods import Euler, Method
from stochdyn.core.sde.solvers import full_state, increment_scale, integrate
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.infer.distributions import DiffusionPath, PathIncrements, start_of
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.linearise import linear_steps
from stochdyn.infer.shaping import check_control
from stochdyn.infer.start import StartPrior, is_unconstrained

__all__ = ["SiteView", "view_site"]


@dataclass(frozen=True)
class SiteView:
    """A path site as the model presents it on one run.

    Attributes:
        fn: The site's distribution.
        path_name: The site that holds the path itself.
        x0: ``(*batch, d)`` start, the prior mean where it is random.
        memory0: ``(*batch, m, K)`` initial memory, or None.
        scale: ``(N, M)`` prior standard deviations of the increments.
        shape: The batch shape of a path, the axes of the other sites' draws included.
        start: The part of the start that is random and belongs to this site, or None.
        start_law: The law of the state there, or None if it isn't random.
    """

    fn: DiffusionPath | PathIncrements
    path_name: str
    x0: Tensor
    memory0: Tensor | None
    scale: Tensor
    shape: torch.Size
    start: StartPrior | None = None
    start_law: Any = None

    @property
    def method(self) -> Method:
        """The solver that turns increments into a path; in state space that of the density."""
        return self.fn.method if isinstance(self.fn, PathIncrements) else Euler()

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
        return self.shape

    def run(self, e: Tensor, start: Tensor | None = None, feedback: Feedback | None = None) -> Tensor:
        """Return the full states ``(T, *batch, Z)`` along increments, from a start of its own if given."""
        x0, memory0 = (
            (self.x0, self.memory0) if start is None or self.start is None else self.start.states(start)
        )
        sde = self.fn.sde
        if feedback is not None:
            sde = sde.with_control(feedback.before(sde.control))
        x0 = x0.expand(*self.batch(), self.dim)
        run = integrate(sde, x0, self.fn.ts, e, memory0, method=self.method)
        return full_state(run.x, run.memory)

    def zero_increments(self) -> Tensor:
        """Return increments that are all zero."""
        return self.x0.new_zeros(self.scale.shape[0], *self.batch(), self.scale.shape[-1])

    def reference(self) -> Tensor:
        """Return the path without noise, cut off from the graph."""
        with torch.no_grad():
            return self.run(self.zero_increments())

    def held_still(self, start: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Return the increments ``(N, *batch, M)`` that hold a path at its start, and that path ``(T, *batch, Z)``.

        It is where a search begins whose path without noise explodes. None where noise can't do it, or by another way than
        Euler steps of a Brownian motion.
        """
        sde, ts = self.fn.sde, self.fn.ts
        if sde.noise.num_states or sde.control is not None or self.method.name != "euler":
            return None
        x0 = self.x0 if start is None or self.start is None else self.start.states(start)[0]
        z = x0.expand(ts.shape[-1], *self.batch(), self.dim)
        t, dt = time_column(ts[..., :-1], z), steps_of(ts, z)
        # 0 = f dt + G e.
        pull, g = sde.drift(t, z[:-1]) * dt, sde.diffusion(t, z[:-1])
        e = g.solve(-pull).expand(*z[:-1].shape[:-1], self.scale.shape[-1])
        left = (pull + g.apply(e)).abs()
        exact = left <= 1e3 * torch.finfo(z.dtype).eps * pull.abs().amax()
        return (e, z) if bool(exact.all()) else None

    def value(self) -> Tensor:
        """Return the path without noise (or its increments) in the layout of the site."""
        if isinstance(self.fn, PathIncrements):
            return self.zero_increments().movedim(0, -2)
        return self.reference()[..., : self.dim].movedim(0, -2)

    def linear_steps(self, states: Tensor, increments: Tensor, keep_graph: bool = False) -> LinearSteps:
        """Return the steps linearised around full states ``(T, *batch, Z)`` and increments ``(N, *batch, M)``."""
        fn = self.fn
        noise = fn.steps if isinstance(fn, PathIncrements) else None
        return linear_steps(
            fn.sde, fn.ts, states[:-1], increments, self.scale, self.method, keep_graph, noise
        )

    def starting_at(self, x0: Tensor | None, past: Tensor | None) -> SiteView:
        """Return the view of an increments site whose path starts at a drawn state, and with a drawn past of the noise."""
        assert isinstance(self.fn, PathIncrements)
        x0 = self.x0 if x0 is None else x0
        memory0 = self.memory0
        if past is not None:
            assert self.start is not None and self.start.factor is not None
            memory0 = past @ self.start.factor
        return replace(self, fn=self.fn.starting_at(x0, memory0), x0=x0, memory0=memory0)

    def follow(self, feedback: Feedback, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean increments ``(N, *batch, M)`` and the full states ``(T, *batch, Z)`` they drive."""
        z = self.run(self.zero_increments(), start, feedback)
        t = time_column(self.fn.ts[..., :-1], z)
        return feedback.mean(t, z[:-1]) * self.units(z.ndim), z

    def units(self, ndim: int) -> Tensor:
        """Return the prior standard deviations of increments, with sample axes after time until they have ``ndim`` axes."""
        scale = self.scale
        return scale.reshape(scale.shape[0], *(1,) * (ndim - scale.ndim), *scale.shape[1:])


def view_site(
    fn: DiffusionPath | PathIncrements,
    path_name: str,
    start_law: Any = None,
    past: bool = False,
    draws: torch.Size = torch.Size(),
) -> SiteView:
    """Gather what a guide needs from a site's distribution.

    Args:
        fn: The site's distribution.
        path_name: The site that holds the path.
        start_law: The law of a random start that the guide treats with an increments site.
        past: Whether the guide treats the past of the noise too.
        draws: The batch axes of the draws of other sites, which the likelihood may depend on.
    """
    check_control(fn.sde)
    if isinstance(fn, PathIncrements):
        x0, memory0, scale = fn.x0, fn.memory0, fn.scale
        channels = scale.shape[-1] // fn.sde.noise.num_innovations(fn.ts)
        factor = fn.sde.noise.initial_factor(dtype=x0.dtype, device=x0.device) if past else None
    else:
        fn = _square(fn)
        x0 = start_of(fn.initial) if not fn.initial.fixed else fn.initial.draw((), None)
        channels = fn.sde.noise_dim(first_time(fn.ts, x0), x0)
        scale, memory0, factor = increment_scale(fn.sde, fn.ts, channels, x0.dtype), None, None
        start_law = fn.initial.distribution if isinstance(fn.initial, DistributionStart) else None
        if start_law is not None and not is_unconstrained(start_law):
            raise InvalidInputError(
                "a path in state space needs a start that may be any vector",
                got=f"support {start_law.support} at site {path_name!r}",
                hint="sample the path in noise space: noise_space=True, or NoiseReparam",
            )
    try:
        batch = torch.broadcast_shapes(fn.batch_shape, x0.shape[:-1], draws)
    except RuntimeError:
        raise ShapeError(
            "many draws don't fit the batch axes of a path site",
            got=f"draws {tuple(draws)} and batch {tuple(fn.batch_shape)}",
            hint="declare the batch axes by pyro.plate",
        ) from None
    prior = StartPrior.of(start_law, x0, factor, channels, batch)
    return SiteView(fn, path_name, x0, memory0, scale, batch, prior, start_law)


def _square(fn: DiffusionPath) -> DiffusionPath:
    """Return the same law with no more noise channels than components: a path tells no more apart."""

    def root(g: Coefficient) -> Coefficient:
        return Matrix(torch.linalg.cholesky(g.covariance(dim)))

    sde, dim = fn.sde, fn.event_shape[-1]
    probe = start_of(fn.initial)
    constant = sde.diffusion(first_time(fn.ts, probe), probe)
    if constant.noise_dim(dim) <= dim:
        return fn
    varying = sde.state_dependent
    if sde.control is not None:
        raise InvalidInputError(
            "a controlled path in state space needs as many noise channels as components, or fewer",
            got=f"{constant.noise_dim(dim)} channels for {dim} components",
            hint="sample the path in noise space: noise_space=True",
        )
    diffusion = (lambda t, x: root(sde.diffusion(t, x))) if varying else root(constant)
    return DiffusionPath(SDE(sde.drift, diffusion), fn.initial, fn.ts, fn.method).expand(fn.batch_shape)
