"""Sums of a function over the eigenvalues of Hermitian matrices, with two derivatives also where eigenvalues coincide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SpectralFunction", "spectral_sum"]

# Eigenvalues that differ by less than this share of them have the derivative in between for their divided difference.
_NEAR = 1e-5


@dataclass(frozen=True)
class SpectralFunction:
    """A function of an eigenvalue with its first two derivatives, each on tensors of any shape."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]


def spectral_sum(matrix: Tensor, function: SpectralFunction) -> Tensor:
    r"""Return :math:`\operatorname{Tr}f(A)` of Hermitian matrices ``(*B, d, d)``, as ``(*B,)``.

    Its derivative is :math:`f'(A)`, and that of :math:`f'(A)` has divided differences of :math:`f'` at pairs of eigenvalues, in which
    nothing is singular where two coincide; the derivatives of eigenvalues themselves are. Third derivatives need different ones.

    Reference:
        Daleckii and Krein, AMS Translations 47, 1 (1965).
    """
    total: Tensor = _Sum.apply(matrix, function)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor, function: SpectralFunction) -> Tensor:
        return function.value(torch.linalg.eigvalsh(matrix)).sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.save_for_backward(inputs[0])
        ctx.function = inputs[1]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        return slope[..., None, None] * _Slope.apply(matrix, ctx.function), None


class _Slope(torch.autograd.Function):
    """The matrix function f' of Hermitian matrices."""

    @staticmethod
    def forward(matrix: Tensor, function: SpectralFunction) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * function.slope(values)[..., None, :]) @ vectors.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.save_for_backward(inputs[0])
        ctx.function = inputs[1]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        values, vectors = torch.linalg.eigh(matrix)
        first, second = values[..., :, None], values[..., None, :]
        near = (first - second).abs() <= _NEAR * torch.maximum(first.abs(), second.abs())
        rise = ctx.function.slope(first) - ctx.function.slope(second)
        # (f'(a) - f'(b)) / (a - b), f'' in the middle where a and b coincide
        ratio = rise / torch.where(near, 1.0, first - second)
        quotient = torch.where(near, ctx.function.curvature((first + second) / 2), ratio)
        inner = vectors.mH @ (0.5 * (slope + slope.mH)) @ vectors
        return vectors @ (quotient * inner) @ vectors.mH, None
