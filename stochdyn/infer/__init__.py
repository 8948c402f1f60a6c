"""The Pyro layer: path distributions, reparametrisation, guides and predictions."""

from __future__ import annotations

from stochdyn.infer.distributions import DiffusionPath, PathIncrements, sample_path
from stochdyn.infer.guides import AutoPathGuide
from stochdyn.infer.predictive import PathDraws, predict_path
from stochdyn.infer.reparam import NoiseReparam

__all__ = [
    "AutoPathGuide",
    "DiffusionPath",
    "NoiseReparam",
    "PathDraws",
    "PathIncrements",
    "predict_path",
    "sample_path",
]
