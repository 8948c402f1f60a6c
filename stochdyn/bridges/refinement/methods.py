"""How a refinement builds its bridges: methods that own their options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    check_bool,
    check_choice,
    check_positive_definite,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.hidden import HiddenStateBridge
from stochdyn.bridges.laws.ipf import DriftRegression, IPFBridge
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.bridges.refinement.projection import Projection, as_projection
from stochdyn.errors import ShapeError

__all__ = ["IPF", "Messages", "Method", "Sinkhorn", "as_method"]


@dataclass(frozen=True, kw_only=True)
class Sinkhorn:
    r"""Refinement with exact couplings: :class:`~stochdyn.bridges.SchrodingerBridge` and a projection in turn.

    It is what to use, unless the transition density of the family can't be had: then there is :class:`IPF`.

    Args:
        projection: The way in which the family is fitted to a bridge: ``"auto"``, or one of :class:`LeastSquares`,
            :class:`GaussNewton` and :class:`Adam`. ``"auto"`` takes the first of them that can.
        accelerate: Whether to extrapolate from the last iterations where that makes the objective fall more; for families of at
            most sixty parameters. Worth it where parameters are strongly correlated.
        from_family: Whether the first bridge is built on the family's own parameters; else its reference has no drift.
        restarts: The number of further attempts, from parameters drawn by the family's ``reset``; the best one is returned.
        num_nodes: The number of states that a projection sees.
        population: The number ``N`` of particles that the divergence counts for beside a prior and in the stopping rule, since
            number of particles that the divergence counts for beside a prior and in the stopping rule, since seeing these
            snapshots has the probability :math:`e^{-N\min_q\mathrm{KL}}` (Sanov); the mean size of a snapshot if None.
        relaxation: The cost of deviations from the snapshots' weights and masses; see
            :class:`~stochdyn.bridges.SchrodingerBridge`.
        corrections: The number of paths per pair for importance weights of what linearisation leaves out; see
            :class:`~stochdyn.bridges.SchrodingerBridge`.
        tolerance: The largest L1 error of a coupling's marginals.
        max_iterations: The largest number of iterations of each coupling.

    Example:
        >>> Sinkhorn(accelerate=True, restarts=2).restarts
        2
    """

    projection: str | Projection = "auto"
    accelerate: bool = False
    from_family: bool = False
    restarts: int = 0
    num_nodes: int = 1_000_000
    population: float | None = None
    relaxation: float | None = None
    corrections: int = 0
    tolerance: float = 1e-6
    max_iterations: int = 10_000

    def __post_init__(self) -> None:
        as_projection(self.projection)
        check_bool(self.accelerate, "accelerate")
        check_bool(self.from_family, "from_family")
        check_positive_int(self.restarts, "restarts", 0)
        check_positive_int(self.num_nodes, "num_nodes")
        for name in ("population", "relaxation"):
            if getattr(self, name) is not None:
                check_real(getattr(self, name), name, above=0.0)
        check_positive_int(self.corrections, "corrections", 0)
        check_real(self.tolerance, "tolerance", above=0.0)
        check_positive_int(self.max_iterations, "max_iterations")

    def bridge(
        self, snapshots: Snapshots, reference: DriftFamily | None, diffusion: Any, dt: float | None = None
    ) -> SchrodingerBridge:
        """Return an unsolved bridge with these options."""
        return SchrodingerBridge(
            snapshots, reference, diffusion, dt=dt, tolerance=self.tolerance, max_iterations=self.max_iterations,
            relaxation=self.relaxation, corrections=self.corrections,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IPF:
    """Refinement by iterative proportional fitting with regressed drifts, as published, for comparison.

    Its bridges are :class:`~stochdyn.bridges.IPFBridge`. They are simulated, so there is no objective to stop by, and neither a posterior
    nor a learned diffusion.

    Args:
        learner: The way in which drifts are regressed: ``"gp"``, ``"neural"``, or a function that makes a
            :class:`~stochdyn.bridges.laws.DriftRegression`.
        projection: The way in which the family is fitted to a bridge; see :class:`Sinkhorn`.
        from_family: Whether the first bridge is built on the family's own parameters; else its reference has no drift.
        num_nodes: The number of states that a projection sees.
        population: The number of particles that the divergence counts for beside a prior; the mean size of a snapshot if None.
        max_iterations: The number of pairs of half-bridges.

    Reference: Vargas et al. (2021), Solving Schrödinger bridges via maximum likelihood; Shen, Berlinghieri & Broderick (2025).
    """

    learner: str | Callable[[], DriftRegression] = "gp"
    projection: str | Projection = "auto"
    from_family: bool = False
    num_nodes: int = 1_000_000
    population: float | None = None
    max_iterations: int = 10

    def __post_init__(self) -> None:
        if not callable(self.learner):
            check_choice(self.learner, ("gp", "neural"), "learner")
        as_projection(self.projection)
        check_bool(self.from_family, "from_family")
        check_positive_int(self.num_nodes, "num_nodes")
        if self.population is not None:
            check_real(self.population, "population", above=0.0)
        check_positive_int(self.max_iterations, "max_iterations")

    def bridge(
        self,
        snapshots: Snapshots,
        reference: DriftFamily | None,
        diffusion: Any,
        dt: float | None = None,
        seed: int = 0,
    ) -> IPFBridge:
        """Return an unsolved bridge with these options."""
        return IPFBridge(
            snapshots,
            reference,
            diffusion,
            dt=dt,
            max_iterations=self.max_iterations,
            learner=self.learner,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Messages:
    """Refinement of a mechanism of which only the first components are seen.

    Its bridges are :class:`~stochdyn.bridges.HiddenStateBridge`, built on the family's own parameters, so these must start where the mechanism
    comes near to the data. The diffusion isn't learnt.

    Use it for species that aren't measured, or for positions without velocities: then the noise drives velocities only, ``diffusion`` is a
    matrix ``(2p, p)`` as that of :func:`~stochdyn.bridges.momentum`, and a function returns ``(v, friction and forces)``.

    Near the end steps are those of Newton's method on the draws of the hidden components, for up to twenty parameters without prior. Parameters
    that can make up for each other, such as the decay of a species that is seen and that of the hidden one which makes it, are held by few
    snapshots so weakly that estimates are far from the truth: :meth:`Refinement.posterior` says how far, and warns of the direction.

    Args:
        initial_mean: The mean of the whole state at the first snapshot to start from, ``(d,)``: the components that are seen
            first.
        initial_cov: The covariance of the whole state at the first snapshot, ``(d, d)``; for what is hidden as wide as is
            known.
        learn_initial: Whether the law at the first snapshot is refined too, from where it is: snapshots often don't determine
            it.
        projection: The way in which the family is fitted to a bridge; see :class:`Sinkhorn`.
        num_hidden: The number of draws of the hidden components per particle.
        num_rounds: The number of times that the hidden components are drawn for each bridge.
        num_nodes: The number of states that a projection sees.
        population: The number of particles that the divergence counts for beside a prior; the mean size of a snapshot if None.
        tolerance: The largest L1 error of a bridge's marginals.
        max_iterations: The largest number of sweeps of each bridge.
    """

    initial_mean: Any
    initial_cov: Any
    learn_initial: bool = False
    projection: str | Projection = "auto"
    num_hidden: int = 10
    num_rounds: int = 2
    num_nodes: int = 200_000
    population: float | None = None
    tolerance: float = 1e-4
    max_iterations: int = 500

    def __post_init__(self) -> None:
        as_projection(self.projection)
        mean = as_tensor(self.initial_mean, "initial_mean", 1, "(d,)")
        cov = as_tensor(self.initial_cov, "initial_cov", 2, "(d, d)")
        if cov.shape != (len(mean), len(mean)):
            raise ShapeError(
                "initial_cov doesn't fit initial_mean", got=tuple(cov.shape), expected=(len(mean),) * 2
            )
        check_positive_definite(cov, "initial_cov")
        check_bool(self.learn_initial, "learn_initial")
        check_positive_int(self.num_hidden, "num_hidden", 2)
        check_positive_int(self.num_rounds, "num_rounds")
        check_positive_int(self.num_nodes, "num_nodes")
        if self.population is not None:
            check_real(self.population, "population", above=0.0)
        check_real(self.tolerance, "tolerance", above=0.0)
        check_positive_int(self.max_iterations, "max_iterations")

    @property
    def dim(self) -> int:
        """The number of components of the whole state."""
        return len(self.initial_mean)

    def bridge(
        self, snapshots: Snapshots, reference: DriftFamily, diffusion: Any, dt: float | None = None,
        initial: tuple[Tensor, Tensor] | None = None, seed: int = 0,
    ) -> HiddenStateBridge:  # fmt: skip
        """Return a bridge with these options."""
        mean, cov = (self.initial_mean, self.initial_cov) if initial is None else initial
        return HiddenStateBridge(
            snapshots, reference, diffusion, mean, cov, dt=dt, num_hidden=self.num_hidden, num_rounds=self.num_rounds,
            tolerance=self.tolerance, max_iterations=self.max_iterations, seed=seed,
        )  # fmt: skip


Method = Sinkhorn | IPF | Messages


def as_method(method: object) -> Method:
    """Return a method for its name, ``"sinkhorn"`` or ``"ipf"``, with its defaults, or itself.

    Raises:
        InvalidInputError: If it is anything else.
    """
    if isinstance(method, str):
        check_choice(method, ("sinkhorn", "ipf"), "method")
        return Sinkhorn() if method == "sinkhorn" else IPF()
    check_type(method, (Sinkhorn, IPF, Messages), "method", 'the names are "sinkhorn" and "ipf"')
    return method  # type: ignore[return-value]
