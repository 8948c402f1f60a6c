"""Small real data sets that ship with the package, and simulators whose truth is known."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
