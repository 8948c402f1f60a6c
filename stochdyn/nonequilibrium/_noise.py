"""Half the covariance of an equation's noise at given points, and its inverse on the directions that noise reaches."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.core.sde.coefficients import Coefficient, Diagonal, Scalar

__all__ = ["HalfCovariance"]


class HalfCovariance:
    r"""The matrix :math:`D=GG^\top/2` at points, as products with it and with a generalised inverse :math:`D^+`.

    For vectors in the range of D, which are all that thermodynamics asks about, every generalised inverse gives the same
    :math:`u\cdot D^+w`. The inverse is taken in units of each component's own noise, so that components may be in any units.

    Args:
        coefficient: The diffusion at the points.
        dim: The number of components ``d``.
    """

    def __init__(self, coefficient: Coefficient, dim: int) -> None:
        self._matrix: Tensor | None = None
        self._inverse: Tensor | None = None
        if isinstance(coefficient, Scalar | Diagonal):
            value = coefficient.value
            if isinstance(coefficient, Scalar):
                value = value.unsqueeze(-1)
            self.variance = 0.5 * value.square()
            return
        d = 0.5 * coefficient.covariance(dim)
        self.variance = d.diagonal(dim1=-2, dim2=-1)
        self._matrix = d

    def times(self, v: Tensor) -> Tensor:
        """Return ``D v``, ``(..., d)``."""
        if self._matrix is None:
            return self.variance.to(v) * v
        return (self._matrix.to(v) @ v.unsqueeze(-1)).squeeze(-1)

    def against(self, v: Tensor) -> Tensor:
        """Return ``D⁺ v``, ``(..., d)``."""
        if self._matrix is None:
            still = self.variance == 0
            return torch.where(still, 0.0, v / torch.where(still, 1.0, self.variance).to(v))
        if self._inverse is None:
            # D = u C u with C a matrix of correlations, whose rank is decided without units: D⁺ = C⁺ / (u u).
            unit = self._unit()
            scale = unit.unsqueeze(-1) * unit.unsqueeze(-2)
            rtol = 1e-10 if unit.dtype == torch.float64 else 1e-5
            self._inverse = torch.linalg.pinv(self._matrix / scale, rtol=rtol, hermitian=True) / scale
        return (self._inverse.to(v) @ v.unsqueeze(-1)).squeeze(-1)

    def _unit(self) -> Tensor:
        return torch.where(self.variance > 0, self.variance, 1.0).sqrt()

    def outside(self, v: Tensor, size: Tensor) -> Tensor:
        """Return which components of vectors point where no noise acts, ``(d,)`` of booleans.

        Args:
            v: The vectors, ``(..., d)``.
            size: The sizes of the terms that ``v`` is made of, ``(..., d)``, against which rounding is judged.
        """
        left = (v - self.times(self.against(v))).detach().abs()
        reached = (self.variance > 0).expand_as(v)
        # A noiseless component is judged in its own unit; the others in units of their noise, among themselves.
        unit = self._unit().to(v)
        noisy = torch.where(reached, size.detach() / unit, 0.0).amax(-1, keepdim=True)
        scale = torch.where(reached, noisy * unit, size.detach())
        axes = tuple(range(v.ndim - 1))
        tolerance = 1e-6 if v.dtype == torch.float64 else 1e-3
        if axes:
            left, scale = left.amax(axes), scale.amax(axes)
        return left > tolerance * scale
