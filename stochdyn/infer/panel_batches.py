"""Panels larger than memory: batches of series, read block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from stochdyn._checks import as_sequence, check_callable, check_positive_int
from stochdyn.errors import EmptyDataError, InvalidInputError, MissingDependencyError
from stochdyn.infer.panel import Panel, joined

__all__ = ["PanelBatches"]


class PanelBatches(IterableDataset[Panel]):
    """Batches of series from a panel that is read block by block, for :func:`stochdyn.fit`.

    Use it for a panel that doesn't fit into memory, with paths that an encoder reads off the data
    (:class:`~stochdyn.infer.AutoPathGuide` in a subsampled plate) or that are integrated out. Only a block or two are in memory at
    a time. Every epoch goes through the blocks, and through the series of a block, in a new order; what is left of a block joins
    the next one, so all batches have one size, and fewer series than a batch wait for another epoch. In the model the plate says
    how many series there are, which scales the bound: ``pyro.plate("series", batches.num_series, subsample=torch.arange(len(panel)))``.

    Workers of a ``DataLoader(batches, batch_size=None, num_workers=...)`` share the blocks. Ranks of data-parallel training draw
    from all of them, each in an order of its own.

    Args:
        blocks: Functions without arguments, each of which reads the panel of one part of the series: a chunk of a Zarr array, say.
            Series whose rows are neighbours in the file end up in the same batches, so mix them once if they are sorted.
        num_series: The number of series in all blocks together.
        batch_size: The number of series of a batch.

    Raises:
        EmptyDataError: If there are no blocks, or fewer series than a batch has.

    Example:
        >>> def read(k):
        ...     return Panel.from_arrays([0.0, 1.0], torch.full((3, 2), float(k)))
        >>> batches = PanelBatches([partial(read, k) for k in range(4)], num_series=12, batch_size=4)
        >>> [len(panel) for panel in batches]
        [4, 4, 4]
    """

    def __init__(self, blocks: Sequence[Callable[[], Panel]], num_series: int, batch_size: int) -> None:
        self.blocks = as_sequence(blocks, "blocks", "functions that read parts of a panel")
        if not self.blocks:
            raise EmptyDataError("there are no blocks to read")
        for k, block in enumerate(self.blocks):
            check_callable(block, f"blocks[{k}]", "a function without arguments that returns a panel")
        check_positive_int(num_series, "num_series")
        check_positive_int(batch_size, "batch_size")
        if num_series < batch_size:
            raise EmptyDataError(
                "there are fewer series than a batch has", got=num_series, expected=batch_size
            )
        self.num_series, self.batch_size = num_series, batch_size

    @classmethod
    def from_parquet(
        cls,
        path: str | os.PathLike[str],
        series: str,
        time: str,
        values: str | Sequence[str],
        covariates: str | Sequence[str] = (),
        *,
        batch_size: int,
        unit: str = "day",
        dtype: torch.dtype | None = None,
    ) -> PanelBatches:
        """Read batches from a Parquet file in long form: one row per series and time.

        A block is one row group of the file. Rows of one series must stand together, as after sorting by series; a series may go
        on in the next row group. Columns hold numbers, nulls are missing values, times may be dates. Needs the package pyarrow.

        Args:
            path: The file.
            series: The column that says which series a row belongs to.
            time: The column of times, numbers or dates.
            values: The columns of values, or the name of one.
            covariates: The columns of covariates, known at the same times.
            batch_size: The number of series of a batch.
            unit: The unit in which dates count, as for :class:`~stochdyn.Panel`.
            dtype: The precision of values and covariates; torch's default one if None.

        Raises:
            MissingDependencyError: If pyarrow isn't installed.
            InvalidInputError: If a column is missing or doesn't hold numbers, or the rows of a series don't stand together.
            EmptyDataError: If there are fewer series than a batch has.
        """
        parquet = _parquet()
        columns = [series, time, *_listed(values), *_listed(covariates)]
        with parquet.ParquetFile(path) as file:
            missing = [c for c in columns if c not in file.schema_arrow.names]
            if missing:
                raise InvalidInputError(
                    "the file has no such column", got=missing, expected=file.schema_arrow.names
                )
            found: list[tuple[int, int, int]] = []
            last = None
            for group in range(file.num_row_groups):
                who = _column(file.read_row_group(group, [series]), series)
                if not len(who):
                    continue
                starts = np.flatnonzero(who[1:] != who[:-1]) + 1
                # The first series of a group may be the last one of the group before.
                goes_on = bool(found) and bool(who[0] == last)
                tail = 0 if not goes_on else int(starts[0]) if len(starts) else len(who)
                found.append((group, tail, len(starts) + (not goes_on)))
                last = who[-1]
        make = partial(
            Panel, series=series, time=time, values=_listed(values), covariates=_listed(covariates), unit=unit, dtype=dtype
        )  # fmt: skip
        blocks: list[Callable[[], Panel]] = []
        for k, (group, skip, count) in enumerate(found):
            if not count:
                continue
            more = []
            for following, tail, others in found[k + 1 :]:
                if tail:
                    more.append((following, tail))
                if others:
                    break
            blocks.append(_RowGroups(os.fspath(path), tuple(columns), group, skip, tuple(more), count, make))
        if not blocks:
            raise EmptyDataError("the file has no rows")
        first = blocks[0]()[:1]
        if first.origin is not None:
            blocks = [_Since(block, first) for block in blocks]
        return cls(blocks, sum(count for _, _, count in found), batch_size)

    def __iter__(self) -> Iterator[Panel]:
        worker = get_worker_info()
        # Workers of a loader know one seed between them.
        seed = int(torch.randint(2**62, ())) if worker is None else worker.seed - worker.id
        source = torch.Generator().manual_seed(seed % 2**63)
        order = torch.randperm(len(self.blocks), generator=source)
        own = order if worker is None else order[worker.id :: worker.num_workers]
        left: Panel | None = None
        for k in own.tolist():
            panel = self.blocks[k]()
            panel = panel[torch.randperm(len(panel), generator=source)]
            if left is not None:
                panel = joined(left, panel)
            whole = len(panel) // self.batch_size * self.batch_size
            for start in range(0, whole, self.batch_size):
                yield panel[start : start + self.batch_size]
            left = panel[whole:] if whole < len(panel) else None


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet files need pyarrow", hint='install it by pip install "stochdyn[parquet]"'
        ) from error
    return pyarrow.parquet


def _column(table: Any, name: str) -> np.ndarray:
    return table[name].to_numpy()


@dataclass(frozen=True)
class _RowGroups:
    """The series that begin in one row group, and the rows of the last one in the groups that follow."""

    path: str
    columns: tuple[str, ...]
    group: int
    skip: int
    more: tuple[tuple[int, int], ...]
    count: int
    make: Callable[[dict[str, np.ndarray]], Panel]

    def __call__(self) -> Panel:
        names = list(self.columns)
        with _parquet().ParquetFile(self.path) as file:
            parts = [file.read_row_group(self.group, names).slice(self.skip)]
            parts += [file.read_row_group(group, names).slice(0, rows) for group, rows in self.more]
        panel = self.make({n: np.concatenate([_column(p, n) for p in parts]) for n in names})
        if panel.labels:
            raise InvalidInputError(
                "columns of values must hold numbers",
                got=sorted(panel.labels),
                hint="write categories as numbers",
            )
        if len(panel) != self.count:
            raise InvalidInputError(
                "the rows of a series must stand together",
                got=f"{self.count} runs of rows for {len(panel)} series in row group {self.group}",
                hint="sort the file by series",
            )
        return panel


@dataclass(frozen=True)
class _Since:
    """A block whose dates count from those of the first block."""

    block: Callable[[], Panel]
    first: Panel

    def __call__(self) -> Panel:
        panel = self.block()
        assert panel.origin is not None
        panel.times = panel.times + self.first.times_of([panel.origin])
        panel.origin = self.first.origin
        return panel
