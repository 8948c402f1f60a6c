"""Refinement of the reference: bridge and projection in turn, and what is known of the parameters afterwards."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
