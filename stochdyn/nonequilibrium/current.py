"""Steady currents of any diffusion from its score: velocity, local rates of entropy production and their parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_callable, check_nonempty, check_points, check_real, check_type
from stochdyn._transforms import as_leaf, recording
from stochdyn.core.law.path import as_parity
from stochdyn.core.sde.covariance import covariance_divergence
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import DiffusionMismatchError, InvalidInputError, ShapeError
from stochdyn.nonequilibrium._noise import HalfCovariance

__all__ = ["SteadyCurrent"]

ScoreFunction = Callable[..., Tensor]
Groups = Mapping[str, Sequence[int]]


@runtime_checkable
class HasScore(Protocol):
    """An object with a method ``score``, such as a flow, a steady state in closed form or a trained network."""

    score: ScoreFunction


def as_score(score: HasScore | ScoreFunction, name: str = "score") -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``score(t, x)`` of a function of states or of time and states, or of an object with such a method ``score``.

    Raises:
        InvalidInputError: If it is neither.
    """
    function = score.score if isinstance(score, HasScore) else score
    check_callable(function, name, "a function of x, or of t and x, or an object with a method score")
    try:
        kinds = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):  # functions written in C tell no signature
        kinds = []
    wanted = [p for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(function, torch.nn.Module):
        wanted = [p for p in inspect.signature(function.forward).parameters.values() if p.default is p.empty]
    if len(wanted) == 2:
        return function
    return lambda t, x: function(x)


def as_points(x: object, like: Tensor | None = None) -> Tensor:
    """Return states ``x (..., d)`` as a tensor in single or double precision, whose values are numbers.

    Lists and whole numbers take the precision of ``like``, or torch's default one.
    """
    points = as_tensor(x, "x", like=like, finite=False)
    check_points(points)
    if points.ndim == 0:
        raise ShapeError("x must hold states", got="a number", expected="(..., d)")
    check_nonempty(points, "x")
    return points


def group_parts(terms: Tensor, by: Groups) -> dict[str, Tensor]:
    """Return the sums of ``terms (..., d)`` over named groups of components."""
    return {name: terms[..., index].sum(-1) for name, index in as_groups(by, terms.shape[-1]).items()}


def as_groups(by: Groups, dim: int) -> dict[str, list[int]]:
    """Return named groups of components as lists of indices, checked."""
    check_type(by, Mapping, "by")
    groups = {name: [int(i) for i in members] for name, members in by.items()}
    for name, index in groups.items():
        if not index or min(index) < 0 or max(index) >= dim:
            raise InvalidInputError(
                f"by[{name!r}] must name components of the state", got=index[:8], expected=f"0 to {dim - 1}"
            )
    return groups


class CurrentAt(NamedTuple):
    """A steady current at states, ``(..., d)`` each.

    Attributes:
        velocity: The irreversible velocity :math:`v`.
        dual: The velocity in units of the noise, :math:`D^+v`.
        irreversible: The part of the force that dissipates.
        reversible: The part of the force that doesn't.
        score: The gradient of the log density.
    """

    velocity: Tensor
    dual: Tensor
    irreversible: Tensor
    reversible: Tensor
    score: Tensor


class SteadyCurrent:
    r"""The probability current of a steady state, from the equation and the score of its density.

    With :math:`dX=F\,dt+G\,dW` (Itô), :math:`D=\tfrac12GG^\top` and the drift of thermodynamics :math:`f=F-\nabla\cdot D`, the
    current is :math:`J=\rho\,v` with the velocity

    .. math:: v=f_{irr}-D\nabla\log\rho,\qquad f_{irr}(x)=\tfrac12\big[f(x)+\epsilon f(\epsilon x)\big],

    where :math:`\epsilon` are the signs of the components under time reversal; with even components alone
    :math:`f_{irr}=f`. Entropy is produced at the local rate :math:`v\cdot D^+v=v\cdot D^+f_{irr}-v\cdot\nabla\log\rho`, the sum of what
    flows into the medium and of the change of the system's own.

    Args:
        sde: The equation, a control included. Where time enters, the rates are those at ``t``.
        score: The gradient of the log density: a function of states ``(..., d)``, a function of time and states, or an object with
            such a method ``score``.
        parity: The sign of each component under time reversal, ``(d,)``, -1 for momenta; all are even if None.
        t: The time at which the equation and the score are evaluated.

    Raises:
        InvalidInputError: If an argument has the wrong type.

    Example:
        >>> from stochdyn.core import SDE
        >>> turn = torch.tensor([[-1.0, 1.5], [-1.5, -1.0]]).double()
        >>> current = SteadyCurrent(SDE(lambda t, x: x @ turn.mT, 2.0**0.5), lambda x: -x)
        >>> current.local(torch.tensor([[1.0, 0.0]]).double())
        tensor([2.2500], dtype=torch.float64)

    Reference:
        U. Seifert, "Stochastic thermodynamics, fluctuation theorems and molecular machines", 2012; with parities: R. Spinney and
        I. Ford, "Entropy production in full phase space for continuous stochastic dynamics", 2012.
    """

    def __init__(
        self, sde: SDE, score: HasScore | ScoreFunction, parity: object = None, t: float = 0.0
    ) -> None:
        check_type(sde, SDE, "sde")
        check_real(t, "t")
        self.sde, self._parity, self.t = sde, parity, t
        self._score = as_score(score)

    def _at(self, x: object) -> Tensor:
        """Return states ``x (..., d)`` that the equation takes."""
        points = as_points(x)
        self.sde.check(self.time(points), points)
        self.signs(points)
        return points

    def time(self, x: Tensor) -> Tensor:
        """Return the time of the current in the precision of ``x``."""
        return torch.as_tensor(self.t, dtype=x.dtype, device=x.device)

    def signs(self, x: Tensor) -> Tensor | None:
        """Return the signs ``(d,)`` of the components under time reversal, or None where all are even."""
        if self._parity is None:
            return None
        signs = as_parity(self._parity, x)
        return None if bool((signs > 0).all()) else signs

    def noise(self, x: Tensor) -> HalfCovariance:
        """Return half the covariance of the noise at ``x``."""
        return HalfCovariance(self.sde.diffusion(self.time(x), x), x.shape[-1])

    def score(self, x: Tensor) -> Tensor:
        """Return the score ``(..., d)``."""
        return self._score_at(self._at(x))

    def _score_at(self, x: Tensor) -> Tensor:
        value = self._score(self.time(x), x)
        if not isinstance(value, Tensor) or value.shape[-1:] != x.shape[-1:]:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                "score must return a vector per state", got=got, expected=f"(..., {x.shape[-1]})"
            )
        return value

    def force(self, x: Tensor) -> Tensor:
        r"""Return :math:`f=F-\nabla\cdot D`, the drift that appears in thermodynamics, ``(..., d)``; a control's drift is part of F."""
        return self._force(self._at(x))

    def _force(self, x: Tensor) -> Tensor:
        t = self.time(x)
        drift = self.sde.slope(t, x).expand_as(x)
        if not self.sde.state_dependent:
            return drift
        with recording():
            y = x if x.requires_grad else as_leaf(x)
            correction = covariance_divergence(self.sde.diffusion(t, y), y)
        return drift - 0.5 * (correction if x.requires_grad else correction.detach())

    def irreversible(self, x: Tensor) -> Tensor:
        r"""Return the part :math:`\tfrac12[f(x)+\epsilon f(\epsilon x)]` of the force, which dissipates, ``(..., d)``."""
        return self._split(self._at(x))[0]

    def reversible(self, x: Tensor) -> Tensor:
        r"""Return the part :math:`\tfrac12[f(x)-\epsilon f(\epsilon x)]` of the force, which doesn't dissipate, ``(..., d)``."""
        return self._split(self._at(x))[1]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the two parts of the force, and the size of the terms that they are made of."""
        force, signs = self._force(x), self.signs(x)
        if signs is None:
            return force, torch.zeros_like(force), force.abs()
        mirrored = signs * self._force(signs * x)
        return 0.5 * (force + mirrored), 0.5 * (force - mirrored), force.abs() + mirrored.abs()

    def velocity(self, x: Tensor) -> Tensor:
        """Return the irreversible velocity of the current, ``(..., d)``.

        Raises:
            DiffusionMismatchError: If an irreversible force acts where there is no noise, so that entropy production is infinite.
        """
        return self.evaluate(self._at(x)).velocity

    def evaluate(self, x: Tensor, components: Sequence[int] | None = None) -> CurrentAt:
        r"""Return the velocity :math:`v`, :math:`D^+v`, and what they are made of, at checked states.

        Args:
            x: The states, ``(..., d)``.
            components: Those whose entropy production is asked for; all if None.

        Raises:
            DiffusionMismatchError: If an irreversible force acts on one of them without noise.
        """
        noise = self.noise(x)
        irreversible, reversible, size = self._split(x)
        score = self._score_at(x)
        pull = noise.times(score)
        v = irreversible - pull
        check_reached(noise, v, size + pull.abs(), components)
        return CurrentAt(v, noise.against(v), irreversible, reversible, score)

    def local(self, x: Tensor, by: Groups | None = None) -> Tensor | dict[str, Tensor]:
        r"""Return the local rate :math:`v\cdot D^+v` of entropy production, ``(...)``, in 1/time.

        Args:
            x: The states, ``(..., d)``.
            by: Named groups of components, whose parts :math:`\sum_iv_i(D^+v)_i` are then returned by name. They add up to the
                whole if every component is in one group. The mean of a part is positive for certain only if noise doesn't couple the
                groups. Groups that leave out components without noise are finite where the whole is infinite.

        Raises:
            DiffusionMismatchError: If the rate is infinite.
        """
        return self._rate(x, by, lambda at: at.velocity * at.dual)

    def medium(self, x: Tensor, by: Groups | None = None) -> Tensor | dict[str, Tensor]:
        r"""Return the rate :math:`v\cdot D^+f_{irr}` at which entropy flows into the medium, ``(...)``.

        Args:
            x: The states, ``(..., d)``.
            by: Named groups of components, as in :meth:`local`: the mean of a group is what flows into its heat baths.
        """
        return self._rate(x, by, lambda at: at.dual * at.irreversible)

    def system(self, x: Tensor, by: Groups | None = None) -> Tensor | dict[str, Tensor]:
        r"""Return the rate :math:`-v\cdot\nabla\log\rho` at which the system's own entropy changes, ``(...)``; its mean is zero.

        Args:
            x: The states, ``(..., d)``.
            by: Named groups of components, as in :meth:`local`: the means of groups add up to zero, and are what the groups exchange.
        """
        return self._rate(x, by, lambda at: -at.velocity * at.score)

    def _rate(
        self, x: Tensor, by: Groups | None, terms: Callable[[CurrentAt], Tensor]
    ) -> Tensor | dict[str, Tensor]:
        """Return the sum of ``terms (..., d)`` over components, or over those of each group, at states that the equation takes."""
        x = self._at(x)
        groups = {} if by is None else as_groups(by, x.shape[-1])
        wanted = None if by is None else sorted({i for index in groups.values() for i in index})
        values = terms(self.evaluate(x, wanted))
        return values.sum(-1) if by is None else group_parts(values, by)


def check_reached(
    noise: HalfCovariance, v: Tensor, size: Tensor, components: Sequence[int] | None = None
) -> None:
    """Raise DiffusionMismatchError where a vector points out of the directions that noise reaches."""
    outside = noise.outside(v, size)
    if components is not None:
        outside = outside[torch.as_tensor(list(components), device=outside.device)]
    if bool(outside.any()):
        raise DiffusionMismatchError(
            "the entropy production rate is infinite: an irreversible force acts where there is no noise",
            hint="momenta are odd under time reversal: give parity=..., -1 for each of them; local(x, by=...) gives the rates of the rest",
        )
