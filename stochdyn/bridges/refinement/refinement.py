"""Refinement of the reference: bridge and projection in turn, until its parameters stand still."""

from __future__ import annotations

import contextlib
import copy
import os
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stochdyn._checks import (
    as_seed,
    check_bool,
    check_choice,
    check_positive,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn._transforms import recorded
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.hidden import HiddenStateBridge
from stochdyn.bridges.laws.ipf import IPFBridge
from stochdyn.bridges.laws.reference import EmpiricalLaw, fitted_family, spread_of
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.bridges.refinement.history import History
from stochdyn.bridges.refinement.identifiability import check_counts
from stochdyn.bridges.refinement.loop import Attempt, IPFLoop, SinkhornLoop, Task, WholeAttempt
from stochdyn.bridges.refinement.messages_loop import MessagesLoop
from stochdyn.bridges.refinement.methods import IPF, Messages, Method, Sinkhorn, as_method
from stochdyn.bridges.refinement.projection import Adam, as_projection
from stochdyn.core.gaussian.small import psd_factor
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError
from stochdyn.run.engine import run_to_end
from stochdyn.run.jobs import Jobs, check_executor

__all__ = ["Refinement", "refine"]

_TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)
class Refinement:
    """A refined reference and the bridge built on it.

    Attributes:
        family: The chosen drift.
        measure: The bridge on the refined reference, a law on paths: ``.sample(ts, sample_shape)``, ``.marginal(t)``,
            ``.drift(t, x)``.
        history: The record of what happened in every iteration.
        snapshots: The snapshots that the bridge passes through.
        diffusion: The covariance rate of the noise, ``(d, d)``.
        dt: The spacing of the inner time grid.
        method: The method by which bridges were built, with its options.
        options: The other arguments of :func:`refine` by name, for repeating it on other data.
    """

    family: DriftFamily
    measure: PathMeasure
    history: History
    snapshots: Snapshots
    diffusion: Tensor
    dt: float
    method: Method
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The refined parameters by name."""
        return self.family.named_values()

    @property
    def objective(self) -> float:
        """The divergence between bridge and reference; see :attr:`SchrodingerBridge.objective`."""
        return self.history.final_objective

    @property
    def reference(self) -> DiffusionMeasure:
        """The refined reference process, started from the first snapshot's particles, hidden components included."""
        noise = Matrix(psd_factor(self.diffusion))
        return DiffusionMeasure(self.states_at(0), SDE(self.family, noise))

    def states_at(self, index: int) -> EmpiricalLaw:
        """Return the law of the whole state at a snapshot: its particles, or weighted draws where components are hidden.

        Args:
            index: The index of the snapshot; negative ones count from the end.
        """
        size = len(self.snapshots)
        if not -size <= index < size:
            raise InvalidInputError("there is no such snapshot", got=index, expected=f"{-size} to {size - 1}")
        if isinstance(self.measure, HiddenStateBridge):
            return self.measure.states_at(index % size)
        return EmpiricalLaw.of(self.snapshots[index % size])

    @property
    def bridge(self) -> SchrodingerBridge:
        """The bridge with its couplings.

        Raises:
            UnavailableError: If the method builds bridges without couplings.
        """
        if not isinstance(self.measure, SchrodingerBridge):
            raise UnavailableError(
                f"a {type(self.measure).__name__} has no couplings, so neither posterior nor linear response are known",
                hint='refine with method="sinkhorn"',
            )
        return self.measure

    def posterior(self, num_draws: int = 100, **options: Any) -> Any:
        """Return an ArviZ posterior over the parameters; see :func:`stochdyn.bridges.posterior`.

        Raises:
            UnavailableError: If the method was :class:`IPF`.
        """
        from stochdyn.bridges.refinement.uncertainty import posterior

        return posterior(self, num_draws, **options)


@recorded
def refine(
    snapshots: Snapshots,
    family: Any,
    diffusion: Any = 0.1,
    *,
    max_iterations: int = 10,
    method: str | Method = "sinkhorn",
    dt: float | None = None,
    seed: int = 0,
    learn_diffusion: bool | str = False,
    tolerance: float | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    executor: Executor | None = None,
) -> Refinement:
    r"""Find the reference process of a family, and the bridge on it, that are nearest to one another.

    .. math:: \min_{\theta}\ \min_{q:\,q_{t_i}=\pi_i}\ \mathrm{KL}(q\,\|\,p_\theta)

    by turns: the Schrödinger bridge :math:`q^k` for :math:`\theta^{k-1}`, then the :math:`\theta^k` whose drift is nearest to
    that of :math:`q^k`. The divergence falls with every half step. It stops where the parameters stand still.

    Args:
        snapshots: The snapshots to pass through.
        family: The family of drifts: a :class:`DriftFamily`, any ``nn.Module`` with ``forward(t, x)``, a function
            ``drift(t, x, rate=1.0, ...)`` whose further arguments are the parameters and their defaults where they start, or a
            Pyro model without arguments that returns a drift, whose priors then act. A copy is refined; the original is left
            alone.
        diffusion: The noise of the reference, known or, with ``learn_diffusion``, a first guess: a number, ``(d,)`` or
            ``(d, d)``, in units of state per root of time.
        max_iterations: The largest number of iterations.
        method: The method by which bridges are built: ``"sinkhorn"``, with exact couplings, or ``"ipf"``, as published, for
            comparison; or :class:`Sinkhorn` or :class:`IPF` with options; or :class:`Messages`, for mechanisms of which only
            some components are seen.
        dt: The spacing of the inner time grid; a twenty-fifth of the shortest interval if None.
        seed: The seed of all randomness.
        learn_diffusion: Whether to estimate the noise from the couplings: True for its overall strength, ``"components"`` for
            that of every component, ``"matrix"`` for all of it.
        tolerance: The distance that parameters may still have from where they go, in their standard errors (the root mean
            square over parameters, were paths seen), estimated from the rate at which they move; 0.1 if None.
        progress: Whether to show a progress bar, after two seconds.
        checkpoint: The directory that the run is saved to after every iteration, made if need be.
        resume: Whether to continue the run in ``checkpoint`` to the same bits as if it had never stopped; a fresh run if there
            is none. ``max_iterations`` may be larger than it was.
        executor: An executor of ``concurrent.futures`` for the attempts of ``Sinkhorn(restarts=...)``; this thread if None. The
            answer is the same to the bit.

    Returns:
        Parameters, the bridge, the refined reference, and the history.

    Raises:
        InvalidInputError: If the family has no parameters, or an option can't work or isn't used by the method; before any
            work.
        ShapeError: If the drift doesn't fit the particles.
        DiffusionError: If the noise is so weak that no path reaches the next snapshot.
        ForeignCheckpointError: If the checkpoint belongs to another run: other data, options or family.
        Interrupted: If Ctrl-C was pressed; raised at the end of the iteration, with the result so far.

    Warns:
        ApproximationWarning: If the snapshots hold no more numbers than there are parameters, if directions of the parameters
            can't be told from them, or if the Monte Carlo error of the projection is large.

    Example:
        >>> from stochdyn.bridges import LinearDrift, Snapshots
        >>> clouds = [torch.linspace(-1, 1, 9)[:, None] * 0.5**i + i for i in range(3)]
        >>> fit = refine(Snapshots([0.0, 1.0, 2.0], clouds), LinearDrift(1), diffusion=0.3)
        >>> sorted(fit.parameters), bool(fit.history.objective.diff().max() < 1e-4)
        (['matrix', 'shift'], True)

    Reference: Shen, Berlinghieri & Broderick (2025), Multi-marginal Schrödinger bridges with iterative reference
    refinement, AISTATS, algorithm 1.
    """
    check_type(snapshots, Snapshots, "snapshots")
    check_positive_int(max_iterations, "max_iterations")
    chosen = as_method(method)
    if dt is not None:
        check_positive(dt, "dt")
        check_real(dt, "dt")
    if not isinstance(learn_diffusion, bool):
        check_choice(learn_diffusion, ("components", "matrix"), "learn_diffusion")
    if tolerance is not None:
        check_real(tolerance, "tolerance", above=0.0)
    check_bool(progress, "progress")
    if isinstance(chosen, IPF):
        for name, given in (("learn_diffusion", learn_diffusion), ("tolerance", tolerance)):
            if given:
                raise InvalidInputError(
                    f"{name} does nothing in refinement by iterative proportional fitting",
                    hint='use method="sinkhorn"',
                )
    if isinstance(chosen, Messages) and learn_diffusion:
        raise InvalidInputError("learn_diffusion does nothing where components are hidden")
    dim = chosen.dim if isinstance(chosen, Messages) else snapshots.dim
    if dim <= snapshots.dim and isinstance(chosen, Messages):
        raise ShapeError(
            "initial_mean must be of the whole state", got=dim, expected=f"more than {snapshots.dim}"
        )
    if isinstance(family, DriftFamily) and family.dim > dim:
        raise ShapeError(
            "the family has more components than the snapshots", got=family.dim, expected=dim,
            hint="for a mechanism that is seen in part give method=Messages(initial_mean=..., initial_cov=...)",
        )  # fmt: skip
    original = fitted_family(family, snapshots, dim)
    if not any(p.requires_grad for p in original.parameters()):
        raise InvalidInputError("the family has no parameters to refine", got=type(family).__name__)
    as_projection(chosen.projection, original)
    spread_of(diffusion, snapshots, dim, reach=isinstance(chosen, Messages))
    options = {
        "diffusion": diffusion, "max_iterations": max_iterations, "dt": dt, "seed": as_seed(seed),
        "learn_diffusion": learn_diffusion, "tolerance": tolerance,
    }  # fmt: skip
    task = Task(
        snapshots, original, diffusion, max_iterations, dt, as_seed(seed), learn_diffusion,
        _TOLERANCE if tolerance is None else float(tolerance),
    )  # fmt: skip

    def by_sinkhorn(best: Attempt) -> Refinement:
        return Refinement(
            copy.deepcopy(best.family), best.bridge, best.history, snapshots, best.bridge.spread, best.bridge.dt,
            chosen, options,
        )  # fmt: skip

    def by_ipf(found: DriftFamily, bridge: IPFBridge, history: History) -> Refinement:
        return Refinement(
            copy.deepcopy(found), bridge, history, snapshots, bridge.spread, bridge.dt, chosen, options
        )

    def by_messages(found: DriftFamily, bridge: HiddenStateBridge, history: History) -> Refinement:
        return Refinement(
            copy.deepcopy(found), bridge, history, snapshots, bridge.spread, bridge.dt, chosen, options
        )

    check_executor(executor)
    attempts = None
    if executor is not None:
        if not isinstance(chosen, Sinkhorn) or not chosen.restarts:
            raise InvalidInputError(
                "executor does nothing without restarts", hint="give method=Sinkhorn(restarts=...)"
            )
        attempts = Jobs(
            WholeAttempt(task, chosen), range(chosen.restarts + 1), task.seed, executor, snapshots.device
        )
    job: SinkhornLoop | IPFLoop | MessagesLoop
    if isinstance(chosen, Messages):
        job = MessagesLoop(task, chosen, by_messages)
    else:
        job = (
            SinkhornLoop(task, chosen, by_sinkhorn, attempts)
            if isinstance(chosen, Sinkhorn)
            else IPFLoop(task, chosen, by_ipf)
        )
    kept = {name: value for name, value in options.items() if name != "max_iterations"}
    with contextlib.nullcontext() if attempts is None else attempts:
        result = run_to_end(
            job, "refine", identity={"snapshots": snapshots, "family": original, "method": chosen, **kept},
            randomness=task.seed, device=snapshots.device, progress=progress, checkpoint=checkpoint, resume=resume,
        )  # fmt: skip
    if isinstance(job, SinkhornLoop | MessagesLoop):
        job.check()
    if not isinstance(as_projection(chosen.projection, original), Adam):
        check_counts(snapshots, original, stacklevel=4)
    return result
