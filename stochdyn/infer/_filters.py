"""The filters of the core under the names that users of :class:`NonlinearObservations` and :func:`particle_filter` look for."""

from __future__ import annotations

from stochdyn.core.gaussian.nonlinear import EnsembleKalman, ExtendedKalman, GaussianStates, UnscentedKalman
from stochdyn.core.particles.filtering import ParticleRun

__all__ = ["EnsembleKalman", "ExtendedKalman", "GaussianStates", "ParticleRun", "UnscentedKalman"]
