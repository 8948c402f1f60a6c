"""Refinement of the reference: bridge and projection in turn, until the divergence between them falls no more."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_positive, check_positive_int
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily, ZeroDrift
from stochdyn.bridges.laws.ipf import IPFBridge
from stochdyn.bridges.laws.reference import fitted_family, spread_of
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.bridges.refinement.history import History, Iteration
from stochdyn.bridges.refinement.loop import Loop, Store, identity_of
from stochdyn.bridges.refinement.projection import Method, drift_at, path_gain, project_drift
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.errors import InvalidInputError, UnavailableError
from stochdyn.run.interrupt import DeferredInterrupt

__all__ = ["Refinement", "RefinementInterrupted", "refine"]


@dataclass(frozen=True, eq=False)
class Refinement:
    """A refined reference and the bridge built on it.

    Attributes:
        family: the chosen drift.
        measure: the bridge, a law on paths: ``.sample(ts, n)``, ``.marginal(t)``, ``.drift(t, x)``.
        history: what happened in every iteration.
        snapshots: the data.
        options: arguments of :func:`refine`, for repeating it on other data.
    """

    family: DriftFamily
    measure: SchrodingerBridge
    history: History
    snapshots: Snapshots
    options: dict[str, Any]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The refined parameters by name."""
        return self.family.named_values()

    @property
    def diffusion(self) -> Tensor:
        """``(d, d)`` covariance rate of the noise."""
        return self.measure.spread

    @property
    def objective(self) -> float:
        """The divergence between bridge and reference; see :attr:`SchrodingerBridge.objective`."""
        return self.history.final_objective

    @property
    def reference(self) -> DiffusionMeasure:
        """The refined reference process, started from the first snapshot's particles."""
        return self.measure.reference

    def posterior(self, num_draws: int = 100, **options: Any) -> Any:
        """Return an ArviZ posterior over the parameters; see :func:`stochdyn.bridges.posterior`."""
        import stochdyn.bridges as room

        return room.posterior(self, num_draws, **options)


class RefinementInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a refinement after a whole iteration; the checkpoint, if any, holds that iteration.

    Attributes:
        result: the :class:`Refinement` so far.
    """

    def __init__(self, message: str, result: Refinement) -> None:
        super().__init__(message)
        self.result = result


def refine(
    snapshots: Snapshots,
    family: Any,
    diffusion: Any = 0.1,
    outer: int = 10,
    solver: str = "sinkhorn",
    step: float | None = None,
    seed: int = 0,
    learn_diffusion: bool = False,
    *,
    accelerate: bool = False,
    start: str = "brownian",
    tolerance: float = 0.1,
    restarts: int = 0,
    projection: Method = "auto",
    projection_steps: int = 300,
    projection_lr: float = 1e-2,
    nodes: int = 1_000_000,
    population: float | None = None,
    relaxation: float | None = None,
    corrections: int = 0,
    sinkhorn_tolerance: float = 1e-6,
    max_iterations: int = 10_000,
    ipf_sweeps: int = 10,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Refinement:
    r"""Find the reference process of a family, and the bridge on it, that are nearest to one another.

    .. math:: \min_{\theta}\ \min_{q:\,q_{t_i}=\pi_i}\ \mathrm{KL}(q\,\|\,p_\theta)

    by turns: the Schrödinger bridge :math:`q^k` for :math:`\theta^{k-1}`, then the :math:`\theta^k` whose drift is nearest to
    that of :math:`q^k`. The divergence falls with every half step. It stops when ``population`` times the objective falls by less than ``tolerance``.

    Args:
        snapshots: the data.
        family: a :class:`DriftFamily`, any ``nn.Module`` with ``forward(t, x)``, or a Pyro model without arguments that
            returns a drift, whose priors then act. A copy is refined; the original is left alone.
        diffusion: a number, ``(d,)`` or ``(d, d)``: the noise, known or, with ``learn_diffusion``, a first guess.
        outer: largest number of iterations.
        solver: ``"sinkhorn"``; or ``"ipf-gp"`` or ``"ipf-neural"``, iterative proportional fitting with drifts
            regressed by Gaussian processes or networks, as published, for comparison.
        step: spacing of the inner time grid; a twenty-fifth of the shortest interval if None.
        seed: of all randomness.
        learn_diffusion: estimate the overall strength of the noise from the couplings.
        accelerate: extrapolate from the last iterations where that makes the objective fall more; for families of at most
            sixty parameters. Worth it where parameters are strongly correlated.
        start: ``"brownian"``: the first bridge has no drift, whatever the family's parameters; ``"family"``: they are used.
        tolerance: fall of the objective, in nats of the whole population, that counts as none: with 0.1 the parameters still move by a
            fraction of their standard error.
        restarts: further attempts from parameters drawn by the family's ``reset``; the best one is returned.
        projection: how parameters are fitted; see :func:`stochdyn.bridges.refinement.projection.project_drift`.
        projection_steps: steps of Adam an iteration, for families of many parameters.
        projection_lr: its learning rate.
        nodes: number of states that a fit sees.
        population: ``N``, particles that the divergence counts for, since seeing these snapshots has the probability
            :math:`e^{-N\min_q\mathrm{KL}}` (Sanov); the mean size of a snapshot if None.
        relaxation: price of deviations from the snapshots' weights and masses; see :class:`SchrodingerBridge`.
        corrections: paths a pair for importance weights of what linearisation leaves out; see :class:`SchrodingerBridge`.
        sinkhorn_tolerance: largest marginal error of the couplings, in L1.
        max_iterations: of each coupling.
        ipf_sweeps: pairs of half-bridges, for the solvers by iterative proportional fitting.
        progress: show a bar.
        checkpoint: directory that is saved to after every iteration, made if need be; for ``solver="sinkhorn"``.
        resume: continue the run in ``checkpoint`` to the same bits as if it had never stopped; a fresh run if there is none. ``outer``
            and ``restarts`` may be larger than they were.

    Returns:
        Parameters, the bridge, the refined reference, and the history.

    Raises:
        InvalidInputError: for a family without parameters or options that can't work; before any work.
        ShapeError: if the drift doesn't fit the particles.
        DiffusionError: if the noise is so weak that no path reaches the next snapshot.
        ForeignCheckpointError: if the checkpoint belongs to another run: other data, options or family.
        RefinementInterrupted: after Ctrl-C, at the end of the iteration, with the result so far.

    Example:
        >>> from stochdyn.bridges import LinearDrift, Snapshots
        >>> clouds = [torch.linspace(-1, 1, 9)[:, None] * 0.5**i + i for i in range(3)]
        >>> fit = refine(Snapshots([0.0, 1.0, 2.0], clouds), LinearDrift(1), diffusion=0.3)
        >>> sorted(fit.parameters), bool(fit.history.objective.diff().max() < 1e-4)
        (['matrix', 'shift'], True)

    Reference: Shen, Berlinghieri & Broderick (2025), Multi-marginal Schrödinger bridges with iterative reference
    refinement, AISTATS, algorithm 1.
    """
    check_positive_int(outer, "outer")
    check_positive_int(restarts, "restarts", 0)
    check_positive_int(nodes, "nodes")
    check_choice(solver, ("sinkhorn", "ipf-gp", "ipf-neural"), "solver")
    check_positive_int(ipf_sweeps, "ipf_sweeps")
    check_choice(start, ("brownian", "family"), "start")
    check_positive(tolerance, "tolerance")
    if not isinstance(snapshots, Snapshots):
        raise InvalidInputError("snapshots must be Snapshots", got=type(snapshots).__name__)
    if resume and checkpoint is None:
        raise InvalidInputError("resume=True needs the directory of the run", hint="pass checkpoint=...")
    if checkpoint is not None and solver != "sinkhorn":
        raise UnavailableError(
            "iterative proportional fitting keeps no checkpoints", got=f"solver={solver!r}"
        )
    options = {
        "diffusion": diffusion, "outer": outer, "solver": solver, "step": step, "seed": seed,
        "learn_diffusion": learn_diffusion, "accelerate": accelerate, "start": start, "tolerance": tolerance, "restarts": restarts,
        "projection": projection, "projection_steps": projection_steps, "projection_lr": projection_lr,
        "nodes": nodes, "population": population,
        "relaxation": relaxation, "corrections": corrections, "sinkhorn_tolerance": sinkhorn_tolerance, "max_iterations": max_iterations,
        "ipf_sweeps": ipf_sweeps,
    }  # fmt: skip
    original = fitted_family(family, snapshots)
    if not any(p.requires_grad for p in original.parameters()):
        raise InvalidInputError("the family has no parameters to refine", got=type(family).__name__)
    spread_of(diffusion, snapshots)
    if solver != "sinkhorn":
        return _refine_by_ipf(snapshots, original, options, progress)
    store = None if checkpoint is None else Store(Path(checkpoint), identity_of(snapshots, original, options))
    return _refine_by_sinkhorn(snapshots, original, options, store, resume, progress)


def _refine_by_sinkhorn(
    snapshots: Snapshots,
    original: DriftFamily,
    options: dict[str, Any],
    store: Store | None,
    resume: bool,
    progress: bool,
) -> Refinement:
    """Run all attempts that aren't done yet, and return the best."""
    generator = torch.Generator(snapshots.device).manual_seed(options["seed"])
    saved = store.read() if store is not None and resume else None
    reached = 0 if saved is None else saved["attempt"]
    best: Loop | None = None
    with DeferredInterrupt() as interrupt:
        for attempt in range(options["restarts"] + 1):
            own = copy.deepcopy(original)
            if attempt:
                own.reset(generator)
            if attempt < reached:
                continue
            loop = Loop(snapshots, own, options, attempt > 0)
            if saved is not None and attempt == reached:
                if saved["best"] is not None:
                    best = Loop(snapshots, copy.deepcopy(original), options, True)
                    best.load_state_dict(saved["best"])
                loop.load_state_dict(saved["loop"])

            def save(loop: Loop, attempt: int = attempt, best: Loop | None = best) -> None:
                if store is not None:
                    store.write(attempt, loop, best)

            whole = loop.run(progress, interrupt, save)
            if best is None or loop.history.final_objective < best.history.final_objective:
                best = loop
            if not whole or (interrupt.requested and attempt < options["restarts"]):
                result = _result(best, snapshots, options)
                raise RefinementInterrupted(f"stopped after iteration {len(loop.history)}", result)
    assert best is not None
    return _result(best, snapshots, options)


def _result(loop: Loop, snapshots: Snapshots, options: dict[str, Any]) -> Refinement:
    return Refinement(loop.family, loop.bridge, loop.history, snapshots, options)


def _refine_by_ipf(
    snapshots: Snapshots, family: DriftFamily, options: dict[str, Any], progress: bool
) -> Refinement:
    """Run the published loop: a fixed number of iterations, since the objective of simulated bridges isn't monotone."""
    from tqdm.auto import tqdm

    population = options["population"] or sum(snapshots.sizes) / len(snapshots)
    learner = options["solver"].removeprefix("ipf-")
    history, brownian = History(), options["start"] == "brownian"
    make = {"dt": options["step"], "max_iterations": options["ipf_sweeps"], "learner": learner}

    def solve(reference: DriftFamily, seed: int) -> IPFBridge:
        return IPFBridge(snapshots, reference, options["diffusion"], seed=seed, **make).solve()

    clock = time.process_time()
    generator = torch.Generator(snapshots.device).manual_seed(options["seed"])
    bridge = solve(ZeroDrift(snapshots.dim) if brownian else copy.deepcopy(family), options["seed"])
    for k in tqdm(range(options["outer"]), disable=not progress, desc="refine"):
        nodes = bridge.nodes(options["nodes"], generator)
        project_drift(
            family, nodes, bridge.spread, population=population, method=options["projection"],
            steps=options["projection_steps"], lr=options["projection_lr"], seed=options["seed"],
        )  # fmt: skip
        objective = float(bridge.divergence(generator))
        gain = path_gain(drift_at(bridge.family, nodes), drift_at(family, nodes), nodes, bridge.spread)
        bridge = solve(copy.deepcopy(family), options["seed"] + k + 1)
        now = time.process_time()
        history.iterations.append(
            Iteration(
                objective,
                objective - float(gain),
                float("nan"),
                family.named_values(),
                bridge.sigma,
                now - clock,
            )
        )
        clock = now
    history.final_objective = float(bridge.divergence(generator))
    history.stopped = "the number of iterations"
    law: Any = bridge  # a PathMeasure of the same shape, without potentials and objective
    return Refinement(family, law, history, snapshots, options)
