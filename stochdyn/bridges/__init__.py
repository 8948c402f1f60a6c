"""Multi-marginal Schrödinger bridges whose reference process is refined.

Snapshots of a population at a few times, without knowledge of who is who, become a law on whole trajectories: the
one that is nearest in relative entropy to a reference process among all that have these marginals; and the reference
is chosen from a family of models so that it is nearest in turn.
"""

from __future__ import annotations

from stochdyn.bridges.bridge import SchrodingerBridge
from stochdyn.bridges.cells import from_anndata, from_npz, pca
from stochdyn.bridges.density_trend import DensityTrend
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
from stochdyn.bridges.growing import GrowingBridge
from stochdyn.bridges.history import History, Iteration
from stochdyn.bridges.identifiability import RotationCheck, rotation_invariance
from stochdyn.bridges.ipf import IPFBridge
from stochdyn.bridges.linear_response import LinearResponse
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
from stochdyn.bridges.partial import PartialBridge, momentum
from stochdyn.bridges.partial_gaussian import PartialGaussianBridge
from stochdyn.bridges.plots import plot_history, plot_trajectories
from stochdyn.bridges.profile import BridgeProfile, ProfileFit, fit_profile
from stochdyn.bridges.pyro_family import ModuleDrift, PyroDrift, as_family
from stochdyn.bridges.refine import Refinement, RefinementInterrupted, refine
from stochdyn.bridges.scoring import HeldOut, Score, forecast, leave_one_out, sampling_floor, score
from stochdyn.bridges.snapshots import Snapshot, Snapshots
from stochdyn.bridges.uncertainty import bootstrap, families_of, posterior
from stochdyn.core.transport import sinkhorn

__all__ = [
    "BridgeMarginal",
    "BridgeMatching",
    "BridgeProfile",
    "ComponentFeatures",
    "DensityTrend",
    "DriftFamily",
    "EllipticVortex",
    "FeatureDrift",
    "GaussianBridge",
    "GaussianChainBridge",
    "GaussianRefinement",
    "GrowingBridge",
    "HeldOut",
    "History",
    "IPFBridge",
    "Iteration",
    "LambOseen",
    "LinearDrift",
    "LinearFamily",
    "LinearResponse",
    "LotkaVolterra",
    "ModuleDrift",
    "NeuralDrift",
    "PartialBridge",
    "PartialGaussianBridge",
    "PotentialDrift",
    "ProfileFit",
    "PyroDrift",
    "Refinement",
    "RefinementInterrupted",
    "Repressilator",
    "RotationCheck",
    "SchrodingerBridge",
    "Score",
    "SharedFeatures",
    "Snapshot",
    "Snapshots",
    "SumDrift",
    "ZeroDrift",
    "as_family",
    "bootstrap",
    "families_of",
    "fit_profile",
    "forecast",
    "from_anndata",
    "from_npz",
    "leave_one_out",
    "momentum",
    "pca",
    "plot_history",
    "plot_trajectories",
    "posterior",
    "refine",
    "refine_gaussian",
    "rotation_invariance",
    "sampling_floor",
    "score",
    "sinkhorn",
]
