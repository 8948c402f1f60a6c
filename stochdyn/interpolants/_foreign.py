"""Names of other packages that users look for beside interpolants."""

from __future__ import annotations

from stochdyn.core.forward.asymmetry import conservativity

__all__ = ["conservativity"]
