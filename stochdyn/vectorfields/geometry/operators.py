"""Covariance operators that stay low-rank, or become dense, when kernels are added."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    LinearOperator,
    LowRankRootLinearOperator,
    RootLinearOperator,
)

__all__ = ["DenseCovariance", "FeatureCovariance"]

# linear_operator adds a root by updating a Cholesky factor, which fails for a matrix without full rank.


class FeatureCovariance(LowRankRootLinearOperator):
    """The covariance ``Z Z'`` of features ``Z (N, k)``; the sum of two has the features of both."""

    def __add__(self, other: Any) -> LinearOperator:
        if isinstance(other, FeatureCovariance):
            return FeatureCovariance(torch.cat([self.root.to_dense(), other.root.to_dense()], -1))
        if isinstance(other, DenseLinearOperator):
            return DenseCovariance(self.to_dense() + other.to_dense())
        return super().__add__(other)


class DenseCovariance(DenseLinearOperator):
    """A dense covariance; so are its sums."""

    def __add__(self, other: Any) -> LinearOperator:
        if isinstance(other, DenseLinearOperator | RootLinearOperator):
            return DenseCovariance(self.to_dense() + other.to_dense())
        return super().__add__(other)
