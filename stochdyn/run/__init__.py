"""Training: one loop for every objective, with checkpoints that resume to the same bits."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
