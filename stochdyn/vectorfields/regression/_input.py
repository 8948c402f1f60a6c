"""What users hand over: points, choices of nodes and vector fields, checked and converted."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_finite, check_ndim, check_nonempty, check_positive_int
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["as_count", "as_float_tensor", "as_index", "as_points", "as_vectors", "is_index"]


def as_float_tensor(value: Any, name: str) -> Tensor:
    """Return ``value`` as a floating tensor; integers become double precision."""
    return as_tensor(value, name, like=torch.empty((), dtype=torch.float64), finite=False)


def as_points(value: Any, name: str = "points", dim: int | None = None) -> Tensor:
    """Return finite ``(n, D)`` points; with ``dim`` given, D must equal it."""
    points = as_float_tensor(value, name)
    check_ndim(points, 2, name, "(number of points, ambient dimension)")
    check_nonempty(points, name)
    check_finite(points.detach(), name)
    if dim is not None and points.shape[1] != dim:
        raise ShapeError(
            f"{name} must live in the space of the cloud",
            got=f"shape {tuple(points.shape)}",
            expected=f"(n, {dim})",
        )
    return points


def as_count(value: Any, name: str, minimum: int = 1) -> int:
    """Return a whole number, Python's or numpy's, of at least ``minimum``."""
    try:
        count = value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = value
    check_positive_int(count, name, minimum)
    return int(count)


def is_index(value: Any) -> bool:
    """Whether ``value`` names nodes (integers or a mask) rather than giving points."""
    if isinstance(value, slice | range):
        return True
    if isinstance(value, Tensor):
        return not value.is_floating_point() and not value.is_complex()
    kind = np.asarray(value).dtype.kind
    return kind in "iub" or (np.asarray(value).size == 0 and np.asarray(value).ndim == 1)


def as_index(value: Any, num_nodes: int, name: str = "index") -> Tensor:
    """Return nodes as a ``(q,)`` long tensor on the CPU.

    Args:
        value: Whole numbers in any container, a boolean mask of length ``num_nodes``, a slice or a range.
        num_nodes: The number of nodes there are.
        name: The argument's name, for messages.

    Raises:
        ShapeError: If there are several axes, or a mask has another length.
        InvalidInputError: If a number lies outside ``[0, num_nodes)`` or isn't whole.
        EmptyDataError: If nothing is chosen.
    """
    if isinstance(value, slice):
        value = range(*value.indices(num_nodes))
    if isinstance(value, Tensor):
        array = value.detach().cpu().numpy()
    else:
        array = np.asarray(list(value) if isinstance(value, range) else value)
    array = np.atleast_1d(array)
    if array.ndim != 1:
        raise ShapeError(f"{name} must have one axis", got=f"shape {array.shape}")
    if array.dtype == np.bool_:
        if len(array) != num_nodes:
            raise ShapeError(
                f"{name} as a mask must have one entry per node", got=len(array), expected=num_nodes
            )
        array = np.flatnonzero(array)
    if len(array) == 0:
        check_nonempty(array.tolist(), name)
    if array.dtype.kind not in "iu":
        raise InvalidInputError(f"{name} must hold whole numbers or be a mask", got=array.dtype)
    outside = (array < 0) | (array >= num_nodes)
    if outside.any():
        where = int(np.flatnonzero(outside)[0])
        raise InvalidInputError(
            f"{name} lies outside the cloud",
            got=f"{name}[{where}]={int(array[where])}",
            expected=f"0 to {num_nodes - 1}",
        )
    return torch.as_tensor(array.astype(np.int64))


def as_vectors(value: Any, rows: int, dim: int, name: str = "vectors", missing: bool = False) -> Tensor:
    """Return finite ambient vectors ``(*batch, rows, dim)``, NaN where they may be missing."""
    vectors = as_float_tensor(value, name)
    check_ndim(vectors, tuple(range(2, 13)), name, "(*batch, number of sites, ambient dimension)")
    if vectors.shape[-2:] != (rows, dim):
        raise ShapeError(
            f"{name} must hold one ambient vector per site",
            got=f"shape {tuple(vectors.shape)}",
            expected=f"(*batch, {rows}, {dim})",
        )
    seen = vectors.detach()
    check_finite(seen[~torch.isnan(seen)] if missing else seen, name)
    return vectors
