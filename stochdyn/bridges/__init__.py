"""Multi-marginal Schrödinger bridges whose reference process is refined.

Snapshots of a population at a few times, without knowledge of who is who, become a law on whole trajectories: the
one that is nearest in relative entropy to a reference process among all that have these marginals; and the reference
is chosen from a family of models so that it is nearest in turn.
"""

from __future__ import annotations

from stochdyn.bridges.families import (
    DriftFamily,
    LinearDrift,
    LinearFamily,
    LotkaVolterra,
    SharedFeatures,
    ZeroDrift,
)
from stochdyn.bridges.gaussian import GaussianBridge
from stochdyn.bridges.gaussian_refine import GaussianChainBridge, GaussianRefinement, refine_gaussian
from stochdyn.bridges.partial_gaussian import PartialGaussianBridge
from stochdyn.bridges.snapshots import Snapshot, Snapshots
from stochdyn.core.transport import sinkhorn

__all__ = [
    "DriftFamily",
    "GaussianBridge",
    "GaussianChainBridge",
    "GaussianRefinement",
    "LinearDrift",
    "LinearFamily",
    "LotkaVolterra",
    "PartialGaussianBridge",
    "SharedFeatures",
    "Snapshot",
    "Snapshots",
    "ZeroDrift",
    "refine_gaussian",
    "sinkhorn",
]
