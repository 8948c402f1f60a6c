"""The posterior law of a path, from a fitted guide or from draws of a sampler."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_sequence,
    as_time_grid,
    check_callable,
    check_choice,
    check_real,
    check_type,
)
from stochdyn._lending import lent
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.girsanov import ESTIMATORS
from stochdyn.core.law.marginals import Generator, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path, PathSample
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import noise_steps
from stochdyn.core.sde.intervention import Intervention
from stochdyn.core.sde.methods import Method
from stochdyn.core.sde.solvers import draw_increments, full_state, integrate
from stochdyn.diagnostics.probe import reason_of
from stochdyn.errors import (
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    StochdynWarning,
    TimeGridError,
    UnavailableError,
    UnknownSiteError,
)
from stochdyn.infer.counterfactual import CounterfactualDraws, intervened_draws
from stochdyn.infer.distributions import DiffusionPath, PathIncrements
from stochdyn.infer.guides import AutoPathGuide
from stochdyn.infer.model_call import ModelCall

__all__ = ["PosteriorPath"]

#: Where posterior draws come from: a guide, a sampler that has run, or its draws by site ``(S, *batch, *event)``.
Source = Callable[..., Any] | MCMC | Mapping[str, Tensor]


class PosteriorPath(PathMeasure):
    r"""The posterior law of one path of a Pyro model, with the other latent sites integrated out.

    On the fitted grid its paths are those of the guide or the sampler. Beyond its end the equation is simulated from the last
    state, with its control, its solver and the memory of its noise, in steps of the fitted grid's size. Between grid points a
    Brownian path is the bridge that the Euler scheme implies,
    :math:`X_t = \mathrm{lerp}(x_n, x_{n+1}) + G(x_n)\,(\text{Brownian bridge})`; a path driven by noise with memory is
    interpolated linearly, which understates its roughness within a step. So the law of the path at a time doesn't depend on
    which other times are asked for.

    Use it where a law is asked for: in plots, scores and comparisons. :func:`predict_path` returns its draws in one call.

    Args:
        model: Pyro model; one that broadcasts over a leading batch of draws (as ``Predictive(parallel=True)`` needs) is much faster.
        source: The fitted guide of the model, a ``pyro.infer.MCMC`` that has run, or a dictionary of its draws by site.
        name: The path's site.
        args: The arguments of model and guide.
        kwargs: The keyword arguments of model and guide.
        do: An intervention: the law is then that of what would have happened to each draw, with the noise that drove it.

    Raises:
        UnknownSiteError: By its verbs, if the model has no path of that name.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from stochdyn import SDE
        >>> from stochdyn.infer import AutoPathGuide, sample_path
        >>> def model(ts, y):
        ...     x = sample_path("x", SDE(lambda t, x: -x, 1.0), torch.zeros(1), ts)
        ...     pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=y)
        >>> guide = AutoPathGuide(model, hidden=())
        >>> law = guide.path_law("x", torch.linspace(0, 1, 11), torch.tensor(0.5))
        >>> law.sample([0.5, 2.0], 100, generator=0).x.shape
        torch.Size([100, 2, 1])
    """

    _derived_ = ("_fitted",)

    def __init__(
        self,
        model: Callable[..., Any],
        source: Source,
        name: str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        do: Intervention | None = None,
    ) -> None:
        super().__init__()
        if do is not None:
            check_type(do, Intervention, "do")
        self.intervention = do
        check_callable(model, "model", "a Pyro model")
        check_type(name, str, "name")
        self.name, self.args, self.kwargs = (
            name,
            tuple(as_sequence(args, "args", "positional arguments of the model")),
            dict(kwargs or {}),
        )
        # The model is no part of the law's state: a guide has parameters of its own.
        self._model = (model,)
        self.source: Any = source
        self._fitted: Tensor | None = None
        if not isinstance(source, nn.Module | MCMC | Mapping):
            check_callable(source, "source", "a guide, an MCMC run or draws by site")

    def _draw(self, count: int) -> Sequence[DrawnPaths | CounterfactualDraws]:
        """Return draws, all at once where the model allows it, else one by one."""
        drawn = draw_paths(self._model[0], self.source, self.name, self.args, self.kwargs, count)
        if self.intervention is None:
            return drawn
        return [intervened_draws(part, self.intervention) for part in drawn]

    def fitted_times(self) -> Tensor:
        """Return the grid of the fit, ``(T,)`` or ``(*batch, T)``."""
        if self._fitted is None:
            with torch.no_grad(), poutine.block(), lent(0):
                drawn = draw_paths(self._model[0], self.source, self.name, self.args, self.kwargs, 1)
                self._fitted = drawn[0].ts
        return self._fitted

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw paths; see :meth:`stochdyn.PathMeasure.sample`.

        Args:
            ts: ``(T,)`` strictly increasing times, or ``(*batch, T)`` where every series has its own, none before the fitted
                grid.
            sample_shape: The shape of independent draws. A sampler's own draws are thinned evenly, or drawn again if there are
                too few.
            generator: The source of randomness; inside, it seeds torch's global one, which guides draw from.

        Raises:
            TimeGridError: If a time lies before the fitted grid, or beyond the horizon that the noise was made for.
        """
        shape = as_sample_shape(sample_shape)
        fitted = self.fitted_times()
        ts = as_time_grid(ts, min_points=1, like=fitted, batch=True)
        check_after_start(ts, fitted)
        source = None if generator is None else as_generator(generator)
        with lent(source), torch.no_grad(), poutine.block():
            drawn = self._draw(max(1, torch.Size(shape).numel()))
            x = torch.cat([part.at(ts.to(part.ts)) for part in drawn], 1)
        batch = x.shape[x.ndim - 1 - drawn[0].num_batch : -1]
        x = x.movedim(0, -2).reshape(-1, *batch, x.shape[0], x.shape[-1])
        x = x[: torch.Size(shape).numel()].reshape(*shape, *x.shape[1:])
        return PathSample(ts, x, x[..., 1:, :0], law=self)

    def marginal(self, t: Tensor | float) -> SampledMarginal:
        """Return the law of the state at one time, fitted or forecast."""
        check_real(t, "t")
        fitted = self.fitted_times()
        time = torch.as_tensor(t, dtype=fitted.dtype, device=fitted.device).reshape(1)
        check_after_start(time, fitted)
        return SampledMarginal(lambda shape, source: self.sample(time, shape, source).x[..., 0, :])

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        """Return the log density ratio on paths on the fitted grid; see :meth:`stochdyn.PathMeasure.log_rn`.

        It is known for a guide without other latent sites, of a path that has a density in state space.

        Raises:
            UnavailableError: Otherwise, for paths on other grids, and for other estimators than ``"density"``.
        """
        check_choice(estimator, ESTIMATORS, "estimator")
        if not isinstance(path, Path):
            raise InvalidInputError("path must be a path of a law", got=type(path).__name__)
        check_type(other, PathMeasure, "other")
        if self.intervention is not None:
            self._refuse("log_rn", "under an intervention it is known by its draws alone")
        if other is self:
            return path.x.new_zeros(path.shape)
        if estimator != "density":
            raise UnavailableError(f"the log ratio of a PosteriorPath by {estimator!r} isn't known")
        if not isinstance(self.source, AutoPathGuide):
            self._refuse("log_rn", "it is known by its draws alone")
        posterior, prior = self.source.path_density(self.name, *self.args, **self.kwargs)
        if path.ts.shape != prior.ts.shape or not torch.equal(path.ts.to(prior.ts), prior.ts):
            self._refuse("log_rn", "its density is known on the fitted grid alone")
        density = posterior.log_prob(path.x)
        if isinstance(other, PosteriorPath) and isinstance(other.source, AutoPathGuide):
            theirs, grid = other.source.path_density(other.name, *other.args, **other.kwargs)
            if not torch.equal(grid.ts, prior.ts):
                self._refuse("log_rn", "the other law is fitted on another grid")
            return density - theirs.log_prob(path.x)
        reference = DiffusionMeasure(prior.initial, prior.sde)
        return density - prior.log_prob(path.x) + reference.log_rn(path, other)


@dataclass(frozen=True)
class DrawnPaths:
    """Posterior draws of a path on the fitted grid, with the equation that continues each.

    Attributes:
        ts: ``(T,)`` or ``(*batch, T)``.
        x: ``(T, S, *batch, d)`` states.
        z: ``(T, S, *batch, Z)`` full states.
        sde: The equation, its parameters those of every draw.
        method: The solver of the site.
        num_batch: The number of batch axes that the path has in the model.
    """

    ts: Tensor
    x: Tensor
    z: Tensor
    sde: SDE
    method: Method
    num_batch: int

    def at(self, ts: Tensor) -> Tensor:
        """Return the paths ``(T', S, *batch, d)`` at other times, none before the fitted grid."""
        grid, x = self._continued(ts)
        return self._between(grid, x, ts)

    def through(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return the grid and the paths with one more time, which may lie beyond the grid; where it is there it stands twice."""
        grid, x = self._continued(time.reshape(1))
        more = self._between(grid, x, time.reshape(1))
        times = torch.cat([grid, time.expand(*grid.shape[:-1], 1)], -1)
        order = torch.argsort(times, dim=-1, stable=True)
        return times.gather(-1, order), _pick(torch.cat([x, more]), order)

    def on(self, grid: Tensor, x: Tensor, sde: SDE | None = None) -> DrawnPaths:
        """Return draws of states on another grid, continued by another equation where one is given."""
        return replace(self, ts=grid, x=x, z=x, sde=self.sde if sde is None else sde)

    def _continued(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the grid and the paths, continued in steps of the fitted grid's size as far as the times ask for it."""
        fitted, last = self.ts, self.x[-1]
        end = fitted[..., -1:]
        step = (fitted[..., 1:] - fitted[..., :-1]).median(-1, keepdim=True).values
        ahead = ((ts[..., -1:] - end) / step).max()
        if not bool(ahead > 0):
            return fitted, self.x
        # A hair less, so that a time on the grid of the forecast doesn't ask for a step beyond it.
        count = int(torch.ceil(ahead * (1 - 1e-9)))
        later = end + step * torch.arange(1, count + 1, dtype=fitted.dtype, device=fitted.device)
        grid = torch.cat([fitted, later], -1)
        # The noise says whether it was made for paths of that length.
        noise_steps(self.sde.noise, torch.cat([grid[..., :1], grid[..., -1:]], -1), last.dtype)
        part = grid[..., fitted.shape[-1] - 1 :]
        dw, _ = draw_increments(self.sde, last, part)
        memory = None
        if self.sde.noise.num_states:
            memory = self.z[-1][..., last.shape[-1] :].unflatten(-1, (-1, self.sde.noise.num_states))
        run = integrate(self.sde, last, part, dw, memory, method=self.method)
        return grid, torch.cat([self.x, run.x[1:]])

    def _between(self, grid: Tensor, x: Tensor, ts: Tensor) -> Tensor:
        """Return the paths at times on or between the points of a grid on which they are known."""
        batch = torch.broadcast_shapes(grid.shape[:-1], ts.shape[:-1])
        grid, ts = grid.expand(*batch, -1).contiguous(), ts.expand(*batch, -1).contiguous()
        right = torch.searchsorted(grid, ts).clamp(1, grid.shape[-1] - 1)
        left = right - 1
        before, after = grid.gather(-1, left), grid.gather(-1, right)
        gap = after - before
        # A time that stands twice on the grid has no step to divide.
        weight = _column((ts - before) / torch.where(gap > 0, gap, torch.ones_like(gap)), x)
        start = _pick(x, left)
        mean = torch.lerp(start, _pick(x, right), weight)
        if self.sde.noise.num_states:
            return mean
        # One Brownian path on the union of both grids, less its chord over each step, gives all bridges at once.
        union = torch.cat([grid, ts], -1).sort(-1).values
        t = _column(before, x)
        channels = self.sde.noise_dim(t[0], x[0])
        increments = torch.randn(
            (union.shape[-1] - 1, *x.shape[1:-1], channels), dtype=x.dtype, device=x.device
        )
        increments = increments * _column((union[..., 1:] - union[..., :-1]).sqrt(), x)
        walk = torch.cat([torch.zeros_like(increments[:1]), increments.cumsum(0)])
        at = _pick(walk, torch.searchsorted(union, ts))
        ends = _pick(walk, torch.searchsorted(union, grid))
        bridge = at - torch.lerp(_pick(ends, left), _pick(ends, right), weight)
        return mean + self.sde.diffusion(t, start).apply(bridge)


def check_after_start(ts: Tensor, fitted: Tensor) -> None:
    """Raise unless no time lies before the fitted grid."""
    early = ts[..., :1] < fitted[..., :1]
    if bool(early.any()):
        raise TimeGridError(
            "ts begins before the fitted grid",
            got=f"{float(ts[..., 0].min()):g}",
            expected=f"at least {float(fitted[..., 0].max()):g}",
        )


def draw_paths(
    model: Callable[..., Any],
    source: Source,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_draws: int,
) -> list[DrawnPaths]:
    """Draw a path on the fitted grid: all draws at once, or one by one where the model isn't written for many.

    Raises:
        UnknownSiteError: If the model has no path of that name.

    Warns:
        StochdynWarning: If the draws are made one by one.
    """
    samples = _samples_of(source, num_draws)
    if samples is None:
        assert callable(source)
        source(*args, **kwargs)
    probe: Any = poutine.trace(model).get_trace(*args, **kwargs).nodes
    if name not in probe:
        raise UnknownSiteError(
            "the model has no such path", got=repr(name), expected=f"one of {sorted(probe)}"
        )
    call = ModelCall(model, args, kwargs)
    state = torch.random.get_rng_state()
    try:
        nodes = _many(call, source, samples, probe, num_draws)
        _check_against_one(call, nodes, probe, name)
    except NonFiniteError:
        raise
    except Exception as error:  # whatever a model may raise on axes that it wasn't written for
        warnings.warn(
            "the model can't be run on many draws at once, so paths are drawn one by one, which is slow. Declare batch axes with "
            "pyro.plate and give parameters their axes from the right, as in k[..., None]. "
            f"What went wrong: {reason_of(error)}",
            StochdynWarning,
            stacklevel=2,
        )
        torch.random.set_rng_state(state)
        size = num_draws if samples is None else next(iter(samples.values())).shape[0]
        return [_drawn_path(_single(call, source, samples, i), probe, name, alone=True) for i in range(size)]
    return [_drawn_path(nodes, probe, name)]


def _many(call: ModelCall, source: Any, samples: dict[str, Tensor] | None, probe: Any, num_draws: int) -> Any:
    """Return the sites of model and draws in a plate outside all others."""
    sites = [s for s in probe.values() if s["type"] == "sample"]
    frames = [f for s in sites for f in s["cond_indep_stack"]]
    depth = 1 + max((-f.dim for f in frames if f.dim is not None), default=0)
    if samples is None:
        with pyro.plate("_draws", num_draws, dim=-depth):
            drawn = poutine.trace(source).get_trace(*call.args, **call.kwargs)
            return _replayed(call, drawn)
    size = next(iter(samples.values())).shape[0]
    values = {n: _spread(v, probe[n], depth) for n, v in samples.items() if n in probe}
    with pyro.plate("_draws", size, dim=-depth):
        return call.run(values).sites


def _single(call: ModelCall, source: Any, samples: dict[str, Tensor] | None, index: int) -> Any:
    """Return the sites of the model for one draw alone."""
    if samples is None:
        return _replayed(call, poutine.trace(source).get_trace(*call.args, **call.kwargs))
    return call.run({n: v[index] for n, v in samples.items()}).sites


def _replayed(call: ModelCall, drawn: Any) -> Any:
    return poutine.trace(poutine.replay(call.model, drawn)).get_trace(*call.args, **call.kwargs).nodes


def _check_against_one(call: ModelCall, nodes: Any, probe: Any, name: str) -> None:
    """Raise unless the first of many draws has the path that it has alone."""
    values = {}
    for n, site in nodes.items():
        known = probe.get(n)
        if known is None or site["type"] != "sample" or site["is_observed"]:
            continue
        whole = known["value"].shape
        many = site["value"]
        # What the plate of draws doesn't reach, such as the indices of a subsample, is the same for all of them.
        values[n] = many if many.shape == whole else many[0].reshape(whole)
    whole, many = probe[name]["value"].shape, nodes[name]["value"]
    alone = call.run(values).sites[name]["value"]
    first = many if many.shape == whole else many[0].reshape(whole)
    slack = 1e-3 * float(alone.abs().max())
    if not torch.allclose(first, alone, rtol=1e-3, atol=slack, equal_nan=True):
        raise ShapeError("a draw among others has another path than alone", got=f"site {name!r}")


def _drawn_path(nodes: Any, probe: Any, name: str, alone: bool = False) -> DrawnPaths:
    """Return the path that a site holds, with the equation that continues it; a single draw gets the axis of draws."""
    site, noise = nodes[name], nodes.get(f"{name}_dw")
    num_batch = probe[name]["value"].ndim - 2

    def leading(value: Tensor) -> Tensor:
        return (value.unsqueeze(0) if alone else value).movedim(-2, 0)

    if noise is not None and isinstance(noise["fn"], PathIncrements):
        fn = noise["fn"]
        x = leading(site["value"])
        if not fn.sde.noise.num_states:
            return DrawnPaths(fn.ts, x, x, fn.sde, fn.method, num_batch)
        e = leading(noise["value"])
        x0 = fn.x0.expand(*torch.broadcast_shapes(e.shape[1:-1], fn.x0.shape[:-1]), fn.x0.shape[-1])
        run = integrate(fn.sde, x0, fn.ts, e, fn.memory0, method=fn.method)
        return DrawnPaths(fn.ts, run.x, full_state(run.x, run.memory), fn.sde, fn.method, num_batch)
    if not isinstance(site["fn"], DiffusionPath):
        raise UnknownSiteError("this site isn't a path", got=f"{name!r} of {type(site['fn']).__name__}")
    x = leading(site["value"])
    return DrawnPaths(site["fn"].ts, x, x, site["fn"].sde, site["fn"].method, num_batch)


def _samples_of(source: Source, num_draws: int) -> dict[str, Tensor] | None:
    """Return ``num_draws`` draws by site, evenly thinned, or drawn again where there are too few; None for a guide."""
    if isinstance(source, MCMC):
        if source._samples is None:
            raise InvalidInputError("the MCMC run has no draws", hint="call mcmc.run(...) first")
        source = source.get_samples()
    if not isinstance(source, Mapping):
        return None
    if not source:
        raise InvalidInputError("there are no draws", got="an empty dictionary")
    size = next(iter(source.values())).shape[0]
    index = (
        torch.arange(num_draws) * size // num_draws
        if num_draws <= size
        else torch.randint(size, (num_draws,))
    )
    return {name: value[index.to(value.device)] for name, value in source.items()}


def _spread(value: Tensor, site: Any, depth: int) -> Tensor:
    """Give draws ``(S, *batch, *event)`` of a site the axes that a plate of draws outside all others needs."""
    gap = depth - 1 - len(site["fn"].batch_shape)
    return value.reshape(value.shape[0], *(1,) * gap, *value.shape[1:])


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Return ``(*batch, T)`` so that it leads and broadcasts with ``like (T, S, *batch, d)``."""
    values = values.to(like.dtype)
    if values.ndim == 1:
        return values.reshape(-1, *(1,) * (like.ndim - 1))
    values = values.movedim(-1, 0)
    return values.reshape(values.shape[0], *(1,) * (like.ndim - 1 - values.ndim), *values.shape[1:], 1)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x (T, S, *batch, d)`` at indices ``(T',)`` or ``(*batch, T')``."""
    if index.ndim == 1:
        return x[index]
    index = index.movedim(-1, 0)
    index = index.reshape(index.shape[0], *(1,) * (x.ndim - 1 - index.ndim), *index.shape[1:], 1)
    return x.gather(0, index.expand(index.shape[0], *x.shape[1:]))
