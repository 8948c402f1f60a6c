"""Posterior paths and forecasts on any grid, from a fitted guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from stochdyn._checks import check_positive_int, check_time_grid
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.solvers import draw_increments, full_state, integrate
from stochdyn.errors import TimeGridError, UnknownSiteError
from stochdyn.infer.distributions import DiffusionPath, PathIncrements

__all__ = ["PathDraws", "predict_path"]


@dataclass(frozen=True)
class PathDraws:
    """Draws of a path from its posterior.

    Attributes:
        ts: ``(T,)`` times.
        x: ``(num_draws, *batch, T, d)`` states.
        num_fitted: how many of the times lie on or before the end of the fitted grid; the others are forecasts.
    """

    ts: Tensor
    x: Tensor
    num_fitted: int


def predict_path(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    name: str,
    ts: Tensor | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    num_draws: int = 1000,
    seed: int | None = None,
) -> PathDraws:
    r"""Draw a path from its posterior on a grid of your choice.

    On the fitted grid the draws are those of the guide. Between its points a Brownian path is the bridge that the Euler scheme implies,
    :math:`X_t = \mathrm{lerp}(x_n, x_{n+1}) + G(x_n)\,(\text{Brownian bridge})`; a path driven by noise with memory is interpolated linearly, which
    understates its roughness within a step. Beyond the end the equation is simulated from the last state, memory included, with one
    step between requested times.

    Args:
        model: Pyro model; it must broadcast over a leading batch of draws (as ``Predictive(parallel=True)`` needs).
        guide: its fitted guide.
        name: the path's site.
        ts: ``(T,)`` strictly increasing times, none before the fitted grid; the fitted grid if None.
        args: arguments of model and guide.
        kwargs: keyword arguments of model and guide.
        num_draws: number of draws.
        seed: seed of the draws; the global random state is left as it was. None draws from the global state.

    Returns:
        The draws.

    Raises:
        UnknownSiteError: if the model has no path of that name.
        TimeGridError: if a time lies before the fitted grid.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from stochdyn import SDE
        >>> from stochdyn.infer import AutoPathGuide, sample_path
        >>> def model(ts, y):
        ...     x = sample_path("x", SDE(lambda t, x: -x, 1.0), torch.zeros(1), ts)
        ...     pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=y)
        >>> guide, args = AutoPathGuide(model, hidden=()), (torch.linspace(0, 1, 11), torch.tensor(0.5))
        >>> draws = predict_path(model, guide, "x", torch.linspace(0.5, 2, 4), args=args, num_draws=100)
        >>> draws.x.shape, draws.num_fitted
        (torch.Size([100, 4, 1]), 2)
    """
    check_positive_int(num_draws, "num_draws")
    if ts is not None:
        check_time_grid(ts, min_points=1)
    kwargs = kwargs or {}
    with torch.random.fork_rng(enabled=seed is not None), torch.no_grad(), poutine.block():
        if seed is not None:
            torch.manual_seed(seed)
        fitted, x, z, sde = _draw(model, guide, name, args, kwargs, num_draws)
        if ts is None:
            return PathDraws(fitted, x.movedim(0, -2), fitted.shape[0])
        if bool(ts[0] < fitted[0]):
            raise TimeGridError(
                "ts begins before the fitted grid",
                got=f"{float(ts[0]):g}",
                expected=f"at least {float(fitted[0]):g}",
            )
        inside = ts[ts <= fitted[-1]]
        parts = []
        if inside.numel():
            parts.append(_between(sde, fitted, x, inside))
        if inside.numel() < ts.numel():
            parts.append(_beyond(sde, fitted, x, z, ts[inside.numel() :]))
        return PathDraws(ts, torch.cat(parts).movedim(0, -2), inside.numel())


def _draw(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_draws: int,
) -> tuple[Tensor, Tensor, Tensor, SDE]:
    """Return the fitted grid, the paths and full states (time leading) and the equation of all draws."""
    guide(*args, **kwargs)
    probe = poutine.trace(model).get_trace(*args, **kwargs)
    if name not in probe.nodes:
        raise UnknownSiteError(
            "the model has no such path", got=repr(name), expected=f"one of {sorted(probe.nodes)}"
        )
    frames = [f for s in probe.nodes.values() if s["type"] == "sample" for f in s["cond_indep_stack"]]
    depths = [-f.dim for f in frames if f.dim is not None]
    with pyro.plate("_draws", num_draws, dim=-1 - max(depths, default=0)):
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        trace = poutine.trace(poutine.replay(model, drawn)).get_trace(*args, **kwargs)
    nodes: dict[str, Any] = dict(trace.nodes)
    site, noise = nodes[name], nodes.get(f"{name}_dw")
    if noise is not None and isinstance(noise["fn"], PathIncrements):
        fn, e = noise["fn"], noise["value"].movedim(-2, 0)
        x0 = fn.x0.expand(*torch.broadcast_shapes(e.shape[1:-1], fn.x0.shape[:-1]), fn.x0.shape[-1])
        run = integrate(fn.sde, x0, fn.ts, e, fn.memory0)
        return fn.ts, run.x, full_state(run.x, run.memory), fn.sde
    if not isinstance(site["fn"], DiffusionPath):
        raise UnknownSiteError("this site isn't a path", got=f"{name!r} of {type(site['fn']).__name__}")
    x = site["value"].movedim(-2, 0)
    return site["fn"].ts, x, x, site["fn"].sde


def _between(sde: SDE, fitted: Tensor, x: Tensor, times: Tensor) -> Tensor:
    """Return the paths ``(T', *batch, d)`` at times on or between the points of the fitted grid."""
    right = torch.searchsorted(fitted, times.contiguous()).clamp(1, fitted.shape[0] - 1)
    left = right - 1
    column = (-1, *(1,) * (x.ndim - 1))
    weight = ((times - fitted[left]) / (fitted[right] - fitted[left])).to(x.dtype).reshape(column)
    mean = torch.lerp(x[left], x[right], weight)
    if sde.noise.num_states:
        return mean
    # One Brownian path on the union of both grids, less its chord over each step, gives all bridges at once.
    union = torch.unique(torch.cat([fitted, times]))
    t = fitted[left].to(x.dtype).reshape(column)
    channels = sde.noise_dim(t[0], x[0])
    kicks = torch.randn((union.shape[0] - 1, *x.shape[1:-1], channels), dtype=x.dtype, device=x.device)
    kicks = kicks * (union[1:] - union[:-1]).to(x.dtype).sqrt().reshape(column)
    walk = torch.cat([torch.zeros_like(kicks[:1]), kicks.cumsum(0)])
    at = walk[torch.searchsorted(union, times.contiguous())]
    ends = walk[torch.searchsorted(union, fitted.contiguous())]
    bridge = at - torch.lerp(ends[left], ends[right], weight)
    return mean + sde.diffusion(t, x[left]).apply(bridge)


def _beyond(sde: SDE, fitted: Tensor, x: Tensor, z: Tensor, times: Tensor) -> Tensor:
    """Return the paths ``(T', *batch, d)`` at times after the end of the fitted grid."""
    grid = torch.cat([fitted[-1:], times])
    last = x[-1]
    dw, _ = draw_increments(sde, last, grid)
    memory = None
    if sde.noise.num_states:
        memory = z[-1][..., last.shape[-1] :].unflatten(-1, (-1, sde.noise.num_states))
    return integrate(sde, last, grid, dw, memory).x[1:]
