"""Costs of transport: a matrix, or points from which blocks of rows are computed whenever they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CostRows", "DenseCost", "PointCost", "row_chunk", "row_chunks"]

_CHUNK = 2**20


class CostRows(ABC):
    """A matrix ``(*B, n, m)`` of which blocks of rows can be had.

    Attributes:
        shape: The shape ``(*B, n, m)``.
        dtype: The precision.
        device: Where it lives.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def rows(self, index: slice | Tensor) -> Tensor:
        """Return rows ``(*B, k, m)``."""

    @abstractmethod
    def transposed(self) -> CostRows:
        """Return the transpose."""

    @abstractmethod
    def detach(self) -> CostRows:
        """Return the same cut off from the graph."""

    @property
    @abstractmethod
    def requires_grad(self) -> bool:
        """Whether the cost has a gradient."""

    def dense(self) -> Tensor:
        """Return the whole matrix."""
        return torch.cat([self.rows(slice(i, i + row_chunk(self))) for i in row_chunks(self)], -2)

    def spread(self) -> float:
        """Return the largest less the smallest entry."""
        parts = [torch.stack(self.rows(slice(i, i + row_chunk(self))).aminmax()) for i in row_chunks(self)]
        ends = torch.stack(parts)
        return float(ends[:, 1].max() - ends[:, 0].min())


def row_chunks(cost: CostRows) -> range:
    """Return the starts of blocks of rows that hold about a million entries each."""
    return range(0, cost.shape[-2], row_chunk(cost))


def row_chunk(cost: CostRows) -> int:
    """Return the number of rows of a block."""
    return max(1, _CHUNK * cost.shape[-2] // max(cost.shape.numel(), 1))


class DenseCost(CostRows):
    """A matrix in memory.

    Use it while the matrix fits into memory: every product with it is one kernel.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def rows(self, index: slice | Tensor) -> Tensor:
        """Return rows ``(*B, k, m)``."""
        return self.matrix[..., index, :]

    def transposed(self) -> DenseCost:
        """Return the transpose."""
        return DenseCost(self.matrix.mT)

    def detach(self) -> DenseCost:
        """Return the same cut off from the graph."""
        return DenseCost(self.matrix.detach())

    @property
    def requires_grad(self) -> bool:
        """Whether the cost has a gradient."""
        return self.matrix.requires_grad

    def dense(self) -> Tensor:
        """Return the whole matrix."""
        return self.matrix


class PointCost(CostRows):
    """A function of two clouds ``(*B, n, d)`` and ``(*B, m, d)``, evaluated block by block.

    Use it for clouds whose matrix is too large, at the price of computing it anew for every product.
    """

    def __init__(self, x: Tensor, y: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.x, self.y, self.function = x, y, function
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        self.shape = torch.Size((*batch, x.shape[-2], y.shape[-2]))
        self.dtype, self.device = x.dtype, x.device

    def rows(self, index: slice | Tensor) -> Tensor:
        """Return rows ``(*B, k, m)``."""
        return self.function(self.x[..., index, :], self.y)

    def transposed(self) -> PointCost:
        """Return the transpose."""
        own = self.function
        return PointCost(self.y, self.x, lambda y, x: own(x, y).mT)

    def detach(self) -> PointCost:
        """Return the same cut off from the graph."""
        return PointCost(self.x.detach(), self.y.detach(), self.function)

    @property
    def requires_grad(self) -> bool:
        """Whether the cost has a gradient."""
        return self.x.requires_grad or self.y.requires_grad
