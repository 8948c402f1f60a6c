"""Generators: samples, laws on paths and Pyro distributions from trained fields."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
