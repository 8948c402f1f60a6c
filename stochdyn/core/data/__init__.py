"""Data as people have them: frames, panels of series with times of their own, and the grids of their paths."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
