"""Vector fields on unknown manifolds: Gaussian processes over point clouds, and drifts learnt from trajectories."""

from __future__ import annotations

from stochdyn.vectorfields.ambient import AmbientKernel, ScalarFactor
from stochdyn.vectorfields.cloud import PointCloud
from stochdyn.vectorfields.graph import farthest_points
from stochdyn.vectorfields.kernels import ConnectionMatern, FeatureKernel, ProjectedMatern
from stochdyn.vectorfields.latent import TrajectoryELBO
from stochdyn.vectorfields.linear_form import LinearField, sample_field
from stochdyn.vectorfields.paths import cloud_of_paths
from stochdyn.vectorfields.plots import plot_field, plot_globe, plot_trajectories
from stochdyn.vectorfields.rvgp import RVGP
from stochdyn.vectorfields.singularities import Singularities, field_index, find_singularities, triangulate
from stochdyn.vectorfields.sphere import HodgeMatern, hodge_compositional
from stochdyn.vectorfields.surface import Surface, TangentDiffusion, TangentDrift

__all__ = [
    "RVGP",
    "AmbientKernel",
    "ConnectionMatern",
    "FeatureKernel",
    "HodgeMatern",
    "LinearField",
    "PointCloud",
    "ProjectedMatern",
    "ScalarFactor",
    "Singularities",
    "Surface",
    "TangentDiffusion",
    "TangentDrift",
    "TrajectoryELBO",
    "cloud_of_paths",
    "farthest_points",
    "field_index",
    "find_singularities",
    "hodge_compositional",
    "plot_field",
    "plot_globe",
    "plot_trajectories",
    "sample_field",
    "triangulate",
]
