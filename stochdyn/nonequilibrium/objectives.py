"""Objectives whose optimum is entropy production, for networks trained on pairs of neighbouring states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_callable, check_positive_int, check_real
from stochdyn.core.law.path import Estimate
from stochdyn.core.networks import MLP
from stochdyn.errors import ShapeError
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["NEEP", "CurrentNetwork", "ShortTimeTUR", "neighbours"]


def neighbours(paths: object, lag: int = 1) -> Tensor:
    """Return the pairs of states that are ``lag`` steps apart, ``(n, 2, d)``, as :class:`NEEP` and :class:`ShortTimeTUR` take them.

    Args:
        paths: The states at equal times, ``(T, d)`` or ``(n, T, d)``.
        lag: The number of steps between the states of a pair.
    """
    x = as_tensor(paths, "paths", (2, 3), "(T, d) or (n, T, d)")
    check_positive_int(lag, "lag")
    if x.shape[-2] <= lag:
        raise ShapeError(
            "paths are shorter than the lag", got=f"{x.shape[-2]} states", expected=f"more than {lag}"
        )
    return torch.stack([x[..., :-lag, :], x[..., lag:, :]], -2).reshape(-1, 2, x.shape[-1])


class CurrentNetwork(nn.Module):
    r"""The coefficients :math:`d_\theta(x)` of a current, a linear field plus a network, in units of the data's own spread.

    At the optimum of :class:`NEEP` and :class:`ShortTimeTUR` they are :math:`D^{-1}v`.

    Args:
        x: States that say where the data lie and how far they spread, ``(n, d)``.
        hidden: The widths of the hidden layers; none for a linear field.
        activation: The nonlinearity between the layers.
    """

    centre: Tensor
    unit: Tensor

    def __init__(self, x: object, hidden: tuple[int, ...] = (64, 64), activation: str = "silu") -> None:
        super().__init__()
        points = as_tensor(x, "x", 2, "(n, d)").detach()
        if len(points) < 2:
            raise ShapeError("x needs at least two states", got=len(points))
        unit = points.std(0)
        self.register_buffer("centre", points.mean(0))
        self.register_buffer("unit", torch.where(unit > 0, unit, 1.0))
        dim = points.shape[-1]
        self.linear = nn.Linear(dim, dim).to(points)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.network = (
            MLP((dim, *hidden, dim), zero_last=True, activation=activation).to(points) if hidden else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return coefficients ``(..., d)`` at ``x (..., d)``, in one over the unit of ``x``."""
        z = (x - self.centre) / self.unit
        out = self.linear(z)
        if self.network is not None:
            out = out + self.network(z)
        return out / self.unit


class _PairObjective(Objective):
    def __init__(self, dt: float) -> None:
        super().__init__()
        check_real(dt, "dt", above=0.0)
        self.dt = float(dt)

    def _pairs(self, batch: Tensor) -> Tensor:
        if not isinstance(batch, Tensor) or batch.ndim != 3 or batch.shape[1] != 2:
            got = f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ShapeError(
                "a batch must hold pairs of states",
                got=got,
                expected="(n, 2, d)",
                hint="neighbours(paths) makes them",
            )
        return batch


class NEEP(_PairObjective):
    r"""The neural estimator of entropy production, and its family :math:`\alpha`.

    .. math::
        \sigma\ge\frac1{dt}E\Big[\frac{e^{\alpha s}-1}{\alpha}-\frac{e^{-(1+\alpha)s}-1}{1+\alpha}\Big],\qquad
        s=d_\theta(\tfrac{x+x'}2)\cdot(x'-x),

    which is :math:`E[s-e^{-s}+1]/dt` for :math:`\alpha=0`. The left side is the divergence of pairs of states from reversed pairs per time,
    a lower bound of the entropy production rate that is tight for short steps. At the optimum :math:`s` is the log-ratio of a pair's
    probability and that of its reverse. A field of currents is odd under reversal by construction and scales rightly with the step; with
    ``current=False`` the function takes both states, which long lags and jumps need.

    Args:
        function: The coefficients :math:`d_\theta(x)`, ``(..., d)`` to ``(..., d)``, such as a :class:`CurrentNetwork`; or a function of two
            states that returns a number per pair, which is made odd here.
        dt: The time between the states of a pair.
        alpha: The member of the family: 0 for the original one; -0.5 is robust where driving is strong.
        current: Whether ``function`` gives the coefficients of a current.

    Reference:
        D.-K. Kim et al., "Learning entropy production via neural networks", 2020; E. Kwon and Y. Baek, "α-divergence improves the
        entropy production estimation via machine learning", 2024.
    """

    def __init__(
        self, function: Callable[..., Tensor], dt: float, alpha: float = 0.0, current: bool = True
    ) -> None:
        super().__init__(dt)
        check_callable(function, "function")
        check_real(alpha, "alpha")
        self.function, self.alpha, self.current = function, float(alpha), current

    def production(self, batch: Tensor) -> Tensor:
        """Return the entropy produced in each step of a batch of pairs ``(n, 2, d)``, ``(n,)``."""
        before, after = self._pairs(batch).unbind(1)
        if self.current:
            return (self.function(0.5 * (before + after)) * (after - before)).sum(-1)
        odd = self.function(before, after) - self.function(after, before)
        return odd.squeeze(-1) if odd.ndim == 2 else odd

    def _gain(self, s: Tensor) -> Tensor:
        a = self.alpha
        # (e^{as} - 1)/a - (e^{-(1+a)s} - 1)/(1+a), with the limits at a = 0 and a = -1.
        first = s if a == 0 else torch.expm1(a * s) / a
        second = -s if a == -1 else torch.expm1(-(1 + a) * s) / (1 + a)
        return first - second

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate minus the bound per pair on pairs ``(n, 2, d)``; the terms are per time."""
        s = self.production(batch)
        # a number without a unit: steps of an optimiser then don't depend on that of time
        gain = self._gain(s).mean()
        return ObjectiveValue(
            -gain, {"bound": gain.detach() / self.dt, "mean_rate": s.detach().mean() / self.dt}
        )

    @torch.no_grad()
    def bound(self, batch: Tensor) -> Estimate:
        """Return the bound on pairs ``(n, 2, d)`` that the training hasn't seen, with the error of independent pairs.

        On the pairs that it was trained on the bound is too large.
        """
        return Estimate.of(self._gain(self.production(batch)) / self.dt)


class ShortTimeTUR(_PairObjective):
    r"""The thermodynamic uncertainty bound of a current in the short-time limit.

    .. math:: \sigma\ge\frac{2\langle j\rangle^2}{\mathrm{Var}(j)\,dt},\qquad j=d_\theta(\tfrac{x+x'}2)\cdot(x'-x)

    Tight for short steps of overdamped motion, where the best coefficients are :math:`D^{-1}v` up to a factor. Not for jumps, where it
    stays below, and not for underdamped motion. A batch must be large enough for its mean current to rise above its noise.

    Args:
        function: The coefficients :math:`d_\theta(x)`, ``(..., d)`` to ``(..., d)``, such as a :class:`CurrentNetwork`.
        dt: The time between the states of a pair.

    Reference:
        S. Otsubo et al., "Estimating entropy production by machine learning of short-time fluctuating currents", 2020.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], dt: float) -> None:
        super().__init__(dt)
        check_callable(function, "function")
        self.function = function

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate minus the bound per pair on pairs ``(n, 2, d)``; before training, where the current is zero, that of a small one."""
        before, after = self._pairs(batch).unbind(1)
        j = (self.function(0.5 * (before + after)) * (after - before)).sum(-1)
        variance = j.var()
        # At a current of zero the ratio is 0/0, and the gradient is that of the mean itself.
        gain = torch.where(
            variance > 0, 2 * j.mean().square() / torch.where(variance > 0, variance, 1.0), j.mean()
        )
        return ObjectiveValue(-gain, {"bound": gain.detach() / self.dt})
