"""stochdyn: probabilistic inference in stochastic dynamics.

The public names, each loaded on first use, so that importing the package costs nothing and pulls in no
plotting, transport or Gaussian-process library.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
