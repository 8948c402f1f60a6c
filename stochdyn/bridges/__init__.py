"""Multi-marginal Schrödinger bridges whose reference process is refined."""

from __future__ import annotations
