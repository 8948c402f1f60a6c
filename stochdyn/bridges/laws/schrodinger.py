"""The Schrödinger bridge through all snapshots for a fixed reference process, as a law on paths."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_time_grid,
    check_inside,
    check_positive,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily, ZeroDrift
from stochdyn.bridges.laws import kernel_drift, sampling
from stochdyn.bridges.laws.growth import Growth
from stochdyn.bridges.laws.lineages import Lineages
from stochdyn.bridges.laws.linearised import AffineTransition, Transition, transition
from stochdyn.bridges.laws.marginal import BridgeMarginal
from stochdyn.bridges.laws.nodes import DriftNodes, bridge_nodes, choose_pairs, effective_pairs
from stochdyn.bridges.laws.reference import EmpiricalLaw, as_reference, default_diffusion, spread_of
from stochdyn.core.forward.operator import ForwardOperator
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path, PathSample
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.core.sde.equation import SDE
from stochdyn.core.transport.entropic import TransportPlan, _cost_rows, sinkhorn
from stochdyn.errors import (
    ApproximationWarning,
    ConvergenceWarning,
    DiffusionError,
    NonFiniteError,
    UnavailableError,
)

__all__ = ["SchrodingerBridge"]

# Beyond this many standard deviations the log-density of a path to the next snapshot is below -5e5.
_MAX_REACH = 1e3
# Where the product of step and Jacobian is larger, matrix exponentials of fourth order are wrong by per cents.
_MAX_STIFFNESS = 1.5
# Pairs of a nonlinear reference that are seen at fewer times each where nodes are short.
_LINEARISED_PAIRS = 2048
# The time grid has this many points in the shortest interval.
_POINTS = 25


class SchrodingerBridge(Lineages, PathMeasure):
    r"""The law on paths nearest to a reference process among all that pass through the snapshots.

    .. math:: \min_q\ \mathrm{KL}(q\,\|\,p)\quad\text{with}\quad q_{t_i}=\pi_i,\ i=1,\dots,I

    For a reference without memory it is a chain of bridges between neighbouring snapshots: particles are coupled by
    :math:`\pi_{ab}\propto e^{f_a+g_b}p(y_b\mid x_a)`, and pairs are joined by the reference pinned at both ends.
    The transition density is exact for affine drifts and relinearised about a path for each pair otherwise
    (:mod:`stochdyn.bridges.laws.linearised`).

    Use it where the reference is known, or as the bridge that :func:`~stochdyn.bridges.refine` builds; beyond some tens of
    components :class:`~stochdyn.bridges.BridgeMatching` needs less noise, and for states that are seen in part there is
    :class:`~stochdyn.bridges.PartialBridge`.

    With a ``relaxation`` the couplings needn't have the snapshots for marginals. What they lack is growth, at an even rate
    along each pair: :meth:`sample`, :meth:`marginal` and :meth:`velocity` are those of the population that moves and grows, which
    has the snapshots' law at their times, and :meth:`growth_rate` is its rate. A path of :meth:`sample` then is that of an
    individual until it dies, and goes on as that of one which is born elsewhere.

    Args:
        snapshots: The snapshots to pass through.
        reference: The reference: a drift (:class:`DriftFamily`, ``nn.Module`` or callable ``(t, x)``), an :class:`SDE` or a
            :class:`DiffusionMeasure`; Brownian motion if None.
        diffusion: The noise of the reference, in units of state per root of time: a number, ``(d,)``, or an invertible
            ``(d, d)`` matrix; if None, that of the reference, or for a drift alone and Brownian motion the noise by which
            particles diffuse as far as they are apart at random (:func:`~stochdyn.bridges.laws.default_diffusion`).
        dt: The spacing of the inner time grid; a twenty-fifth of the shortest interval if None.
        tolerance: The largest L1 error of a coupling's marginals.
        max_iterations: The largest number of iterations of each coupling.
        relaxation: The cost of a deviation of a coupling from the snapshots' weights and masses, in nats per unit of relative
            entropy; infinite if None, and masses don't count then. For populations that grow: see :func:`stochdyn.sinkhorn`.
        corrections: The number of paths per pair for importance weights of what linearisation leaves out of a nonlinear drift,
            in couplings and trajectories; none if zero, which is right where the noise is small. See
            :mod:`stochdyn.bridges.laws.importance`.
        memory: The number of bytes that matrices of a coupling may take; where they need more, they are computed in blocks.

    Raises:
        DiffusionError: If the diffusion is singular, or so small that no path reaches the next snapshot.
        ShapeError: If the drift doesn't fit the particles.

    Example:
        >>> snaps = Snapshots([0.0, 1.0], [torch.zeros(5, 1), torch.ones(5, 1)])
        >>> bridge = SchrodingerBridge(snaps, diffusion=0.5).solve()
        >>> bridge.marginal(0.5).mean, bridge.marginal(0.5).covariance
        (tensor([0.5000]), tensor([[0.0625]]))

    Reference: Shen, Berlinghieri & Broderick (2025), Multi-marginal Schrödinger bridges with iterative reference
    refinement, AISTATS; Léonard (2014), A survey of the Schrödinger problem.
    """

    spread: Tensor

    _derived_ = ("_parts", "_growths")

    def __init__(
        self,
        snapshots: Snapshots,
        reference: Any = None,
        diffusion: Any = None,
        *,
        dt: float | None = None,
        tolerance: float = 1e-6,
        max_iterations: int = 10_000,
        relaxation: float | None = None,
        corrections: int = 0,
        memory: float = 4 * 2**30,
    ) -> None:
        super().__init__()
        check_type(snapshots, Snapshots, "snapshots")
        check_real(tolerance, "tolerance", above=0.0)
        check_positive_int(max_iterations, "max_iterations")
        check_positive_int(corrections, "corrections", 0)
        if relaxation is not None:
            check_positive(relaxation, "relaxation")
        if dt is not None:
            check_positive(dt, "dt")
        check_positive(memory, "memory")
        self.snapshots = snapshots
        family, own = as_reference(reference, snapshots)
        self.family: DriftFamily = ZeroDrift(snapshots.dim) if family is None else family
        given = diffusion if diffusion is not None else own
        self.diffusion: Coefficient | Tensor | float = (
            default_diffusion(snapshots) if given is None else given
        )
        self.register_buffer("spread", spread_of(self.diffusion, snapshots))
        self.dt = float(snapshots.durations.min()) / _POINTS if dt is None else float(dt)
        self.tolerance, self.max_iterations = float(tolerance), max_iterations
        value = torch.nan if relaxation is None else float(relaxation)
        self.register_buffer("_penalty", torch.tensor(value, dtype=torch.float64))
        self._penalty: Tensor
        self.corrections, self.memory = corrections + corrections % 2, float(memory)
        # what a solution consists of: potentials of every coupling, their errors and values
        for i, (n, m) in enumerate(itertools.pairwise(snapshots.sizes)):
            self.register_buffer(f"f{i}", torch.zeros(n, dtype=torch.float64, device=snapshots.device))
            self.register_buffer(f"g{i}", torch.zeros(m, dtype=torch.float64, device=snapshots.device))
        count = len(snapshots) - 1
        empty = torch.full((3, count), torch.nan, dtype=torch.float64, device=snapshots.device)
        self.register_buffer("_report", empty)  # marginal errors, values, iterations
        self._report: Tensor
        self.register_load_state_dict_post_hook(_forget_solution)
        self._tilted = self._by_rates = self._counted = False
        self._parts: list[Transition] | None = None
        self._plans: list[TransportPlan] | None = None
        self._growths: list[Growth | None] | None = None

    def like(self, snapshots: Snapshots | None = None, reference: Any = None) -> SchrodingerBridge:
        """Return an unsolved bridge with the same options through other snapshots, or on another drift.

        Args:
            snapshots: The snapshots to pass through; the same ones if None.
            reference: The drift; the same one if None.
        """
        return SchrodingerBridge(
            self.snapshots if snapshots is None else snapshots,
            self.family if reference is None else reference,
            self.diffusion,
            dt=self.dt,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            relaxation=self.relaxation,
            corrections=self.corrections,
            memory=self.memory,
        )

    @property
    def relaxation(self) -> float | None:
        """What a unit of relative entropy from the snapshots costs, in nats; None if they are kept to exactly."""
        value = float(self._penalty)
        return None if math.isnan(value) else value

    # ------------------------------------------------------------------------------------------ solution
    @torch.no_grad()
    def solve(self, warm_start: SchrodingerBridge | None = None) -> SchrodingerBridge:
        """Couple all neighbouring snapshots; returns this bridge.

        Args:
            warm_start: A solved bridge through the same snapshots, whose potentials are started from.
        """
        self._forget()
        parts = self._transitions
        plans = []
        for i, part in enumerate(parts):
            start = None if warm_start is None else warm_start.plans[i].potentials
            plan, value = self._couple(i, part, start)
            plans.append(plan)
            report = (plan.marginal_error.double(), value.double(), float(plan.num_iterations))
            self._report[:, i] = torch.stack([torch.as_tensor(v).to(self._report) for v in report])
            setattr(self, f"f{i}", plan._f)
            setattr(self, f"g{i}", plan._g)
        self._plans = plans
        stiffness = max(getattr(part, "stiffness", 0.0) for part in parts)
        if stiffness > _MAX_STIFFNESS:
            warnings.warn(
                f"The inner time grid is too coarse for this drift: dt times Jacobian is {stiffness:.2g}. "
                f"A dt of {self.dt / stiffness:.2g} would do",
                ApproximationWarning,
                stacklevel=2,
            )
        if not self.converged:
            far = [
                f"t={float(t):g}: {own[:8].tolist()}"
                for t, own in zip(self.snapshots.times, self.outliers(), strict=True)
                if len(own)
            ]
            named = f". Particles far from all others, by index: {'; '.join(far)}" if far else ""
            warnings.warn(
                f"A coupling stopped with a marginal error of {float(self.marginal_errors.max()):.1e} "
                f"(tolerance {self.tolerance:.1e}). Allow more max_iterations or a larger diffusion{named}",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _add_tilts(self, nodes: int, by_rates: bool = False, counted: bool = False) -> None:
        """Let couplings be those of tilted snapshots, and growth undo the tilts; see :class:`GrowingBridge`.

        Tilts of rates say how much the whole population grows, unless it was ``counted``.
        """
        self._tilted, self._by_rates, self._counted = True, by_rates, by_rates and counted
        for i, (n, m) in enumerate(itertools.pairwise(self.snapshots.sizes)):
            like = torch.zeros(nodes, n + m, dtype=torch.float64, device=self.spread.device)
            self.register_buffer(f"rows{i}", like[:, :n].clone())
            self.register_buffer(f"columns{i}", like[:, n:].clone())

    def _forget(self) -> None:
        self._parts = self._plans = self._growths = None

    @property
    def _transitions(self) -> list[Transition]:
        if self._parts is None:
            times = self.snapshots.times.tolist()
            self._parts = [
                transition(self.family, self.spread, a, b, self.dt, self.corrections)
                for a, b in itertools.pairwise(times)
            ]
        return self._parts

    def _weights(self, i: int) -> tuple[Tensor, Tensor]:
        """Weights of both ends of a coupling, their totals as 1 to the factor of growth where that counts."""
        a, b = self.snapshots.weights[i : i + 2]
        if self.relaxation is not None and not self._tilted:
            b = b * (self.snapshots.masses[i + 1] / self.snapshots.masses[i])
        if self._tilted:
            rows, columns = getattr(self, f"rows{i}"), getattr(self, f"columns{i}")
            a, b = (torch.softmax(w.double().log() - u, 0).to(w) for w, u in ((a, rows[0]), (b, columns[-1])))
        return a, b

    def _kernel(self, i: int, part: Transition) -> tuple[Tensor | None, Tensor | None, float, Tensor | None]:
        """Points, regularisation and cost of the transport problem of an interval."""
        x, y = self.snapshots.samples[i : i + 2]
        a, b = self.snapshots.weights[i : i + 2]
        # Sinkhorn's kernel is p(y | x), so the cost is -log p; affine drifts make it a squared distance in whitened coordinates,
        # where |x - y|^2 with regularisation 2 needs no matrix
        if isinstance(part, AffineTransition) and self.relaxation is not None:
            return None, None, 1.0, self._log_unit(part) - part.log_kernel(x, y)
        if isinstance(part, AffineTransition):
            before, after = part.whitened(x, y)
            self._check_reach(i, _nearest(before[a > 0], after[b > 0]))
            return before, after, 2.0, None
        kernel = part.log_kernel(x, y)
        if not bool(torch.isfinite(kernel).all()):
            raise NonFiniteError(
                f"the transition density before t={float(self.snapshots.times[i + 1]):g} isn't finite",
                got=f"dt times Jacobian up to {getattr(part, 'stiffness', 0.0):.2g}",
                hint="give a smaller dt, or a smoother drift",
            )
        # a Mahalanobis distance again: log p differs from its largest value by -distance^2 / 2
        seen = kernel[a > 0][:, b > 0]
        self._check_reach(i, (-2 * (seen - seen.max())).amin(-2).clamp_min(0).sqrt())
        return None, None, 1.0, (self._log_unit(part) if self.relaxation is not None else 0.0) - kernel

    def _log_unit(self, part: Transition) -> Tensor:
        """The log density of the noise alone at its mean: costs of relaxed couplings, whose mass they decide, are relative to it."""
        return -0.5 * torch.logdet(2 * torch.pi * self.spread * (part.end - part.start))

    def _couple(
        self, i: int, part: Transition, start: tuple[Tensor, Tensor] | None
    ) -> tuple[TransportPlan, Tensor]:
        x, y, reg, cost = self._kernel(i, part)
        a, b = self._weights(i)
        relaxation = None if self.relaxation is None else reg * self.relaxation
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one for all is given by solve
            plan = sinkhorn(
                x, y, reg, a, b, cost, self.tolerance, max_iterations=self.max_iterations,
                warm_start=start, relaxation=relaxation, memory=self.memory,
            )  # fmt: skip
        if relaxation is not None:
            return plan, plan.value - self._log_unit(part)
        # KL(plan | mu x nu p), once the constant of the kernel is put back that whitened coordinates leave out
        if not isinstance(part, AffineTransition):
            return plan, plan.value
        return plan, plan.value / reg - part.log_constant()

    def _restored(self, i: int, part: Transition) -> TransportPlan:
        """The coupling that the potentials stand for."""
        x, y, reg, cost = self._kernel(i, part)
        a, b = self._weights(i)
        relaxation = None if self.relaxation is None else reg * self.relaxation
        error, _, iterations = self._report[:, i]
        return TransportPlan(
            _cost_rows(x, y, cost, self.memory), a, b, reg, error, bool(error <= self.tolerance),
            int(iterations), relaxation, getattr(self, f"f{i}").double(), getattr(self, f"g{i}").double(),
        )  # fmt: skip

    def _check_reach(self, i: int, distance: Tensor) -> None:
        worst = float(distance.max())
        if worst > _MAX_REACH:
            raise DiffusionError(
                f"no path of the reference reaches the snapshot at t={float(self.snapshots.times[i + 1]):g}",
                got=f"a particle {worst:.3g} standard deviations of the noise away from where any could come",
                expected=f"at most {_MAX_REACH:g}",
                hint=f"a diffusion {worst / 10:.2g} times larger would put it within ten, or give a better drift",
            )

    @property
    def plans(self) -> list[TransportPlan]:
        """The couplings of neighbouring snapshots; ``plans[i].plan()`` is the matrix ``(n_i, n_{i+1})``.

        Raises:
            UnavailableError: If the bridge isn't solved.
        """
        if bool(self._report[1].isnan().any()):
            raise UnavailableError("the bridge isn't solved yet", hint="call solve() first")
        if self._plans is None:
            with torch.no_grad():
                self._plans = [self._restored(i, part) for i, part in enumerate(self._transitions)]
        return self._plans

    @property
    def _growth(self) -> list[Growth | None]:
        plans = self.plans
        if self._growths is None:
            weights, masses = self.snapshots.weights, self.snapshots.masses.double().log().diff().tolist()
            growths: list[Growth | None] = [None] * len(plans)
            for i, plan in enumerate(plans):
                if self._tilted and self.relaxation is None:
                    tilts = (getattr(self, f"rows{i}"), getattr(self, f"columns{i}"))
                    # where rates are given the counts say what the whole grows by beyond them
                    beyond = masses[i] - self._of_rates(i) if self._counted else masses[i]
                    growths[i] = Growth(plan, *tilts, beyond, absolute=self._by_rates)
                elif self.relaxation is not None:
                    # without counts the whole grows as the rates that are the prior say
                    own = self._of_rates(i) if self._by_rates and not self._counted else 0.0
                    growths[i] = Growth.even(plan, weights[i], weights[i + 1], masses[i] + own)
            self._growths = growths
        return self._growths

    def _of_rates(self, i: int) -> float:
        """The log of the factor by which given rates let the whole population grow in an interval."""
        log_weight = self.snapshots.weights[i].double().log()
        return float(torch.logsumexp(log_weight - getattr(self, f"rows{i}")[0], 0))

    @property
    def converged(self) -> bool:
        """Whether every coupling has its marginals within the tolerance."""
        return all(plan.converged for plan in self.plans)

    @property
    def marginal_errors(self) -> Tensor:
        """The L1 error of each coupling's marginals, ``(I-1,)``."""
        return torch.stack([plan.marginal_error.double() for plan in self.plans])

    @property
    def objective(self) -> Tensor:
        r"""The divergence from the reference, less what the snapshots alone determine.

        .. math:: \sum_i\sum_{ab}\pi_{ab}\log\frac{\pi_{ab}}{\mu_a\nu_b\,p(y_b\mid x_a)}

        Adding the negative entropies of the laws behind the snapshots 2 to I gives :math:`\mathrm{KL}(q\|p)`.
        """
        self.plans  # noqa: B018, raises if there are none
        return self._report[1].sum()

    @torch.no_grad()
    def outliers(self, factor: float = 3.0) -> list[Tensor]:
        """Return for each snapshot the indices ``(k,)`` of particles that are far from all others of its neighbours in time.

        Far is more than ``factor`` times the median distance to the nearest partner, in units of the noise between the snapshots, at all
        neighbouring snapshots. Such particles make couplings slow and dominate distances of second order.
        """
        check_real(factor, "factor", above=1.0)
        far = [torch.ones(n, dtype=torch.bool, device=self.spread.device) for n in self.snapshots.sizes]
        for i, part in enumerate(self._transitions):
            x, y = self.snapshots.samples[i : i + 2]
            if isinstance(part, AffineTransition):
                before, after = part.whitened(x, y)
                forth, back = _nearest(after, before), _nearest(before, after)
            else:
                kernel = part.log_kernel(x, y)
                distance = (-2 * (kernel - kernel.max())).sqrt()
                forth, back = distance.amin(1), distance.amin(0)
            for j, own in ((i, forth), (i + 1, back)):
                far[j] &= own > factor * own.median().clamp_min(1.0)
        return [own.nonzero()[:, 0] for own in far]

    def nodes(self, num_nodes: int = 1_000_000, generator: torch.Generator | int | None = None) -> DriftNodes:
        """Return about ``num_nodes`` weighted states and drifts that stand for the bridge; see :class:`DriftNodes`.

        Where they don't suffice for all pairs that carry a coupling at all times, pairs are seen at fewer times each.
        """
        check_positive_int(num_nodes, "num_nodes")
        source, parts = as_generator(generator, self.spread.device), []
        copies = 2 * self.snapshots.dim if self.snapshots.dim <= 8 else 2
        with torch.no_grad():
            for i, (plan, part) in enumerate(zip(self.plans, self._transitions, strict=True)):
                # all pairs that carry the coupling come before all times: a pair at few times costs less accuracy than a pair left out
                times = len(part.quadrature)
                budget = max(num_nodes // (len(self.plans) * copies), 64)  # pairs times times
                wanted = int(min(4 * effective_pairs(plan), plan.shape.numel()))
                if not isinstance(part, AffineTransition):
                    wanted = min(wanted, _LINEARISED_PAIRS)  # each is linearised along its whole way
                pairs = max(budget // times, min(wanted, budget), 64)
                first, second, weight = choose_pairs(plan, pairs, source)
                each = max(1, min(times, budget // max(len(first), 1)))
                x, y = self.snapshots.samples[i][first], self.snapshots.samples[i + 1][second]
                parts.append(bridge_nodes(part, x, y, weight, source, each))
        return DriftNodes.join(parts)

    def innovations(self, family: DriftFamily | None = None, num_pairs: int = 20_000) -> Tensor:
        r"""Return the mean of :math:`zz^\top` over couplings, ``(d, d)``, where ``z`` is how far a partner is from where it is expected.

        It is in units of the noise, so it is the identity where the noise has the right strength. Expectations are those of
        ``family``, or of this bridge's reference.
        """
        values = []
        for i, (plan, part) in enumerate(zip(self.plans, self._transitions, strict=True)):
            own = part if family is None else transition(family, self.spread, part.start, part.end, self.dt)
            first, second, weight = choose_pairs(
                plan, num_pairs, torch.Generator(self.spread.device).manual_seed(0)
            )
            x, y = self.snapshots.samples[i][first], self.snapshots.samples[i + 1][second]
            # z = R^{-1/2} (y - Psi x - D), a standard normal where the noise has the right strength
            white = own.chain(x, y).whitened(x.mT, y.mT)
            values.append((weight * white) @ white.mT)
        return torch.stack(values).mean(0)

    # ------------------------------------------------------------------------------------------ the law
    @torch.no_grad()
    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw whole trajectories through all snapshots.

        Partners are drawn along the chain of couplings, and states between them from the pinned reference, without
        discretisation error where the drift is affine.

        Args:
            ts: The times of the paths, ``(T,)``, within the span of the snapshots.
            sample_shape: The shape of independent draws, an integer or a tuple.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            Paths whose ``dw (*sample, T-1, d)`` are the innovations, what each step adds to its mean given the state and the
            particle that is reached next, in units of the noise; where the population grows there are none, ``(*sample, T-1, 0)``.

        Raises:
            TimeGridError: If the grid isn't increasing or leaves the span.
            NonFiniteError: If the inner time grid is too coarse for the drift on a path.
        """
        grid = as_time_grid(ts, min_points=1, like=self.snapshots.times)
        check_inside(grid, self.snapshots.times, "ts", "the snapshots")
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.spread.device)
        x, dw = sampling.draw_paths(
            self.snapshots,
            self.plans,
            self._transitions,
            self._growth,
            grid,
            torch.Size(shape).numel(),
            source,
        )
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                "trajectories aren't finite",
                got=f"{float((~torch.isfinite(x)).any(-1).any(-1).double().mean()):.1%} of them",
                hint="give a smaller dt, or a smoother drift",
            )
        return PathSample(grid, x.reshape(*shape, *x.shape[1:]), dw.reshape(*shape, *dw.shape[1:]), {}, self)

    @torch.no_grad()
    def marginal(self, t: Tensor | float, max_pairs: int = 100_000) -> BridgeMarginal:
        """Return the law at time ``t``, a mixture over the pairs of the coupling, without simulation.

        Args:
            t: The time, within the span of the snapshots.
            max_pairs: The largest number of pairs; larger couplings are replaced by a systematic sample of so many.

        Raises:
            TimeGridError: If ``t`` lies outside.
        """
        check_real(t, "t")
        time = float(t)
        times = self.snapshots.times
        check_inside(times.new_tensor([time]), times, "t", "the snapshots")
        plans = self.plans
        exact = (times - time).abs() <= 1e-9 * float(times[-1] - times[0])
        if bool(exact.any()):
            snap = self.snapshots[int(exact.nonzero()[0, 0])]
            return BridgeMarginal(time, snap.sample, None, snap.weights)
        i = kernel_drift.owner(times, time)[0]
        part, growth = self._transitions[i], self._growth[i]
        coupling = plans[i] if growth is None else growth.coupling(self._side(i).share(time))
        first, second, weight = choose_pairs(
            coupling, max_pairs, torch.Generator(times.device).manual_seed(0)
        )
        x, y = self.snapshots.samples[i][first], self.snapshots.samples[i + 1][second]
        law = sampling.pinned_law(part, x, y, time)
        return BridgeMarginal(time, *sampling.finite_pairs(*law, weight, time))

    def _side(self, i: int) -> kernel_drift.Side:
        return kernel_drift.Side(self.snapshots, i, self._transitions[i], self.plans[i], self._growth[i])

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the drift of the bridge at times ``t`` and states ``x (*batch, d)``.

        .. math:: b_q(t,x)=b(t,x)+GG^\top\nabla_x\log\sum_b\nu_be^{g_b}\,p(y_b\mid X_t=x)

        Just before a snapshot it pulls every path onto a particle seen there. At the last snapshot nothing lies ahead: the drift there is
        that of the process run backward, the velocity with which paths arrive. For velocities of cells see :meth:`velocity`.

        Raises:
            UnavailableError: If the population grows: births and deaths aren't a drift. The motion has a :meth:`velocity`.
        """
        self._refuse_growth("drift")

        def at(time: float, x: Tensor) -> Tensor:
            times = self.snapshots.times
            if time >= float(times[-1]) - 1e-9 * float(times[-1] - times[0]):
                return kernel_drift.backward_drift(self._side(len(times) - 2), time, x)
            return kernel_drift.forward_drift(self._side(kernel_drift.owner(times, time)[1]), time, x)

        return kernel_drift.at_times(self.snapshots, t, x, at)

    def velocity(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the velocity with which the density moves, at times ``t`` and states ``x (*batch, d)``.

        .. math:: v=\tfrac12(b_++b_-)

        It is the mean of the drift forward in time and of that of the process run backward. At a snapshot the first is of the interval
        after it, the second of the one before; at the first and at the last snapshot there is only one of them.
        """
        return kernel_drift.mean_velocity(
            self.snapshots,
            t,
            x,
            lambda i, time, own: kernel_drift.forward_drift(self._side(i), time, own),
            lambda i, time, own: kernel_drift.backward_drift(self._side(i), time, own),
        )

    def growth_rate(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the rate of births less deaths at times ``t`` and states ``x (*batch, d)``, ``(*batch,)`` per unit of time.

        It is zero without a ``relaxation``. The growth of the whole population enters where the snapshots' masses differ.
        """

        def at(time: float, x: Tensor) -> Tensor:
            return kernel_drift.growth_rate(
                self._side(kernel_drift.owner(self.snapshots.times, time)[1]), time, x
            )

        return kernel_drift.at_times(self.snapshots, t, x, at)

    def as_diffusion(self) -> DiffusionMeasure:
        """Return the same law as an SDE with this drift, started from the first snapshot's particles.

        Raises:
            UnavailableError: If the population grows.
        """
        self._refuse_growth("as_diffusion")
        return DiffusionMeasure(EmpiricalLaw.of(self.snapshots[0]), SDE(_BridgeDrift(self), self.diffusion))

    def forward(self) -> ForwardOperator:
        """Return the forward operator of the bridge as a diffusion.

        Raises:
            UnavailableError: If the population grows.
        """
        self._refuse_growth("forward")
        return self.as_diffusion().forward()

    def _refuse_growth(self, verb: str) -> None:
        if any(growth is not None for growth in self._growth):
            self._refuse(
                verb,
                "its population grows, and isn't that of a diffusion; the motion between births and deaths has a velocity()",
            )

    @property
    def reference(self) -> DiffusionMeasure:
        """The reference process, started from the first snapshot's particles."""
        return DiffusionMeasure(EmpiricalLaw.of(self.snapshots[0]), SDE(self.family, self.diffusion))

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        """Raise: the bridge visits only particles that were seen, so no density exists; see :meth:`as_diffusion`."""
        raise UnavailableError(
            "a bridge through particles has no density with respect to another law",
            hint="use as_diffusion().log_rn on paths that end before a snapshot, or .objective for the divergence",
        )

    # ------------------------------------------------------------------------------------------ storage
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SchrodingerBridge:
        """Move the snapshots with the module; potentials keep their double precision."""
        super()._apply(fn, recurse)
        self.snapshots = self.snapshots.to(self.spread.dtype, self.spread.device)
        for name, value in self.named_buffers(recurse=False):
            if name not in ("spread", "_penalty"):
                setattr(self, name, value.double())
        self._forget()
        return self


def _forget_solution(bridge: SchrodingerBridge, keys: object) -> None:
    bridge._forget()


class _BridgeDrift(nn.Module):
    def __init__(self, bridge: SchrodingerBridge) -> None:
        super().__init__()
        self._drift: Callable[[Tensor, Tensor], Tensor] = bridge.drift

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self._drift(t, x)


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance from every ``y (m, d)`` to the nearest ``x (n, d)``, in blocks."""
    rows = max(1, 2**22 // max(x.shape[0], 1))
    return torch.cat([torch.cdist(part, x).amin(-1) for part in y.split(rows)])
