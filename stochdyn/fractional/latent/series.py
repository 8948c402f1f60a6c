"""Observed series of any lengths, times and gaps, as one batch of tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    as_time_grid,
    check_nonempty,
    check_same_device,
    values_are_checked,
)
from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError, TimeGridError

__all__ = ["Series"]


@dataclass(frozen=True)
class Series:
    """A batch of multivariate series with times of their own and missing values.

    The first axis counts series, so :func:`stochdyn.fit` draws minibatches of them. What is missing is marked in
    ``mask`` and holds zeros; shorter series are padded at their end, with their last time repeated. Times keep the
    precision that they are given in, which may be higher than that of the values.

    Attributes:
        times: The times ``(B, n)``, not decreasing along each series.
        values: The observed values ``(B, n, p)``.
        mask: The booleans ``(B, n, p)`` that are True where a value was observed.

    Example:
        >>> nan = float("nan")
        >>> series = Series.of([(torch.tensor([0.1, 0.5]), torch.tensor([1.0, nan])), (torch.tensor([0.3]), torch.tensor([2.0]))])
        >>> series.mask[..., 0].tolist()
        [[True, False], [True, False]]
    """

    times: Tensor
    values: Tensor
    mask: Tensor

    @staticmethod
    def of(data: Sequence[tuple[Any, Any]]) -> Series:
        """Gather series ``(times (n_i,), values (n_i, p) or (n_i,))`` of any kind of data; NaN marks what is missing.

        Args:
            data: The pairs of times and values, one per series.

        Raises:
            InvalidInputError: If the data aren't such pairs.
            EmptyDataError: If there is no series, or one without any value.
            TimeGridError: If times don't increase strictly.
            NonFiniteError: For infinite values.
            ShapeError: If sizes differ.
        """
        if not isinstance(data, list | tuple):
            raise InvalidInputError("data must be a list of pairs (times, values)", got=type(data).__name__)
        if len(data) == 0:
            raise EmptyDataError("there are no series")
        rows = []
        for index, pair in enumerate(data):
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise InvalidInputError(f"series {index} must be a pair (times, values)", got=repr(pair)[:60])
            values = as_tensor(pair[1], f"values of series {index}", (1, 2), "(n,) or (n, p)", missing=True)
            times = as_time_grid(pair[0], f"times of series {index}", min_points=1, like=values)
            times = times.to(values.device)
            values = values[:, None] if values.ndim == 1 else values
            check_nonempty(values, f"values of series {index}")
            if values.shape[0] != times.shape[0]:
                raise ShapeError(
                    f"times and values of series {index} differ in length",
                    got=f"{times.shape[0]} and {values.shape[0]}",
                )
            seen = ~torch.isnan(values)
            if not bool(seen.any()):
                raise EmptyDataError(f"series {index} has no observed value")
            rows.append((times, torch.where(seen, values, torch.zeros_like(values)), seen))
        sizes = {row[1].shape[1] for row in rows}
        if len(sizes) > 1:
            raise ShapeError("series differ in the number of components", got=sorted(sizes))
        check_same_device(**{f"series {i}": row[1] for i, row in enumerate(rows)})
        length = max(row[0].shape[0] for row in rows)
        finest = functools.reduce(torch.promote_types, (t.dtype for t, _, _ in rows))
        times = torch.stack([torch.cat([t, t[-1:].expand(length - len(t))]).to(finest) for t, _, _ in rows])
        pad = torch.nn.functional.pad
        values = torch.stack([pad(v, (0, 0, 0, length - v.shape[0])) for _, v, _ in rows])
        mask = torch.stack([pad(m, (0, 0, 0, length - m.shape[0])) for _, _, m in rows])
        return Series(times, values, mask)

    @staticmethod
    def regular(times: Any, values: Any) -> Series:
        """Gather series that share their times, of any kind of data.

        Args:
            times: The times ``(n,)`` of all series.
            values: The values ``(B, n, p)``; NaN marks what is missing.

        Raises:
            TimeGridError: If the times don't increase strictly.
            ShapeError: If sizes differ.
            NonFiniteError: For infinite values.
        """
        values = as_tensor(values, "values", 3, "(B, n, p)", missing=True)
        times = as_time_grid(times, "times", min_points=1, like=values)
        check_nonempty(values, "values")
        if values.shape[1] != times.shape[0]:
            raise ShapeError(
                "values must have one row per time",
                got=tuple(values.shape),
                expected=f"(B, {times.shape[0]}, p)",
            )
        seen = ~torch.isnan(values)
        values = torch.where(seen, values, torch.zeros_like(values))
        return Series(times.to(values.device).expand(values.shape[0], -1), values, seen)

    def __len__(self) -> int:
        return self.times.shape[0]

    def check_within(self, ts: Tensor) -> None:
        """Raise unless all observed times lie on the grid ``ts (T,)``.

        Raises:
            TimeGridError: If a series leaves the grid; the message names the first that does.
            InvalidInputError: If the mask isn't boolean.
        """
        if self.mask.dtype != torch.bool:
            raise InvalidInputError("mask must be boolean", got=self.mask.dtype)
        if not values_are_checked():
            return
        slack = 1e-6 * float(ts[-1] - ts[0])
        outside = self.mask.any(-1) & ((self.times < ts[0] - slack) | (self.times > ts[-1] + slack))
        if bool(outside.any()):
            row, place = (int(i) for i in outside.nonzero()[0])
            raise TimeGridError(
                "a series reaches beyond the grid of the model",
                got=f"time {float(self.times[row, place]):g} in series {row}",
                expected=f"between {float(ts[0]):g} and {float(ts[-1]):g}",
                hint="build the model with a longer grid (and noise of that horizon)",
            )
