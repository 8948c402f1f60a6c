"""Gaussian processes for vector fields on manifolds known by points only."""

from __future__ import annotations
