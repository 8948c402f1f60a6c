"""Series and tracks of any form as blocks: one component of one series, its times and what its mean is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stochdyn._checks import as_tensor, check_type
from stochdyn.errors import InvalidInputError, ShapeError, TooFewDrawsError

__all__ = ["Block", "columns_of", "read_series", "read_times", "steps_between"]

_MOST_GAPS = 60
_F64 = torch.zeros((), dtype=torch.float64)


@dataclass(eq=False)
class Block:
    """One component of one series, where it was observed.

    Attributes:
        values: The values ``(n,)`` less their least-squares fit, over ``unit``.
        times: The times ``(n,)`` in units of dt, or their index.
        design: The columns ``(n, p)`` of the mean, orthogonal and of norm one.
        fit, unit, norms: The least-squares coefficients that were taken away, and the spread and the norms that were divided by.
        mixing: What the columns, each over its norm, are of the orthogonal ones, ``(p, p)``.
        place: The places on the regular grid where values were observed.
        gaps: The number of columns that stand for missing values.
        series, axis: The series and the component that the block comes from.
        group: The number of the group of blocks with a common scale.
        length: The number of steps of the regular grid that the observed values lie on; None if they lie on none.
    """

    values: np.ndarray
    times: np.ndarray
    design: np.ndarray
    series: int
    axis: int
    group: int
    length: int | None
    fit: np.ndarray = field(default_factory=lambda: np.zeros(0))
    unit: float = 1.0
    norms: np.ndarray = field(default_factory=lambda: np.ones(0))
    mixing: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    place: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    gaps: int = 0

    @property
    def complete(self) -> bool:
        """Whether the values lie on all of a regular grid."""
        return self.length == len(self.values)

    def fill_gaps(self) -> None:
        """Make a grid with few missing values complete: a free coefficient for each of them integrates it out."""
        if self.length is None or self.complete or self.length - len(self.values) > _MOST_GAPS:
            return
        missing = np.setdiff1d(np.arange(self.length), self.place)
        values, design = np.zeros(self.length), np.zeros((self.length, self.design.shape[1] + len(missing)))
        values[self.place] = self.values
        design[self.place, : self.design.shape[1]] = self.design
        design[missing, self.design.shape[1] + np.arange(len(missing))] = 1.0
        self.values, self.design, self.times = values, design, np.arange(self.length, dtype=float)
        self.gaps = len(missing)

    def mean_coefficients(self, coefficients: np.ndarray) -> np.ndarray:
        """Coefficients ``(S, p)`` of the mean in the units of the data, of those of the block."""
        rows = self.fit + self.unit * coefficients[:, : len(self.fit)]
        return np.asarray(np.linalg.solve(self.mixing, rows.T).T / self.norms)

    def fitted(self, coefficients: np.ndarray) -> np.ndarray:
        """The mean ``(S, n)`` at the observed places."""
        design = self.design[self.place] if self.gaps else self.design
        return (self.fit + self.unit * coefficients[:, : len(self.fit)]) @ design[:, : len(self.fit)].T

    def standardise(self, name: str, straight: bool = False) -> None:
        """Take the least-squares fit away and the spread out, so that neither level, trend nor unit plays a part."""
        self.place = np.rint(self.times).astype(int)
        self.norms = np.linalg.norm(self.design, axis=0)
        if (self.norms == 0).any():
            raise InvalidInputError("a regressor is zero throughout", got=name)
        self.design = self.design / self.norms
        if self.design.shape[1] and np.linalg.matrix_rank(self.design) < self.design.shape[1]:
            raise InvalidInputError(
                "regressors are linearly dependent where the series was observed",
                got=name,
                hint="leave one out; a constant is always there",
            )
        # Orthogonal columns, since those of a regressor that hardly varies beside its level are nearly one.
        self.design, self.mixing = np.linalg.qr(self.design)
        # in two passes: what is left after the first is free of the rounding of a large level
        self.fit = np.zeros(self.design.shape[1])
        rest = self.values
        for _ in range(2):
            step = self.design.T @ rest
            self.fit, rest = self.fit + step, rest - self.design @ step
        free = len(rest) - self.design.shape[1]
        level = float(np.abs(self.values).max()) or 1.0
        self.unit = level * float(np.sqrt(((rest / level) ** 2).sum() / max(free, 1)))
        if not self.unit > 1e-12 * level or self.unit == 0:
            raise InvalidInputError(
                f"{name} is constant, or a straight line"
                if straight
                else f"{name} is constant but for its mean",
                got="no variation",
                hint="the Hurst index needs variation",
            )
        self.values = rest / self.unit


def _are_several(data: object) -> bool:
    """Return whether data are a list of series, rather than the values of one."""
    if not isinstance(data, list | tuple) or not data or isinstance(data[0], str):
        return False
    return hasattr(data[0], "__len__") and getattr(data[0], "ndim", 1) > 0


def read_series(data: object, name: str, shortest: int) -> list[np.ndarray]:
    """Return series as float64 ``(n_i, d)`` arrays with NaN for missing values.

    One series is anything with one axis (time) or two (time, component); several come as a list or tuple of such.

    Raises:
        EmptyDataError, InvalidInputError, NonFiniteError, ShapeError, TooFewDrawsError: For data that aren't such.
    """
    several = _are_several(data)
    rows = list(data) if several else [data]  # type: ignore[call-overload]
    found = []
    for index, row in enumerate(rows):
        label = f"{name}[{index}]" if several else name
        value = as_tensor(row, label, (1, 2), "(n,) or (n, d)", like=_F64, missing=True)
        value = value.detach().to("cpu", torch.float64)
        value = value[:, None] if value.ndim == 1 else value
        seen = int((~torch.isnan(value)).sum(0).min()) if value.numel() else 0
        if seen < shortest:
            raise TooFewDrawsError(
                f"{label} is too short", got=f"{seen} observed values", expected=f"at least {shortest}"
            )
        found.append(value.numpy())
    if len({x.shape[1] for x in found}) > 1:
        raise ShapeError("series differ in the number of components", got=[x.shape[1] for x in found])
    return found


def read_times(times: object, series: list[np.ndarray], dt: float) -> list[np.ndarray]:
    """Return times in units of dt, ``(n_i,)`` each: the index where none are given."""
    if times is None:
        return [np.arange(len(x), dtype=float) for x in series]
    rows = list(times) if _are_several(times) else [times] * len(series)  # type: ignore[call-overload]
    if len(rows) != len(series):
        raise ShapeError("times must come for each series", got=len(rows), expected=len(series))
    found = []
    for index, (row, x) in enumerate(zip(rows, series, strict=True)):
        t = as_tensor(row, f"times[{index}]", 1, "(n,)", like=_F64).detach().to("cpu", torch.float64).numpy()
        if t.shape[0] != x.shape[0]:
            raise ShapeError("times and series differ in length", got=f"{t.shape[0]} and {x.shape[0]}")
        if not (np.diff(t) > 0).all():
            raise InvalidInputError("times must increase strictly", got=f"times[{index}]")
        found.append((t - t[0]) / dt)
    return found


def steps_between(times: object, series: list[np.ndarray]) -> np.ndarray:
    """Return the steps between the times at which something was observed, of all series."""
    every = zip(read_times(times, series, 1.0), series, strict=True)
    return np.concatenate([np.diff(t[~np.isnan(x).all(1)]) for t, x in every])


def columns_of(regressors: object, series: list[np.ndarray]) -> list[np.ndarray]:
    """Return regressors ``(n_i, k)`` for each series."""
    if regressors is None:
        return [np.zeros((len(x), 0)) for x in series]
    rows: Sequence[Any]
    if len(series) == 1 and not (isinstance(regressors, list | tuple) and len(regressors) == 1):
        rows = [regressors]
    else:
        check_type(regressors, (list, tuple), "regressors", "a list with the columns of each series")
        rows = list(regressors)  # type: ignore[call-overload]
    if len(rows) != len(series):
        raise ShapeError("regressors must come for each series", got=len(rows), expected=len(series))
    found = []
    for index, (row, x) in enumerate(zip(rows, series, strict=True)):
        given = as_tensor(
            row, f"regressors[{index}]", (1, 2), "(n,) or (n, k)", like=_F64, missing=True
        ).detach()
        value = given.to("cpu", torch.float64).numpy()
        value = value[:, None] if value.ndim == 1 else value
        if value.shape[0] != x.shape[0]:
            raise ShapeError(
                "regressors must have a row per value of the series", got=value.shape[0], expected=x.shape[0]
            )
        found.append(value)
    return found
