"""Stochastic interpolants, and score diffusion regularised by its Fokker-Planck equation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stochdyn.interpolants.bounds import kl_bound, kl_bound_from_losses, optimal_epsilon
from stochdyn.interpolants.conversions import conversion, convert
from stochdyn.interpolants.couplings import Coupling, EntropicCoupling, ExactCoupling, IndependentCoupling
from stochdyn.interpolants.evidence import energy_identity, evidence_bound, feynman_kac_log_density
from stochdyn.interpolants.evidence_objective import DiffusionEvidence
from stochdyn.interpolants.exponential import exponential_ode, exponential_sde
from stochdyn.interpolants.fields import FieldNetwork, Fields
from stochdyn.interpolants.gap import Gap, histogram_w2, ode_sde_gap
from stochdyn.interpolants.gauge import conservativity, gauge_residual, intrinsic_dimension
from stochdyn.interpolants.gaussian_mixture import GaussianMixture
from stochdyn.interpolants.generator import InterpolantGenerator
from stochdyn.interpolants.interpolant import Interpolant
from stochdyn.interpolants.kinetic import KineticOptimal, explained_share
from stochdyn.interpolants.likelihood import (
    PathWeights,
    feynman_kac_log_prob,
    flow_log_prob,
    flow_with_log_density,
)
from stochdyn.interpolants.max_min import MaxMinBridge, PathCorrection
from stochdyn.interpolants.mixtures import GaussianMixtureInterpolant
from stochdyn.interpolants.noise_level import Epsilon, TabulatedEpsilon
from stochdyn.interpolants.noised import NoisedMixture
from stochdyn.interpolants.point_source import Forecaster, ForecastRegression, PointSource
from stochdyn.interpolants.potential import FunctionPotential, Potential, PotentialNetwork
from stochdyn.interpolants.prefetch import CoupledBatches
from stochdyn.interpolants.processes import OU, VE, VP, AffineProcess, MeanReverting
from stochdyn.interpolants.regression import InterpolantRegression
from stochdyn.interpolants.reverse import ReverseDiffusion
from stochdyn.interpolants.samplers import integrate_ode, integrate_sde, integrate_strang, time_grid
from stochdyn.interpolants.schedules import CustomSchedule, Schedule
from stochdyn.interpolants.score import ScoreMatching, WeightRamp
from stochdyn.interpolants.student import StudentKernel
from stochdyn.interpolants.whitened import WhitenedField

if TYPE_CHECKING:
    from stochdyn.interpolants.diffusion_distribution import DiffusionDistribution
    from stochdyn.interpolants.distribution import InterpolantDistribution

__all__ = [
    "OU",
    "VE",
    "VP",
    "AffineProcess",
    "CoupledBatches",
    "Coupling",
    "CustomSchedule",
    "DiffusionDistribution",
    "DiffusionEvidence",
    "EntropicCoupling",
    "Epsilon",
    "ExactCoupling",
    "FieldNetwork",
    "Fields",
    "ForecastRegression",
    "Forecaster",
    "FunctionPotential",
    "Gap",
    "GaussianMixture",
    "GaussianMixtureInterpolant",
    "IndependentCoupling",
    "Interpolant",
    "InterpolantDistribution",
    "InterpolantGenerator",
    "InterpolantRegression",
    "KineticOptimal",
    "MaxMinBridge",
    "MeanReverting",
    "NoisedMixture",
    "PathCorrection",
    "PathWeights",
    "PointSource",
    "Potential",
    "PotentialNetwork",
    "ReverseDiffusion",
    "Schedule",
    "ScoreMatching",
    "StudentKernel",
    "TabulatedEpsilon",
    "WeightRamp",
    "WhitenedField",
    "conservativity",
    "conversion",
    "convert",
    "energy_identity",
    "evidence_bound",
    "explained_share",
    "exponential_ode",
    "exponential_sde",
    "feynman_kac_log_density",
    "feynman_kac_log_prob",
    "flow_log_prob",
    "flow_with_log_density",
    "gauge_residual",
    "histogram_w2",
    "integrate_ode",
    "integrate_sde",
    "integrate_strang",
    "intrinsic_dimension",
    "kl_bound",
    "kl_bound_from_losses",
    "ode_sde_gap",
    "optimal_epsilon",
    "time_grid",
]


def __getattr__(name: str) -> Any:
    # the Pyro layer is loaded when it is asked for
    if name == "InterpolantDistribution":
        from stochdyn.interpolants.distribution import InterpolantDistribution

        return InterpolantDistribution
    if name == "DiffusionDistribution":
        from stochdyn.interpolants.diffusion_distribution import DiffusionDistribution

        return DiffusionDistribution
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
