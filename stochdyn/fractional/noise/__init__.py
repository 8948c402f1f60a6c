"""Fractional noise by Markov approximation: speeds, weights, memory states and their exact steps."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
