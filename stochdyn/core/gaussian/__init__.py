"""Linear-Gaussian laws: chains, filter and smoother, conditioning on ends and on data, exact moments."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
