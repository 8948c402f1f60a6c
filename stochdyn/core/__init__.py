"""Laws of stochastic processes: equations, noise, path measures, and what is exact about them."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
