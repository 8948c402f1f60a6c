"""Vector fields on unknown manifolds: Gaussian processes over point clouds, and drifts learnt from trajectories."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
