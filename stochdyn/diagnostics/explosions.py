"""Draws of a guide whose paths explode: the guide without them is what is meant, so they are drawn anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from stochdyn.errors import ApproximationWarning, ExplosionError

__all__ = ["drawn_anew", "warn_of_explosions"]

_T = TypeVar("_T")


def drawn_anew(draw: Callable[[], _T], most: int = 20) -> tuple[_T, int]:
    """Return what ``draw()`` returns, called again with the next random numbers where paths explode, and how often they did.

    Raises:
        ExplosionError: If they do so ``most`` times in a row.
    """
    lost = 0
    while True:
        try:
            return draw(), lost
        except ExplosionError:
            lost += 1
            if lost >= most:
                raise


def warn_of_explosions(lost: int, count: int, what: str) -> None:
    """Say that some paths exploded, if any did."""
    if lost:
        warnings.warn(
            f"paths exploded, or had no finite density, in {lost} of {count} {what}, which were drawn anew: the equation wants smaller steps there. "
            "Give the path a finer ts, or coordinates in which the state can't leave its range (sde.transformed('log'))",
            ApproximationWarning,
            stacklevel=4,
        )
