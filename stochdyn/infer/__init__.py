"""The Pyro layer: path distributions, reparametrisation, guides and predictions."""

from __future__ import annotations

from stochdyn.infer.distributions import DiffusionPath, PathIncrements, sample_path
from stochdyn.infer.guides import AutoPathGuide
from stochdyn.infer.reparam import NoiseReparam

__all__ = ["AutoPathGuide", "DiffusionPath", "NoiseReparam", "PathIncrements", "sample_path"]
