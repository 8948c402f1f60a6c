"""A fitted Pyro model as an ArviZ container: posterior, predictive draws, likelihood, data and densities."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC
from torch import Tensor

from stochdyn._checks import check_bool, check_positive_int, check_type
from stochdyn.diagnostics.container import from_draws
from stochdyn.diagnostics.draws import ChainDraws, PosteriorDraws, draw_posterior, evaluate_draws
from stochdyn.diagnostics.prior import draw_prior
from stochdyn.diagnostics.probe import check_program
from stochdyn.diagnostics.sites import Site
from stochdyn.errors import InvalidInputError

__all__ = ["to_inference_data"]


def to_inference_data(
    model: Callable[..., Any],
    guide: Callable[..., Any] | MCMC | Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_draws: int = 1000,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = 0,
    *,
    predictive: bool = True,
    split_events: bool = False,
    chunk_size: int | None = None,
    num_prior_draws: int = 0,
) -> Any:
    r"""Draw from a guide, or take an MCMC run's draws, and put all that ArviZ asks for into its container.

    Groups: ``posterior`` (latent and deterministic sites), ``posterior_predictive`` (observed sites drawn
    anew), ``log_likelihood`` (observed sites, pointwise over their batch axes), ``observed_data``,
    ``constant_data`` (the grid ``{site}_ts`` of each path site, the indices of subsampled plates and the
    array arguments that aren't observed) and ``sample_stats``: ``lp``, the log joint density, ``log_q``, the
    log density of the guide, and

    .. math:: \mathtt{log\_weight} = \log p(y, z) - \log q(z), \qquad z\sim q,

    the log importance weight of a draw; these two are NaN for a guide without a density (a point mass such as
    ``AutoDelta``) and left out for MCMC, which has ``diverging`` instead. With a subsampled plate all draws
    share one minibatch, densities are scaled as in the ELBO, and ``log_likelihood`` is that of the minibatch,
    unscaled.

    A masked value is missing: it is NaN in ``observed_data``, and ``log_likelihood`` of such a site has the observed
    entries alone, along ``{site}_seen``, whose coordinate is their position, so that ``az.loo`` counts what was seen.

    Axes are named by their plates; a path site ``x`` lies on ``(x_time, x_dim)``, with the grid as
    coordinate.

    Args:
        model: Pyro model.
        guide: Pyro guide, already fitted, a ``pyro.infer.MCMC`` that has run, or draws ``(S, *shape)`` by latent site.
        args: Positional arguments of model and guide.
        kwargs: Keyword arguments of model and guide.
        num_draws: The number of draws of the guide; an MCMC run has its own.
        coords: One value per index, by the name of the dimension; they replace those found here.
        dims: Names of the axes, by the name of the site; they replace those found here.
        seed: What the draws start from; the global random state is left alone. None draws from that instead.
        predictive: Whether to draw observed sites anew.
        split_events: Whether ``log_likelihood`` has one value for each element of an observed site that
            ``to_event`` declares one event. ``az.loo`` leaves out one such value at a time: elements of a
            vector of independent records should be split, components of one record should not.
        chunk_size: The number of draws at a time; by default what bounds the memory of the traced values.
        num_prior_draws: The number of draws for the groups ``prior`` and ``prior_predictive``; 0 leaves them out.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        UnknownSiteError: If model and guide don't have the same latent sites.
        ShapeError: If a coordinate doesn't fit its axis.
        InvalidInputError: If the MCMC run has no draws yet, or ``num_draws`` isn't a positive integer.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("record", len(y)):
        ...         pyro.sample("y", dist.Normal(rate, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("rate", dist.Normal(y.sum() / 4, 0.5))
        >>> idata = to_inference_data(model, guide, (torch.tensor([0.1, 0.3, 0.2]),), num_draws=100)
        >>> dict(idata.log_likelihood.sizes)
        {'chain': 1, 'draw': 100, 'record': 3}

    Reference:
        The InferenceData schema, https://python.arviz.org.
    """
    check_program(model, None if isinstance(guide, MCMC | Mapping) else guide, args, kwargs)
    check_positive_int(num_prior_draws, "num_prior_draws", 0)
    check_type(coords, (Mapping, type(None)), "coords")
    check_type(dims, (Mapping, type(None)), "dims")
    check_bool(predictive, "predictive")
    check_bool(split_events, "split_events")
    options: dict[str, Any] = {
        "seed": seed,
        "predictive": predictive,
        "split_events": split_events,
        "chunk_size": chunk_size,
    }
    if isinstance(guide, MCMC):
        draws, chains, extra = _mcmc_draws(model, guide, args, kwargs, options)
    elif isinstance(guide, Mapping):
        draws, chains, extra = evaluate_draws(model, guide, args, kwargs, **options), 1, {}
        chains = guide.num_chains if isinstance(guide, ChainDraws) else 1
    else:
        draws = draw_posterior(model, guide, args, kwargs, num_draws=num_draws, **options)
        assert draws.log_guide is not None
        chains, extra = 1, {"log_q": draws.log_guide, "log_weight": draws.log_weights}
    found_dims, found_coords, constants = _axes(draws)
    observed = {n: _observed(s) for n, s in draws.sites.items() if s.value is not None}
    for name, value in _array_arguments(model, args, kwargs or {}).items():
        if not any(_same(value, data) for data in observed.values()):
            taken = name in draws.sites or name in found_coords
            constants.setdefault(f"{name}_argument" if taken else name, _array(value))
    attrs: dict[str, str | int | float] = {"estimator": _estimator(guide)}
    if seed is not None:
        attrs["seed"] = seed

    likelihood = dict(draws.log_likelihood)
    for name, site in draws.sites.items():
        if site.seen is not None:
            # What was missing is no observation: leave-one-out must not count it.
            seen = _of_shape(site.seen, likelihood[name].shape[1:])
            rows = likelihood[name].reshape(likelihood[name].shape[0], -1)
            likelihood[name] = rows[:, seen.flatten().to(rows.device)]
            found_dims[f"log_likelihood/{name}"] = [f"{name}_seen"]
            found_coords[f"{name}_seen"] = _array(seen.flatten().nonzero()[:, 0])

    def by_chain(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {n: _array(t.reshape(chains, t.shape[0] // chains, *t.shape[1:])) for n, t in tensors.items()}

    before: dict[str, Any] = {}
    if num_prior_draws:
        prior = draw_prior(model, args, kwargs, num_draws=num_prior_draws, seed=seed)
        latent = {n: v for n, v in prior.items() if n in draws.values}
        replicated = {n: v for n, v in prior.items() if n in observed}
        before = {
            "prior": {n: _array(v)[None] for n, v in latent.items()},
            "prior_predictive": {n: _array(v)[None] for n, v in replicated.items()},
        }
    return from_draws(
        by_chain(draws.values),
        **before,
        posterior_predictive=by_chain(draws.predictive),
        log_likelihood=by_chain(likelihood),
        observed_data={n: _array(value) for n, value in observed.items()},
        constant_data=constants,
        sample_stats=by_chain({"lp": draws.log_joint, **extra}),
        coords={**found_coords, **(coords or {})},
        dims={**found_dims, **(dims or {})},
        attrs=attrs,
    )


def _of_shape(seen: Tensor, shape: torch.Size) -> Tensor:
    """Return which entries of a likelihood count: those of which any element was seen."""
    return seen if seen.shape == shape else seen.flatten(len(shape)).any(-1)


def _observed(site: Site) -> Tensor:
    """Return the data of a site, NaN where they are masked."""
    assert site.value is not None
    if site.seen is None:
        return site.value
    value = site.value if site.value.is_floating_point() else site.value.to(torch.get_default_dtype())
    seen = site.seen.to(value.device).reshape(*site.seen.shape, *(1,) * (value.ndim - site.seen.ndim))
    return torch.where(seen, value, value.new_full((), float("nan")))


def _mcmc_draws(
    model: Callable[..., Any],
    mcmc: MCMC,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> tuple[PosteriorDraws, int, dict[str, Tensor]]:
    grouped = mcmc.get_samples(group_by_chain=True) if mcmc._samples is not None else {}
    if not grouped:
        raise InvalidInputError("the MCMC run has no draws", hint="call mcmc.run(...) first")
    chains, per_chain = next(iter(grouped.values())).shape[:2]
    flat = {name: value.flatten(0, 1) for name, value in grouped.items()}
    draws = evaluate_draws(model, flat, args, kwargs, **options)
    extra = {}
    diagnostics: list[Any] = mcmc._diagnostics
    if "divergences" in diagnostics[0]:
        diverging = torch.zeros(chains, per_chain, dtype=torch.bool)
        for chain in range(chains):
            diverging[chain, diagnostics[chain]["divergences"]] = True
        extra["diverging"] = diverging.flatten()
    return draws, chains, extra


def _axes(draws: PosteriorDraws) -> tuple[dict[str, list[str]], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Name the axes of all sites; return names, coordinates, and the constant data that they rest on."""
    dims: dict[str, list[str]] = {}
    coords: dict[str, np.ndarray] = {}
    constants: dict[str, np.ndarray] = {}
    for name, site in draws.sites.items():
        if site.kind == "factor":
            continue
        names = [
            f"{name}_dim_{i}" if plate is None else _plate_dim(plate, draws)
            for i, plate in enumerate(site.plates)
        ]
        if site.times is not None:
            gap = len(site.shape) - 2 - len(names)
            names += [f"{name}_dim_{len(names) + i}" for i in range(gap)]
            names += [f"{name}_time", f"{name}_dim"]
            coords[f"{name}_time"] = _array(site.times)
            constants[f"{name}_ts"] = _array(site.times)
            dims[f"{name}_ts"] = [f"{name}_time"]
        dims[name] = names
    for plate, index in draws.subsamples.items():
        coords[_plate_dim(plate, draws)] = _array(index)
        constants[f"{plate}_index"] = _array(index)
        dims[f"{plate}_index"] = [_plate_dim(plate, draws)]
    return dims, coords, constants


def _plate_dim(plate: str, draws: PosteriorDraws) -> str:
    # xarray takes a variable with the name of a dimension for its coordinate
    return f"{plate}_plate" if plate in draws.sites else plate


def _array_arguments(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor | np.ndarray]:
    """Return the tensors and arrays among the arguments under the names that the model gives them."""
    try:
        program = model.forward if isinstance(model, torch.nn.Module) else model
        named = inspect.signature(program).bind(*args, **kwargs)
        arguments = {**named.arguments, **named.arguments.pop("kwargs", {})}
    except (TypeError, ValueError):
        arguments = {**{f"arg_{i}": value for i, value in enumerate(args)}, **kwargs}
    return dict(itertools.chain.from_iterable(_leaves(name, value) for name, value in arguments.items()))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor | np.ndarray]]:
    if isinstance(value, Tensor | np.ndarray):
        yield name, value
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _leaves(f"{name}_{i}", part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{name}_{key}", part)


def _same(value: Any, observed: Tensor) -> bool:
    if tuple(value.shape) != tuple(observed.shape):
        return False
    return bool(np.array_equal(_array(value), _array(observed), equal_nan=True))


def _estimator(guide: Any) -> str:
    if isinstance(guide, MCMC):
        return type(guide.kernel).__name__
    if isinstance(guide, Mapping):
        return "draws"
    return getattr(guide, "__name__", type(guide).__name__)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
