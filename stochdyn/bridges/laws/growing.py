"""Populations that move and grow: part of the change between snapshots is left to births and deaths."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_tensor, check_positive_int, check_real, check_type, is_real
from stochdyn.bridges.data.snapshots import Snapshots, redrawn_weights
from stochdyn.bridges.families.density_trend import DensityTrend
from stochdyn.bridges.laws.lineages import Lineages
from stochdyn.bridges.laws.marginal import BridgeMarginal
from stochdyn.bridges.laws.nodes import choose_pairs
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.particles.resampling import effective_size
from stochdyn.core.transport.entropic import TransportPlan
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError

__all__ = ["GrowingBridge"]

# Where fewer particles than this share of a snapshot carry the weight, little is left of it.
_FEW = 0.05
# Times in an interval at which the trend is asked.
_NODES = 17
# A unit of relative entropy costs as much as so many times what half of the population needs to move.
_DEAR = 10.0
# Errors of marginals that are nothing beside what redrawing the cells does to them.
_LOOSE = 1e-4
# Totals of weights that differ by no more than rounding aren't counts.
_EQUAL = 1e-5


class GrowingBridge(Lineages, PathMeasure):
    r"""The law of a population whose density changes by growth and by motion.

    Balanced transport must carry cells from one branch to another where their shares differ between days; growth lets a branch
    swell in its place. How much is growth can't be seen in snapshots as such. There are two ways to say it:

    - ``growth=None``: growth is what motion can't explain. Births and deaths are charged for by relative entropy, at ten times what
      half of the population needs to move, and the couplings of a :class:`SchrodingerBridge` with this ``relaxation`` decide.
      :meth:`growth_rate` then is an estimate: next to zero in a population that only moves.
    - ``growth`` :math:`=\kappa`, a share from 0 to 1 of the change in time of the density, as a regularity prior:

      .. math:: g(t,x)=\kappa\,\partial_t\log p_t(x)+\mathrm{const},

      with :math:`p_t` of a :class:`DensityTrend` through all snapshots. What half of this growth makes of the earlier snapshot is joined to
      what half of it, taken back, makes of the later one. With :math:`\kappa=0` it is the balanced bridge; with
      :math:`\kappa=1` both sides are estimates of the same law, and nothing but their difference moves. The rate is an
      assumption then; choose the share by :func:`leave_one_out`.

    - ``growth`` per cell: one rate of births less deaths ``(n_i,)`` per snapshot, in 1/time, from scores of proliferation and death, say.
      The earlier cells then count :math:`e^{g\Delta t}` times in the coupling. With a ``relaxation`` they are a prior: couplings may deviate,
      and :meth:`growth_rate` is what they make of it.

    The cost of growth without a share is a heuristic: it makes births of what would have to move several times as far as most cells do, in
    units of the noise, and of nothing else. Where growth and motion are of like size no choice of it can tell them apart; give a
    ``relaxation`` of your own then and see by :func:`leave_one_out` whether it predicts, or rates per cell.

    Use it for cells that divide and die; for the balanced law use :class:`SchrodingerBridge`.

    Args:
        snapshots: The snapshots to pass through.
        growth: The share :math:`\kappa` of growth, from 0 to 1; or one ``(n_i,)`` array of rates per snapshot, of which the last doesn't
            count; or None for growth that motion can't explain.
        trend: The fitted :class:`DensityTrend` that a share is taken of; one with its defaults if None.
        reference: The drift of the reference; Brownian motion if None. See :class:`SchrodingerBridge`.
        diffusion: The noise of the reference, in units of state per root of time.
        options: Further arguments of :class:`SchrodingerBridge`, such as ``dt``, ``tolerance`` or ``relaxation``.

    Raises:
        InvalidInputError: If the share isn't between 0 and 1, or a relaxation is given beside it.
        ShapeError: If there isn't one rate per cell.

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
        growth: float | Sequence[Any] | None = None,
        trend: DensityTrend | None = None,
        reference: Any = None,
        diffusion: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._cell_rates: list[Tensor] | None = None
        self.growth: float | None = None
        if growth is not None and not is_real(growth):
            self._cell_rates = _as_rates(growth, snapshots)
            if trend is not None:
                raise InvalidInputError("a trend does nothing where rates are given")
        elif growth is not None:
            check_real(growth, "growth", minimum=0.0, maximum=1.0)
            self.growth = float(growth)  # type: ignore[arg-type]
            if options.get("relaxation") is not None:
                check_type(
                    options["relaxation"],
                    type(None),
                    "relaxation",
                    "it says what growth costs; growth says its share",
                )
        if trend is not None:
            check_type(trend, DensityTrend, "trend")
        self.trend = trend
        # checks everything that a bridge does, before any work
        self.bridge = SchrodingerBridge(snapshots, reference, diffusion, **options)
        if self.growth or self._cell_rates is not None:
            masses = self.snapshots.masses
            counted = bool(((masses - masses[0]).abs() > _EQUAL * masses[0]).any())
            self.bridge._add_tilts(_NODES, self._cell_rates is not None, counted)

    @property
    def snapshots(self) -> Snapshots:  # type: ignore[override]
        """What was seen."""
        return self.bridge.snapshots

    @property
    def plans(self) -> list[TransportPlan]:
        """The couplings of neighbouring snapshots, in which the earlier particles count as growth lets them."""
        return self.bridge.plans

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GrowingBridge:
        super()._apply(fn, recurse)
        if self.trend is not None:
            self.trend = self.trend.to(self.snapshots.device)
        return self

    def solve(self) -> GrowingBridge:
        """Find the couplings; returns this law."""
        return self._solve(None)

    def _solve(self, warm_start: SchrodingerBridge | None) -> GrowingBridge:
        if self._cell_rates is not None:
            self._tilt_by_rates(self._cell_rates)
        elif self.growth is None and self.bridge.relaxation is None:
            self.bridge._penalty.fill_(self._cost())
        if self.growth:
            if self.trend is None:
                self.trend = DensityTrend(self.snapshots)
            if self.trend.weight is None:
                self.trend.fit()
            self._tilt(self.trend)
        self.bridge.solve(warm_start)
        return self

    def _like(self, snapshots: Snapshots) -> GrowingBridge:
        """The same law, unsolved, through snapshots of the same particles with other weights; growth costs what it costs here."""
        own = self.bridge
        trend = None if self.trend is None else self.trend.like(snapshots)
        growth = self.growth if self._cell_rates is None else self._cell_rates
        like = GrowingBridge(
            snapshots, growth, trend, own.family, own.diffusion, dt=own.dt, tolerance=max(own.tolerance, _LOOSE),
            max_iterations=own.max_iterations, relaxation=own.relaxation, corrections=own.corrections,
            memory=own.memory,
        )  # fmt: skip
        like.bridge._counted = own._counted
        return like

    def _tilt(self, trend: DensityTrend) -> None:
        r"""Set the logs of the weights that growth gives to particles, and take from both snapshots half of what is between them.

        With :math:`u_t=\kappa\log(p_t/p_{t_i})` and the share ``s`` of the interval they are :math:`(1-s)(u_t-\tfrac12u_{t_{i+1}})` at
        the earlier particles and :math:`s(u_t-\tfrac12u_{t_{i+1}})` at the later ones.
        """
        assert self.growth is not None
        for i, (start, end) in enumerate(itertools.pairwise(self.snapshots.times.tolist())):
            shares = torch.linspace(0, 1, _NODES, dtype=torch.float64).tolist()
            for name, j in (("rows", i), ("columns", i + 1)):
                x = self.snapshots.samples[j]
                change = torch.stack(
                    [
                        self.growth * trend.log_ratio(x, start + s * (end - start), start).double()
                        for s in shares
                    ]
                )
                parts = change.new_tensor([1 - s if name == "rows" else s for s in shares])
                tilt = parts[:, None] * (change - 0.5 * change[-1])
                setattr(self.bridge, f"{name}{i}", tilt)
                self._check_weights(j, -tilt[0 if name == "rows" else -1])

    def _tilt_by_rates(self, rates: list[Tensor]) -> None:
        r"""Let the earlier particles count :math:`e^{g\Delta t}` times in a coupling, and so much less before: :math:`\alpha=-(1-s)\,g\Delta t`."""
        for i, duration in enumerate(self.snapshots.durations.tolist()):
            change = rates[i].double() * duration
            share = torch.linspace(0, 1, _NODES, dtype=torch.float64, device=change.device)[:, None]
            setattr(self.bridge, f"rows{i}", -(1 - share) * change)
            self._check_weights(i, change)

    def _check_weights(self, j: int, tilt: Tensor) -> None:
        log_weight = self.snapshots.weights[j].double().log() + tilt
        effective = float(effective_size(log_weight))
        if effective < _FEW * len(log_weight):
            warnings.warn(
                f"Growth leaves the weight of {effective:.1f} of the {len(log_weight)} particles at t={float(self.snapshots.times[j]):g}. "
                "Give a smaller share of growth, or a trend with a larger ridge",
                ApproximationWarning,
                stacklevel=4,
            )

    def _cost(self) -> float:
        """Ten times the median of what pairs of the balanced coupling move, in nats."""
        # |z|^2 / 2 with z how far a partner is from where it is expected, in units of the noise: what motion costs a pair
        balanced = self.bridge.like().solve()
        values, weights = [], []
        for i, (plan, part) in enumerate(zip(balanced.plans, balanced._transitions, strict=True)):
            first, second, weight = choose_pairs(
                plan, 10_000, torch.Generator(plan.cost.device).manual_seed(0)
            )
            x, y = self.snapshots.samples[i][first], self.snapshots.samples[i + 1][second]
            values.append(0.5 * part.chain(x, y).whitened(x.mT, y.mT).square().sum(0))
            weights.append(weight)
        moved, order = torch.cat(values).sort()
        reach = torch.cat(weights)[order].cumsum(0)
        return _DEAR * float(moved[int((reach < 0.5 * reach[-1]).sum())].clamp_min(0.5))

    # ------------------------------------------------------------------------------------------ the law
    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw the paths of individuals, which die and go on as newborn ones; see :meth:`SchrodingerBridge.sample`."""
        return replace(self.bridge.sample(ts, sample_shape, generator), law=self)

    def marginal(self, t: Tensor | float, max_pairs: int = 100_000) -> BridgeMarginal:
        """Return the law of the population at time ``t``, without simulation; see :meth:`SchrodingerBridge.marginal`."""
        return self.bridge.marginal(t, max_pairs)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Raise where the population grows, since births and deaths aren't a drift: the motion has a :meth:`velocity`."""
        return self.bridge.drift(t, x)

    def velocity(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the velocity of individuals between birth and death, ``(*batch, d)``; see :meth:`SchrodingerBridge.velocity`."""
        return self.bridge.velocity(t, x)

    def growth_rate(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the rate of births less deaths at times ``t`` and states ``x (*batch, d)``, ``(*batch,)`` per unit of time.

        Its mean over the population is the growth of the whole: the logarithm of the ratio of the snapshots' masses per time. Give total
        counts as weights, therefore: ``weights=[torch.full((n,), count / n), ...]``. Without, the whole grows by what given rates per
        cell say, which are returned as they are then, and otherwise not at all. Counts that contradict given rates shift all of these
        evenly.
        """
        return self.bridge.growth_rate(t, x)

    @torch.no_grad()
    def bootstrap_growth(
        self,
        t: Tensor | float,
        x: Tensor,
        num_draws: int = 100,
        generator: Generator = None,
        *,
        count_error: float = 0.0,
    ) -> Tensor:
        """Return the rates of :meth:`growth_rate` on redrawn data, ``(num_draws, *batch)``, whose quantiles are intervals.

        The cells of every snapshot are redrawn with replacement and coupled anew. The draws show how the estimate scatters over
        data sets; what is assumed of growth, its share, cost or prior, is the same in all of them. Draws are of all points together, so
        that their mean over the cells of a type is a draw of that type's rate.

        Args:
            t: The times, as in :meth:`growth_rate`.
            x: The states, ``(*batch, d)``.
            num_draws: The number of redrawn data sets.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
            count_error: The relative standard error of the total counts, of which each is drawn by itself; zero where they are exact.

        Example:
            >>> cells = torch.cat((torch.linspace(-3, -2, 30), torch.linspace(2, 3, 30)))[:, None]
            >>> early, late = cells[10:50], cells[20:]  # the right branch grows from a half to three quarters
            >>> law = GrowingBridge(Snapshots([0.0, 1.0], [early, late]), diffusion=0.5).solve()
            >>> draws = law.bootstrap_growth(0.5, torch.tensor([[-2.5], [2.5]]), 50, generator=0)
            >>> draws.shape, bool((draws[:, 1] > draws[:, 0]).double().mean() > 0.9)
            (torch.Size([50, 2]), True)

        Reference: Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapter 6.
        """
        check_positive_int(num_draws, "num_draws")
        check_real(count_error, "count_error", minimum=0.0)
        snaps = self.snapshots
        source = as_generator(generator, snaps.device)
        self.bridge.plans  # noqa: B018, raises if there are none
        redrawn = redrawn_weights(snaps, num_draws, source)
        noise = torch.randn(num_draws, len(snaps), generator=source, dtype=torch.float64, device=snaps.device)
        masses = snaps.masses * (count_error * noise).exp().to(snaps.masses)
        draws = []
        for k in range(num_draws):
            weights = [own[k] * mass for own, mass in zip(redrawn, masses[k], strict=True)]
            law = self._like(Snapshots(snaps.times, snaps.samples, weights))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ApproximationWarning)  # said of the data themselves
                draws.append(law._solve(self.bridge).growth_rate(t, x))
        return torch.stack(draws)


def _as_rates(growth: Any, snapshots: Snapshots) -> list[Tensor]:
    """Return rates ``(n_i,)`` for all snapshots but the last."""
    check_type(snapshots, Snapshots, "snapshots")
    check_type(growth, (Sequence, Tensor), "growth", "a share, or one array of rates per snapshot")
    count = len(snapshots)
    if len(growth) not in (count - 1, count):
        raise ShapeError("growth must have one array of rates per snapshot", got=len(growth), expected=count)
    rates = []
    for i in range(count - 1):
        own = as_tensor(growth[i], f"growth[{i}]", 1, "(n,)", like=snapshots.samples[i])
        if own.shape != snapshots.weights[i].shape:
            raise ShapeError(
                f"growth[{i}] must have one rate per cell",
                got=tuple(own.shape),
                expected=(snapshots.sizes[i],),
            )
        rates.append(own)
    return rates
