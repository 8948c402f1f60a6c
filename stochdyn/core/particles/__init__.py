"""Particle filters of any law that can be simulated: the loop, resampling, and what a run says."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
