"""The loop of a refinement: its state, one iteration after the other, and how it is kept on disk."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily, ZeroDrift
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.bridges.refinement.acceleration import Anderson, get_vector, set_vector
from stochdyn.bridges.refinement.history import History, Iteration
from stochdyn.bridges.refinement.projection import drift_at, path_gain, project_drift
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.errors import ConvergenceWarning, DiffusionError, NonFiniteError
from stochdyn.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from stochdyn.run.folder import prepare_folder
from stochdyn.run.identity import check_same_run, fingerprint
from stochdyn.run.interrupt import DeferredInterrupt

__all__ = ["Loop", "Store", "identity_of"]

_SMALL = 60
_LIMIT = "the largest number of iterations"
# What may change when a run is continued: nothing that an iteration depends on.
_FREE = ("outer", "restarts")


def identity_of(snapshots: Snapshots, family: DriftFamily, options: dict[str, Any]) -> dict[str, str]:
    """Return by name what a run's results depend on, as text: data, options and the shapes of the family."""
    digest = hashlib.sha256()
    for part in (snapshots.times, *snapshots.samples, *snapshots.weights, snapshots.masses):
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    start = hashlib.sha256()
    for value in family.state_dict().values():
        if isinstance(value, Tensor):
            start.update(value.detach().cpu().contiguous().numpy().tobytes())
    described = {name: _text(value) for name, value in options.items() if name not in _FREE}
    return {"snapshots": digest.hexdigest(), "start": start.hexdigest(), **described, **fingerprint(family)}


def _text(value: Any) -> str:
    return repr(value.tolist()) if isinstance(value, Tensor) else repr(value)


class Loop:
    """One attempt at a refinement, between iterations.

    Args:
        snapshots: the data.
        family: the drift, which is changed.
        options: of :func:`stochdyn.bridges.refine`.
        from_family: whether the first bridge is that of the family rather than what ``start`` says.

    Attributes:
        bridge: the bridge of the present reference.
        family: the present reference's drift.
        history: of all iterations so far.
    """

    def __init__(
        self, snapshots: Snapshots, family: DriftFamily, options: dict[str, Any], from_family: bool
    ) -> None:
        self.snapshots, self.family, self.options = snapshots, family, options
        self.population = options["population"] or sum(snapshots.sizes) / len(snapshots)
        self.diffusion = options["diffusion"]
        self.brownian = options["start"] == "brownian" and not from_family
        self.history = History()
        self.make = {
            "dt": options["step"],
            "tolerance": options["sinkhorn_tolerance"],
            "max_iterations": options["max_iterations"],
            "relaxation": options["relaxation"],
            "corrections": options["corrections"],
        }
        small = sum(p.numel() for p in family.parameters()) <= _SMALL
        self.anderson = Anderson(3) if options["accelerate"] and small else None
        self._bridge: SchrodingerBridge | None = None

    @property
    def bridge(self) -> SchrodingerBridge:
        """The present bridge; the first one is solved when it is asked for."""
        if self._bridge is None:
            first = ZeroDrift(self.snapshots.dim) if self.brownian else copy.deepcopy(self.family)
            self._bridge = SchrodingerBridge(self.snapshots, first, self.diffusion, **self.make).solve()
        return self._bridge

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do."""
        return bool(self.history.stopped) or len(self.history) >= self.options["outer"]

    def iterate(self) -> float:
        """Project, and solve the next bridge; returns by how much the objective fell."""
        options, bridge, family = self.options, self.bridge, self.family
        clock = time.process_time()
        generator = torch.Generator(self.snapshots.device).manual_seed(options["seed"])
        nodes = bridge.nodes(options["nodes"], generator)
        kept = copy.deepcopy(family)
        project_drift(
            family, nodes, bridge.spread, population=self.population, method=options["projection"],
            steps=options["projection_steps"], lr=options["projection_lr"], seed=options["seed"],
        )  # fmt: skip
        gain = path_gain(drift_at(bridge.family, nodes), drift_at(family, nodes), nodes, bridge.spread)
        if options["learn_diffusion"]:
            self.diffusion = _learnt_diffusion(bridge, family)
        projected = float(bridge.objective) - float(gain)
        following = None
        if self.anderson is not None:
            following = _extrapolate(
                self.anderson, kept, family, bridge, projected, self.diffusion, self.make
            )
        if following is None:
            own = copy.deepcopy(family)
            following = SchrodingerBridge(self.snapshots, own, self.diffusion, **self.make).solve(bridge)
        else:
            family = copy.deepcopy(following.family)
        objective = float(bridge.objective)
        fall = objective - float(following.objective)
        least = options["tolerance"] / self.population
        if fall < -least and len(self.history) > 0:
            # the projection no longer sees what the objective does: the last reference was better
            self.history.stopped, self.family = "the objective would rise", kept
            return fall
        self.history.iterations.append(
            Iteration(
                objective, projected, float(bridge.marginal_errors.max()), family.named_values(),
                float(following.spread.diagonal().mean().sqrt()), time.process_time() - clock,
            )
        )  # fmt: skip
        self.family, self._bridge = family, following
        if fall < least:
            self.history.stopped = "the objective no longer falls"
        return fall

    def run(self, progress: bool, interrupt: DeferredInterrupt, save: Any = None) -> bool:
        """Iterate to the end; returns False if interrupted before."""
        from tqdm.auto import tqdm

        with tqdm(total=self.options["outer"], disable=not progress, desc="refine") as bar:
            bar.update(len(self.history))
            self.history.final_objective = float(self.bridge.objective)
            while not self.finished:
                fall = self.iterate()
                self.history.final_objective = float(self.bridge.objective)
                bar.update()
                bar.set_postfix(objective=f"{self.history.final_objective:.5g}", fall=f"{fall:.2g}")
                if save is not None:
                    save(self)
                if interrupt.requested and not self.finished:
                    return False
        if not self.history.stopped:
            self.history.stopped = _LIMIT
        return True

    # ------------------------------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Return all that the next iteration depends on, as plain data and tensors."""
        return {
            "family": dict(self.family.state_dict()),
            "bridge": dict(self.bridge.state_dict()),
            "diffusion": self.diffusion.value if self.options["learn_diffusion"] else None,
            "anderson": None if self.anderson is None else self.anderson.pairs,
            "iterations": [
                {f.name: getattr(own, f.name) for f in dataclasses.fields(own)} for own in self.history
            ],
            "final_objective": self.history.final_objective,
            "stopped": self.history.stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        device = self.snapshots.device
        self.family.load_state_dict(state["family"])
        if state["diffusion"] is not None:
            self.diffusion = Matrix(state["diffusion"].to(device))
        if self.anderson is not None:
            self.anderson.pairs = [(old.to(device), new.to(device)) for old, new in state["anderson"]]
        self.history = History(
            [Iteration(**own) for own in state["iterations"]], state["final_objective"], state["stopped"]
        )
        own = (
            copy.deepcopy(self.family)
            if len(self.history) or not self.brownian
            else ZeroDrift(self.snapshots.dim)
        )
        self._bridge = SchrodingerBridge(self.snapshots, own, self.diffusion, **self.make)
        self._bridge.load_state_dict(state["bridge"])


class Store:
    """A run's checkpoint: the attempt under way, and the best one before it."""

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder, self.identity = folder, identity
        prepare_folder(folder)

    def read(self) -> dict[str, Any] | None:
        """Return what was saved, if it is this run's.

        Raises:
            ForeignCheckpointError: if it belongs to another run.
        """
        content = read_checkpoint(self.folder)
        if content is None:
            return None
        check_same_run(self.folder, {"kind": content.kind}, {"kind": "refinement"})
        check_same_run(self.folder, content.identity, self.identity)
        return content.state

    def write(self, attempt: int, loop: Loop, best: Loop | None) -> None:
        """Save."""
        state = {
            "attempt": attempt,
            "loop": loop.state_dict(),
            "best": None if best is None else best.state_dict(),
        }
        write_checkpoint(self.folder, Checkpoint("refinement", len(loop.history), self.identity, state))


def _extrapolate(
    anderson: Anderson,
    before: DriftFamily,
    after: DriftFamily,
    bridge: SchrodingerBridge,
    bound: float,
    diffusion: Any,
    make: dict[str, Any],
) -> SchrodingerBridge | None:
    """Return the bridge for extrapolated parameters, if it is better than the projection promises; else None."""
    image = get_vector(after)
    proposal = anderson.propose(get_vector(before), image)
    if torch.equal(proposal, image) or not bool(torch.isfinite(proposal).all()):
        return None
    bold = copy.deepcopy(after)
    set_vector(bold, proposal)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            attempt = SchrodingerBridge(bridge.snapshots, bold, diffusion, **make).solve(bridge)
    except (DiffusionError, NonFiniteError):
        attempt = None
    if attempt is None or not attempt.converged or not float(attempt.objective) <= bound:
        anderson.forget()
        return None
    return attempt


@torch.no_grad()
def _learnt_diffusion(bridge: SchrodingerBridge, family: DriftFamily) -> Matrix:
    """Return the noise whose strength fits the couplings best, the drift being that of ``family``."""
    factor = bridge.innovations(family).trace() / bridge.snapshots.dim
    return Matrix(torch.linalg.cholesky(bridge.spread * factor.to(bridge.spread)))
