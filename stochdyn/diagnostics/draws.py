"""Posterior draws of a Pyro model with their densities: many at once where the model allows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from stochdyn._checks import as_seed, as_tensor, check_bool, check_callable, check_positive_int, check_type
from stochdyn.diagnostics.explosions import KeptShare, drawn_anew, warn_of_explosions
from stochdyn.diagnostics.probe import (
    Chunk,
    NotVectorisedError,
    Probe,
    Program,
    check_program,
    random_values,
    reason_of,
)
from stochdyn.diagnostics.sites import Site
from stochdyn.errors import InvalidInputError, NonFiniteError, StochdynWarning, UnknownSiteError
from stochdyn.run.randomness import fork_random_state

__all__ = ["ChainDraws", "PosteriorDraws", "draw_posterior", "evaluate_draws", "seeded"]

_MAX_ELEMENTS = 2**23


class ChainDraws(dict[str, Tensor]):
    """Draws ``(num_chains * num_draws, *shape)`` by site, one chain after the other.

    Args:
        draws: The draws by site.
        num_chains: The number of chains.
    """

    def __init__(self, draws: Mapping[str, Tensor], num_chains: int) -> None:
        super().__init__(draws)
        self.num_chains = num_chains


@dataclass(repr=False)
class PosteriorDraws:
    """Draws from a guide or a sampler, with what the model says about each.

    All tensors lead with the draw axis.

    Attributes:
        values: The latent and deterministic sites, ``(S, *batch, *event)``.
        predictive: The observed sites drawn anew, ``(S, *batch, *event)``; empty unless asked for.
        log_likelihood: The observed sites' log densities, pointwise, ``(S, *batch)``: neither scaled by subsampling nor
            by ``poutine.scale``, and zero where masked.
        log_joint: The log density ``(S,)`` of latent and observed sites, scaled as the model says.
        log_guide: The log density ``(S,)`` of the guide, scaled likewise; NaN where it has none (a point mass), None
            for draws that no guide made. Where draws that explode were drawn anew, it is the density of the guide given that
            nothing explodes.
        sites: What each site of the model is, by name.
        subsamples: The indices of every subsampled plate. All draws share them.
        vectorised: Whether the model ran on many draws at once.
    """

    values: dict[str, Tensor]
    predictive: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    log_joint: Tensor
    log_guide: Tensor | None
    sites: dict[str, Site]
    subsamples: dict[str, Tensor] = field(default_factory=dict)
    vectorised: bool = True

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in self.values.items())
        many = "" if self.vectorised else ", one by one"
        return f"PosteriorDraws({self.log_joint.shape[0]} draws of {shapes}{many})"

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
    split_events: bool = False,
    chunk_size: int | None = None,
) -> PosteriorDraws:
    """Draw from a guide and evaluate the model's and the guide's density at every draw.

    The model and the guide run inside one further, outermost plate, a chunk of draws at a time. Some draws
    are then evaluated once more on their own; a model that isn't written for further batch axes fails or
    disagrees there, and all draws are made one by one instead. A subsampled plate keeps one minibatch for all
    draws.

    Args:
        model: Pyro model.
        guide: Pyro guide with the model's latent sites.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_draws: The number of draws.
        seed: What the draws start from; they leave the global random state untouched; None draws from it instead.
        predictive: Whether to draw observed sites anew too.
        split_events: Whether ``log_likelihood`` has one value for each element of an observed site that
            ``to_event`` declares one event, rather than one for the event.
        chunk_size: The number of draws at a time; by default what bounds the traced values to some 64 MiB.

    Returns:
        The draws.

    Raises:
        UnknownSiteError: If model and guide don't have the same latent sites.
        ExplosionError: If the paths of nearly every draw explode.

    Warns:
        ApproximationWarning: If paths of some draws exploded: these were drawn anew, and ``log_guide`` counts the share of
            draws that don't explode.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(rate, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("rate", dist.Normal(y / 2, 0.5**0.5))
        >>> draws = draw_posterior(model, guide, (torch.tensor(1.0),), num_draws=3)
        >>> draws.log_weights  # the exact posterior: every weight is the evidence
        tensor([-1.5155, -1.5155, -1.5155], dtype=torch.float64)
    """
    check_positive_int(num_draws, "num_draws")
    check_callable(guide, "guide", "a Pyro guide")
    check_program(model, guide, args, kwargs)
    check_bool(predictive, "predictive")
    check_bool(split_events, "split_events")
    with torch.no_grad(), seeded(seed):
        probe = Probe(model, guide, tuple(args), dict(kwargs or {}), predictive, split_events)
        return _collect(probe, num_draws, chunk_size)


def evaluate_draws(
    model: Program,
    values: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int | None = 0,
    predictive: bool = False,
    split_events: bool = False,
    chunk_size: int | None = None,
) -> PosteriorDraws:
    """Evaluate a model at given draws of all its latent sites, such as those of MCMC.

    Args:
        model: Pyro model.
        values: The draws ``(S, *batch, *event)`` of every latent site by its name.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        seed: What replicated data start from, as in :func:`draw_posterior`.
        predictive: Whether to draw observed sites anew too.
        split_events: Whether events are split into elements, as in :func:`draw_posterior`.
        chunk_size: The number of draws at a time, as in :func:`draw_posterior`.

    Returns:
        The draws; ``log_guide`` is None.

    Raises:
        UnknownSiteError: If the model has other latent sites.
        ShapeError: If a site's draws have another shape than the model gives it.
    """
    check_program(model, None, args, kwargs)
    check_type(values, Mapping, "values")
    values = {name: as_tensor(value, f"values[{name!r}]", finite=False) for name, value in values.items()}
    if not values or any(value.ndim == 0 for value in values.values()):
        raise InvalidInputError("values needs draws of every latent site", got=f"{len(values)} sites")
    check_bool(predictive, "predictive")
    check_bool(split_events, "split_events")
    with torch.no_grad(), seeded(seed):
        probe = Probe(model, None, tuple(args), dict(kwargs or {}), predictive, split_events, values)
        return _collect(probe, next(iter(values.values())).shape[0], chunk_size)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from ``seed`` on and give the global random state back in the end; None changes nothing."""
    with fork_random_state(None if seed is None else as_seed(seed), current_device()):
        yield


def current_device() -> torch.device:
    """Return the device whose generator models may draw from, besides the CPU's: that of CUDA, if it is in use."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.device("cuda", torch.cuda.current_device()) if in_use else torch.device("cpu")


def _collect(probe: Probe, num_draws: int, chunk_size: int | None) -> PosteriorDraws:
    if chunk_size is None:
        chunk_size = max(1, _MAX_ELEMENTS // max(probe.elements, 1))
    check_positive_int(chunk_size, "chunk_size")
    state = torch.random.get_rng_state()
    share = KeptShare()
    try:
        chunks = _vectorised_chunks(probe, num_draws, min(chunk_size, num_draws), share)
        return _join(probe, chunks, True, share)
    except NonFiniteError:
        raise
    except Exception as error:  # whatever a model may raise on axes that it wasn't written for
        warnings.warn(
            "The model and guide can't be run on many draws at once, so they run once per draw, which is slow. "
            "Declare batch axes with pyro.plate and index from the right, as in x[..., 0], to speed this up. "
            f"What went wrong: {reason_of(error)}",
            StochdynWarning,
            stacklevel=4,
        )
    torch.random.set_rng_state(state)
    share = KeptShare()
    return _join(probe, _single_draws(probe, num_draws, share), False, share)


def _vectorised_chunks(
    probe: Probe, num_draws: int, chunk_size: int, share: KeptShare
) -> Iterator[PosteriorDraws]:
    start = lost = tried = 0
    while start < num_draws:
        size, tried = min(chunk_size, num_draws - start), tried + 1
        last = size == 1 or probe.guide is None
        try:
            chunk, anew = drawn_anew(
                partial(probe.run, start, size, probe.depth), probe.most_draws if last else 1
            )
        except NonFiniteError:
            if last:
                raise
            share.count(size, 1, kept=False)
            # of fewer draws at once a larger share has none that explodes
            lost, chunk_size = lost + 1, size // 2
            continue
        share.count(size, anew)
        draws = _read(probe, chunk)
        if start == 0:
            for index in sorted({0, chunk.size - 1}):
                _check_against_single(probe, chunk, draws, index)
        start, lost, tried = start + size, lost + anew, tried + anew
        yield draws
    warn_of_explosions(lost, tried, "sets of draws of the guide")


def _single_draws(probe: Probe, num_draws: int, share: KeptShare) -> Iterator[PosteriorDraws]:
    lost = 0
    for i in range(num_draws):
        chunk, anew = drawn_anew(partial(probe.run, i, 1, 0), probe.most_draws)
        lost += anew
        share.count(1, anew)
        yield _read(probe, chunk)
    warn_of_explosions(lost, num_draws + lost, "draws of the guide")


def _check_against_single(probe: Probe, chunk: Chunk, draws: PosteriorDraws, index: int) -> None:
    """Raise unless the chunk's draw ``index``, run alone, has the same densities and deterministic values."""
    values = {n: v[index] for n, v in draws.values.items() if probe.sites[n].kind == "latent"}
    guide = None
    if chunk.guide is not None and probe.guide_trace is not None:
        shapes = {name: value.shape for name, value in random_values(probe.guide_trace).items()}
        values = {
            name: _take(value, chunk.size, shapes[name])[index]
            for name, value in random_values(chunk.guide).items()
        }
        try:
            guide = probe.run_guide(values, 1, 0)
        except Exception:  # a flow without an inverse has the density only of what it has just drawn
            guide = None
    single = _read(probe, Chunk(probe.run_model(values, 1, 0), guide, None, 1, 0))
    pairs = {"the joint density": (draws.log_joint[index], single.log_joint[0])}
    if draws.log_guide is not None and single.log_guide is not None:
        pairs["the guide's density"] = (draws.log_guide[index], single.log_guide[0])
    # Densities are in nats, whose unit is one; every entry of a site is held against the size of its own draws.
    sizes = {}
    for name in draws.values:
        # a draw of the prior may have exploded, which says nothing of the others
        size = draws.values[name].abs().nan_to_num(0.0, 0.0)
        sizes[f"site {name!r}"] = size.amax(0)
        pairs[f"site {name!r}"] = (draws.values[name][index], single.values[name][0])
    for name, likelihood in draws.log_likelihood.items():
        pairs[f"the likelihood of {name!r}"] = (likelihood[index], single.log_likelihood[name][0])
    # Sums of densities are kept in double precision, but no better than the values that they come from.
    kinds = [v.dtype for v in draws.values.values() if v.is_floating_point()]
    coarsest = max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    for what, (many, one) in pairs.items():
        scale = sizes.get(what, torch.ones_like(one))
        if not _agree(many, one, scale, coarsest):
            raise NotVectorisedError(f"{what} of a draw among many differs from that of the draw alone")


def _agree(many: Tensor, one: Tensor, scale: Tensor, coarsest: float) -> bool:
    """Return whether two evaluations agree to rounding, entry by entry, in a scale of each entry."""
    if not one.is_floating_point():
        return bool((many == one).all())
    bound = 30 * max(torch.finfo(one.dtype).eps, coarsest) ** 0.5 * torch.maximum(scale, one.abs())
    same = ((many - one).abs() <= bound) | (many == one) | (many.isnan() & one.isnan())
    return bool(same.all())


def _read(probe: Probe, chunk: Chunk) -> PosteriorDraws:
    """Turn traces into tensors that lead with the draw axis."""
    values, likelihood, predictive = {}, {}, {}
    for name, site in probe.sites.items():
        if name not in chunk.model.nodes:
            raise UnknownSiteError(f"site {name!r} is there in some draws only", hint="mask it instead")
        node = chunk.model.nodes[name]
        if site.kind in ("latent", "deterministic"):
            values[name] = _take(node["value"], chunk.size, site.shape)
        elif site.kind == "observed":
            elements = site.elements if probe.split_events else site.batch_shape
            likelihood[name] = _take(_pointwise(node, probe.split_events), chunk.size, elements)
            if chunk.replica is not None:
                predictive[name] = _take(chunk.replica.nodes[name]["value"], chunk.size, site.shape)
    log_joint = _density(chunk.model, chunk)
    log_guide = None
    if chunk.guide is not None:
        log_guide = _density(chunk.guide, chunk)
    return PosteriorDraws(values, predictive, likelihood, log_joint, log_guide, probe.sites)


def _pointwise(node: Any, split_events: bool) -> Tensor:
    """Return the log density of each datum, without scales, and zero where masked."""
    fn, log_prob = node["fn"], node["unscaled_log_prob"]
    axes = 0
    if split_events and isinstance(fn, dist.Independent):
        log_prob, axes = fn.base_dist.log_prob(node["value"]), fn.reinterpreted_batch_ndims
    if node["mask"] is None:
        return log_prob
    mask = torch.as_tensor(node["mask"], device=log_prob.device)
    return torch.where(mask.reshape((*mask.shape, *(1,) * axes)), log_prob, log_prob.new_zeros(()))


def _take(value: Any, size: int, shape: tuple[int, ...]) -> Tensor:
    """Return ``value`` as ``(size, *shape)``, repeated where it doesn't depend on the draw."""
    full = torch.Size((size, *shape))
    if value.numel() == full.numel():
        return value.reshape(full)
    if value.numel() == torch.Size(shape).numel():
        return value.reshape(shape).expand(full)
    raise NotVectorisedError(f"a value has shape {tuple(value.shape)} where {tuple(full)} was due")


def _density(trace: poutine.Trace, chunk: Chunk) -> Tensor:
    """Sum log densities over all axes but the draws'; in double precision, as weights are differences."""
    total: Tensor | None = None
    for node in trace.nodes.values():
        if node["type"] != "sample":
            continue
        log_prob = torch.as_tensor(node["log_prob"]).double()
        if chunk.depth == 0:
            part = log_prob.sum().reshape(1)
        elif log_prob.ndim == chunk.depth and log_prob.shape[0] in (1, chunk.size):
            part = log_prob.reshape(log_prob.shape[0], -1).sum(-1).expand(chunk.size)
        elif not bool(log_prob.any()):
            continue  # masked out as a whole, as deterministic sites are
        else:
            shape = tuple(log_prob.shape)
            raise NotVectorisedError(f"site {node['name']!r} has a log density of shape {shape}")
        total = part if total is None else total + part.to(total.device)
    return torch.zeros(chunk.size, dtype=torch.float64) if total is None else total


def _is_constant(draws: Tensor) -> bool:
    return draws.shape[0] > 1 and bool((draws == draws[:1]).all())


def _join(
    probe: Probe, chunks: Iterator[PosteriorDraws], vectorised: bool, share: KeptShare
) -> PosteriorDraws:
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
    log_guide = torch.cat(log_guides) - share.log if log_guides else None
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
