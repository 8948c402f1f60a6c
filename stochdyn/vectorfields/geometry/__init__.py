"""The geometry of a point cloud: frames, connection, Laplacians, spectra, surfaces."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
