"""The Pyro layer: path distributions, reparametrisation, guides and predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stochdyn.infer.distributions import DiffusionPath, PathIncrements, sample_path
from stochdyn.infer.guides import AutoPathGuide
from stochdyn.infer.laplace import start_at_mode
from stochdyn.infer.predictive import PathDraws, predict_path
from stochdyn.infer.reparam import NoiseReparam
from stochdyn.infer.skewed import AutoSkewedNormal

if TYPE_CHECKING:
    from stochdyn.diagnostics.psis import khat

__all__ = [
    "AutoPathGuide",
    "AutoSkewedNormal",
    "DiffusionPath",
    "NoiseReparam",
    "PathDraws",
    "PathIncrements",
    "khat",
    "predict_path",
    "sample_path",
    "start_at_mode",
]


def __getattr__(name: str) -> Any:
    # A diagnostic of guides that is asked for beside them; loaded late, since diagnostics build on this room.
    if name == "khat":
        from stochdyn.diagnostics.psis import khat

        return khat
    raise AttributeError(f"module 'stochdyn.infer' has no attribute {name!r}")
