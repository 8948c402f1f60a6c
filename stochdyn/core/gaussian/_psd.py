"""Positive semi-definite matrices: a factor that allows singular ones, and symmetrisation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["psd_factor", "symmetrise"]

_THRESHOLD = 1e-2


def symmetrise(matrix: Tensor) -> Tensor:
    """Return the symmetric part of ``(..., n, n)``."""
    return 0.5 * (matrix + matrix.mT)


def psd_factor(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    r"""Factor positive semi-definite matrices, singular ones included.

    Cholesky decomposition that postpones tiny pivots and stops at the numerical rank:

    .. math:: M = L L^\top + E,\qquad |E|\le\mathtt{tolerance}\cdot\max_i M_{ii}.

    Rows keep their order, so :math:`L` is a column-permuted triangular matrix, and columns beyond the rank
    are zero. Differentiable; directions of zero variance pass no gradient.

    Args:
        matrix: symmetric ``(..., n, n)``.
        tolerance: pivots below ``tolerance * max diagonal`` count as zero. Default ``n`` machine epsilons.

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
        tolerance = max(size, 4) * torch.finfo(matrix.dtype).eps
    rest = matrix
    floor = tolerance * matrix.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(0.0).detach()
    columns = []
    for _ in range(size):
        diagonal = rest.diagonal(dim1=-2, dim2=-1)
        # Natural order unless a pivot is tiny: ties don't reorder, so draws stay smooth in parameters.
        bar = torch.maximum(_THRESHOLD * diagonal.detach().amax(-1), floor)
        eligible = diagonal.detach() > bar[..., None]
        index = eligible.to(torch.uint8).argmax(-1, keepdim=True)
        column = rest.gather(-1, index[..., None].expand(*rest.shape[:-1], 1)).squeeze(-1)
        pivot = diagonal.gather(-1, index).squeeze(-1)
        keep = eligible.any(-1)
        scale = torch.where(keep, pivot, torch.ones_like(pivot)).rsqrt()
        column = torch.where(keep[..., None], column * scale[..., None], torch.zeros_like(column))
        rest = rest - column[..., :, None] * column[..., None, :]
        columns.append(column)
    return torch.stack(columns, -1)
