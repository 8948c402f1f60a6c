"""Populations that move and grow: part of the change between snapshots is left to births and deaths."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_inside
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.density_trend import DensityTrend
from stochdyn.bridges.laws.marginal import BridgeMarginal
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.errors import ApproximationWarning, InvalidInputError

__all__ = ["GrowingBridge"]

# Where fewer particles than this share of a snapshot carry the weight, little is left of it.
_FEW = 0.05


class GrowingBridge:
    r"""The law of a population whose density changes by growth to a given share, and by motion otherwise.

    A share :math:`\kappa` of the change in time of the density is put down to births and deaths, at the rate

    .. math:: g(t,x)=\kappa\,\partial_t\log p_t(x)+\mathrm{const},

    with :math:`p_t` of a :class:`DensityTrend` through all snapshots. What growth alone would make of the two neighbouring snapshots at time ``t``,

    .. math:: \tilde\pi_i\propto\pi_i\,\Big(\frac{p_t}{p_{t_i}}\Big)^{\kappa},\qquad
        \tilde\pi_{i+1}\propto\pi_{i+1}\,\Big(\frac{p_t}{p_{t_{i+1}}}\Big)^{\kappa},

    is joined by a Schrödinger bridge, of which the marginal at ``t`` is taken. It starts at :math:`\pi_i` and ends at :math:`\pi_{i+1}`; with
    :math:`\kappa=0` it is the bridge, and with :math:`\kappa=1` both sides are estimates of the same law and nothing but their difference moves.

    Balanced transport must carry cells from one branch to another where their shares differ between days; growth lets a branch
    swell in its place. The share can't be seen in snapshots as such: choose it by :func:`leave_one_out`.

    Args:
        snapshots: what was seen.
        growth: :math:`\kappa`, from 0 to 1.
        trend: a fitted :class:`DensityTrend`; one with its defaults if None.
        reference: drift of the bridges; Brownian if None. See :class:`SchrodingerBridge`.
        diffusion: their noise.
        options: others of :class:`SchrodingerBridge`, such as ``step`` or ``tolerance``.

    Raises:
        InvalidInputError: if the share isn't between 0 and 1.

    Example:
        >>> branches = torch.cat((torch.linspace(-3, -2, 10), torch.linspace(2, 3, 10)))[:, None]
        >>> few, many = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
        >>> weights = [w.repeat_interleave(10) for w in (few, many)]
        >>> snaps = Snapshots([0.0, 1.0], [branches, branches], weights)
        >>> moved, grown = (GrowingBridge(snaps, g, diffusion=0.5).solve().marginal(0.5) for g in (0.0, 1.0))
        >>> [bool((abs(law.means) < 1.5).float().flatten() @ law.weights > 0.3) for law in (moved, grown)]
        [True, False]

    Reference: Chizat, Peyré, Schmitzer & Vialard (2018), An interpolating distance between optimal transport and Fisher-Rao metrics;
    Baradat & Lavenant (2021), Regularized unbalanced optimal transport as entropy minimization with respect to branching Brownian motion.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        growth: float = 0.5,
        trend: DensityTrend | None = None,
        reference: Any = None,
        diffusion: Any = None,
        **options: Any,
    ) -> None:
        if not 0 <= growth <= 1:
            raise InvalidInputError("growth is a share", got=growth, expected="0 to 1")
        if trend is not None and not isinstance(trend, DensityTrend):
            raise InvalidInputError("trend must be a DensityTrend", got=type(trend).__name__)
        # checks everything that a bridge does, before any work
        self._whole = SchrodingerBridge(snapshots, reference, diffusion, **options)
        self.snapshots, self.growth = snapshots, float(growth)
        self.trend = trend
        self._make = {"diffusion": self._whole.diffusion, **options, "step": self._whole.step}

    def solve(self) -> GrowingBridge:
        """Fit the trend, unless one was given; returns this law. Bridges are solved for the times that are asked for."""
        if self.trend is None:
            self.trend = DensityTrend(self.snapshots)
        if self.trend.weight is None:
            self.trend.fit()
        return self

    def weights(self, t: float) -> tuple[Tensor, Tensor]:
        """Return what growth alone makes of the weights of the snapshots before and after ``t``, ``(n,)`` and ``(m,)``.

        Raises:
            TimeGridError: if ``t`` lies outside the snapshots.
        """
        i = self._interval(t)
        first, second = (self._tilted(j, t) for j in (i, i + 1))
        return first, second

    def bridge(self, t: float) -> SchrodingerBridge:
        """Return the bridge between the neighbours of ``t`` as growth leaves them, solved."""
        i = self._interval(t)
        masses = self.snapshots.masses[i : i + 2]
        weights = [w * m for w, m in zip(self.weights(t), masses, strict=True)]
        pair = Snapshots(self.snapshots.times[i : i + 2], self.snapshots.samples[i : i + 2], weights)
        return SchrodingerBridge(pair, self._whole.family, **self._make).solve()

    def marginal(self, t: float | Tensor, max_pairs: int = 100_000) -> BridgeMarginal:
        """Return the law of the population at time ``t``, without simulation.

        Args:
            t: within the span of the snapshots.
            max_pairs: larger couplings are replaced by a systematic sample of this many pairs.

        Raises:
            TimeGridError: if ``t`` lies outside.
        """
        time = float(t)
        i = self._interval(time)
        slack = 1e-9 * float(self.snapshots.times[-1] - self.snapshots.times[0])
        for j in (i, i + 1):
            if abs(time - float(self.snapshots.times[j])) <= slack:
                return BridgeMarginal(time, self.snapshots.samples[j], None, self.snapshots.weights[j])
        return self.bridge(time).marginal(time, max_pairs)

    def growth_rate(self, t: float, x: Tensor) -> Tensor:
        """Return the rate of births less deaths at ``x (*batch, d)``, ``(*batch,)``, zero on average over the neighbouring snapshots.

        The growth of the whole population can't be seen in samples of it.
        """
        trend, i = self._fitted(), self._interval(t)
        near = torch.stack(
            [self.snapshots.weights[j] @ trend.rate(self.snapshots.samples[j], t) for j in (i, i + 1)]
        )
        return self.growth * (trend.rate(x, t) - near.mean())

    def _fitted(self) -> DensityTrend:
        if self.trend is None:
            self.solve()
        assert self.trend is not None
        return self.trend

    def _interval(self, t: float) -> int:
        times = self.snapshots.times
        check_inside(torch.tensor([t], dtype=torch.float64), times, "t", "the snapshots")
        return next(
            i
            for i, (_, end) in enumerate(itertools.pairwise(times.tolist()))
            if t <= end or i == len(times) - 2
        )

    def _tilted(self, j: int, t: float) -> Tensor:
        own = self.snapshots.weights[j]
        if not self.growth:
            return own
        change = self._fitted().log_ratio(self.snapshots.samples[j], t, float(self.snapshots.times[j]))
        tilted = own.log() + self.growth * change
        tilted = (tilted - tilted.logsumexp(0)).exp()
        effective = float(tilted.square().sum().reciprocal())
        if effective < _FEW * len(own):
            warnings.warn(
                f"Growth leaves the weight of {effective:.1f} of the {len(own)} particles at t={float(self.snapshots.times[j]):g}. "
                "Give a smaller share of growth, or a trend with a larger ridge",
                ApproximationWarning,
                stacklevel=5,
            )
        return tilted
