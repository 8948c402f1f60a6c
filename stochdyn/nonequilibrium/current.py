"""Steady currents of any diffusion from its score: velocity, local rates, and entropy production with its sum rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_callable, check_type
from stochdyn.core.forward.divergences import divergence
from stochdyn.core.law.path import Estimate
from stochdyn.core.sde.covariance import covariance_divergence
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import DiffusionMismatchError, InvalidInputError, ShapeError
from stochdyn.nonequilibrium.linear import as_points, check_parity

__all__ = ["SteadyCurrent", "entropy_production_rate", "sum_rule"]


class SteadyCurrent:
    r"""The probability current of a steady state, from the equation and the score of its density.

    .. math:: v=f_{irr}-D\nabla\log\rho,\qquad f=F-\nabla\cdot D,\qquad D=\tfrac12GG^\top

    Args:
        sde: the equation, a control included.
        score: ``score(x)``, or ``score(t, x)`` with any t, of the steady density: ``(..., d)``; or an object with such a ``score``.
        parity: ``(d,)`` the sign of each component under time reversal, -1 for momenta; all even if None.

    Example:
        >>> from stochdyn.core import SDE
        >>> turn = torch.tensor([[-1.0, 1.5], [-1.5, -1.0]]).double()
        >>> current = SteadyCurrent(SDE(lambda t, x: x @ turn.mT, 2.0**0.5), lambda x: -x)
        >>> current.local(torch.tensor([[1.0, 0.0]]).double())
        tensor([2.2500], dtype=torch.float64)
    """

    def __init__(self, sde: SDE, score: Any, parity: object = None) -> None:
        check_type(sde, SDE, "sde")
        self.sde, self._parity = sde, parity
        function = getattr(score, "score", score)
        check_callable(function, "score", "a function, or an object with one")
        self._score: Callable[..., Tensor] = function

    def _at(self, x: object) -> Tensor:
        """Return states ``x (..., d)`` that the equation takes."""
        points = as_points(x)
        self.sde.check(torch.zeros((), dtype=points.dtype, device=points.device), points)
        return points

    def score(self, x: Tensor) -> Tensor:
        """Return the score ``(..., d)``."""
        return self._score_at(self._at(x))

    def _score_at(self, x: Tensor) -> Tensor:
        try:
            return self._score(x)
        except TypeError:
            return self._score(torch.zeros((), dtype=x.dtype, device=x.device), x)

    def _force(self, x: Tensor) -> Tensor:
        """Return ``f = F - div D`` at points, with the control's drift."""
        return thermodynamic_force(self.sde, x)

    def irreversible(self, x: Tensor) -> Tensor:
        """Return the part of the force that is even under time reversal, ``(..., d)``."""
        return self._irreversible(self._at(x))

    def _irreversible(self, x: Tensor) -> Tensor:
        signs = check_parity(self._parity, x.shape[-1], x)
        if bool((signs > 0).all()):
            return self._force(x)
        return 0.5 * (self._force(x) + signs * self._force(signs * x))

    def _covariance(self, x: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        full = self.sde.diffusion(zero, x).covariance(x.shape[-1])
        return 0.5 * full.expand(*x.shape, x.shape[-1])

    def velocity(self, x: Tensor) -> Tensor:
        """Return the irreversible velocity of the current, ``(..., d)``.

        Raises:
            DiffusionMismatchError: if an irreversible force acts where there is no noise, so that entropy production is infinite.
        """
        return self._velocity_and_force(self._at(x))[0]

    def _velocity_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity v = f_irr - D s of the current, and the thermodynamic force D⁺v."""
        v = self._irreversible(x) - (self._covariance(x) @ self._score_at(x)[..., None])[..., 0]
        return v, self._against(x, v)

    def _against(self, x: Tensor, vector: Tensor) -> Tensor:
        """Return ``D⁺`` times an irreversible vector, which must lie in the range of ``D``."""
        d = self._covariance(x)
        force = (torch.linalg.pinv(d, rtol=1e-10, hermitian=True) @ vector[..., None])[..., 0]
        outside = (d @ force[..., None])[..., 0] - vector
        if float(outside.detach().abs().amax()) > 1e-6 * float(vector.detach().abs().amax()):
            raise DiffusionMismatchError(
                "the entropy production rate is infinite: an irreversible force acts where there is no noise",
                hint="momenta are odd under time reversal: give parity=..., -1 for each of them",
            )
        return force

    def local(self, x: Tensor, by: Mapping[str, list[int]] | None = None) -> Tensor | dict[str, Tensor]:
        r"""Return the local rate :math:`v\cdot D^+v` of entropy production, ``(...)``, in 1/time.

        Args:
            x: ``(..., d)``.
            by: groups of components by name; then a dict of the groups' parts, which add up to the whole. Each part's mean is
                positive only if noise doesn't couple the groups.
        """
        x = self._at(x)
        v, force = self._velocity_and_force(x)
        terms = v * force
        if by is None:
            return terms.sum(-1)
        return {name: terms[..., list(index)].sum(-1) for name, index in by.items()}

    def medium(self, x: Tensor) -> Tensor:
        r"""Return the rate :math:`v\cdot D^+f` at which entropy flows into the medium, ``(...)``."""
        x = self._at(x)
        # D⁺ is symmetric: v D⁺f = (D⁺v) f.
        return (self._velocity_and_force(x)[1] * self._irreversible(x)).sum(-1)

    def system(self, x: Tensor) -> Tensor:
        r"""Return the rate :math:`-v\cdot\nabla\log\rho` at which the system's entropy changes, ``(...)``; its mean is zero."""
        x = self._at(x)
        return -(self._velocity_and_force(x)[0] * self._score_at(x)).sum(-1)


def thermodynamic_force(sde: SDE, x: Tensor) -> Tensor:
    """Return ``F - div D`` at ``x (..., d)``, with the drift of a control."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)

    def drift(y: Tensor) -> Tensor:
        out = sde.drift(zero, y)
        control = sde.control
        if control is not None and control.drift is not None:
            out = out + sde.diffusion(zero, y).apply(control.drift(zero, y))
        return out

    if not sde.state_dependent:
        return drift(x)
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        correction = covariance_divergence(sde.diffusion(zero, y), y)
    return drift(x) - 0.5 * (correction if x.requires_grad else correction.detach())


def entropy_production_rate(current: SteadyCurrent, x: Tensor) -> Estimate:
    """Return the entropy production rate as the mean local rate over draws ``x (n, d)`` of the steady state.

    With a learned score the estimate is too large by the mean square of the score's error; :func:`sum_rule` needs no score, and
    the two agree within their errors where the score is right.
    """
    check_type(current, SteadyCurrent, "current")
    return Estimate.of(current.local(_draws(x)).detach())  # type: ignore[union-attr]


def sum_rule(sde: SDE, x: Tensor, parity: object = None) -> Estimate:
    r"""Return the entropy production rate from the equation and draws of its steady state alone.

    .. math:: \sigma=E\big[f_{irr}\cdot D^+f_{irr}+\nabla\cdot f_{irr}-\nabla\cdot f_{rev}\big]

    Args:
        sde: the equation.
        x: ``(n, d)`` independent draws of the steady state.
        parity: as in :class:`SteadyCurrent`; with odd components the noise must be constant.
    """
    check_type(sde, SDE, "sde")
    points = _draws(x)
    signs = check_parity(parity, points.shape[-1], points)
    even = bool((signs > 0).all())
    if not even and sde.state_dependent:
        raise InvalidInputError("odd components need constant noise here")
    current = SteadyCurrent(sde, torch.zeros_like, parity)
    irreversible = current.irreversible(points)
    square = (irreversible * current._against(points, irreversible)).sum(-1)
    spread = divergence(current._irreversible, points)
    if not even:
        spread = 2 * spread - divergence(lambda y: thermodynamic_force(sde, y), points)
    return Estimate.of((square + spread).detach())


def _draws(x: object) -> Tensor:
    points = as_tensor(x, "x", 2, "(n, d)")
    if len(points) < 2:
        raise ShapeError("x needs at least two draws", got=tuple(points.shape))
    return points.detach()
