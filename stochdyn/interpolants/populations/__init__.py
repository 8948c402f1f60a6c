"""Flows conditioned on populations: what becomes of a whole sample, also of one that was never seen."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
