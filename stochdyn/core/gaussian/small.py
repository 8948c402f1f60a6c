"""Positive semi-definite matrices whose components have units of their own: factors, inverses, symmetrisation."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.errors import SingularDiffusionError

__all__ = ["definite_factor", "psd_factor", "psd_inverse", "standard_deviations", "symmetrise", "times"]

_THRESHOLD = 1e-2


def symmetrise(matrix: Tensor) -> Tensor:
    """Return the symmetric part of ``(..., n, n)``."""
    return 0.5 * (matrix + matrix.mT)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return matrices times vectors."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def standard_deviations(matrix: Tensor) -> Tensor:
    """Return the roots ``(..., n)`` of the diagonal, one where it isn't positive; no gradient.

    Dividing by them makes a covariance a correlation, so that what counts as small doesn't depend on units.
    """
    variance = matrix.detach().diagonal(dim1=-2, dim2=-1)
    return torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()


def psd_factor(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    r"""Factor positive semi-definite matrices, singular ones included.

    Cholesky decomposition of the correlations, which postpones tiny pivots and stops at the numerical rank:

    .. math:: M = L L^\top + E,\qquad |E_{ij}|\le\mathtt{tolerance}\cdot\sqrt{M_{ii}M_{jj}}.

    Rows keep their order, so :math:`L` is a column-permuted triangular matrix, and columns beyond the rank
    are zero. Differentiable; directions of zero variance pass no gradient.

    Args:
        matrix: The symmetric matrices ``(..., n, n)``.
        tolerance: The size below which pivots (of a unit diagonal) count as zero. Default ``32 n`` machine epsilons.

    Returns:
        ``(..., n, n)`` with ``L @ L.mT`` equal to ``matrix`` up to rounding.

    Example:
        >>> m = torch.ones(2, 2, dtype=torch.float64)
        >>> factor = psd_factor(m)
        >>> bool(torch.allclose(factor @ factor.mT, m))
        True

    Reference: Higham (1990), Analysis of the Cholesky decomposition of a semi-definite matrix.
    """
    size = matrix.shape[-1]
    if tolerance is None:
        tolerance = 32 * max(size, 4) * torch.finfo(matrix.dtype).eps
    unit = standard_deviations(matrix)
    # The factor of a rescaled matrix is the rescaled factor, so the scale needs no gradient.
    rest = matrix / unit[..., :, None] / unit[..., None, :]
    columns = []
    for _ in range(size):
        diagonal = rest.diagonal(dim1=-2, dim2=-1)
        # Natural order unless a pivot is tiny: ties don't reorder, so draws stay smooth in parameters.
        bar = (_THRESHOLD * diagonal.detach().amax(-1)).clamp_min(tolerance)
        eligible = diagonal.detach() > bar[..., None]
        index = eligible.to(torch.uint8).argmax(-1, keepdim=True)
        column = rest.gather(-1, index[..., None].expand(*rest.shape[:-1], 1)).squeeze(-1)
        pivot = diagonal.gather(-1, index).squeeze(-1)
        keep = eligible.any(-1)
        scale = torch.where(keep, pivot, torch.ones_like(pivot)).rsqrt()
        column = torch.where(keep[..., None], column * scale[..., None], torch.zeros_like(column))
        rest = rest - column[..., :, None] * column[..., None, :]
        columns.append(column * unit)
    return torch.stack(columns, -1)


def definite_factor(cov: Tensor, name: str) -> Tensor:
    """Return the lower Cholesky factor of ``(..., n, n)``; correlations that are singular to rounding don't count as definite.

    Raises:
        SingularDiffusionError: If a matrix is singular; ``name`` says of what it is the covariance.
    """
    unit = standard_deviations(cov)
    factor, info = torch.linalg.cholesky_ex(cov / unit[..., :, None] / unit[..., None, :])
    if bool((info != 0).any()):
        raise SingularDiffusionError(
            f"the covariance of {name} is singular, so there is no density",
            hint="compare the laws through their noise, or look at the components that the noise reaches",
        )
    return factor * unit[..., None]


def psd_inverse(matrix: Tensor) -> Tensor:
    """Return the pseudo-inverse of positive semi-definite ``(..., n, n)``, the rank being that of the correlations."""
    unit = standard_deviations(matrix)
    scale = unit[..., :, None] * unit[..., None, :]
    return torch.linalg.pinv(symmetrise(matrix / scale), hermitian=True) / scale
