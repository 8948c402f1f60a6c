"""Data as people have them: frames, inputs over time, and the grids of paths through times of their own."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
