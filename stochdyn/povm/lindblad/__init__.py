"""Lindblad equations on lattices, as users write them and as master equations for outcomes."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
