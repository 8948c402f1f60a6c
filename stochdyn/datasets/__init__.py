"""Small real data sets that ship with the package, and simulators whose truth is known."""

from __future__ import annotations

from stochdyn.datasets.branching import CellSnapshots, branching_cells
from stochdyn.datasets.moving_digits import moving_digits
from stochdyn.datasets.nile import NileMinima, nile_minima
from stochdyn.datasets.open_systems import OpenSystem, open_systems
from stochdyn.datasets.oscillators import SimulatedSnapshots, lotka_volterra, repressilator
from stochdyn.datasets.wind import WindClimatology, wind_climatology, wind_on_sphere

__all__ = [
    "CellSnapshots",
    "NileMinima",
    "OpenSystem",
    "SimulatedSnapshots",
    "WindClimatology",
    "branching_cells",
    "lotka_volterra",
    "moving_digits",
    "nile_minima",
    "open_systems",
    "repressilator",
    "wind_climatology",
    "wind_on_sphere",
]
