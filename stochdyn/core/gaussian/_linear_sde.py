"""Linear-Gaussian laws as equations to simulate and control."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.core.gaussian._linear_coefficients import TimeValue
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.sde.coefficients import Coefficient, Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import SingularDiffusionError

if TYPE_CHECKING:
    from stochdyn.core.gaussian.measure import LinearGaussianMeasure

__all__ = ["as_measure", "to_sde"]


def _at(value: TimeValue, t: Tensor, x: Tensor) -> Tensor:
    """Evaluate at ``t``, broadcastable to ``x[..., :1]``, aligned with ``x (..., *B, d)``."""
    if value.constant is not None:
        return value.constant
    out = value.at(t.reshape(-1).to(x.dtype))
    if t.numel() == 1:
        return out[0]
    own = out.ndim - 1 - len(value.event)
    lead = t.shape[: max(t.ndim - 1, 1)]
    if own and t.numel() == lead[0]:
        # Time leads; axes of the draws stand between it and the batch of the coefficients.
        gap = x.ndim - 2 - own
        return out.reshape(lead[0], *(1,) * gap, *out.shape[1:])
    return out.reshape(*lead, *out.shape[1:])


class _LinearDrift(torch.nn.Module):
    def __init__(self, law: LinearGaussianMeasure) -> None:
        super().__init__()
        self.law = law

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        a, b = (_at(v, t, x) for v in (self.law.drift_matrix, self.law.drift_offset))
        return (a @ x[..., None]).squeeze(-1) + b if a.ndim > 2 else x @ a.mT + b


class _LinearDiffusion(torch.nn.Module):
    def __init__(self, law: LinearGaussianMeasure) -> None:
        super().__init__()
        self.law = law

    def forward(self, t: Tensor, x: Tensor) -> Coefficient:
        return Matrix(_at(self.law.diffusion, t, x))


def to_sde(law: LinearGaussianMeasure) -> SDE:
    """Return the equation of the law."""
    constant = law.diffusion.constant
    return SDE(_LinearDrift(law), _LinearDiffusion(law) if constant is None else Matrix(constant))


def as_measure(law: LinearGaussianMeasure) -> DiffusionMeasure:
    """Return the law as a diffusion measure."""
    batch = law.batch_shape
    mean = law.initial_mean.expand(*batch, law.dim)
    if law.fixed_start:
        return DiffusionMeasure(mean, to_sde(law))
    factor, info = torch.linalg.cholesky_ex(law.initial_cov)
    if bool((info != 0).any()):
        raise SingularDiffusionError(
            "the initial covariance is singular but not zero, so the start has no density"
        )
    start = torch.distributions.MultivariateNormal(mean, scale_tril=factor)
    return DiffusionMeasure(start, to_sde(law))
