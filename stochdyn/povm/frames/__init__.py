"""Measurement frames, operators on single sites, and observables of a lattice."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
