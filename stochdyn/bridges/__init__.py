"""Multi-marginal Schrödinger bridges whose reference process is refined.

Snapshots of a population at a few times, without knowledge of who is who, become a law on whole trajectories: the
one that is nearest in relative entropy to a reference process among all that have these marginals; and the reference
is chosen from a family of models so that it is nearest in turn.
"""

from __future__ import annotations

from stochdyn.bridges.bridge import SchrodingerBridge
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
from stochdyn.bridges.history import History, Iteration
from stochdyn.bridges.marginal import BridgeMarginal
from stochdyn.bridges.matching import BridgeMatching
from stochdyn.bridges.mechanistic import (
    ComponentFeatures,
    EllipticVortex,
    FeatureDrift,
    LambOseen,
    Repressilator,
)
from stochdyn.bridges.neural import NeuralDrift, PotentialDrift, SumDrift
from stochdyn.bridges.partial_gaussian import PartialGaussianBridge
from stochdyn.bridges.plots import plot_history, plot_trajectories
from stochdyn.bridges.pyro_family import ModuleDrift, PyroDrift, as_family
from stochdyn.bridges.refine import Refinement, refine
from stochdyn.bridges.snapshots import Snapshot, Snapshots
from stochdyn.core.transport import sinkhorn

__all__ = [
    "BridgeMarginal",
    "BridgeMatching",
    "ComponentFeatures",
    "DriftFamily",
    "EllipticVortex",
    "FeatureDrift",
    "GaussianBridge",
    "GaussianChainBridge",
    "GaussianRefinement",
    "History",
    "Iteration",
    "LambOseen",
    "LinearDrift",
    "LinearFamily",
    "LotkaVolterra",
    "ModuleDrift",
    "NeuralDrift",
    "PartialGaussianBridge",
    "PotentialDrift",
    "PyroDrift",
    "Refinement",
    "Repressilator",
    "SchrodingerBridge",
    "SharedFeatures",
    "Snapshot",
    "Snapshots",
    "SumDrift",
    "ZeroDrift",
    "as_family",
    "plot_history",
    "plot_trajectories",
    "refine",
    "refine_gaussian",
    "sinkhorn",
]
