"""Draws of a guide that leave the range of numbers, or whose paths do: the guide without them is what is meant, so they are drawn anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from stochdyn.errors import ApproximationWarning, NonFiniteError

__all__ = ["MOST_DRAWS", "drawn_anew", "warn_of_explosions"]

_T = TypeVar("_T")

#: How often something is drawn anew before that is an error.
MOST_DRAWS = 20


def drawn_anew(draw: Callable[[], _T], most: int = MOST_DRAWS) -> tuple[_T, int]:
    """Return what ``draw()`` returns, called again with the next random numbers where something isn't finite, and how often.

    Raises:
        NonFiniteError: If that happens ``most`` times in a row; :class:`ExplosionError` for paths.
    """
    lost = 0
    while True:
        try:
            return draw(), lost
        except NonFiniteError:
            lost += 1
            if lost >= most:
                raise


def warn_of_explosions(lost: int, count: int, what: str) -> None:
    """Say that some paths exploded, if any did."""
    if lost:
        warnings.warn(
            f"paths exploded, or numbers had no finite density, in {lost} of {count} {what}, which were drawn anew. Give paths a finer ts, "
            "or coordinates in which the state can't leave its range (sde.transformed('log')), and parameters a prior that keeps them in range",
            ApproximationWarning,
            stacklevel=4,
        )
