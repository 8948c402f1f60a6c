"""stochdyn: probabilistic inference in stochastic dynamics.

The public names, each loaded on first use, so that importing the package costs nothing and pulls in no
plotting, transport or Gaussian-process library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stochdyn import errors
from stochdyn._version import __version__
from stochdyn.errors import (
    ApproximationWarning,
    CheckpointError,
    CheckpointWriteError,
    ConvergenceWarning,
    DamagedCheckpointError,
    DeviceMismatchError,
    DiffusionError,
    DiffusionMismatchError,
    DisconnectedGraphError,
    DtypeMismatchError,
    EmptyDataError,
    ForeignCheckpointError,
    FrameError,
    HurstRangeError,
    InvalidInputError,
    LindbladianError,
    MissingDependencyError,
    NonFiniteError,
    NonFiniteLossError,
    ShapeError,
    SingularDiffusionError,
    StochdynError,
    StochdynWarning,
    SystemSizeError,
    TimeGridError,
    TooFewDrawsError,
    UnavailableError,
    UnknownSiteError,
    ZeroProbabilityError,
)

if TYPE_CHECKING:
    from stochdyn import (
        bridges,
        core,
        datasets,
        diagnostics,
        fractional,
        infer,
        interpolants,
        objectives,
        povm,
        testing,
        training,
        vectorfields,
    )
    from stochdyn.core.coefficients import Coefficient, Diagonal, Matrix, Scalar
    from stochdyn.core.flow import GaussianFlow, LearnedFlow, MarginalFlow, MixtureFlow
    from stochdyn.core.generators import (
        ContinuityEquation,
        FokkerPlanck,
        MatrixMasterEquation,
        SparseMasterEquation,
    )
    from stochdyn.core.linear import LinearGaussianMeasure
    from stochdyn.core.measure import DiffusionMeasure, PathMeasure
    from stochdyn.core.noise import Brownian, NoiseProcess
    from stochdyn.core.path import Estimate, PathSample
    from stochdyn.core.sde import SDE
    from stochdyn.core.transport import sinkhorn
    from stochdyn.diagnostics.inference_data import to_inference_data
    from stochdyn.objectives.base import Objective, ObjectiveValue
    from stochdyn.objectives.elbo import GaussianObservations, PathELBO
    from stochdyn.objectives.projection import PathProjection, project_linear_drift
    from stochdyn.objectives.regression import Regression
    from stochdyn.objectives.residual import ForwardResidual
    from stochdyn.training.trainer import fit

_ROOMS = (
    "bridges",
    "core",
    "datasets",
    "diagnostics",
    "fractional",
    "infer",
    "interpolants",
    "objectives",
    "povm",
    "testing",
    "training",
    "vectorfields",
)

_HOMES = {
    "project_linear_drift": "objectives.projection",
    "PathProjection": "objectives.projection",
    "Regression": "objectives.regression",
    "ForwardResidual": "objectives.residual",
    "MatrixMasterEquation": "core.generators",
    "ContinuityEquation": "core.generators",
    "LearnedFlow": "core.flow",
    "MixtureFlow": "core.flow",
    "GaussianFlow": "core.flow",
    "Brownian": "core.noise",
    "Coefficient": "core.coefficients",
    "Diagonal": "core.coefficients",
    "DiffusionMeasure": "core.measure",
    "Estimate": "core.path",
    "FokkerPlanck": "core.generators",
    "GaussianObservations": "objectives.elbo",
    "LinearGaussianMeasure": "core.linear",
    "MarginalFlow": "core.flow",
    "Matrix": "core.coefficients",
    "NoiseProcess": "core.noise",
    "Objective": "objectives.base",
    "ObjectiveValue": "objectives.base",
    "PathELBO": "objectives.elbo",
    "PathMeasure": "core.measure",
    "PathSample": "core.path",
    "SDE": "core.sde",
    "Scalar": "core.coefficients",
    "SparseMasterEquation": "core.generators",
    "fit": "training.trainer",
    "sinkhorn": "core.transport",
    "to_inference_data": "diagnostics.inference_data",
}

__all__ = [
    "SDE",
    "ApproximationWarning",
    "Brownian",
    "CheckpointError",
    "CheckpointWriteError",
    "Coefficient",
    "ContinuityEquation",
    "ConvergenceWarning",
    "DamagedCheckpointError",
    "DeviceMismatchError",
    "Diagonal",
    "DiffusionError",
    "DiffusionMeasure",
    "DiffusionMismatchError",
    "DisconnectedGraphError",
    "DtypeMismatchError",
    "EmptyDataError",
    "Estimate",
    "FokkerPlanck",
    "ForeignCheckpointError",
    "ForwardResidual",
    "FrameError",
    "GaussianFlow",
    "GaussianObservations",
    "HurstRangeError",
    "InvalidInputError",
    "LearnedFlow",
    "LindbladianError",
    "LinearGaussianMeasure",
    "MarginalFlow",
    "Matrix",
    "MatrixMasterEquation",
    "MissingDependencyError",
    "MixtureFlow",
    "NoiseProcess",
    "NonFiniteError",
    "NonFiniteLossError",
    "Objective",
    "ObjectiveValue",
    "PathELBO",
    "PathMeasure",
    "PathProjection",
    "PathSample",
    "Regression",
    "Scalar",
    "ShapeError",
    "SingularDiffusionError",
    "SparseMasterEquation",
    "StochdynError",
    "StochdynWarning",
    "SystemSizeError",
    "TimeGridError",
    "TooFewDrawsError",
    "UnavailableError",
    "UnknownSiteError",
    "ZeroProbabilityError",
    "__version__",
    "bridges",
    "core",
    "datasets",
    "diagnostics",
    "errors",
    "fit",
    "fractional",
    "infer",
    "interpolants",
    "objectives",
    "povm",
    "project_linear_drift",
    "sinkhorn",
    "testing",
    "to_inference_data",
    "training",
    "vectorfields",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"stochdyn.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"stochdyn.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'stochdyn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
