"""The Schrödinger bridge through all snapshots for a fixed reference process, as a law on paths."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_inside, check_positive, check_positive_int, check_time_grid
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily, ZeroDrift
from stochdyn.bridges.laws import kernel_drift, sampling
from stochdyn.bridges.laws.linearised import AffineTransition, Transition, transition
from stochdyn.bridges.laws.marginal import BridgeMarginal
from stochdyn.bridges.laws.nodes import DriftNodes, bridge_nodes, choose_pairs
from stochdyn.bridges.laws.reference import EmpiricalLaw, as_reference, spread_of
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.equation import SDE
from stochdyn.core.transport.entropic import TransportPlan, sinkhorn
from stochdyn.errors import (
    ApproximationWarning,
    ConvergenceWarning,
    DiffusionError,
    InvalidInputError,
    NonFiniteError,
    UnavailableError,
)

__all__ = ["SchrodingerBridge"]

# Beyond this many standard deviations the log-density of a path to the next snapshot is below -5e5.
_MAX_REACH = 1e3
# Where the product of step and Jacobian is larger, matrix exponentials of fourth order are wrong by per cents.
_MAX_STIFFNESS = 1.5


class SchrodingerBridge(PathMeasure):
    r"""The law on paths nearest to a reference process among all that pass through the snapshots.

    .. math:: \min_q\ \mathrm{KL}(q\,\|\,p)\quad\text{with}\quad q_{t_i}=\pi_i,\ i=1,\dots,I

    For a reference without memory it is a chain of bridges between neighbouring snapshots: particles are coupled by
    :math:`\pi_{ab}\propto e^{f_a+g_b}p(y_b\mid x_a)`, and pairs are joined by the reference pinned at both ends.
    The transition density is exact for affine drifts and relinearised about a path for each pair otherwise
    (:mod:`stochdyn.bridges.laws.linearised`).

    Args:
        snapshots: what was seen.
        reference: a drift (:class:`DriftFamily`, ``nn.Module`` or callable ``(t, x)``), an :class:`SDE` or a
            :class:`DiffusionMeasure`; Brownian motion if None.
        diffusion: a number, ``(d,)``, or an invertible ``(d, d)`` matrix; that of the reference if it has one, else 1.
        step: spacing of the inner time grid; a twenty-fifth of the shortest interval if None.
        tolerance: largest marginal error of the couplings, in L1.
        max_iterations: of each coupling.
        relaxation: price of a deviation of a coupling from the snapshots' weights and masses, in nats; infinite if None, and masses
            don't count then. For populations that grow: :func:`stochdyn.core.transport.entropic.sinkhorn`.
        corrections: paths a pair for importance weights of what linearisation leaves out of a nonlinear drift, in couplings and
            trajectories; none if zero, which is right where the noise is small. See :mod:`stochdyn.bridges.laws.importance`.

    Raises:
        DiffusionError: if the diffusion is singular, or so small that no path reaches the next snapshot.
        ShapeError: if the drift doesn't fit the particles.

    Example:
        >>> snaps = Snapshots([0.0, 1.0], [torch.zeros(5, 1), torch.ones(5, 1)])
        >>> bridge = SchrodingerBridge(snaps, diffusion=0.5).solve()
        >>> bridge.marginal(0.5).mean, bridge.marginal(0.5).covariance
        (tensor([0.5000]), tensor([[0.0625]]))

    Reference: Shen, Berlinghieri & Broderick (2025), Multi-marginal Schrödinger bridges with iterative reference
    refinement, AISTATS; Léonard (2014), A survey of the Schrödinger problem.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        reference: Any = None,
        diffusion: Any = None,
        *,
        step: float | None = None,
        tolerance: float = 1e-6,
        max_iterations: int = 10_000,
        relaxation: float | None = None,
        corrections: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(snapshots, Snapshots):
            raise InvalidInputError("snapshots must be Snapshots", got=type(snapshots).__name__)
        check_positive(tolerance, "tolerance")
        check_positive_int(max_iterations, "max_iterations")
        self.snapshots = snapshots
        family, own = as_reference(reference, snapshots)
        self.family: DriftFamily = ZeroDrift(snapshots.dim) if family is None else family
        self.diffusion = diffusion if diffusion is not None else own if own is not None else 1.0
        self.spread = spread_of(self.diffusion, snapshots)
        if step is None:
            step = float(snapshots.durations.min()) / 25
        check_positive(step, "step")
        self.step, self.tolerance, self.max_iterations = float(step), tolerance, max_iterations
        self.relaxation = relaxation
        check_positive_int(corrections, "corrections", 0)
        self.corrections = corrections + corrections % 2
        self.plans: list[TransportPlan] | None = None
        self._transitions: list[Transition] = []
        self._values: list[Tensor] = []

    # ------------------------------------------------------------------------------------------ solution
    @torch.no_grad()
    def solve(self, warm_start: SchrodingerBridge | None = None) -> SchrodingerBridge:
        """Couple all neighbouring snapshots; returns this bridge.

        Args:
            warm_start: a solved bridge through the same snapshots, whose potentials are started from.
        """
        times = self.snapshots.times.tolist()
        self._transitions = [
            transition(self.family, self.spread, a, b, self.step, self.corrections)
            for a, b in itertools.pairwise(times)
        ]
        plans, values = [], []
        for i, part in enumerate(self._transitions):
            start = warm_start.plans[i] if warm_start is not None and warm_start.plans else None
            plan, value = self._couple(i, part, start)
            plans.append(plan)
            values.append(value)
        self.plans, self._values = plans, values
        stiffness = max(getattr(part, "stiffness", 0.0) for part in self._transitions)
        if stiffness > _MAX_STIFFNESS:
            warnings.warn(
                f"The inner time grid is too coarse for this drift: step times Jacobian is {stiffness:.2g}. "
                f"A step of {self.step / stiffness:.2g} would do",
                ApproximationWarning,
                stacklevel=2,
            )
        if not self.converged:
            warnings.warn(
                f"A coupling stopped with a marginal error of {float(self.marginal_errors.max()):.1e} "
                f"(tolerance {self.tolerance:.1e}). Allow more max_iterations or a larger diffusion",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _couple(self, i: int, part: Transition, start: TransportPlan | None) -> tuple[TransportPlan, Tensor]:
        x, y = self.snapshots.samples[i : i + 2]
        a, b = self.snapshots.weights[i : i + 2]
        options: dict[str, Any] = {
            "weights_x": a, "weights_y": b, "tolerance": self.tolerance, "max_iterations": self.max_iterations,
            "warm_start": None if start is None else start.potentials,
        }  # fmt: skip
        price = self.relaxation
        if price is not None:
            masses = self.snapshots.masses[i : i + 2] / self.snapshots.masses[i]
            options |= {"weights_x": a * masses[0], "weights_y": b * masses[1]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one for all is given by solve
            if isinstance(part, AffineTransition):
                before, after = part.whitened(x, y)
                self._check_reach(i, _nearest(before[a > 0], after[b > 0]))
                plan = sinkhorn(
                    before, after, 2.0, relaxation=None if price is None else 2 * price, **options
                )
                mass = 1.0 if price is None else plan.mass
                return plan, 0.5 * plan.value - part.log_constant() * mass
            kernel = part.log_kernel(x, y)
            if not bool(torch.isfinite(kernel).all()):
                raise NonFiniteError(
                    f"the transition density before t={float(self.snapshots.times[i + 1]):g} isn't finite",
                    got=f"step times Jacobian up to {getattr(part, 'stiffness', 0.0):.2g}",
                    hint="give a smaller step, or a smoother drift",
                )
            seen = kernel[a > 0][:, b > 0]
            self._check_reach(i, (-2 * (seen - seen.max())).amin(-2).clamp_min(0).sqrt())
            plan = sinkhorn(None, None, 1.0, cost=-kernel, relaxation=price, **options)
            return plan, plan.value

    def couplings(self) -> dict[str, Any]:
        """Return the potentials of all couplings and their values, as tensors and plain data; the reference isn't in it."""
        plans = [
            {
                "f": plan._f,
                "g": plan._g,
                "error": plan.marginal_error,
                "converged": plan.converged,
                "iterations": plan.num_iterations,
            }
            for plan in self._solved()
        ]
        return {"plans": plans, "values": list(self._values)}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take couplings from :meth:`couplings` instead of solving for them; to the same bits."""
        limit, self.max_iterations = self.max_iterations, 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.solve()
        finally:
            self.max_iterations = limit
        device, plans = self.spread.device, self._solved()
        self.plans = [
            replace(
                plan, _f=own["f"].to(device), _g=own["g"].to(device), marginal_error=own["error"].to(device),
                converged=own["converged"], num_iterations=own["iterations"],
            )
            for plan, own in zip(plans, state["plans"], strict=True)
        ]  # fmt: skip
        self._values = [value.to(device) for value in state["values"]]

    def _check_reach(self, i: int, distance: Tensor) -> None:
        worst = float(distance.max())
        if worst > _MAX_REACH:
            raise DiffusionError(
                f"no path of the reference reaches the snapshot at t={float(self.snapshots.times[i + 1]):g}",
                got=f"a particle {worst:.3g} standard deviations of the noise away from where any could come",
                expected=f"at most {_MAX_REACH:g}",
                hint=f"a diffusion {worst / 10:.2g} times larger would put it within ten, or give a better drift",
            )

    def _solved(self) -> list[TransportPlan]:
        if self.plans is None:
            raise UnavailableError("the bridge isn't solved yet", hint="call solve() first")
        return self.plans

    @property
    def converged(self) -> bool:
        """Whether every coupling has its marginals within the tolerance."""
        return all(plan.converged for plan in self._solved())

    @property
    def marginal_errors(self) -> Tensor:
        """``(I-1,)`` L1 error of each coupling's marginals."""
        return torch.stack([plan.marginal_error.double() for plan in self._solved()])

    @property
    def objective(self) -> Tensor:
        r"""The divergence from the reference, less what the snapshots alone determine.

        .. math:: \sum_i\sum_{ab}\pi_{ab}\log\frac{\pi_{ab}}{\mu_a\nu_b\,p(y_b\mid x_a)}

        Adding the negative entropies of the laws behind the snapshots 2 to I gives :math:`\mathrm{KL}(q\|p)`.
        """
        self._solved()
        return torch.stack([value.double() for value in self._values]).sum()

    def nodes(self, count: int = 1_000_000, generator: torch.Generator | None = None) -> DriftNodes:
        """Return about ``count`` weighted states and drifts that stand for the bridge; see :class:`DriftNodes`."""
        parts = []
        with torch.no_grad():
            for i, (plan, part) in enumerate(zip(self._solved(), self._transitions, strict=True)):
                copies = 2 * self.snapshots.dim if self.snapshots.dim <= 8 else 2
                share = count // (len(self._transitions) * copies * len(part.quadrature))
                first, second, weight = choose_pairs(plan, max(share, 64), generator)
                x, y = self.snapshots.samples[i][first], self.snapshots.samples[i + 1][second]
                parts.append(bridge_nodes(part, x, y, weight, generator))
        return DriftNodes.join(parts)

    def mahalanobis(self, family: DriftFamily | None = None, count: int = 20_000) -> Tensor:
        """Return how far partners are from where they are expected: the mean square in units of the noise, over couplings.

        It is ``d`` where the noise has the right strength. Expectations are those of ``family``, or of this bridge's reference.
        """
        values = []
        for i, (plan, part) in enumerate(zip(self._solved(), self._transitions, strict=True)):
            own = part if family is None else transition(family, self.spread, part.start, part.end, self.step)
            first, second, weight = choose_pairs(
                plan, count, torch.Generator(self.spread.device).manual_seed(0)
            )
            x, y = self.snapshots.samples[i][first], self.snapshots.samples[i + 1][second]
            values.append((weight * own.chain(x, y).mahalanobis(x.mT, y.mT)).sum())
        return torch.stack(values).mean()

    # ------------------------------------------------------------------------------------------ the law
    @torch.no_grad()
    def sample(
        self,
        ts: Tensor,
        sample_shape: tuple[int, ...] | int = (),
        generator: torch.Generator | None = None,
    ) -> PathSample:
        """Draw whole trajectories through all snapshots.

        Partners are drawn along the chain of couplings, and states between them from the pinned reference, without
        discretisation error where the drift is affine.

        Args:
            ts: ``(T,)`` times within the span of the snapshots.
            sample_shape: number or shape of independent draws.
            generator: source of randomness.

        Returns:
            Paths whose ``dw`` are the innovations, what each step adds to its mean given the state and the particle
            that is reached next, in units of the noise.

        Raises:
            TimeGridError: if the grid isn't increasing or leaves the span.
            NonFiniteError: if the inner time grid is too coarse for the drift on a path.
        """
        check_time_grid(ts)
        check_inside(ts, self.snapshots.times, "ts", "the snapshots")
        shape = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        count = int(torch.Size(shape).numel())
        x, dw = sampling.draw_paths(self.snapshots, self._solved(), self._transitions, ts, count, generator)
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                "trajectories aren't finite",
                got=f"{float((~torch.isfinite(x)).any(-1).any(-1).double().mean()):.1%} of them",
                hint="give a smaller step, or a smoother drift",
            )
        dim = self.snapshots.dim
        return PathSample(ts, x.reshape(*shape, len(ts), dim), dw.reshape(*shape, len(ts) - 1, dim), {}, self)

    @torch.no_grad()
    def marginal(self, t: float | Tensor, max_pairs: int = 100_000) -> BridgeMarginal:
        """Return the law at time ``t``, a mixture over the pairs of the coupling, without simulation.

        Args:
            t: within the span of the snapshots.
            max_pairs: larger couplings are replaced by a systematic sample of this many pairs.

        Raises:
            TimeGridError: if ``t`` lies outside.
        """
        time = float(t)
        times = self.snapshots.times
        check_inside(torch.tensor([time], dtype=torch.float64), times, "t", "the snapshots")
        plans = self._solved()
        exact = (times - time).abs() <= 1e-9 * float(times[-1] - times[0])
        if bool(exact.any()):
            snap = self.snapshots[int(exact.nonzero()[0, 0])]
            return BridgeMarginal(time, snap.sample, None, snap.weights)
        i = int(torch.searchsorted(times, time)) - 1
        first, second, weight = choose_pairs(
            plans[i], max_pairs, torch.Generator(times.device).manual_seed(0)
        )
        x, y = self.snapshots.samples[i][first], self.snapshots.samples[i + 1][second]
        law = sampling.pinned_law(self._transitions[i], x, y, time)
        return BridgeMarginal(time, *sampling.finite_pairs(*law, weight, time))

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the drift of the bridge at times ``t`` and states ``x (*batch, d)``.

        .. math:: b_q(t,x)=b(t,x)+GG^\top\nabla_x\log\sum_b\nu_be^{g_b}\,p(y_b\mid X_t=x)

        Just before a snapshot it pulls every path onto a particle seen there.
        """
        return kernel_drift.bridge_drift(self.snapshots, self._solved(), self._transitions, t, x)

    def as_diffusion(self) -> DiffusionMeasure:
        """Return the same law as an SDE with this drift, started from the first snapshot's particles."""
        self._solved()
        return DiffusionMeasure(EmpiricalLaw.of(self.snapshots[0]), SDE(_BridgeDrift(self), self.diffusion))

    @property
    def reference(self) -> DiffusionMeasure:
        """The reference process, started from the first snapshot's particles."""
        return DiffusionMeasure(EmpiricalLaw.of(self.snapshots[0]), SDE(self.family, self.diffusion))

    def log_rn(self, path: PathSample, other: PathMeasure) -> Tensor:
        """Raise: the bridge visits only particles that were seen, so no density exists; see :meth:`as_diffusion`."""
        raise UnavailableError(
            "a bridge through particles has no density with respect to another law",
            hint="use as_diffusion().log_rn on paths that end before a snapshot, or .objective for the divergence",
        )


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
