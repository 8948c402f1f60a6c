"""Snapshots from what single-cell users have: an AnnData object, or arrays in an npz file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stochdyn._checks import (
    check_positive_int,
    check_type,
)
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.errors import (
    EmptyDataError,
    InvalidInputError,
    MissingDependencyError,
    NonFiniteError,
    ShapeError,
)

__all__ = ["from_anndata", "from_npz", "pca"]


def from_anndata(
    adata: Any,
    time_key: str,
    representation: str | None = "X_pca",
    num_components: int | None = None,
    weights_key: str | None = None,
    times: Mapping[Any, float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Snapshots:
    """Return one snapshot for every value of a column of cells' times.

    Args:
        adata: The cells, an ``anndata.AnnData``, or the path of an ``.h5ad`` file.
        time_key: The column of ``adata.obs`` with the time of each cell: numbers, or categories.
        representation: The key of ``adata.obsm`` that holds the coordinates; None for ``adata.X``, densified.
        num_components: The number of leading columns that are kept; all if None.
        weights_key: The column of ``adata.obs`` with the weight of each cell, a growth rate or an inverse sampling probability,
            say.
        times: The time of each category, where the column isn't of numbers: ``{"day 0": 0.0, ...}``. Cells whose category isn't
            listed are left out.
        dtype: The precision of the snapshots.

    Returns:
        Snapshots in order of time, whose ``names`` are the cells' ``obs_names`` (their positions where there are none), so that
        :func:`~stochdyn.bridges.to_anndata` finds them again.

    Raises:
        MissingDependencyError: If a path is given and AnnData isn't installed.
        InvalidInputError: If a key doesn't exist, or the times are no numbers.
        NonFiniteError: If a time or a cell is NaN.
        TimeGridError: If there are fewer than two times.

    Example:
        >>> class Cells:  # anything with obs and obsm
        ...     obs = {"day": np.array([0, 0, 3, 3])}
        ...     obsm = {"X_pca": np.zeros((4, 2))}
        >>> from_anndata(Cells(), "day")
        Snapshots(times=[0, 3], sizes=[2, 2], dim=2)
    """
    if isinstance(adata, str | os.PathLike):
        adata = _read_h5ad(adata)
    for name in ("obs", "obsm"):
        if not hasattr(adata, name):
            raise InvalidInputError("adata has no cells", got=type(adata).__name__, expected="an AnnData")
    clock = _clock(_column(adata.obs, time_key, "time_key"), times)
    if representation is None:
        values = adata.X
    elif representation not in adata.obsm:
        raise InvalidInputError(
            "adata has no such representation",
            got=repr(representation),
            expected=" | ".join(map(repr, adata.obsm)) or "an entry of obsm",
            hint="sc.pp.pca(adata) makes 'X_pca'",
        )
    else:
        values = adata.obsm[representation]
    weights = None if weights_key is None else _column(adata.obs, weights_key, "weights_key")
    values = _dense(values, "adata.X" if representation is None else f"adata.obsm[{representation!r}]")
    names = getattr(adata, "obs_names", None)
    names = np.arange(len(values)) if names is None else np.asarray(names)
    return _split(values, clock, num_components, weights, dtype, names)


def from_npz(
    path: str | os.PathLike[str],
    values: str | None = None,
    labels: str | None = None,
    num_components: int | None = None,
    times: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Snapshots:
    """Return the snapshots of an ``.npz`` file, in one of three layouts.

    One array of cells ``(N, d)`` and one of their times ``(N,)`` (``pcs`` and ``sample_labels``, say); one array of snapshots
    ``(I, n, d)``; or one array ``(n_i, d)`` a snapshot, in the order of their names (``t0``, ``t1``, ...).

    Args:
        path: The path of the file. Pickled arrays are refused.
        values: The key of the array of cells; None for a file of one array per snapshot, or of one array ``(I, n, d)``.
        labels: The key of the array of the cells' times.
        num_components: The number of leading columns that are kept; all if None.
        times: The time of each snapshot, or of each of the sorted labels; if None, the labels themselves or 0, 1, and so on.
        dtype: The precision of the snapshots.

    Raises:
        InvalidInputError: If a key doesn't exist.
        ShapeError: If the arrays don't fit.
        NonFiniteError: If a cell is NaN.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(folder + "/cells.npz", t0=np.zeros((3, 2)), t1=np.ones((4, 2)))
        ...     from_npz(folder + "/cells.npz", times=[0.0, 12.0])
        Snapshots(times=[0, 12], sizes=[3, 4], dim=2)
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for key in (values, labels):
        if key is not None and key not in arrays:
            raise InvalidInputError("the file has no such array", got=repr(key), expected=" | ".join(arrays))
    if labels is not None:
        if values is None:
            raise InvalidInputError(
                "labels need values", hint=f"name the array of cells: {' | '.join(arrays)}"
            )
        clock = arrays[labels]
        if times is not None:
            known, place = np.unique(clock, return_inverse=True)
            if len(known) != len(times):
                raise ShapeError("there must be one time per label", got=len(times), expected=len(known))
            clock = np.asarray(times, dtype=float)[place.reshape(-1)]
        return _split(arrays[values], clock.astype(float), num_components, None, dtype)
    if values is not None or (len(arrays) == 1 and next(iter(arrays.values())).ndim == 3):
        clouds = list(arrays[values] if values is not None else next(iter(arrays.values())))
    else:
        clouds = [arrays[name] for name in sorted(arrays, key=_natural)]
    if not clouds:
        raise EmptyDataError("the file has no arrays")
    tensors = [_cut(np.asarray(x), num_components, dtype) for x in clouds]
    return Snapshots(list(range(len(tensors))) if times is None else list(times), tensors)


def pca(snapshots: Snapshots, num_components: int, whiten: bool = False) -> Snapshots:
    """Return the snapshots in the principal components of all of their particles together, each snapshot counting alike.

    Args:
        snapshots: The snapshots to project.
        num_components: The number of principal components, at most ``d``.
        whiten: Whether every component gets the variance one.

    Raises:
        InvalidInputError: If there are too few components.

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> pca(Snapshots([0.0, 1.0], [x, x]), 1).dim
        1
    """
    check_type(snapshots, Snapshots, "snapshots")
    check_positive_int(num_components, "num_components")
    if num_components > snapshots.dim:
        raise InvalidInputError(
            "there are fewer components", got=num_components, expected=f"at most {snapshots.dim}"
        )
    # eigenvectors of the covariance of all particles, in which every snapshot has the same weight
    weights = torch.cat(list(snapshots.weights)) / len(snapshots)
    everything = torch.cat(snapshots.samples)
    mean = weights @ everything
    centred = everything - mean
    variance, axes = torch.linalg.eigh(centred.mT @ (weights[:, None] * centred))
    axes = axes.flip(-1)[:, :num_components]
    # the sign of an axis is arbitrary: make its largest entry positive
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * largest.sign()
    if whiten:
        axes = axes / variance.flip(-1)[:num_components].clamp_min(1e-300).sqrt()
    return snapshots.map(lambda x: (x - mean) @ axes)


def _read_h5ad(path: str | os.PathLike[str]) -> Any:
    try:
        import anndata
    except ImportError as error:
        raise MissingDependencyError(
            "AnnData is not installed", hint="pip install stochdyn[cells]"
        ) from error
    return anndata.read_h5ad(path)


def _dense(values: Any, name: str) -> np.ndarray:
    """Return cells as an array; sparse ones and tables are turned into one.

    Raises:
        ShapeError: If they aren't a table of numbers.
    """
    dense = values.toarray() if hasattr(values, "toarray") else np.asarray(values)
    if dense.ndim != 2 or dense.dtype.kind not in "fiub":
        raise ShapeError(
            f"{name} must be a table of numbers",
            got=f"{type(values).__name__} of shape {dense.shape}",
            expected="(N, d)",
        )
    return dense


def _column(obs: Any, key: str, argument: str) -> np.ndarray:
    if key not in obs:
        raise InvalidInputError(
            f"{argument} isn't a column of adata.obs", got=repr(key), expected=" | ".join(map(str, obs))
        )
    return np.asarray(obs[key])


def _clock(column: np.ndarray, times: Mapping[Any, float] | None) -> np.ndarray:
    """The time of every cell; infinity for cells to be left out."""
    if times is not None:
        return np.array([float(times[v]) if v in times else np.inf for v in column.tolist()])
    if column.dtype.kind in "mM":
        raise InvalidInputError(
            "the times are dates or durations, whose unit is up to you",
            got=column.dtype,
            hint="such as days: adata.obs[key] = (adata.obs[key] - adata.obs[key].min()) / pandas.Timedelta('1D')",
        )
    try:
        clock = column.astype(float)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            "the times are no numbers",
            got=f"values such as {column.reshape(-1)[0]!r}",
            hint="pass times={category: time, ...}",
        ) from error
    if not np.isfinite(clock).all():
        raise NonFiniteError(
            "the times must be finite",
            got=f"{int((~np.isfinite(clock)).sum())} of {clock.size} cells without",
        )
    return clock


def _split(
    values: np.ndarray,
    clock: np.ndarray,
    num_components: int | None,
    weights: np.ndarray | None,
    dtype: torch.dtype,
    names: np.ndarray | None = None,
) -> Snapshots:
    if values.ndim != 2 or clock.shape != values.shape[:1]:
        raise ShapeError(
            "cells and times don't fit", got=f"{values.shape} and {clock.shape}", expected="(N, d) and (N,)"
        )
    levels = [t for t in np.unique(clock).tolist() if np.isfinite(t)]
    clouds = [_cut(values[clock == t], num_components, dtype) for t in levels]
    chosen = None
    if weights is not None:
        chosen = [torch.as_tensor(weights[clock == t].astype(float), dtype=dtype) for t in levels]
    kept = None if names is None else [names[clock == t] for t in levels]
    return Snapshots(levels, clouds, chosen, kept)


def _cut(values: np.ndarray, num_components: int | None, dtype: torch.dtype) -> torch.Tensor:
    if values.ndim != 2:
        raise ShapeError("a snapshot is an array of cells", got=values.shape, expected="(n, d)")
    if num_components is not None:
        check_positive_int(num_components, "num_components")
        if values.shape[1] < num_components:
            raise ShapeError(
                "there are fewer components", got=values.shape[1], expected=f"at least {num_components}"
            )
        values = values[:, :num_components]
    return torch.tensor(np.asarray(values, dtype=float), dtype=dtype)


def _natural(name: str) -> tuple[str, float]:
    """Sort ``t2`` before ``t10``."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    return stem, float(digits) if digits else -1.0
