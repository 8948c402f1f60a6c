"""Panels: many series, each with its own times, lengths and gaps, from data frames, lists or padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from stochdyn._checks import as_tensor, check_choice, check_ndim, check_positive, copied
from stochdyn.core.data.frames import as_dates, as_frame, as_numbers, is_missing, read_column
from stochdyn.core.data.panel_grid import PanelGrid, grid_through
from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError, TimeGridError
from stochdyn.infer.observations import observe

__all__ = ["Panel", "joined"]

_SECONDS = {
    "second": 1.0,
    "minute": 60.0,
    "hour": 3600.0,
    "day": 86400.0,
    "week": 604800.0,
    "year": 31557600.0,
}


@dataclass(frozen=True)
class _Rows:
    """The rows of a panel in order of series and time."""

    series: list[Any]
    lengths: np.ndarray
    order: np.ndarray


class Panel:
    """Many series, each with its own times, lengths and gaps.

    Use it wherever several subjects, sites or runs were observed, each at times of its own. Rows of shorter series are filled
    up: times go on in steps of the series' median gap, and values are missing there, so every array is regular and every
    grid increases. A value that isn't known is NaN.

    Args:
        frame: A data frame (pandas or polars), a mapping from names to columns, or a Dataset or DataArray of xarray, in long
            form: one row per series and time.
        series: The column that says which series a row belongs to.
        time: The column of times, numbers, dates, or time that has passed (timedelta). Rows may stand in any order.
        values: The columns of values, or the name of one. A column that doesn't hold numbers is read as categories; see
            ``labels``.
        covariates: The columns of covariates, known at the same times.
        unit: The unit in which dates and time that has passed count: ``"second"``, ``"minute"``, ``"hour"``, ``"day"``, ``"week"`` or ``"year"`` (of
            365.25 days). Numbers are taken as they are.
        dtype: The precision of values and covariates; torch's default one if None. Times are float64.

    Attributes:
        times: The times ``(N, T)`` of the N series, strictly increasing.
        values: The values ``(N, T, p)``, NaN where missing.
        lengths: The number of times of each series, ``(N,)``.
        covariates: The covariates ``(N, T, c)``, NaN where missing.
        series: The labels of the series, in order of first appearance.
        columns: The names of the p columns of values.
        covariate_names: The names of the c covariates.
        labels: The categories of each column that doesn't hold numbers, by name; its values are positions in them.
        series_name: What the axis of series is called, as in the frame.
        time_name: What the axis of times is called, as in the frame.
        origin: The date that counts as time zero, in ISO 8601, or None if times are numbers.
        unit: The unit of times that were dates.

    Raises:
        InvalidInputError: If a column is missing from the frame, or a row has no series or no time.
        TimeGridError: If a time occurs twice within a series, which is named.
        EmptyDataError: If there are no rows.

    Example:
        >>> frame = {"id": ["a", "a", "b", "b", "b"], "t": [0.0, 1.0, 0.5, 0.7, 2.0], "y": [1.0, 2.0, None, 4.0, 5.0]}
        >>> panel = Panel(frame, series="id", time="t", values="y")
        >>> panel
        Panel(2 series, 2 to 3 times, columns=['y'], 1 of 5 values missing)
        >>> panel.values[..., 0]
        tensor([[1., 2., nan],
                [nan, 4., 5.]])
    """

    times: Tensor
    values: Tensor
    lengths: Tensor
    covariates: Tensor
    # By the number of their points; None where two different ones have it.
    _grids: dict[int, PanelGrid | None]

    def __init__(
        self,
        frame: Any,
        series: str,
        time: str,
        values: str | Sequence[str],
        covariates: str | Sequence[str] = (),
        *,
        unit: str = "day",
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(unit, tuple(_SECONDS), "unit")
        frame = as_frame(frame)
        names = _names(values, "values")
        extra = _names(covariates, "covariates")
        if not names:
            raise InvalidInputError("values must name at least one column")
        who = read_column(frame, series, "series").tolist()
        dates = read_column(frame, time, "time")
        if not who:
            raise EmptyDataError("the panel has no rows")
        at, origin = _as_times(dates, time, unit)
        rows = _in_order(who, at, series)
        labels: dict[str, list[Any]] = {}
        arrays = []
        for name, argument in [*((n, "values") for n in names), *((n, "covariates") for n in extra)]:
            numbers, found = as_numbers(read_column(frame, name, argument), name)
            if len(numbers) != len(who):
                raise ShapeError(
                    "the columns differ in length",
                    got=f"{len(numbers)} in {name!r} and {len(who)} in {series!r}",
                )
            if found is not None:
                labels[name] = found
            arrays.append(numbers[rows.order])
        dtype = torch.get_default_dtype() if dtype is None else dtype
        table = torch.as_tensor(np.stack(arrays, -1)).to(dtype)
        self._fill(rows, torch.as_tensor(at[rows.order]), table, len(names))
        self.columns, self.covariate_names, self.labels = tuple(names), tuple(extra), labels
        self.series_name, self.time_name = series, time
        self.origin, self.unit, self._grids = origin, unit, {}

    @classmethod
    def from_arrays(
        cls,
        times: Any,
        values: Any,
        covariates: Any = None,
        *,
        series: Sequence[Any] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Panel:
        """Make a panel of lists with one entry per series, or of padded arrays.

        Args:
            times: A list of times ``(T_i,)``, or an array ``(N, T)`` whose rows end in NaN where they are shorter; times
                ``(T,)`` are those of all series.
            values: A list of values ``(T_i,)`` or ``(T_i, p)``, or an array ``(N, T)`` or ``(N, T, p)``; NaN is missing.
            covariates: The covariates in the form of ``values``, or None.
            series: The labels of the series; 0, 1, 2, ... if None.
            columns: The names of the components; ``value`` or ``value_0``, ``value_1``, ... if None.

        Returns:
            The panel, in the precision of times and values.

        Raises:
            ShapeError: If times and values don't fit each other.
            TimeGridError: If the times of a series don't increase strictly.
            EmptyDataError: If there are no series, or one of them has no times.

        Example:
            >>> panel = Panel.from_arrays([[0.0, 1.0], [0.5, 0.7, 2.0]], [[1.0, 2.0], [3.0, 4.0, 5.0]])
            >>> panel.times
            tensor([[0.0000, 1.0000, 2.0000],
                    [0.5000, 0.7000, 2.0000]])
        """
        parts = _rows_of(values, "values")
        grids = _rows_of(times, "times", len(parts), shared=True)
        extras = None if covariates is None else _rows_of(covariates, "covariates", len(parts))
        at, table, lengths, width = [], [], [], None
        for k, (grid, part) in enumerate(zip(grids, parts, strict=True)):
            own, kept = _own_times(grid, part, k)
            lengths.append(len(own))
            columns_here = [_matrix(part, len(grid), "values", k)[kept]]
            width = columns_here[0].shape[-1] if width is None else width
            if columns_here[0].shape[-1] != width:
                raise ShapeError(
                    "the series of values differ in their components",
                    got=f"{columns_here[0].shape[-1]} in series {k} and {width} before",
                )
            if extras is not None:
                columns_here.append(_matrix(extras[k], len(grid), "covariates", k)[kept])
            at.append(own)
            table.append(torch.cat([c.to(columns_here[0]) for c in columns_here], -1))
        if len({t.shape[-1] for t in table}) > 1:
            raise ShapeError("the series of covariates differ in their components")
        assert width is not None
        names = _given_names(columns, width, "columns", "value")
        who = list(range(len(parts))) if series is None else list(series)
        if len(who) != len(parts) or len(set(who)) != len(who):
            raise InvalidInputError(
                "series must be one label per series, each a different one",
                got=f"{len(set(who))} different ones for {len(parts)} series",
            )
        panel = cls.__new__(cls)
        counts = np.array(lengths)
        panel._fill(_Rows(who, counts, np.arange(counts.sum())), torch.cat(at), torch.cat(table), width)
        panel.columns = tuple(names)
        panel.covariate_names = tuple(
            _given_names(None, table[0].shape[-1] - width, "covariates", "covariate")
        )
        panel.labels, panel.series_name, panel.time_name = {}, "series", "time"
        panel.origin, panel.unit, panel._grids = None, "day", {}
        return panel

    def _fill(self, rows: _Rows, times: Tensor, table: Tensor, width: int) -> None:
        """Lay rows out as padded arrays."""
        lengths = torch.as_tensor(rows.lengths, device=times.device)
        count, size = len(lengths), int(lengths.max())
        inside = torch.arange(size, device=times.device) < lengths.unsqueeze(-1)
        grid = times.new_full((count, size), torch.nan)
        grid[inside] = times
        padded = table.new_full((count, size, table.shape[-1]), torch.nan)
        padded[inside] = table
        gaps = grid[:, 1:] - grid[:, :-1]
        typical = gaps[~torch.isnan(gaps)]
        usual = typical.median() if typical.numel() else torch.ones((), dtype=grid.dtype, device=grid.device)
        # A series of one time has no gap of its own.
        step = gaps.nanmedian(-1).values if size > 1 else usual.expand(count)
        step = torch.where(torch.isnan(step), usual, step)
        last = grid.gather(-1, lengths.unsqueeze(-1) - 1)
        beyond = torch.arange(size, device=times.device) - (lengths.unsqueeze(-1) - 1)
        self.times = torch.where(inside, grid, last + beyond.to(grid.dtype) * step.unsqueeze(-1))
        self.values, self.covariates = padded[..., :width], padded[..., width:]
        self.lengths, self.series = lengths, tuple(rows.series)

    def __repr__(self) -> str:
        short, long = int(self.lengths.min()), int(self.lengths.max())
        count = f"{short}" if short == long else f"{short} to {long}"
        total = int(self.lengths.sum()) * len(self.columns)
        missing = total - int(self.seen.sum())
        gaps = f", {missing} of {total} values missing" if missing else ""
        return f"Panel({len(self)} series, {count} times, columns={list(self.columns)}{gaps})"

    def __len__(self) -> int:
        return self.times.shape[0]

    def __getitem__(self, index: Any) -> Panel:
        """Return the panel of some series: a slice, positions, or a mask."""
        chosen = torch.arange(len(self), device=self.times.device)[
            torch.as_tensor([index] if isinstance(index, int) else index)
            if not isinstance(index, slice)
            else index
        ]
        if not chosen.numel():
            raise EmptyDataError("no series is left", got=repr(index)[:60])
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, _grids={})
        size = int(self.lengths[chosen].max())
        new.times, new.lengths = self.times[chosen, :size], self.lengths[chosen]
        new.values, new.covariates = self.values[chosen, :size], self.covariates[chosen, :size]
        new.series = tuple(self.series[k] for k in chosen.tolist())
        return new

    @property
    def seen(self) -> Tensor:
        """Which values are known, ``(N, T, p)``."""
        return ~torch.isnan(self.values)

    @property
    def coords(self) -> dict[str, list[Any]]:
        """The labels of the series, by the name of their axis, as ArviZ takes them."""
        return {self.series_name: list(self.series)}

    def grid(self, dt: float | None = None, start: Any = None) -> PanelGrid:
        """Return the grids on which the paths of the series are computed: through their own times, in equal steps between them.

        Args:
            dt: The longest step; None takes the times themselves, for laws that need no steps between them. A path site takes Euler
                steps on this grid: halve ``dt`` until the posterior no longer changes.
            start: The time at which all paths begin, or one per series ``(N,)``; the first time of each series if None.

        Returns:
            The grids, and the positions of the panel's times in them.

        Raises:
            InvalidInputError: If ``dt`` isn't positive.
            TimeGridError: If a series has a time before its start.

        Example:
            >>> panel = Panel.from_arrays([[1.0, 2.0], [0.5, 0.7]], [[1.0, 2.0], [3.0, 4.0]])
            >>> panel.grid(dt=0.5, start=0.0).index
            tensor([[2, 4],
                    [1, 2]])
        """
        if dt is not None:
            check_positive(dt, "dt")
        begin = None
        if start is not None:
            begin = as_tensor(start, "start", (0, 1), "one time, or one per series", like=self.times)
            if begin.ndim and begin.shape[0] != len(self):
                raise ShapeError("start must be one time, or one per series", got=tuple(begin.shape))
            begin = begin.to(self.times).expand(len(self))
        made = grid_through(self.times, self.lengths, dt, begin)
        known = self._grids.setdefault(made.ts.shape[-1], made)
        if known is not None and not torch.equal(known.index, made.index):
            self._grids[made.ts.shape[-1]] = None
        return made

    def at(self, x: Tensor) -> Tensor:
        """Return the states of paths at the panel's times.

        Args:
            x: The paths ``(..., N, G, d)`` on grids that :meth:`grid` made, or on the panel's own times.

        Returns:
            The states ``(..., N, T, d)``.

        Raises:
            ShapeError: If no grid of this panel has as many points as the paths.
            InvalidInputError: If two different grids of this panel have as many points; ``grid.read(x)`` knows its own.

        Example:
            >>> panel = Panel.from_arrays([[1.0, 2.0]], [[0.5, 0.7]])
            >>> grid = panel.grid(dt=0.5, start=0.0)
            >>> panel.at(grid.ts[..., None])[..., 0]
            tensor([[1., 2.]])
        """
        check_ndim(x, tuple(range(2, 16)), "x", "(..., series, time, dim)")
        count, own = x.shape[-2], self.times.shape[-1]
        if count not in (own, *self._grids):
            raise ShapeError(
                "no grid of this panel has as many points as the paths",
                got=f"{count} points",
                expected=f"one of {sorted({own, *self._grids})}",
                hint="make the grid by panel.grid(dt)",
            )
        grid = self._grids[count] if count in self._grids else self.grid()
        if grid is None:
            raise InvalidInputError(
                "two different grids of this panel have as many points as the paths",
                got=f"{count} points",
                hint="read them by grid.read(x)",
            )
        return grid.read(x)

    def observe(self, name: str, distribution: Any) -> Tensor:
        """Observe a column in a Pyro model: the likelihood of what was seen at the panel's times.

        A missing value leaves the likelihood as it is and stays NaN in ``to_inference_data``; see :func:`observe`.

        Args:
            name: The name of a column of values, which is the name of the site too.
            distribution: The law of the column at the times of each series, of shape ``(..., N, T)``. Times are elements of one
                event, so it stands in a plate of the series: ``with pyro.plate("series", len(panel))``.

        Returns:
            The column ``(N, T)``, with something in the support of the law where a value is missing.

        Raises:
            InvalidInputError: If the panel has no such column.
            ShapeError: If the law doesn't fit the column.

        Example:
            >>> import pyro
            >>> import pyro.distributions as dist
            >>> panel = Panel.from_arrays([[1.0, 2.0]], [[0.5, float("nan")]], columns=["y"])
            >>> def model():
            ...     with pyro.plate("series", 1):
            ...         panel.observe("y", dist.Normal(torch.zeros(1, 2), 1.0))
            >>> trace = pyro.poutine.trace(model).get_trace()
            >>> bool(trace.log_prob_sum() == dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)))
            True
        """
        check_choice(name, self.columns, "name")
        if isinstance(distribution, TorchDistributionMixin) and not distribution.event_shape:
            distribution = distribution.to_event(1)
        return observe(name, distribution, self.values[..., self.columns.index(name)])

    def dates(self, ts: Any) -> np.ndarray:
        """Return times as dates, for axes and plots.

        Args:
            ts: The times, of any shape.

        Returns:
            An array of ``datetime64[ns]`` of the same shape.

        Raises:
            InvalidInputError: If the panel's times were numbers.
        """
        if self.origin is None:
            raise InvalidInputError("the times of this panel are numbers, so they have no dates")
        seconds = as_tensor(ts, "ts").detach().cpu().double().numpy() * _SECONDS[self.unit]
        return np.datetime64(self.origin) + np.round(seconds * 1e9).astype("int64").astype("timedelta64[ns]")

    def times_of(self, dates: Any) -> Tensor:
        """Return dates as times of the panel, in its unit since its origin: the inverse of :meth:`dates`.

        Use it for what has dates of its own, such as doses, interventions and covariates from another table.

        Args:
            dates: The dates, as NumPy, pandas or strings have them; or numbers, where the panel's times are numbers.

        Returns:
            The times ``(n,)``, float64.

        Raises:
            InvalidInputError: If they are dates and the panel's times are numbers, or the other way round.
        """
        times, origin = _as_times(np.asarray(as_dates(dates)).reshape(-1), "dates", self.unit)
        if (origin is None) != (self.origin is None):
            raise InvalidInputError(
                "dates must be what the times of the panel are",
                got="numbers" if origin is None else "dates",
                expected="numbers" if self.origin is None else "dates",
            )
        if origin is not None:
            gap = np.datetime64(origin, "ns") - np.datetime64(self.origin, "ns")
            times = times + gap.astype(np.int64) / 1e9 / _SECONDS[self.unit]
        return copied(np.asarray(times, dtype=np.float64))

    def to(self, *args: Any, **kwargs: Any) -> Panel:
        """Return the panel on another device, or with values in another precision, as ``torch.Tensor.to`` takes them.

        Times stay float64 where they are, since long series need it.

        Args:
            args: The arguments of ``torch.Tensor.to``.
            kwargs: The keyword arguments of ``torch.Tensor.to``.
        """
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, _grids={})
        new.values, new.covariates = self.values.to(*args, **kwargs), self.covariates.to(*args, **kwargs)
        device = new.values.device
        new.times, new.lengths = self.times.to(device), self.lengths.to(device)
        return new


def joined(first: Panel, second: Panel) -> Panel:
    """Return the series of two panels of the same columns in one."""
    panels = (first, second)
    parts = []
    for panel in panels:
        inside = torch.arange(panel.times.shape[-1], device=panel.times.device) < panel.lengths.unsqueeze(-1)
        parts.append((panel.times[inside], torch.cat([panel.values, panel.covariates], -1)[inside]))
    times, table = (torch.cat(part) for part in zip(*parts, strict=True))
    lengths = torch.cat([p.lengths for p in panels]).cpu().numpy()
    new = object.__new__(type(first))
    new.__dict__.update(first.__dict__, _grids={})
    rows = _Rows([*first.series, *second.series], lengths, np.arange(lengths.sum()))
    new._fill(rows, times, table, len(first.columns))
    return new


def _names(columns: object, argument: str) -> list[str]:
    names = [columns] if isinstance(columns, str) else columns
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise InvalidInputError(f"{argument} must name columns", got=repr(columns)[:60])
    if len(set(names)) != len(names):
        raise InvalidInputError(f"{argument} names a column twice", got=list(names))
    return list(names)


def _given_names(names: Sequence[str] | None, count: int, argument: str, stem: str) -> list[str]:
    if names is None:
        return [stem] if count == 1 else [f"{stem}_{i}" for i in range(count)]
    chosen = _names(names, argument)
    if len(chosen) != count:
        raise InvalidInputError(f"{argument} must name all components", got=chosen, expected=f"{count} names")
    return chosen


def _as_times(column: np.ndarray, name: str, unit: str) -> tuple[np.ndarray, str | None]:
    """Return times as float64, and the date that counts as zero."""
    if column.dtype.kind in "OU" and len(column) and not isinstance(column[0], int | float):
        try:
            plain = [
                v.astimezone(UTC).replace(tzinfo=None) if getattr(v, "tzinfo", None) else v
                for v in column.tolist()
            ]
            column = np.array(plain, dtype="datetime64[ns]")
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"the column {name!r} must hold numbers or dates", got=repr(column[0])[:60]
            ) from error
    if column.dtype.kind in "Mm" and np.isnat(column).any():
        raise TimeGridError(f"a row of the column {name!r} has no date", hint="leave such rows out")
    if column.dtype.kind == "m":  # time that has passed: zero is zero
        return column.astype("timedelta64[ns]").astype(np.int64) / 1e9 / _SECONDS[unit], None
    if column.dtype.kind == "M":
        exact = column.astype("datetime64[ns]")
        origin = exact.min()
        return (exact - origin).astype(np.int64) / 1e9 / _SECONDS[unit], str(origin)
    if column.dtype.kind not in "fiuO":
        raise InvalidInputError(
            f"the column {name!r} must hold numbers or dates", got=f"dtype {column.dtype}"
        )
    numbers, labels = as_numbers(column, name)
    if labels is not None:
        raise InvalidInputError(f"the column {name!r} must hold numbers or dates", got=labels[:3])
    if np.isnan(numbers).any():
        raise TimeGridError(f"a row of the column {name!r} has no time", hint="leave such rows out")
    return numbers, None


def _in_order(who: list[Any], at: np.ndarray, series: str) -> _Rows:
    """Return the rows by series, in order of first appearance, and by time within each."""
    if len(at) != len(who):
        raise ShapeError("the columns differ in length", got=f"{len(at)} times and {len(who)} series")
    if any(is_missing(w) for w in who):
        raise InvalidInputError(f"a row of the column {series!r} names no series")
    first: dict[Any, int] = {}
    index = np.array([first.setdefault(w, len(first)) for w in who])
    order = np.lexsort((at, index))
    same = (np.diff(index[order]) == 0) & (np.diff(at[order]) <= 0)
    if same.any():
        k = int(np.flatnonzero(same)[0])
        raise TimeGridError(
            f"a time occurs twice in series {list(first)[index[order][k]]!r}",
            got=f"{at[order][k]:g}",
            hint="merge repeated rows",
        )
    return _Rows(list(first), np.bincount(index), order)


def _rows_of(data: Any, name: str, count: int | None = None, *, shared: bool = False) -> list[Tensor]:
    """Return one tensor per series."""
    if isinstance(data, list | tuple):
        if not data:
            raise EmptyDataError(f"{name} has no series")
        if shared and not any(np.ndim(d) for d in data):
            data = as_tensor(data, name)
        else:
            parts = [
                as_tensor(d, f"{name}[{k}]", (1, 2), "(T,) or (T, p)", missing=True)
                for k, d in enumerate(data)
            ]
            return _counted(parts, name, count)
    array = as_tensor(data, name, (1, 2, 3) if shared else (2, 3), "(N, T) or (N, T, p)", missing=True)
    if array.ndim == 1:
        return [array] * (count or 1)
    if not array.shape[0]:
        raise EmptyDataError(f"{name} has no series")
    return _counted(list(array), name, count)


def _counted(parts: list[Tensor], name: str, count: int | None) -> list[Tensor]:
    if count is not None and len(parts) != count:
        raise ShapeError(f"{name} must have one entry per series", got=len(parts), expected=count)
    return parts


def _own_times(grid: Tensor, part: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the times of a series without what fills up its row, and the mask of its rows."""
    if grid.ndim != 1:
        raise ShapeError("times must be (T,) for each series", got=f"shape {tuple(grid.shape)} of series {k}")
    kept = ~torch.isnan(grid)
    own = grid[kept]
    if not own.numel():
        raise EmptyDataError(f"series {k} has no times")
    bad = (own[1:] <= own[:-1]).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise TimeGridError(
            f"times must increase strictly within series {k}",
            got=f"{own[i + 1].item():g} after {own[i].item():g}",
            hint="sort the times and merge repeated ones",
        )
    return own, kept


def _matrix(part: Tensor, count: int, name: str, k: int) -> Tensor:
    """Return ``(T, p)``."""
    if part.shape[0] != count:
        raise ShapeError(
            f"{name} must have one row per time", got=f"{part.shape[0]} rows and {count} times in series {k}"
        )
    return part.unsqueeze(-1) if part.ndim == 1 else part
