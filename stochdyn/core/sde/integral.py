"""Integrals along a path as further components of its state, for data that are sums over intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn.core.sde.coefficients import Coefficient, Matrix
from stochdyn.errors import InvalidInputError, ShapeError

if TYPE_CHECKING:
    from stochdyn.core.sde.control import Field
    from stochdyn.core.sde.equation import SDE

__all__ = ["IntegralDrift", "StateOnly", "padded", "state_dim"]


def padded(matrix: Tensor, rows: int) -> Tensor:
    """Return a matrix ``(..., d, m)`` with ``rows`` rows of zeros below."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows))


class IntegralDrift(nn.Module):
    """The drift of a state ``(..., d)`` followed by integrals of a function of it.

    Args:
        sde: The equation of the state.
        integrand: The function ``(t, x) -> (..., q)`` that is integrated.
        dim: The number d of components of the state.
    """

    def __init__(self, sde: SDE, integrand: Field, dim: int) -> None:
        super().__init__()
        self.sde, self.integrand, self.dim = sde, integrand, dim
        probe = _probed(integrand, dim)
        if not isinstance(probe, Tensor) or probe.ndim == 0:
            raise ShapeError(
                "integrand must return one value per integral",
                got=tuple(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__,
                expected="(..., q)",
                hint="keep the axis of components: x[..., :1] and not x[..., 0]",
            )
        self.num_integrals = probe.shape[-1]

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the drift ``(..., d + q)``."""
        if z.shape[-1] != self.dim + self.num_integrals:
            raise ShapeError(
                "the state must be followed by its integrals",
                got=f"{z.shape[-1]} components",
                expected=f"{self.dim} + {self.num_integrals}",
                hint="start the integrals at zero: torch.cat([x0, torch.zeros(q)])",
            )
        x = z[..., : self.dim]
        move, gain = self.sde.drift(t, x), self.integrand(t, x)
        batch = torch.broadcast_shapes(move.shape[:-1], gain.shape[:-1], z.shape[:-1])
        return torch.cat([move.expand(*batch, self.dim), gain.expand(*batch, self.num_integrals)], -1)

    def diffusion(self, t: Tensor, z: Tensor) -> Coefficient:
        """Return the diffusion of the state, with no noise on the integrals, ``(..., d + q, m)``."""
        g = self.sde.diffusion(t, z[..., : self.dim])
        return Matrix(padded(g.matrix(self.dim), self.num_integrals))


def _probed(integrand: Field, dim: int) -> Any:
    """Return what a function gives at a state of zeros, in the precision that its parameters ask for."""
    with torch.no_grad():
        try:
            return integrand(torch.zeros(()), torch.zeros(dim))
        except RuntimeError:
            zero = torch.zeros(dim, dtype=torch.float64)
            return integrand(zero.sum(), zero)


class StateOnly(nn.Module):
    """A function of time and state, given a state followed by integrals."""

    def __init__(self, field: Field, dim: int) -> None:
        super().__init__()
        self.field, self.dim = field, dim

    def forward(self, t: Tensor, z: Tensor) -> Any:
        """Return what the function gives at the state alone."""
        return self.field(t, z[..., : self.dim])


def state_dim(coefficient: Coefficient | None) -> int:
    """Return the number of components that a constant diffusion tells.

    Raises:
        InvalidInputError: If it doesn't.
    """
    if coefficient is not None and coefficient.value.ndim:
        size = coefficient.value.shape[-2 if isinstance(coefficient, Matrix) else -1]
        if size > 1:
            return size
    raise InvalidInputError("dim must be given where the diffusion doesn't tell it", expected="an integer")
