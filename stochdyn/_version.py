"""The version of the package, read by the build and by ``stochdyn.__version__``."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
