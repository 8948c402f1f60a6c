"""The Fokker-Planck operator of an SDE."""

from __future__ import annotations

from torch import Tensor

from stochdyn.core.forward.continuity import TransportOperator
from stochdyn.core.forward.divergences import pull_back
from stochdyn.core.sde.coefficients import Coefficient, Diagonal, Scalar
from stochdyn.core.sde.control import Control
from stochdyn.core.sde.covariance import covariance_divergence
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError

__all__ = ["FokkerPlanck"]


class FokkerPlanck(TransportOperator):
    r"""The Fokker-Planck operator of an SDE, with any diffusion, of state or not.

    .. math::
        L^*\rho = -\nabla\cdot(f\rho) + \tfrac12\sum_{ij}\partial_i\partial_j(D_{ij}\rho),\qquad D=GG^\top,

    that is transport along the velocity of the probability flow,
    :math:`v = f - \tfrac12\nabla\cdot D - \tfrac12 D\,\nabla\log\rho`.

    Args:
        sde: An equation driven by Brownian motion. A control's drift is part of ``f``; its precision plays no
            part, because it vanishes in continuous time.

    Raises:
        InvalidInputError: If the noise has memory, since the state alone then has no forward equation.

    Example:
        >>> import torch
        >>> from stochdyn.core import GaussianFlow
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
                got=f"{type(sde.noise).__name__} with {sde.noise.num_states} memory states per channel",
            )
        if sde.control is not None and type(sde.control).shape_increment is not Control.shape_increment:
            raise InvalidInputError(
                "this control acts on the increments of a grid, so it has no forward equation",
                got=type(sde.control).__name__,
            )
        self.sde = sde

    @property
    def random_velocity(self) -> bool:
        """Whether :meth:`velocity` makes use of a probe."""
        return self.sde.state_dependent

    def _drift(self, t: Tensor, x: Tensor, coefficient: Coefficient) -> Tensor:
        drift = self.sde.drift(t, x)
        control = self.sde.control
        if control is None or control.drift is None:
            return drift
        return drift + coefficient.apply(control.drift(t, x))

    def velocity(self, t: Tensor, x: Tensor, score: Tensor, probe: Tensor | None = None) -> Tensor:
        """Return the velocity ``(..., d)`` of a density with the given score ``(..., d)``."""
        coefficient = self.sde.diffusion(t, x)
        # v = f + G u - (G G^T s + div G G^T) / 2.
        spread = _apply_covariance(coefficient, score)
        if self.sde.state_dependent:
            spread = spread + covariance_divergence(coefficient, x, probe)
        return self._drift(t, x, coefficient) - 0.5 * spread

    def flux(self, t: Tensor, x: Tensor, density: Tensor) -> Tensor:
        """Return the probability current ``(..., d)`` of a density ``(...)`` computed from ``x``."""
        coefficient = self.sde.diffusion(t, x)
        # J = (f + G u) rho - (G G^T grad rho + rho div G G^T) / 2 = v rho.
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
