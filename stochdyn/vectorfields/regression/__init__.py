"""Gaussian processes of vector fields: kernels, engines, and the fields fitted with them."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
