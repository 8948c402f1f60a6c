"""Products, inverses and factors of very many small matrices whose batch axis comes last.

Shapes are ``(..., d, d, P)`` and ``(..., d, P)``. With the long axis innermost every product is a handful of
vectorised operations, several times faster than batched multiplication of 2 x 2 matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cholesky", "identity", "inverse", "log_det", "mm", "mt", "mv", "quadratic"]


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b``."""
    out = a[..., :, 0, None, :] * b[..., None, 0, :, :]
    for j in range(1, a.shape[-2]):
        out = torch.addcmul(out, a[..., :, j, None, :], b[..., None, j, :, :])
    return out


def mv(a: Tensor, v: Tensor) -> Tensor:
    """Return ``a v``."""
    out = a[..., :, 0, :] * v[..., None, 0, :]
    for j in range(1, a.shape[-2]):
        out = torch.addcmul(out, a[..., :, j, :], v[..., None, j, :])
    return out


def mt(a: Tensor) -> Tensor:
    """Return the transpose."""
    return a.transpose(-3, -2)


def quadratic(v: Tensor, a: Tensor) -> Tensor:
    """Return ``v^T a v``, ``(..., P)``."""
    return (v * mv(a, v)).sum(-2)


def identity(like: Tensor) -> Tensor:
    """Return the identity ``(d, d, 1)`` that fits ``like (..., d, d, P)``."""
    return torch.eye(like.shape[-2], dtype=like.dtype, device=like.device)[..., None]


def inverse(a: Tensor) -> Tensor:
    """Return the inverse of symmetric positive definite matrices."""
    size = a.shape[-2]
    if size == 1:
        return a.reciprocal()
    if size == 2:
        first, off, last = a[..., 0, 0, :], a[..., 0, 1, :], a[..., 1, 1, :]
        det = first * last - off * off
        rows = (torch.stack((last, -off), -2), torch.stack((-off, first), -2))
        return torch.stack(rows, -3) / det[..., None, None, :]
    usual = a.movedim(-1, -3)
    factor, failed = torch.linalg.cholesky_ex(usual)
    if bool(failed.any()):
        # covariances so flat that rounding made them indefinite: a floor relative to the largest variance
        floor = torch.finfo(a.dtype).eps ** 0.75 * usual.diagonal(dim1=-2, dim2=-1).amax(-1)
        eye = torch.eye(size, dtype=a.dtype, device=a.device)
        factor = torch.linalg.cholesky(usual + torch.where(failed > 0, floor, 0.0)[..., None, None] * eye)
    return torch.cholesky_inverse(factor).movedim(-3, -1)


def log_det(a: Tensor) -> Tensor:
    """Return the log determinant of symmetric positive definite matrices, ``(..., P)``."""
    size = a.shape[-2]
    if size == 1:
        return a[..., 0, 0, :].log()
    if size == 2:
        return (a[..., 0, 0, :] * a[..., 1, 1, :] - a[..., 0, 1, :] ** 2).log()
    return 2 * cholesky(a).diagonal(dim1=-3, dim2=-2).log().sum(-1)


def cholesky(a: Tensor) -> Tensor:
    """Return the lower factor; pivots that rounding has made negative count as zero."""
    size = a.shape[-2]
    factor = torch.zeros_like(a)
    for j in range(size):
        known = factor[..., j, :j, :]
        pivot = (a[..., j, j, :] - known.square().sum(-2)).clamp_min(0.0).sqrt()
        factor[..., j, j, :] = pivot
        safe = torch.where(pivot > 0, pivot, torch.ones_like(pivot))
        for i in range(j + 1, size):
            rest = a[..., i, j, :] - (factor[..., i, :j, :] * known).sum(-2)
            factor[..., i, j, :] = torch.where(pivot > 0, rest / safe, torch.zeros_like(rest))
    return factor
