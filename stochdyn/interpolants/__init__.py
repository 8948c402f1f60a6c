"""Stochastic interpolants, and score diffusion regularised by its Fokker-Planck equation."""

from __future__ import annotations
