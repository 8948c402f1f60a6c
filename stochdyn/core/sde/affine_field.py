"""A drift that says of itself that it is affine, so that steps of its equation can be exact."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

__all__ = ["AffineField"]


class AffineField(nn.Module, ABC):
    r"""The drift :math:`b(x)=Ax+a`, the same at all times. Subclasses say what A and a are, and may be trained.

    Derive a drift from it where paths are wanted in long steps: :class:`~stochdyn.core.Exact` then takes them without error.

    Example:
        >>> import torch
        >>> from stochdyn.core import AffineField
        >>> class Relaxation(AffineField):
        ...     def affine(self):
        ...         return -2.0 * torch.eye(1), torch.ones(1)
        >>> Relaxation()(torch.tensor(0.0), torch.tensor([3.0]))
        tensor([-5.])
    """

    @abstractmethod
    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the matrix A ``(*batch, d, d)``, in 1/time, and the offset a ``(*batch, d)``."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` at ``x (..., d)``."""
        matrix, offset = self.affine()
        if matrix.ndim == 2:
            return x @ matrix.mT + offset
        return (matrix @ x.unsqueeze(-1)).squeeze(-1) + offset
