"""Sizes that users give: whole numbers that a computer can still hold."""

from __future__ import annotations

from stochdyn._checks import check_positive_int
from stochdyn.errors import SystemSizeError

__all__ = ["check_size"]


def check_size(value: object, name: str, largest: int, minimum: int = 1) -> None:
    """Raise unless a size is a whole number within bounds.

    Raises:
        InvalidInputError: If it isn't a whole number, or too small.
        SystemSizeError: If it is too large to be worked with.
    """
    check_positive_int(value, name, minimum)
    if value > largest:  # type: ignore[operator]
        raise SystemSizeError(f"{name} is too large", got=value, expected=f"at most {largest}")
