"""The loops of a refinement, as long runs: their state, one iteration after the other."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily, ZeroDrift
from stochdyn.bridges.laws.ipf import IPFBridge
from stochdyn.bridges.laws.nodes import DriftNodes
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.bridges.refinement.acceleration import Anderson, get_vector, set_vector
from stochdyn.bridges.refinement.history import History, Iteration
from stochdyn.bridges.refinement.methods import IPF, Sinkhorn
from stochdyn.bridges.refinement.projection import (
    Adam,
    as_projection,
    drift_at,
    drift_shift,
    path_gain,
    project_drift,
)
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.errors import ApproximationWarning, ConvergenceWarning, DiffusionError, NonFiniteError
from stochdyn.run.engine import Resumable
from stochdyn.run.jobs import Jobs

__all__ = ["AlternatingLoop", "Attempt", "IPFLoop", "SinkhornLoop", "Task", "WholeAttempt"]

_SMALL = 60
LIMIT = "the largest number of iterations"
STILL = "the parameters stand still"
# A rate of convergence is taken from two moves of the parameters, and for at most this.
_SLOWEST = 0.98


@dataclass(frozen=True)
class Task:
    """What a refinement is asked for.

    Attributes:
        snapshots: The snapshots to pass through.
        family: The drift as it was given, in the data's precision; copies of it are refined.
        diffusion: The noise of the reference, or a first guess of it.
        max_iterations: The largest number of iterations.
        dt: The spacing of the inner time grid; a twenty-fifth of the shortest interval if None.
        seed: The seed of all randomness.
        learn_diffusion: The part of the noise that is learnt: False, True (its strength), ``"components"`` or ``"matrix"``.
        tolerance: The distance, in standard errors, that parameters may still have from where they go.
    """

    snapshots: Snapshots
    family: DriftFamily
    diffusion: Any
    max_iterations: int
    dt: float | None
    seed: int
    learn_diffusion: bool | str
    tolerance: float

    @property
    def size(self) -> float:
        """The mean number of particles of a snapshot."""
        return self.snapshots.mean_count


class Attempt:
    """One attempt at a refinement with exact couplings, between iterations.

    Args:
        task: The task: data, family and options.
        method: The method by which bridges are built.
        family: The drift that is refined, in place.
        from_family: Whether the first bridge is that of the family.

    Attributes:
        bridge: The bridge of the present reference.
        family: The present reference's drift.
        history: The records of all iterations so far.
    """

    def __init__(self, task: Task, method: Sinkhorn, family: DriftFamily, from_family: bool) -> None:
        self.task, self.method, self.family = task, method, family
        self.population = task.size if method.population is None else float(method.population)
        self.diffusion = task.diffusion
        self.brownian = not from_family
        self.history = History()
        self.size = sum(p.numel() for p in family.parameters())
        self.anderson = Anderson(3) if method.accelerate and self.size <= _SMALL else None
        self.moved: float | None = None
        self.rough: float | None = None
        self._bridge: SchrodingerBridge | None = None

    def _build(self, family: DriftFamily, warm: SchrodingerBridge | None = None) -> SchrodingerBridge:
        task = self.task
        return self.method.bridge(task.snapshots, family, self.diffusion, task.dt).solve(warm)

    @property
    def bridge(self) -> SchrodingerBridge:
        """The present bridge; the first one is solved when it is asked for."""
        if self._bridge is None:
            self._bridge = self._build(ZeroDrift(self.task.snapshots.dim) if self.brownian else self.family)
        return self._bridge

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do."""
        return bool(self.history.stopped) or len(self.history) >= self.task.max_iterations

    def iterate(self) -> None:
        """Project, and solve the next bridge."""
        task, bridge, kept = self.task, self.bridge, self.family
        clock = time.process_time()
        nodes = bridge.nodes(self.method.num_nodes, task.seed)
        family = copy.deepcopy(kept)
        self._project(family, nodes, task.seed)
        before, after = drift_at(bridge.family, nodes), drift_at(family, nodes)
        projected = float(bridge.objective) - float(path_gain(before, after, nodes, bridge.spread))
        old = self.diffusion
        if task.learn_diffusion:
            self.diffusion = learnt_diffusion(bridge, family, task.learn_diffusion)
        following = None
        if self.anderson is not None:
            following = self._extrapolate(kept, family, bridge, projected)
        if following is None:
            following = self._build(family, bridge)
        else:
            family = copy.deepcopy(following.family)
            after = drift_at(family, nodes)
        shift = drift_shift(before, after, nodes, bridge.spread)
        objective, moved = float(bridge.objective), self._distance(bridge, following, shift)
        rise = (float(following.objective) - objective) * self.population
        if len(self.history) and rise > 0 and self._is_worse(rise, family, kept, nodes, bridge):
            # the projection no longer sees what the objective does: the last reference was better
            self.history.stopped, self.diffusion = "the objective would rise", old
            return
        self.history.iterations.append(
            Iteration(
                objective, projected, float(bridge.marginal_errors.max()), family.named_values(),
                float(following.spread.diagonal().mean().sqrt()), time.process_time() - clock,
            )
        )  # fmt: skip
        self.family, self._bridge = family, following
        self._decide(moved)

    def _project(self, family: DriftFamily, nodes: DriftNodes, seed: int) -> None:
        project_drift(
            family, nodes, self.bridge.spread, population=self.population,
            projection=self.method.projection, seed=seed,
        )  # fmt: skip

    def _distance(self, old: SchrodingerBridge, new: SchrodingerBridge, shift: float) -> float:
        """How far the reference moved: the root mean square over parameters, in standard errors were paths seen."""
        count, total = self.size, self.population * shift
        if self.task.learn_diffusion:
            factor = torch.linalg.cholesky(old.spread.double())
            # Fisher information of a covariance: half the squared norm of its relative change, once per coupling
            change = torch.cholesky_solve(new.spread.double(), factor) - torch.eye(len(factor)).to(factor)
            total += 0.5 * self.population * len(old.plans) * float(change.square().sum())
            count += 1
        return math.sqrt(total / count)

    def _is_worse(
        self,
        rise: float,
        family: DriftFamily,
        kept: DriftFamily,
        nodes: DriftNodes,
        bridge: SchrodingerBridge,
    ) -> bool:
        """Whether a rise of the objective, in nats of the population, is more than tolerance and Monte Carlo error explain."""
        allowed = max(self.task.tolerance, 1e-6)
        if 2 * rise <= self.size * allowed**2:
            return False
        return 2 * rise > self.size * (allowed**2 + (3 * self._roughness(family, kept, nodes, bridge)) ** 2)

    def _roughness(
        self, family: DriftFamily, kept: DriftFamily, nodes: DriftNodes, bridge: SchrodingerBridge
    ) -> float:
        """How far other random numbers would move the projection, in the units of :meth:`_distance`."""
        if self.rough is None:
            other = copy.deepcopy(kept)
            fresh = bridge.nodes(self.method.num_nodes, self.task.seed + 1)
            self._project(other, fresh, self.task.seed + 1)
            shift = drift_shift(drift_at(family, nodes), drift_at(other, nodes), nodes, bridge.spread)
            self.rough = math.sqrt(self.population * shift / self.size / 2)
        return self.rough

    def _decide(self, moved: float) -> None:
        """Stop where the parameters stand still: where what lies ahead, at the present rate, is within the tolerance."""
        last, self.moved = self.moved, moved
        if moved == 0:
            self.history.stopped = STILL
        elif last is not None and len(self.history) > 2:
            # of a geometric series of moves with this ratio, moved * rate / (1 - rate) is still to come
            rate = min(moved / last, _SLOWEST) if last > 0 else _SLOWEST
            if moved * rate / (1 - rate) < self.task.tolerance:
                self.history.stopped = STILL

    def check(self) -> None:
        """Warn if the nodes were too few: where other random numbers would move the answer by more than half a standard error."""
        if isinstance(as_projection(self.method.projection, self.family), Adam):
            return  # steps of an optimiser have noise of their own
        nodes = self.bridge.nodes(self.method.num_nodes, self.task.seed)
        fresh = self.bridge.nodes(self.method.num_nodes, self.task.seed + 1)
        if nodes.x.shape == fresh.x.shape and torch.equal(nodes.x, fresh.x):
            return
        found = copy.deepcopy(self.family)
        self._project(found, nodes, self.task.seed)
        self.rough = None
        rough = self._roughness(found, self.family, nodes, self.bridge)
        if rough > 0.5:
            warnings.warn(
                f"Monte Carlo error of the projection is {rough:.2g} standard errors of the parameters. "
                f"Give more than num_nodes={self.method.num_nodes}",
                ApproximationWarning,
                stacklevel=4,
            )

    def _extrapolate(
        self, before: DriftFamily, after: DriftFamily, bridge: SchrodingerBridge, bound: float
    ) -> SchrodingerBridge | None:
        """Return the bridge for extrapolated parameters, if it is better than the projection promises; else None."""
        assert self.anderson is not None
        image = get_vector(after)
        proposal = self.anderson.propose(get_vector(before), image)
        if torch.equal(proposal, image) or not bool(torch.isfinite(proposal).all()):
            return None
        bold = copy.deepcopy(after)
        set_vector(bold, proposal)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                attempt: SchrodingerBridge | None = self._build(bold, bridge)
        except (DiffusionError, NonFiniteError):
            attempt = None
        if attempt is None or not attempt.converged or not float(attempt.objective) <= bound:
            self.anderson.forget()
            return None
        return attempt

    # ------------------------------------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        """Return all that the next iteration depends on, as plain data and tensors."""
        return {
            "family": dict(self.family.state_dict()),
            "bridge": None if self._bridge is None else dict(self._bridge.state_dict()),
            "diffusion": self.diffusion.value if isinstance(self.diffusion, Matrix) else None,
            "anderson": None if self.anderson is None else [list(pair) for pair in self.anderson.pairs],
            "moved": self.moved,
            "rough": self.rough,
            "iterations": self.history.records(),
            "stopped": self.history.stopped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        device = self.task.snapshots.device
        self.family.load_state_dict(state["family"])
        if state["diffusion"] is not None:
            self.diffusion = Matrix(state["diffusion"].to(device))
        if self.anderson is not None:
            self.anderson.pairs = [(old.to(device), new.to(device)) for old, new in state["anderson"]]
        self.moved, self.rough = state["moved"], state["rough"]
        self.history = History.of_records(state["iterations"], state["stopped"])
        self._bridge = None
        if state["bridge"] is not None:
            brownian = self.brownian and not len(self.history)
            own = ZeroDrift(self.task.snapshots.dim) if brownian else self.family
            task = self.task
            self._bridge = self.method.bridge(task.snapshots, own, self.diffusion, task.dt)
            self._bridge.load_state_dict(state["bridge"])


@dataclass(frozen=True)
class WholeAttempt:
    """An attempt at a refinement from its start to its end, by its number: the first is the fit, others start elsewhere.

    Attributes:
        task: The task: data, family and options.
        method: The method by which bridges are built.
    """

    task: Task
    method: Sinkhorn

    def start(self, index: int) -> Attempt:
        """Return the attempt before its first iteration."""
        family = copy.deepcopy(self.task.family)
        if index:
            family.reset(torch.Generator(self.task.snapshots.device).manual_seed(self.task.seed + index))
        return Attempt(self.task, self.method, family, index > 0 or self.method.from_family)

    def __call__(self, index: int) -> dict[str, Any]:
        """Return the state of the attempt at its end."""
        attempt = self.start(index)
        while not attempt.finished:
            attempt.iterate()
        return attempt.state()


class SinkhornLoop(Resumable[Any]):
    """All attempts at a refinement with exact couplings, one iteration per step.

    Args:
        task: The task: data, family and options.
        method: The method by which bridges are built.
        result: A function that makes the result from the best attempt.
        jobs: What computes whole attempts, one per step, in place of iterations; none if None.
    """

    unit = "iteration"

    def __init__(
        self,
        task: Task,
        method: Sinkhorn,
        result: Callable[[Attempt], Any],
        jobs: Jobs[dict[str, Any]] | None = None,
    ) -> None:
        self.task, self.method, self.result, self.jobs = task, method, result, jobs
        self.index = 0
        self.best: Attempt | None = None
        self.now = self._attempt(0)
        self.total = task.max_iterations if not method.restarts else None

    def _attempt(self, index: int) -> Attempt:
        return WholeAttempt(self.task, self.method).start(index)

    @property
    def finished(self) -> bool:
        """Whether all attempts have ended."""
        return self.now.finished and self.index >= self.method.restarts

    def step(self) -> None:
        """Take one iteration, of the next attempt where the last one has ended."""
        if self.now.finished:
            self.best, self.index = self._better(), self.index + 1
            self.now = self._attempt(self.index)
        if self.jobs is None or self.now.history.iterations:
            self.now.iterate()
        else:
            self.now.load_state(self.jobs.result(self.index))

    def _better(self) -> Attempt:
        if self.best is None or float(self.now.bridge.objective) < float(self.best.bridge.objective):
            return self.now
        return self.best

    def describe(self) -> dict[str, Any]:
        """Return the objective of the present attempt."""
        return {"objective": f"{float(self.now.bridge.objective):.5g}"}

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain data and tensors."""
        best = None if self.best is None else self.best.state()
        return {"attempt": self.index, "now": self.now.state(), "best": best}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.index = state["attempt"]
        self.now, self.best = self._attempt(self.index), None
        self.now.load_state(state["now"])
        if state["best"] is not None:
            self.best = self._attempt(1)
            self.best.load_state(state["best"])

    def check(self) -> None:
        """Warn of what is wrong with the best attempt; see :meth:`Attempt.check`."""
        self._better().check()

    def report(self) -> Any:
        """Return the best attempt so far as a result."""
        best = self._better()
        best.history.final_objective = float(best.bridge.objective)
        if not best.history.stopped and len(best.history) >= self.task.max_iterations:
            best.history.stopped = LIMIT
        return self.result(best)


class AlternatingLoop(Resumable[Any]):
    """A refinement whose bridge follows from the present reference: its state is the reference and the history.

    Args:
        task: The task: data, family and options.
        population: The number of particles that the divergence counts for; the mean size of a snapshot if None.
    """

    unit = "iteration"

    def __init__(self, task: Task, population: float | None) -> None:
        self.task, self.total = task, task.max_iterations
        self.family = copy.deepcopy(task.family)
        self.population = task.size if population is None else float(population)
        self.history = History()

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do."""
        return bool(self.history.stopped) or len(self.history) >= self.task.max_iterations

    def _record(
        self, objective: float, gain: float, marginal_error: float, family: DriftFamily, diffusion: float, clock: float
    ) -> None:  # fmt: skip
        self.history.iterations.append(
            Iteration(
                objective, objective - gain, marginal_error, family.named_values(), diffusion, time.process_time() - clock,
            )
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain data and tensors."""
        return {
            "family": dict(self.family.state_dict()), "iterations": self.history.records(),
            "stopped": self.history.stopped,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.family.load_state_dict(state["family"])
        self.history = History.of_records(state["iterations"], state["stopped"])

    def _end(self, objective: float) -> None:
        """Note the last objective, and why the run ended if it did."""
        self.history.final_objective = objective
        if not self.history.stopped and self.finished:
            self.history.stopped = LIMIT


class IPFLoop(AlternatingLoop):
    """The published loop: a fixed number of iterations, since the objective of simulated bridges isn't monotone.

    Args:
        task: The task: data, family and options.
        method: The method by which bridges are built.
        result: A function that makes the result from family, bridge and history.
    """

    def __init__(
        self, task: Task, method: IPF, result: Callable[[DriftFamily, IPFBridge, History], Any]
    ) -> None:
        super().__init__(task, method.population)
        self.method, self.result = method, result
        self._bridge: IPFBridge | None = None

    @property
    def bridge(self) -> IPFBridge:
        """The bridge of the present reference, which follows from its parameters and the number of the iteration."""
        if self._bridge is None:
            count = len(self.history)
            plain = not count and not self.method.from_family
            own = ZeroDrift(self.task.snapshots.dim) if plain else copy.deepcopy(self.family)
            made = self.method.bridge(
                self.task.snapshots, own, self.task.diffusion, self.task.dt, self.task.seed + count
            )
            self._bridge = made.solve()
        return self._bridge

    def step(self) -> None:
        """Project on the family; the next bridge follows."""
        clock, bridge, task = time.process_time(), self.bridge, self.task
        generator = torch.Generator(task.snapshots.device).manual_seed(
            task.seed + 1000 * (1 + len(self.history))
        )
        nodes = bridge.nodes(self.method.num_nodes, generator)
        project_drift(
            self.family, nodes, bridge.spread, population=self.population,
            projection=self.method.projection, seed=task.seed,
        )  # fmt: skip
        objective = float(bridge.divergence(generator))
        gain = path_gain(drift_at(bridge.family, nodes), drift_at(self.family, nodes), nodes, bridge.spread)
        self._record(objective, float(gain), float("nan"), self.family, bridge.sigma, clock)
        self._bridge = None

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        super().load_state(state)
        self._bridge = None

    def report(self) -> Any:
        """Return the result so far."""
        generator = torch.Generator(self.task.snapshots.device).manual_seed(self.task.seed)
        self._end(float(self.bridge.divergence(generator)))
        return self.result(self.family, self.bridge, self.history)


@torch.no_grad()
def learnt_diffusion(bridge: SchrodingerBridge, family: DriftFamily, what: bool | str) -> Matrix:
    r"""Return the noise that fits the couplings best, the drift being that of ``family``.

    With :math:`M` the mean square of innovations in units of the noise, :math:`GG^\top` becomes :math:`LML^\top`, or what of it is
    learnt: its components, with the correlations as they are, or its strength alone.
    """
    moment, spread = bridge.innovations(family).to(bridge.spread), bridge.spread
    if what is True:
        return Matrix(torch.linalg.cholesky(spread * (moment.trace() / len(moment))))
    # the maximum of sum log N(z; 0, M): the mean square of innovations, in the units of the state
    factor = torch.linalg.cholesky(spread)
    whole = factor @ moment @ factor.mT
    if what == "components":
        size = (whole.diagonal() / spread.diagonal()).sqrt()
        whole = size[:, None] * spread * size
    return Matrix(torch.linalg.cholesky(whole))
