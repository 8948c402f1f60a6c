"""Entropy production rates as means over draws: with the score, by the sum rule without it, and split by Hatano and Sasa."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_type
from stochdyn.core.forward.asymmetry import conservativity
from stochdyn.core.forward.divergences import divergence
from stochdyn.core.law.path import Estimate
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError
from stochdyn.nonequilibrium.current import (
    Groups,
    HasScore,
    ScoreFunction,
    SteadyCurrent,
    as_score,
    check_reached,
)

__all__ = ["HatanoSasa", "entropy_production_rate", "hatano_sasa", "sum_rule"]


def entropy_production_rate(
    current: SteadyCurrent, x: Tensor, by: Groups | None = None
) -> Estimate | dict[str, Estimate]:
    r"""Return the entropy production rate :math:`E[v\cdot D^+v]`, the mean local rate over draws of the steady state.

    With a learnt score whose error is a gradient the estimate is too large by the mean square of that error; a network that can't follow
    the current everywhere makes it too small by the mean square of what is missing. :func:`sum_rule` needs no score, and the two agree
    within their errors where the score is right. The score's estimate scatters much less.

    Args:
        current: The steady current.
        x: Independent draws of the steady state, ``(n, d)``.
        by: Named groups of components, for a rate per group; see :meth:`SteadyCurrent.local`.

    Raises:
        DiffusionMismatchError: If the rate is infinite.
    """
    check_type(current, SteadyCurrent, "current")
    rates = current.local(_draws(x), by)
    if isinstance(rates, dict):
        return {name: Estimate.of(values.detach()) for name, values in rates.items()}
    return Estimate.of(rates.detach())


def sum_rule(
    sde: SDE, x: Tensor, parity: object = None, base: HasScore | ScoreFunction | None = None
) -> Estimate:
    r"""Return the entropy production rate from the equation and draws of its steady state alone.

    .. math::
        \sigma=E\big[f_{irr}\cdot D^+f_{irr}+\nabla\cdot f_{irr}-\nabla\cdot f_{rev}\big]-E\big[f\cdot s_0+\nabla\cdot(Ds_0)\big]

    The first mean follows from :math:`\sigma=E[v\cdot D^+f_{irr}]` by integration by parts, so it is exact without a score, and the check
    of every learnt score. The second, with a ``base`` :math:`s_0=\nabla\varphi`, is the rate at which :math:`E\,\varphi` changes: zero in
    the steady state. It takes away the fluctuations that a conservative force causes, and most of the error of draws that come from a
    simulation in finite steps: under stiff forces the first mean alone is wrong by a large part of itself on draws of Euler's method.
    Where the two answers, without a base and with one, differ by more than their errors, the draws aren't those of the steady state.

    Args:
        sde: The equation, a control included.
        x: Independent draws of the steady state, ``(n, d)``.
        parity: The sign of each component under time reversal, ``(d,)``; all are even if None. With odd components the noise must be
            constant.
        base: A gradient that is near the score, such as conservative force over temperature, or a learnt potential's; in the forms that
            :class:`SteadyCurrent` takes. The answer is right with any, and the nearer, the smaller its error. None for the plain rule.

    Raises:
        InvalidInputError: If components are odd and the noise depends on the state, or ``base`` isn't a gradient.
        DiffusionMismatchError: If the rate is infinite.
    """
    check_type(sde, SDE, "sde")
    current = SteadyCurrent(sde, torch.zeros_like if base is None else as_score(base, "base"), parity)
    points = _draws(x)
    if current.signs(points) is not None and sde.state_dependent:
        raise InvalidInputError("odd components need constant noise here")
    irreversible, reversible, size = current._split(current._at(points))
    noise = current.noise(points)
    check_reached(noise, irreversible, size)
    values = (irreversible * noise.against(irreversible)).sum(-1)
    if base is not None:
        _check_gradient(lambda t, y: current._score_at(y), points)
        values = values - ((irreversible + reversible) * current._score_at(points)).sum(-1)

    def remainder(y: Tensor) -> Tensor:
        first, second, _ = current._split(y)
        rest = first - second
        return rest if base is None else rest - current.noise(y).times(current._score_at(y))

    # Without a graph: one through all the derivatives would be as many times larger as there are components.
    with torch.no_grad():
        spread = divergence(remainder, points)
    return Estimate.of(values.detach() + spread)


def _check_gradient(base: Callable[[Tensor, Tensor], Tensor], points: Tensor) -> None:
    """Raise InvalidInputError unless the Jacobian of ``base`` is symmetric at some of the draws."""
    share = conservativity(
        base, 0.0, points[:8], spread=points.std(0), generator=torch.Generator(points.device).manual_seed(0)
    ).share
    if float(share) > (1e-12 if points.dtype == torch.float64 else 1e-6):
        raise InvalidInputError(
            "base must be a gradient; its Jacobian isn't symmetric",
            got=f"an antisymmetric share of {float(share):.2g}",
            hint="use a conservative force over temperature, or SteadyScore(..., potential=True)",
        )


@dataclass(frozen=True)
class HatanoSasa:
    """The entropy production rate of a law on its way to, or driven away from, its steady state.

    Attributes:
        total: The whole rate.
        housekeeping: What keeps up the steady state of the moment.
        excess: What the distance from that steady state adds; at fixed parameters it is the rate at which the divergence from the steady
            state falls.
    """

    total: Estimate
    housekeeping: Estimate
    excess: Estimate


def hatano_sasa(
    sde: SDE,
    score: HasScore | ScoreFunction,
    steady_score: HasScore | ScoreFunction,
    x: Tensor,
    t: float = 0.0,
    parity: object = None,
) -> HatanoSasa:
    r"""Split the entropy production rate at a time into housekeeping and excess rates.

    .. math:: E|v_t|^2=E|v_{st}|^2+E|v_t-v_{st}|^2,\qquad v_t=f-D\nabla\log\rho_t,\quad v_{st}=f-D\nabla\log\rho_{st},

    with :math:`|v|^2=v\cdot D^+v` and means over the law at that time. The mixed term vanishes because the steady current has no
    divergence, so on draws the parts add up within their errors.

    Args:
        sde: The equation; where its coefficients depend on time, they are taken at ``t``.
        score: The score of the law at ``t``, in the forms that :class:`SteadyCurrent` takes.
        steady_score: The score of the steady state that the equation would have if its parameters stayed as they are at ``t``.
        x: Independent draws of the law at ``t``, ``(n, d)``.
        t: The time.
        parity: The sign of each component under time reversal; the split is defined for even components alone.

    Raises:
        UnavailableError: If a component is odd: the excess rate may be negative then, and the split loses its meaning.

    Reference:
        T. Hatano and S. Sasa, "Steady-state thermodynamics of Langevin systems", 2001.
    """
    points = _draws(x)
    now = SteadyCurrent(sde, score, parity, t)
    if now.signs(points) is not None:
        raise UnavailableError(
            "housekeeping and excess rates are defined for components that are even under time reversal",
            hint="entropy_production_rate gives the total rate with momenta",
        )
    steady = SteadyCurrent(sde, steady_score, None, t)
    now._at(points)
    here, there = now.evaluate(points), steady.evaluate(points)

    def size(v: Tensor, dual: Tensor) -> Estimate:
        return Estimate.of((v * dual).sum(-1).detach())

    return HatanoSasa(
        size(here.velocity, here.dual),
        size(there.velocity, there.dual),
        size(here.velocity - there.velocity, here.dual - there.dual),
    )


def _draws(x: object) -> Tensor:
    points = as_tensor(x, "x", 2, "(n, d)")
    if len(points) < 2:
        raise ShapeError("x needs at least two draws", got=tuple(points.shape))
    return points.detach()
