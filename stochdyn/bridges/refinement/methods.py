"""How a refinement builds its bridges: methods that own their options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stochdyn._checks import check_bool, check_choice, check_positive_int, check_real, check_type
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.ipf import DriftRegression, IPFBridge
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.bridges.refinement.projection import Projection, as_projection

__all__ = ["IPF", "Method", "Sinkhorn", "as_method"]


@dataclass(frozen=True, kw_only=True)
class Sinkhorn:
    r"""Refinement with exact couplings: :class:`~stochdyn.bridges.SchrodingerBridge` and a projection in turn.

    It is what to use, unless the transition density of the family can't be had: then there is :class:`IPF`.

    Args:
        projection: how the family is fitted to a bridge: ``"auto"``, or one of :class:`LeastSquares`, :class:`GaussNewton` and
            :class:`Adam`. ``"auto"`` takes the first of them that can.
        accelerate: whether to extrapolate from the last iterations where that makes the objective fall more; for families of at
            most sixty parameters. Worth it where parameters are strongly correlated.
        from_family: whether the first bridge is built on the family's own parameters; else its reference has no drift.
        restarts: the number of further attempts, from parameters drawn by the family's ``reset``; the best one is returned.
        num_nodes: the number of states that a projection sees.
        population: ``N``, the number of particles that the divergence counts for beside a prior and in the stopping rule, since
            seeing these snapshots has the probability :math:`e^{-N\min_q\mathrm{KL}}` (Sanov); the mean size of a snapshot if None.
        relaxation: what deviations from the snapshots' weights and masses cost; see :class:`~stochdyn.bridges.SchrodingerBridge`.
        corrections: the number of paths per pair for importance weights of what linearisation leaves out; see
            :class:`~stochdyn.bridges.SchrodingerBridge`.
        tolerance: the largest marginal error of the couplings, in L1.
        max_iterations: the largest number of iterations of each coupling.

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
        learner: how drifts are regressed: ``"gp"``, ``"neural"``, or a function that makes a
            :class:`~stochdyn.bridges.laws.DriftRegression`.
        projection: how the family is fitted to a bridge; see :class:`Sinkhorn`.
        from_family: whether the first bridge is built on the family's own parameters; else its reference has no drift.
        num_nodes: the number of states that a projection sees.
        population: the number of particles that the divergence counts for beside a prior; the mean size of a snapshot if None.
        max_iterations: the number of pairs of half-bridges.

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


Method = Sinkhorn | IPF


def as_method(method: object) -> Method:
    """Return a method for its name, ``"sinkhorn"`` or ``"ipf"``, with its defaults, or itself.

    Raises:
        InvalidInputError: for anything else.
    """
    if isinstance(method, str):
        check_choice(method, ("sinkhorn", "ipf"), "method")
        return Sinkhorn() if method == "sinkhorn" else IPF()
    check_type(method, (Sinkhorn, IPF), "method", 'the names are "sinkhorn" and "ipf"')
    return method  # type: ignore[return-value]
