"""stochdyn: probabilistic inference in stochastic dynamics.

The public names, each loaded on first use, so that importing the package costs nothing and pulls in no
plotting, transport or Gaussian-process library.
"""

from importlib import import_module

from lazy_loader import attach_stub

_load, __dir__, __all__ = attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Load a public name; errors live in ``stochdyn.errors`` and are found here as well, for ``except`` clauses."""
    errors = import_module("stochdyn.errors")
    return getattr(errors, name) if name in errors.__all__ else _load(name)
