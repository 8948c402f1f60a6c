"""Forward (Kolmogorov) operators: Fokker-Planck here, transport and master equations from their files."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.core.coefficients import Coefficient, Diagonal, Scalar
from stochdyn.core.divergence import jacobian_contraction, pull_back
from stochdyn.core.master import MasterEquation
from stochdyn.core.master_terms import MatrixMasterEquation, SparseMasterEquation
from stochdyn.core.operator import ForwardOperator
from stochdyn.core.sde import SDE, Control
from stochdyn.core.transport_equation import ContinuityEquation, TransportOperator
from stochdyn.errors import InvalidInputError

__all__ = [
    "ContinuityEquation",
    "FokkerPlanck",
    "ForwardOperator",
    "MasterEquation",
    "MatrixMasterEquation",
    "SparseMasterEquation",
    "TransportOperator",
    "covariance_divergence",
]


class FokkerPlanck(TransportOperator):
    r"""The Fokker-Planck operator of an SDE, with any diffusion, of state or not.

    .. math::
        L^*\rho = -\nabla\cdot(f\rho) + \tfrac12\sum_{ij}\partial_i\partial_j(D_{ij}\rho),\qquad D=GG^\top,

    that is transport along the velocity of the probability flow,
    :math:`v = f - \tfrac12\nabla\cdot D - \tfrac12 D\,\nabla\log\rho`.

    Args:
        sde: an equation driven by Brownian motion. A control's drift is part of ``f``; its precision plays no
            part, because it vanishes in continuous time.

    Raises:
        InvalidInputError: if the noise has memory, since the state alone then has no forward equation.

    Example:
        >>> from stochdyn.core.flow import GaussianFlow
        >>> still = GaussianFlow(lambda t: torch.zeros(*t.shape, 2), lambda t: 0.5 * torch.eye(2))
        >>> operator = FokkerPlanck(SDE(lambda t, x: -x, 1.0))
        >>> operator.residual(still, 0.0, torch.ones(1, 2), stationary=True).abs() < 1e-6
        tensor([True])

    Reference:
        Risken, "The Fokker-Planck Equation", 1989, chapter 4.
    """

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        if not isinstance(sde, SDE):
            raise InvalidInputError("sde must be an SDE", got=type(sde).__name__)
        if sde.noise.num_states:
            raise InvalidInputError(
                "noise with memory has no forward equation in the state alone",
                got=f"{type(sde.noise).__name__} with {sde.noise.num_states} memory states a channel",
            )
        if sde.control is not None and type(sde.control).shape_increment is not Control.shape_increment:
            raise InvalidInputError(
                "this control acts on the increments of a grid, so it has no forward equation",
                got=type(sde.control).__name__,
            )
        self.sde = sde

    @property
    def random_velocity(self) -> bool:
        """See :meth:`TransportOperator.random_velocity`."""
        return self.sde.state_dependent

    def _drift(self, t: Tensor, x: Tensor, coefficient: Coefficient) -> Tensor:
        drift = self.sde.drift(t, x)
        control = self.sde.control
        if control is None or control.drift is None:
            return drift
        return drift + coefficient.apply(control.drift(t, x))

    def velocity(self, t: Tensor, x: Tensor, score: Tensor, probe: Tensor | None = None) -> Tensor:
        """See :meth:`TransportOperator.velocity`."""
        coefficient = self.sde.diffusion(t, x)
        spread = _apply_covariance(coefficient, score)
        if self.sde.state_dependent:
            spread = spread + covariance_divergence(coefficient, x, probe)
        return self._drift(t, x, coefficient) - 0.5 * spread

    def flux(self, t: Tensor, x: Tensor, density: Tensor) -> Tensor:
        """See :meth:`TransportOperator.flux`."""
        coefficient = self.sde.diffusion(t, x)
        spread = _apply_covariance(coefficient, pull_back(density, x))
        if self.sde.state_dependent:
            spread = spread + covariance_divergence(coefficient, x) * density.unsqueeze(-1)
        return self._drift(t, x, coefficient) * density.unsqueeze(-1) - 0.5 * spread


def _apply_covariance(coefficient: Coefficient, v: Tensor) -> Tensor:
    if isinstance(coefficient, Diagonal):
        return coefficient.value.square() * v
    if isinstance(coefficient, Scalar):
        return coefficient.apply(coefficient.apply(v))
    g = coefficient.matrix(v.shape[-1])
    return (g @ (g.mT @ v.unsqueeze(-1))).squeeze(-1)


def covariance_divergence(coefficient: Coefficient, x: Tensor, probe: Tensor | None = None) -> Tensor:
    r"""Divergence of the noise covariance, which carries the noise-induced drift.

    .. math:: (\nabla\cdot D)_i = \sum_j\partial_j D_{ij},\qquad D = GG^\top

    Args:
        coefficient: the diffusion, computed from ``x``.
        x: ``(..., d)`` points, with ``requires_grad``.
        probe: ``(..., d)`` vectors of unit covariance; if given, the unbiased estimate
            :math:`(\partial_\epsilon D)\,\epsilon` from one directional derivative takes the place of ``d``
            of them.

    Returns:
        ``(..., d)``; zero where the coefficient doesn't depend on ``x``.

    Example:
        >>> x = torch.tensor([[3.0]], requires_grad=True)
        >>> covariance_divergence(Diagonal(x), x).detach()
        tensor([[6.]])
    """
    d = x.shape[-1]
    if isinstance(coefficient, Scalar):
        return pull_back(coefficient.value.square(), x)
    if isinstance(coefficient, Diagonal):
        values = coefficient.value.square().expand_as(x)
    else:
        values = coefficient.covariance(d).expand(*x.shape, d)
    if probe is None:
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        directions = eye.reshape(d, *(1,) * (x.ndim - 1), d).expand(d, *x.shape)
        slopes = jacobian_contraction(values, x, directions)
        if isinstance(coefficient, Diagonal):
            return torch.stack([slopes[i, ..., i] for i in range(d)], -1)
        return torch.stack([slopes[j, ..., j] for j in range(d)]).sum(0)
    slope = jacobian_contraction(values, x, probe[None])[0]
    if isinstance(coefficient, Diagonal):
        return slope * probe
    return (slope @ probe.unsqueeze(-1)).squeeze(-1)
