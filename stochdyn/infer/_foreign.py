"""Names of other packages that users look for beside guides; loaded late, since diagnostics build on this package."""

from __future__ import annotations

from stochdyn.diagnostics.psis import khat

__all__ = ["khat"]
