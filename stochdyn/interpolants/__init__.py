"""Stochastic interpolants, and score diffusion regularised by its Fokker-Planck equation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stochdyn.interpolants.bounds import kl_bound, kl_bound_from_losses, optimal_epsilon
from stochdyn.interpolants.conversions import conversion, convert
from stochdyn.interpolants.couplings import Coupling, EntropicCoupling, ExactCoupling, IndependentCoupling
from stochdyn.interpolants.fields import FieldNetwork, Fields
from stochdyn.interpolants.gaussian_mixture import GaussianMixture
from stochdyn.interpolants.generator import InterpolantGenerator
from stochdyn.interpolants.interpolant import Interpolant
from stochdyn.interpolants.likelihood import (
    PathWeights,
    feynman_kac_log_prob,
    flow_log_prob,
    flow_with_log_density,
)
from stochdyn.interpolants.mixtures import GaussianMixtureInterpolant
from stochdyn.interpolants.noise_level import Epsilon, TabulatedEpsilon
from stochdyn.interpolants.regression import InterpolantRegression
from stochdyn.interpolants.samplers import integrate_ode, integrate_sde, integrate_strang, time_grid
from stochdyn.interpolants.schedules import CustomSchedule, Schedule

if TYPE_CHECKING:
    from stochdyn.interpolants.distribution import InterpolantDistribution

__all__ = [
    "Coupling",
    "CustomSchedule",
    "EntropicCoupling",
    "Epsilon",
    "ExactCoupling",
    "FieldNetwork",
    "Fields",
    "GaussianMixture",
    "GaussianMixtureInterpolant",
    "IndependentCoupling",
    "Interpolant",
    "InterpolantDistribution",
    "InterpolantGenerator",
    "InterpolantRegression",
    "PathWeights",
    "Schedule",
    "TabulatedEpsilon",
    "conversion",
    "convert",
    "feynman_kac_log_prob",
    "flow_log_prob",
    "flow_with_log_density",
    "integrate_ode",
    "integrate_sde",
    "integrate_strang",
    "kl_bound",
    "kl_bound_from_losses",
    "optimal_epsilon",
    "time_grid",
]


def __getattr__(name: str) -> Any:
    # the Pyro layer is loaded when it is asked for
    if name == "InterpolantDistribution":
        from stochdyn.interpolants.distribution import InterpolantDistribution

        return InterpolantDistribution
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
