"""Columns of data frames of any kind, as arrays: pandas, polars, xarray, or a mapping of columns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from stochdyn._checks import without_mask
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["as_dates", "as_frame", "as_numbers", "is_missing", "read_column"]


def as_frame(frame: Any, name: str = "frame") -> Any:
    """Return what columns can be read from by name: the frame itself, or the long form of xarray's data.

    Args:
        frame: A data frame of pandas (its index may hold columns) or polars, a mapping from names to columns, or a Dataset or DataArray of xarray.
        name: The argument's name, for errors.

    Raises:
        InvalidInputError: If it is none of these.
    """
    xarray = sys.modules.get("xarray")
    if xarray is not None and isinstance(frame, xarray.DataArray):
        frame = frame.to_dataset(name=frame.name or "value")
    if xarray is not None and isinstance(frame, xarray.Dataset):
        return frame.to_dataframe().reset_index()
    if isinstance(frame, Mapping):
        return frame
    for package in ("pandas", "polars"):
        module = sys.modules.get(package)
        if module is not None and isinstance(frame, module.DataFrame):
            return _with_index(frame) if package == "pandas" else frame
    raise InvalidInputError(
        f"{name} must be a data frame",
        got=type(frame).__name__,
        expected="a frame of pandas, polars or xarray, or a mapping from names to columns",
        hint="use Panel.from_arrays for lists and arrays",
    )


def _with_index(frame: Any) -> Any:
    """Return a frame of pandas in which the named levels of its index are columns like others."""
    levels = [name for name in frame.index.names if name is not None and name not in frame.columns]
    return frame.reset_index(level=levels) if levels else frame


def as_dates(column: Any) -> Any:
    """Return dates of pandas with a time zone, or periods, as dates of UTC, or those on which the periods begin; other data as they are."""
    dtype = getattr(column, "dtype", None)
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(dtype, pandas.DatetimeTZDtype):
        return pandas.DatetimeIndex(column).tz_convert("UTC").tz_localize(None)
    if pandas is not None and isinstance(dtype, pandas.PeriodDtype):
        return pandas.PeriodIndex(column).to_timestamp()
    return column


def read_column(frame: Any, name: object, argument: str) -> np.ndarray:
    """Return a column of a data frame as an array with one value per row.

    Args:
        frame: What :func:`as_frame` returned, or any frame whose columns are read by ``frame[name]``.
        name: The name of the column.
        argument: The argument that names it, for errors.

    Raises:
        InvalidInputError: If there is no such column.
        ShapeError: If the column doesn't have one value per row.

    Example:
        >>> read_column({"t": [0.0, 1.0]}, "t", "time")
        array([0., 1.])
    """
    if not isinstance(name, str):
        raise InvalidInputError(f"{argument} must name a column", got=repr(name)[:60])
    try:
        array = without_mask(as_dates(frame[name]))
    except Exception as error:  # every kind of frame has errors of its own
        raise InvalidInputError(f"{argument} isn't a column of the frame", got=repr(name)) from error
    if array.ndim != 1:
        raise ShapeError(f"the column {name!r} must have one value per row", got=array.shape)
    return array


def is_missing(value: Any) -> bool:
    """Return whether one value stands for a missing one: None, NaN, NaT, or the NA of pandas."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return bool(value != value)


def as_numbers(column: np.ndarray, name: str) -> tuple[np.ndarray, list[Any] | None]:
    """Return a column as float64 with NaN for missing values, and the labels whose positions these numbers are.

    Labels are None for a column of numbers. Any other column is read as categories in sorted order.

    Args:
        column: The values, one per row.
        name: The name of the column, for errors.

    Raises:
        InvalidInputError: If categories of different types can't be sorted, or numbers are infinite or complex.
    """
    if column.dtype.kind in "fiub":
        numbers = column.astype(np.float64)
        if np.isinf(numbers).any():
            raise InvalidInputError(f"the column {name!r} must be finite", got="infinity")
        return numbers, None
    if column.dtype.kind not in "OUSTM":
        raise InvalidInputError(
            f"the column {name!r} must hold numbers or categories", got=f"dtype {column.dtype}"
        )
    values = column.tolist()
    present = [v for v in values if not is_missing(v)]
    if all(isinstance(v, int | float) for v in present):
        filled = np.array([np.nan if is_missing(v) else float(v) for v in values], dtype=np.float64)
        return as_numbers(filled, name)
    try:
        labels = sorted(set(present))
    except TypeError as error:
        raise InvalidInputError(
            f"the column {name!r} mixes types", got=sorted({type(v).__name__ for v in present})
        ) from error
    code = {label: float(k) for k, label in enumerate(labels)}
    return np.array([np.nan if is_missing(v) else code[v] for v in values], dtype=np.float64), labels
