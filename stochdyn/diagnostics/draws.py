"""Posterior draws of a Pyro model with their densities: vectorised where the model allows it, else one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.diagnostics.sites import Site, is_delta, read_sites
from stochdyn.errors import ShapeError, StochdynWarning, UnknownSiteError

__all__ = ["PosteriorDraws", "draw_posterior", "evaluate_draws", "seeded"]

_PLATE = "_stochdyn_draws"
_MAX_ELEMENTS = 2**23

Program = Callable[..., Any]


@dataclass
class PosteriorDraws:
    """Draws from a guide or a sampler, with what the model says about each; all tensors lead with the draw axis.

    Attributes:
        values: latent and deterministic sites, ``(S, *batch, *event)``.
        predictive: observed sites drawn anew, ``(S, *batch, *event)``; empty unless asked for.
        log_likelihood: observed sites' log densities, pointwise, ``(S, *batch)``: neither scaled by subsampling nor
            by ``poutine.scale``, and zero where masked.
        log_joint: ``(S,)`` log density of latent and observed sites, scaled as the model says.
        log_guide: ``(S,)`` log density of the guide, scaled likewise; NaN where it has none (a point mass), None for
            draws that no guide made.
        sites: what each site of the model is, by name.
        subsamples: the indices of every subsampled plate. All draws share them.
        vectorised: whether the model ran on many draws at once.
    """

    values: dict[str, Tensor]
    predictive: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    log_joint: Tensor
    log_guide: Tensor | None
    sites: dict[str, Site]
    subsamples: dict[str, Tensor] = field(default_factory=dict)
    vectorised: bool = True

    @property
    def log_weights(self) -> Tensor:
        """``(S,)`` log importance weights, joint over guide."""
        if self.log_guide is None:
            return torch.full_like(self.log_joint, float("nan"))
        return self.log_joint - self.log_guide


def draw_posterior(
    model: Program,
    guide: Program,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_draws: int = 1000,
    seed: int | None = 0,
    predictive: bool = False,
    chunk_size: int | None = None,
) -> PosteriorDraws:
    """Draw from a guide and evaluate the model's and the guide's density at every draw.

    The model and the guide run inside one further, outermost plate, a chunk of draws at a time. Some draws are then
    evaluated once more on their own; a model that isn't written for further batch axes fails or disagrees there, and
    all draws are made one by one instead. A subsampled plate keeps one minibatch for all draws.

    Args:
        model: Pyro model.
        guide: Pyro guide with the model's latent sites.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        num_draws: how many draws.
        seed: of the draws, which leave the global random state untouched; None draws from it instead.
        predictive: whether to draw observed sites anew too.
        chunk_size: draws at a time; by default what bounds the traced values to some 64 MiB.

    Returns:
        The draws.

    Raises:
        UnknownSiteError: if model and guide don't have the same latent sites.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(rate, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("rate", dist.Normal(y / 2, 0.5**0.5))
        >>> draws = draw_posterior(model, guide, (torch.tensor(1.0),), num_draws=3)
        >>> draws.log_weights  # the exact posterior: every weight is the evidence
        tensor([-1.5155, -1.5155, -1.5155])
    """
    check_positive_int(num_draws, "num_draws")
    with torch.no_grad(), seeded(seed):
        probe = _Probe(model, guide, tuple(args), dict(kwargs or {}), predictive)
        return _collect(probe, num_draws, chunk_size)


def evaluate_draws(
    model: Program,
    values: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int | None = 0,
    predictive: bool = False,
    chunk_size: int | None = None,
) -> PosteriorDraws:
    """Evaluate a model at given draws of all its latent sites, such as those of MCMC.

    Args:
        model: Pyro model.
        values: by latent site, ``(S, *batch, *event)``.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        seed: as :func:`draw_posterior`.
        predictive: as :func:`draw_posterior`.
        chunk_size: as :func:`draw_posterior`.

    Returns:
        The draws; ``log_guide`` is None.

    Raises:
        UnknownSiteError: if the model has other latent sites.
        ShapeError: if a site's draws have another shape than the model gives it.
    """
    with torch.no_grad(), seeded(seed):
        probe = _Probe(model, None, tuple(args), dict(kwargs or {}), predictive, values)
        return _collect(probe, next(iter(values.values())).shape[0], chunk_size)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a generator seeded by ``seed`` and give the global random state back; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _SetValues(Messenger):
    """Give random sites their values; unlike ``condition`` they stay random, unlike ``replay`` they need no trace."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.given = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.given and not msg["is_observed"]:
            msg["value"] = self.given[msg["name"]]
            msg["done"] = True


@dataclass
class _Chunk:
    """Traces of a model and a guide on ``size`` draws; the draw axis is ``depth`` from the right of batch shapes."""

    model: poutine.Trace
    guide: poutine.Trace | None
    replica: poutine.Trace | None
    size: int
    depth: int


class _Probe:
    """One run of guide and model on a single draw: which sites there are, and their shapes."""

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        predictive: bool,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.predictive, self.given = predictive, given
        self.subsamples: dict[str, Tensor] = {}
        first: dict[str, Any] = {name: value[0] for name, value in (given or {}).items()}
        self.guide_trace = None
        if guide is not None:
            raw = poutine.trace(guide).get_trace(*args, **kwargs)
            self._keep_subsamples(raw)
            self.guide_trace = prune_subsample_sites(raw)
            first = _random_values(self.guide_trace)
        raw = poutine.trace(_SetValues({**self.subsamples, **first})(model)).get_trace(*args, **kwargs)
        self._keep_subsamples(raw)
        self.model_trace = prune_subsample_sites(raw)
        self.sites = read_sites(self.model_trace)
        self._check_names(first)
        self.points: set[str] = set()
        if self.guide_trace is not None:
            self.points = {
                name
                for name in first
                if name in self.sites
                and is_delta(self.guide_trace.nodes[name]["fn"])
                and not is_delta(self.model_trace.nodes[name]["fn"])
            }
        traces = [self.model_trace] + ([self.guide_trace] if self.guide_trace is not None else [])
        self.depth = 1 + max(_batch_depth(trace) for trace in traces)
        self.elements = sum(_numel(site.get("value")) for trace in traces for site in trace.nodes.values())

    def _keep_subsamples(self, trace: poutine.Trace) -> None:
        for name, site in trace.nodes.items():
            if site_is_subsample(site):
                self.subsamples[name] = site["value"]

    def _check_names(self, given: Mapping[str, Any]) -> None:
        wanted = {name for name, site in self.sites.items() if site.kind == "latent"}
        missing = sorted(wanted - set(given))
        source = "guide" if self.guide is not None else "draws"
        if missing:
            raise UnknownSiteError(
                f"the {source} lacks sites of the model" if self.guide is not None else "draws lack sites of the model",
                got=", ".join(sorted(given)) or "none",
                expected=", ".join(missing),
                hint="every latent site needs a guide site; enumerated sites must be sampled or marginalised",
            )
        foreign = sorted(
            name
            for name in set(given) - wanted
            if self.guide_trace is None or not self.guide_trace.nodes[name]["infer"].get("is_auxiliary")
        )
        if foreign:
            raise UnknownSiteError(
                f"the {source} has sites that the model lacks" if self.guide is not None else "draws of unknown sites",
                got=", ".join(foreign),
                expected=", ".join(sorted(wanted)),
                hint="mark helper sites of a guide with infer={'is_auxiliary': True}",
            )
        if self.guide is None:
            for name, value in (self.given or {}).items():
                if tuple(value.shape[1:]) != self.sites[name].shape:
                    raise ShapeError(
                        f"draws of {name!r} have the wrong shape",
                        got=f"shape {tuple(value.shape)}",
                        expected=f"(draws, {', '.join(map(str, self.sites[name].shape))})",
                    )

    def run(
        self, start: int, size: int, depth: int, values: dict[str, Any] | None = None, predictive: bool = True
    ) -> _Chunk:
        """Run on ``size`` draws in a plate (``depth > 0``) or on one draw (``depth == 0``), at ``values`` if given."""

        def plated(program: Program) -> Program:
            if depth == 0:
                return program

            def inside(*args: Any, **kwargs: Any) -> Any:
                with pyro.plate(_PLATE, size, dim=-depth):
                    return program(*args, **kwargs)

            return inside

        guide_trace = None
        if self.guide is not None:
            wrapped = _SetValues({**self.subsamples, **(values or {})})(plated(self.guide))
            guide_trace = self._trace(wrapped)
            values = _random_values(guide_trace)
        elif values is None:
            assert self.given is not None
            values = {
                name: self._spread(value[start : start + size], self.sites[name], depth)
                for name, value in self.given.items()
            }
        known = {**self.subsamples, **(values or {})}
        model_trace = self._trace(_SetValues(known)(plated(self.model)))
        replica = None
        if self.predictive and predictive:
            replica = self._trace(_SetValues(known)(plated(poutine.uncondition(self.model))), densities=False)
        return _Chunk(model_trace, guide_trace, replica, size, depth)

    def _trace(self, program: Program, densities: bool = True) -> poutine.Trace:
        # every plate leaves a site with its indices: ours and the model's are no part of the density
        trace = prune_subsample_sites(poutine.trace(program).get_trace(*self.args, **self.kwargs))
        if densities:
            trace.compute_log_prob()
        return trace

    @staticmethod
    def _spread(value: Tensor, site: Site, depth: int) -> Tensor:
        if depth == 0:
            return value[0]
        gap = depth - 1 - len(site.batch_shape)
        return value.reshape(value.shape[0], *(1,) * gap, *value.shape[1:])


def _random_values(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def _batch_depth(trace: poutine.Trace) -> int:
    sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
    frames = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
    return max(frames + [len(s["fn"].batch_shape) for s in sites if hasattr(s["fn"], "batch_shape")], default=0)


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0


def _collect(probe: _Probe, num_draws: int, chunk_size: int | None) -> PosteriorDraws:
    if chunk_size is None:
        chunk_size = max(1, _MAX_ELEMENTS // max(probe.elements, 1))
    check_positive_int(chunk_size, "chunk_size")
    state = torch.random.get_rng_state()
    try:
        return _join(probe, _vectorised_chunks(probe, num_draws, min(chunk_size, num_draws)), True)
    except Exception as error:  # whatever a model may raise on axes that it wasn't written for
        reason = str(error).strip().splitlines()
        warnings.warn(
            "The model and guide can't be run on many draws at once, so they run once a draw, which is slow. Declare "
            "batch axes with pyro.plate and index from the right, as in x[..., 0], to speed this up. What went "
            f"wrong: {reason[0] if reason else type(error).__name__}",
            StochdynWarning,
            stacklevel=4,
        )
    torch.random.set_rng_state(state)
    return _join(probe, (_read(probe, probe.run(i, 1, 0)) for i in range(num_draws)), False)


class _NotVectorisedError(Exception):
    """A run on many draws disagrees with a run on one of them."""


def _vectorised_chunks(probe: _Probe, num_draws: int, chunk_size: int) -> Iterator[PosteriorDraws]:
    for start in range(0, num_draws, chunk_size):
        chunk = probe.run(start, min(chunk_size, num_draws - start), probe.depth)
        draws = _read(probe, chunk)
        if start == 0:
            for index in sorted({0, chunk.size - 1}):
                _check_against_single(probe, chunk, draws, index)
        yield draws


def _check_against_single(probe: _Probe, chunk: _Chunk, draws: PosteriorDraws, index: int) -> None:
    """Raise unless the chunk's draw ``index``, run on its own, has the same densities and deterministic values."""
    if chunk.guide is not None and probe.guide_trace is not None:
        shapes = {name: site["value"].shape for name, site in probe.guide_trace.nodes.items() if site["type"] == "sample"}
        values = {
            name: _take(value, chunk.size, shapes[name])[index] for name, value in _random_values(chunk.guide).items()
        }
    else:
        values = {n: v[index] for n, v in draws.values.items() if probe.sites[n].kind == "latent"}
    single = _read(probe, probe.run(index, 1, 0, values, predictive=False))
    pairs = {"the joint density": (draws.log_joint[index], single.log_joint[0])}
    if draws.log_guide is not None and single.log_guide is not None:
        pairs["the guide's density"] = (draws.log_guide[index], single.log_guide[0])
    for name in draws.values:
        pairs[f"site {name!r}"] = (draws.values[name][index], single.values[name][0])
    for name in draws.log_likelihood:
        pairs[f"the likelihood of {name!r}"] = (draws.log_likelihood[name][index], single.log_likelihood[name][0])
    for what, (many, one) in pairs.items():
        tolerance = 30 * torch.finfo(one.dtype).eps ** 0.5 if one.is_floating_point() else 0.0
        if not torch.allclose(many, one, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise _NotVectorisedError(f"{what} of a draw among many differs from that of the draw alone")


def _read(probe: _Probe, chunk: _Chunk) -> PosteriorDraws:
    """Turn traces into tensors that lead with the draw axis."""
    values, likelihood, predictive = {}, {}, {}
    for name, site in probe.sites.items():
        node = chunk.model.nodes[name]
        if site.kind in ("latent", "deterministic"):
            values[name] = _take(node["value"], chunk.size, site.shape)
        elif site.kind == "observed":
            pointwise = node["unscaled_log_prob"]
            if node["mask"] is not None:
                mask = torch.as_tensor(node["mask"], device=pointwise.device)
                pointwise = torch.where(mask, pointwise, pointwise.new_zeros(()))
            likelihood[name] = _take(pointwise, chunk.size, site.batch_shape)
            if chunk.replica is not None:
                predictive[name] = _take(chunk.replica.nodes[name]["value"], chunk.size, site.shape)
    log_joint = _density(chunk.model, chunk)
    log_guide = None
    if chunk.guide is not None:
        log_guide = _density(chunk.guide, chunk)
    return PosteriorDraws(values, predictive, likelihood, log_joint, log_guide, probe.sites)


def _take(value: Tensor, size: int, shape: tuple[int, ...]) -> Tensor:
    """Return ``value`` as ``(size, *shape)``, repeated where it doesn't depend on the draw."""
    full = torch.Size((size, *shape))
    if value.numel() == full.numel():
        return value.reshape(full)
    if value.numel() == torch.Size(shape).numel():
        return value.reshape(shape).expand(full)
    raise _NotVectorisedError(f"a value has shape {tuple(value.shape)} where {tuple(full)} was due")


def _density(trace: poutine.Trace, chunk: _Chunk) -> Tensor:
    """Sum log densities over all axes but the draws'; in double precision, since weights are differences of sums."""
    total: Tensor | None = None
    for node in trace.nodes.values():
        if node["type"] != "sample":
            continue
        log_prob = torch.as_tensor(node["log_prob"]).double()
        if chunk.depth == 0:
            part = log_prob.sum().reshape(1)
        elif log_prob.ndim == chunk.depth and log_prob.shape[0] in (1, chunk.size):
            part = log_prob.flatten(1).sum(-1).expand(chunk.size)
        elif not bool(log_prob.any()):
            continue  # masked out as a whole, as deterministic sites are
        else:
            raise _NotVectorisedError(f"site {node['name']!r} has a log density of shape {tuple(log_prob.shape)}")
        total = part if total is None else total + part.to(total.device)
    return torch.zeros(chunk.size, dtype=torch.float64) if total is None else total


def _is_constant(draws: Tensor) -> bool:
    return draws.shape[0] > 1 and bool((draws == draws[:1]).all())


def _join(probe: _Probe, chunks: Iterator[PosteriorDraws], vectorised: bool) -> PosteriorDraws:
    parts = list(chunks)

    def joined(pick: Callable[[PosteriorDraws], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([pick(part)[name] for part in parts]) for name in pick(parts[0])}

    log_guides = [part.log_guide for part in parts if part.log_guide is not None]
    subsampled = {
        frame.name
        for node in probe.model_trace.nodes.values()
        if node["type"] == "sample"
        for frame in node["cond_indep_stack"]
        if frame.full_size is not None and frame.full_size != frame.size
    }
    values = joined(lambda p: p.values)
    log_guide = torch.cat(log_guides) if log_guides else None
    if log_guide is not None and any(_is_constant(values[name]) for name in probe.points):
        log_guide = torch.full_like(log_guide, float("nan"))  # a point mass has no density
    return PosteriorDraws(
        values,
        joined(lambda p: p.predictive),
        joined(lambda p: p.log_likelihood),
        torch.cat([part.log_joint for part in parts]),
        log_guide,
        probe.sites,
        {name: index for name, index in probe.subsamples.items() if name in subsampled},
        vectorised,
    )
