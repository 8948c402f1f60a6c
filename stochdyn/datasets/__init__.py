"""Small real data sets that ship with the package."""

from __future__ import annotations

from stochdyn.datasets.nile import NileMinima, nile_minima

__all__ = ["NileMinima", "nile_minima"]
