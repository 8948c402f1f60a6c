"""Yearly minimum water levels of the Nile, the classic series with long memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn.datasets._csv import read_columns

__all__ = ["NileMinima", "nile_minima"]


class NileMinima(NamedTuple):
    """The series: ``years (663,)`` and ``level (663,)`` in centimetres, both float64."""

    years: Tensor
    level: Tensor


def nile_minima() -> NileMinima:
    """Return the yearly minimum level of the Nile at the Roda gauge near Cairo, years 622 to 1284.

    The levels lie between 935 and 1466 cm. Hurst (1951) found in this series the slow decay of
    correlations that has his name; under fractional Gaussian noise its exact maximum-likelihood Hurst
    index is 0.8315 with standard error 0.0246.

    Returns:
        ``(years, level)``, float64 tensors of shape ``(663,)``, years in ``[622, 1284]``, levels in cm.

    Example:
        >>> from stochdyn.datasets import nile_minima
        >>> years, level = nile_minima()
        >>> int(years[0]), float(level[0]), tuple(level.shape)
        (622, 1157.0, (663,))

    Reference:
        O. Tousson, Memoire sur l'histoire du Nil, Memoires de l'Institut d'Egypte 9, 1925; digits as in the
        R package waveslim (BSD-3). H. E. Hurst, Long-term storage capacity of reservoirs, Trans. ASCE 116,
        770-799, 1951.
    """
    columns = read_columns("nile_minima")
    years, level = (torch.tensor(column, dtype=torch.float64) for column in columns.values())
    return NileMinima(years, level)
