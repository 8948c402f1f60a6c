"""Conditions of models: labels or contexts, as tensors with one row per point."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_finite
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.fields.buffers import FlexibleBuffers

__all__ = ["SeenConditions", "as_condition", "paired_condition", "rows_of_condition"]


def as_condition(condition: Any, like: Tensor) -> Tensor:
    """Turn labels or contexts of any kind into a tensor beside ``like``; contexts take its precision.

    Raises:
        InvalidInputError: If they aren't numbers.
        NonFiniteError: If a context isn't finite.
    """
    value = condition
    if not isinstance(value, Tensor):
        plain = not isinstance(condition, str | bytes | dict | set)
        array = np.asarray(condition) if plain else np.zeros(0)
        if array.dtype.kind in "iub":
            value = torch.from_numpy(array.astype("int64"))
        else:
            value = as_tensor(condition, "condition", finite=False)
    value = value.to(like.device)
    if value.is_floating_point():
        check_finite(value.detach(), "condition")
        return value.to(like.dtype)
    return value.long() if value.dtype != torch.long else value


def paired_condition(condition: Any, x1: Tensor) -> Tensor | None:
    """Return the conditions of points ``x1 (n, ...)``, one for each, or None.

    Raises:
        ShapeError: If there is another number of them.
    """
    if condition is None:
        return None
    value = as_condition(condition, x1)
    if value.shape[:1] != x1.shape[:1]:
        raise ShapeError(
            "there must be one condition per point", got=tuple(value.shape), expected=f"({len(x1)}, ...)"
        )
    return value


class SeenConditions(FlexibleBuffers):
    """Whether a model was trained with conditions, without, or with both: what it never saw, it can't be asked."""

    flexible = ("seen",)
    _derived_ = ("_noted", "_always")
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.hold("seen", torch.zeros(2, dtype=torch.bool))
        self._noted: set[bool] = set()
        self._always: bool | None = None

    def observe(self, given: bool) -> None:
        """Note that a batch had conditions, or had none; without a look at the device."""
        if given not in self._noted:
            self._noted.add(given)
            self.seen[int(given)] = True
            self._always = None

    def buffers_changed(self) -> None:
        """Forget what was derived from buffers."""
        self._noted, self._always = set(), None

    @property
    def always(self) -> bool:
        """Whether all batches had conditions."""
        if self._always is None:
            without, given = self.seen.tolist()
            self._always = given and not without
        return self._always

    def check_absent(self) -> None:
        """Raise where a condition is left out of what was always trained with one."""
        if self.always:
            raise InvalidInputError(
                "the model was trained with conditions alone, so what it returns without one was never learnt",
                got="condition=None",
                hint="pass condition=..., or train with condition_dropout above 0",
            )


def rows_of_condition(condition: Any, count: int, lead: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return a condition with one row for each of ``count`` points, or None.

    Args:
        condition: None; one label ``()`` or one context ``(c,)`` for all; or one for each point, with the leading axes
            ``lead`` or ``(count,)``.
        count: The number of points.
        lead: The shape of the points.
        like: A tensor whose precision and device it takes.

    Raises:
        ShapeError: If it has another number of rows.
    """
    if condition is None:
        return None
    value = as_condition(condition, like)
    if value.ndim == 0 or (value.ndim == 1 and value.is_floating_point()):
        return value.expand(count, *value.shape)
    if lead and tuple(value.shape[: len(lead)]) == lead:
        return value.reshape(count, *value.shape[len(lead) :])
    if value.shape[0] == count:
        return value
    raise ShapeError(
        "there must be one condition per point, or one for all",
        got=tuple(value.shape),
        expected=f"{(*lead, '...')} or one label () or context (c,)",
    )
