"""Draws of a guide that leave the range of numbers, or whose paths do: the guide without them is what is meant, so they are drawn anew."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from scipy.optimize import brentq

from stochdyn.errors import ApproximationWarning, NonFiniteError

__all__ = ["MOST_DRAWS", "KeptShare", "drawn_anew", "warn_of_explosions"]

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


class KeptShare:
    r"""The share of a guide's draws that don't explode, out of sets of draws of which those with one that does are drawn anew.

    The draws that are left have the density :math:`q(z)/s` of the guide given that nothing explodes, with the share
    :math:`s=P_q(\text{no explosion})`. Their weights are therefore :math:`s\,p(y,z)/q(z)`, with the evidence as their mean: where
    paths explode the data have no density. A set of :math:`n` independent draws is kept with probability :math:`s^n`, so
    the likelihood of :math:`s` has its maximum where, for :math:`\lambda=-\log s` and :math:`K` draws that were kept,

    .. math:: K=\sum_{\text{lost sets}}\frac{n}{e^{\lambda n}-1} .
    """

    def __init__(self) -> None:
        self._kept = 0
        self._lost: Counter[int] = Counter()

    def count(self, size: int, lost: int, kept: bool = True) -> None:
        """Count sets of ``size`` draws: ``lost`` that were drawn anew, and, if ``kept``, one that was not."""
        if lost:
            self._lost[size] += lost
        self._kept += size if kept else 0

    @property
    def log(self) -> float:
        """The logarithm of the share: 0 where nothing exploded, NaN where nothing was kept."""
        if not self._lost:
            return 0.0
        if not self._kept:
            return math.nan
        lost, drawn = self._lost.total(), sum(size * times for size, times in self._lost.items())
        if lost == drawn:
            return -math.log1p(lost / self._kept)

        def excess(rate: float) -> float:
            # n / (exp(rate n) - 1), where the exponential may overflow
            parts = (t * n * math.exp(-rate * n) / -math.expm1(-rate * n) for n, t in self._lost.items())
            return sum(parts) - self._kept

        # 1/x - n < n / (exp(nx) - 1) < 1/x puts the root between these.
        return -float(brentq(excess, lost / (self._kept + drawn), lost / self._kept, xtol=1e-12, rtol=1e-10))


def warn_of_explosions(lost: int, count: int, what: str) -> None:
    """Say that some paths exploded, if any did."""
    if lost:
        warnings.warn(
            f"paths exploded, or numbers had no finite density, in {lost} of {count} {what}, which were drawn anew. Give paths a finer ts, "
            "or coordinates in which the state can't leave its range (sde.transformed('log')), and parameters a prior that keeps them in range",
            ApproximationWarning,
            stacklevel=4,
        )
