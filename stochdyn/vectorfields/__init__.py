"""Vector fields on unknown manifolds: Gaussian processes over point clouds, and drifts learnt from trajectories."""

from __future__ import annotations

from stochdyn.vectorfields.ambient import AmbientKernel, ScalarFactor
from stochdyn.vectorfields.cloud import PointCloud
from stochdyn.vectorfields.graph import farthest_points
from stochdyn.vectorfields.kernels import ConnectionMatern, FeatureKernel, ProjectedMatern
from stochdyn.vectorfields.rvgp import RVGP

__all__ = [
    "RVGP",
    "AmbientKernel",
    "ConnectionMatern",
    "FeatureKernel",
    "PointCloud",
    "ProjectedMatern",
    "ScalarFactor",
    "farthest_points",
]
