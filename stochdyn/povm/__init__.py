"""Open quantum systems as probabilities over the outcomes of local measurements."""

from __future__ import annotations

from stochdyn.povm.frames import FourPauli, Frame, QutritSIC, Tetrahedral
from stochdyn.povm.graphs import all_to_all, chain, ring, square_lattice
from stochdyn.povm.lindblad import Lindbladian
from stochdyn.povm.operators import named_operator, spin_matrices
from stochdyn.povm.site_frames import SiteFrames

__all__ = [
    "FourPauli",
    "Frame",
    "Lindbladian",
    "QutritSIC",
    "SiteFrames",
    "Tetrahedral",
    "all_to_all",
    "chain",
    "named_operator",
    "ring",
    "spin_matrices",
    "square_lattice",
]
