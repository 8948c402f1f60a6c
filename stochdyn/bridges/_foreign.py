"""Names of other packages that users look for beside bridges."""

from __future__ import annotations

from stochdyn.core.transport.entropic import sinkhorn

__all__ = ["sinkhorn"]
