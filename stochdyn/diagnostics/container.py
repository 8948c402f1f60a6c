"""Draws as plain arrays into ArviZ's container: InferenceData before 1.0, xarray's DataTree from there on."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from stochdyn._version import __version__
from stochdyn.errors import EmptyDataError, InvalidInputError, MissingDependencyError, ShapeError

# Neither torch nor Pyro is imported here, so the container works, and is tested, where they aren't installed.

__all__ = ["arviz_major", "from_draws"]

Arrays = Mapping[str, Any]


def arviz_major() -> int:
    """Return the installed ArviZ's major version, which decides between InferenceData (0) and DataTree (1).

    Raises:
        MissingDependencyError: If ArviZ isn't installed.
    """
    try:
        return int(importlib.metadata.version("arviz").split(".")[0])
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError("ArviZ is not installed", hint="pip install arviz") from error


def from_draws(
    posterior: Arrays,
    *,
    posterior_predictive: Arrays | None = None,
    prior: Arrays | None = None,
    prior_predictive: Arrays | None = None,
    log_likelihood: Arrays | None = None,
    observed_data: Arrays | None = None,
    constant_data: Arrays | None = None,
    sample_stats: Arrays | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, str | int | float] | None = None,
) -> Any:
    """Put draws into the container that the installed ArviZ reads.

    Args:
        posterior: Arrays ``(chain, draw, *shape)`` by the name of the variable.
        posterior_predictive: Arrays ``(chain, draw, *shape)`` of replicated data.
        prior: Arrays ``(chain, draw, *shape)`` drawn from the prior, as many as there are.
        prior_predictive: Arrays ``(chain, draw, *shape)`` of data drawn from the prior.
        log_likelihood: Arrays ``(chain, draw, *shape)``, pointwise: one value per observation.
        observed_data: Arrays ``(*shape)``.
        constant_data: Arrays ``(*shape)``.
        sample_stats: Arrays ``(chain, draw, *shape)``.
        coords: One value per index, by the name of the dimension.
        dims: The names, by variable, of the axes behind ``(chain, draw)``. Axes that aren't named become
            ``{variable}_dim_{i}``. Names beyond the axes of an array are ignored, so that one entry serves
            data with event axes and its log likelihood without them. A key ``"group/variable"`` is for one group.
        attrs: The attributes of the container and of each group.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x; empty groups are left out.

    Raises:
        EmptyDataError: If the posterior has no variables or no draws.
        ShapeError: If chains and draws disagree, or a coordinate doesn't fit its axis.
        InvalidInputError: If a dimension has the name of a variable that doesn't lie along it.
        MissingDependencyError: If ArviZ isn't installed.

    Example:
        >>> idata = from_draws({"rate": np.ones((1, 100)), "x": np.zeros((1, 100, 5))}, dims={"x": ["time"]})
        >>> dict(idata.posterior.sizes)
        {'chain': 1, 'draw': 100, 'time': 5}

    Reference:
        The InferenceData schema, https://python.arviz.org.
    """
    _check_mappings(
        posterior=posterior, posterior_predictive=posterior_predictive, prior=prior,
        prior_predictive=prior_predictive, log_likelihood=log_likelihood,
        observed_data=observed_data, constant_data=constant_data, sample_stats=sample_stats, coords=coords,
        dims=dims, attrs=attrs,
    )  # fmt: skip
    if not posterior:
        raise EmptyDataError("posterior is empty", hint="a model needs at least one latent site")
    sampled = {
        "posterior": posterior,
        "posterior_predictive": posterior_predictive,
        "log_likelihood": log_likelihood,
        "sample_stats": sample_stats,
    }
    fixed = {"observed_data": observed_data, "constant_data": constant_data}
    sample_shape = _sample_shape(posterior)
    attributes = {"inference_library": "stochdyn", "inference_library_version": __version__, **(attrs or {})}
    groups = {}
    for group, arrays in sampled.items():
        if arrays:
            _check_sample_shape(group, arrays, sample_shape)
            groups[group] = _dataset(
                arrays, ("chain", "draw"), coords or {}, _of(group, dims or {}), attributes
            )
    before = {"prior": prior, "prior_predictive": prior_predictive}
    first = next((arrays for arrays in before.values() if arrays), None)
    for group, arrays in before.items():
        if arrays and first is not None:
            # The prior has draws of its own, and their number.
            _check_sample_shape(group, arrays, _sample_shape(first))
            groups[group] = _dataset(
                arrays, ("chain", "draw"), coords or {}, _of(group, dims or {}), attributes
            )
    for group, arrays in fixed.items():
        if arrays:
            groups[group] = _dataset(arrays, (), coords or {}, _of(group, dims or {}), attributes)
    return _assemble(groups, attributes)


def _check_mappings(**given: object) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, Mapping):
            raise InvalidInputError(f"{name} must be a mapping", got=type(value).__name__)


def _assemble(groups: dict[str, Any], attributes: dict[str, Any]) -> Any:
    if arviz_major() >= 1:
        return _as_datatree(groups, attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the last 0.x announces 1.0 at every import
        import arviz
    return arviz.InferenceData(attrs=attributes, **groups)


def _as_datatree(groups: dict[str, Any], attributes: dict[str, Any]) -> Any:
    import xarray

    tree = xarray.DataTree.from_dict(groups)
    tree.attrs.update(attributes)
    return tree


def _sample_shape(posterior: Arrays) -> tuple[int, int]:
    name, first = next(iter(posterior.items()))
    shape = np.shape(first)
    if len(shape) < 2:
        raise ShapeError(
            f"{name} needs the axes of chains and draws", got=shape, expected="(chain, draw, ...)"
        )
    if 0 in shape[:2]:
        raise EmptyDataError(f"{name} has no draws", got=f"shape {shape}")
    return shape[0], shape[1]


def _check_sample_shape(group: str, arrays: Arrays, expected: tuple[int, int]) -> None:
    for name, array in arrays.items():
        if np.shape(array)[:2] != expected:
            raise ShapeError(
                f"{name} in {group} has other chains and draws than the posterior",
                got=f"shape {np.shape(array)}",
                expected=f"({expected[0]}, {expected[1]}, ...)",
            )


def _of(group: str, dims: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Return the names of axes in one group."""
    own = {
        name.removeprefix(f"{group}/"): axes for name, axes in dims.items() if name.startswith(f"{group}/")
    }
    return {**dims, **own}


def _dataset(
    arrays: Arrays,
    sample_dims: tuple[str, ...],
    coords: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    attributes: dict[str, Any],
) -> Any:
    import xarray

    variables: dict[Hashable, Any] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        values = np.asarray(array)
        shape = values.shape[len(sample_dims) :]
        named = list(dims.get(name, ()))[: len(shape)]
        names = [*named, *(f"{name}_dim_{i}" for i in range(len(named), len(shape)))]
        for dim, size in zip(names, shape, strict=True):
            known, owner = sizes.setdefault(dim, (size, name))
            if known != size:
                raise ShapeError(
                    f"dimension {dim!r} has two sizes", got=f"{known} in {owner!r} and {size} in {name!r}"
                )
        variables[name] = ((*sample_dims, *names), values)
    for name in arrays:
        if name in sizes and variables[name][0] != (name,):
            raise InvalidInputError(
                f"dimension {name!r} has the name of a variable", hint="rename it through dims"
            )
    axes = {
        dim: np.asarray(coords[dim]) if dim in coords else np.arange(size) for dim, (size, _) in sizes.items()
    }
    for dim, (size, owner) in sizes.items():
        if axes[dim].shape != (size,):
            raise ShapeError(
                f"coords[{dim!r}] doesn't fit {owner!r}", got=f"shape {axes[dim].shape}", expected=(size,)
            )
    for i, dim in enumerate(sample_dims):
        axes[dim] = np.arange(next(iter(variables.values()))[1].shape[i])
    axes = {dim: values for dim, values in axes.items() if dim not in variables}
    return xarray.Dataset(variables, coords=axes, attrs=attributes)
