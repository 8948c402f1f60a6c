"""Latent SDEs: series explained by a hidden path that fractional noise drives."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
