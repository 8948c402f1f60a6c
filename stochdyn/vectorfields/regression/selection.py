"""Choice of a kernel by evidence: the candidates, and the engine that serves each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from gpytorch.kernels import AdditiveKernel, Kernel, ScaleKernel

from stochdyn.errors import InvalidInputError
from stochdyn.run.engine import Resumable
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.sphere import HodgeMatern, hodge_compositional, sphere_of
from stochdyn.vectorfields.regression.ambient import AmbientKernel
from stochdyn.vectorfields.regression.engines import (
    DenseEngine,
    Engine,
    Observations,
    SpectralEngine,
    feature_terms,
)
from stochdyn.vectorfields.regression.kernels import ConnectionMatern, ProjectedMatern
from stochdyn.vectorfields.regression.precision import PrecisionEngine

__all__ = ["Best", "Candidate", "Choice", "KernelSearch", "candidates", "make_engine"]

Found = TypeVar("Found")

#: The most rows for which kernels without features are tried.
MAX_DENSE_ROWS = 5000
#: The most rows for which a sum of kernels is, whose search takes twice the steps.
MAX_SUM_ROWS = 2500
#: The most nodes for which the full-rank field is tried: its search costs tens of sparse factorisations.
MAX_SPARSE_NODES = 20_000
#: The most modes that are all taken, and the most rows with which: the first bounds the eigenproblem, the second the search.
MAX_ALL_MODES, MAX_ALL_ROWS = 2000, 1000
#: What costs most is tried only if something akin to it is this near the best, in nats per component.
_HOPELESS = 0.4


@dataclass(frozen=True)
class Candidate:
    """A kernel to try: its name, how to make it, the backend and smoothness that go with it, and the cheaper ones akin to it."""

    name: str
    make: Callable[[], Kernel | None]
    backend: str = "spectral"
    nu: float = 2.0
    akin: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What became of a candidate.

    Attributes:
        name: The name of the candidate.
        log_evidence: The log marginal likelihood at its best hyper-parameters.
        seconds: The processor time that it took.
    """

    name: str
    log_evidence: float
    seconds: float


@dataclass(frozen=True)
class Best:
    """The best of the candidates: its kernel, if it has one in itself, and its optimised engine."""

    candidate: Candidate
    kernel: Kernel | None
    engine: Engine


def candidates(cloud: PointCloud, rows: int) -> list[Candidate]:
    """Return the kernels that are tried on a cloud with so many components observed.

    Where that is affordable the connection kernel has all its modes. A truncated kernel takes the truncation for truth: with about as
    many modes as observed components it fits the data with a noise that is too small, wins by evidence and predicts badly.
    """
    total = cloud.dim * len(cloud)
    whole = total <= MAX_ALL_MODES and min(rows, total) <= MAX_ALL_ROWS

    def connection() -> Kernel:
        return ConnectionMatern(cloud, 1.5, total if whole else None, trainable_nu=True)

    along = "connection, all modes" if whole else "connection"
    found = [
        Candidate(along, connection),
        Candidate("projected", lambda: ProjectedMatern(cloud, 1.5, trainable_nu=True)),
    ]
    if rows <= MAX_DENSE_ROWS:
        found += [
            Candidate("ambient Matérn 3/2", lambda: AmbientKernel(cloud, 1.5)),
            Candidate("ambient Matérn 5/2", lambda: AmbientKernel(cloud, 2.5)),
            Candidate("ambient squared exponential", lambda: AmbientKernel(cloud, math.inf)),
        ]
    if sphere_of(cloud.points, closed=True) is not None:
        found += [
            Candidate(
                "divergence-free", lambda: HodgeMatern(cloud, 1.5, 20, "divergence_free", trainable_nu=True)
            ),
            Candidate("Hodge compositional", lambda: hodge_compositional(cloud, 1.5, 20, trainable_nu=True)),
        ]
    if not whole and len(cloud) <= MAX_SPARSE_NODES:
        found += [
            Candidate("connection, full rank, ν = 2", lambda: None, "precision", 2.0, (along,)),
            Candidate("connection, full rank, ν = 3", lambda: None, "precision", 3.0, (along,)),
        ]
    if rows <= MAX_SUM_ROWS:
        both = (along, "ambient Matérn 3/2")
        found.append(
            Candidate(" + ".join(both), lambda: _sum(connection(), AmbientKernel(cloud, 1.5)), akin=both)
        )
    return found


def _sum(*kernels: Kernel) -> Kernel:
    """Add kernels, each with a variance of its own."""
    return AdditiveKernel(*(ScaleKernel(kernel) for kernel in kernels))


def make_engine(
    cloud: PointCloud, data: Observations, kernel: Kernel | None, backend: str, nu: float
) -> Engine:
    """Return the engine for a kernel; without one, the sparse engine of smoothness ν."""
    if backend == "precision":
        scale = None if kernel is None else float(kernel.lengthscale.detach())
        return PrecisionEngine(data, cloud, nu, scale)
    if kernel is None:
        raise InvalidInputError("there is no kernel yet", hint="kernel='auto' is chosen by fit")
    if feature_terms(kernel) is not None:
        return SpectralEngine(data, kernel).to(cloud.device)
    return DenseEngine(data, kernel, cloud).to(cloud.device)


class KernelSearch(Resumable[Found]):
    """The search among the candidates, a candidate per step, as the engine of long runs does it.

    Args:
        cloud: The points.
        data: The observations.
        prepare: What sets the noise of an engine and optimises it, in place.
        finish: What makes the result of the best candidate so far, None if there is none yet, and the record of all.
    """

    unit = "kernel"

    def __init__(
        self,
        cloud: PointCloud,
        data: Observations,
        prepare: Callable[[Engine], None],
        finish: Callable[[Best | None, list[Choice]], Found],
    ) -> None:
        self.cloud, self.data, self._prepare, self._finish = cloud, data, prepare, finish
        self.candidates = candidates(cloud, data.rows)
        self.total = len(self.candidates)
        self.record: list[Choice] = []
        self.best: Best | None = None

    @property
    def finished(self) -> bool:
        """Whether all candidates were looked at."""
        return self.number >= len(self.candidates)

    def step(self) -> None:
        """Fit the next candidate, unless what is akin to it is too far behind the best to hope for more."""
        candidate = self.candidates[self.number]
        evidence = {choice.name: choice.log_evidence for choice in self.record}
        highest = max(evidence.values(), default=-math.inf)
        near = max((evidence[name] for name in candidate.akin if name in evidence), default=highest)
        if highest - near > _HOPELESS * self.data.rows:
            return
        began = time.process_time()
        kernel, engine = self._make(candidate)
        self._prepare(engine)
        reached = float(engine.evidence().detach())
        self.record.append(Choice(candidate.name, reached, time.process_time() - began))
        if reached > highest:
            self.best = Best(candidate, kernel, engine)

    def _make(self, candidate: Candidate) -> tuple[Kernel | None, Engine]:
        kernel = candidate.make()
        if kernel is not None:
            kernel = kernel.double().to(self.cloud.device)
        return kernel, make_engine(self.cloud, self.data, kernel, candidate.backend, candidate.nu)

    def state(self) -> dict[str, Any]:
        """Return the record, and which candidate is the best with its hyper-parameters."""
        best = self.best
        return {
            "record": [[c.name, c.log_evidence, c.seconds] for c in self.record],
            "best": None if best is None else [best.candidate.name, dict(best.engine.state_dict())],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Make the best candidate again, with the hyper-parameters that it had."""
        self.record, self.best = [Choice(*row) for row in state["record"]], None
        if state["best"] is not None:
            name, values = state["best"]
            candidate = next(c for c in self.candidates if c.name == name)
            kernel, engine = self._make(candidate)
            engine.load_state_dict(values)
            self.best = Best(candidate, kernel, engine)

    def keep(self) -> tuple[list[Choice], Best | None]:
        """Return the record and the best: a step makes new ones and changes none."""
        return list(self.record), self.best

    def put_back(self, kept: tuple[list[Choice], Best | None]) -> bool:
        """Take the record and the best of before the step."""
        self.record, self.best = kept
        return True

    def describe(self) -> dict[str, Any]:
        """Return the name of the best so far."""
        return {} if self.best is None else {"best": self.best.candidate.name}

    def report(self) -> Found:
        """Return what becomes of the best so far."""
        if self.best is None and self.finished:
            raise InvalidInputError("no kernel could be fitted", got="evidence that isn't finite for any")
        return self._finish(self.best, sorted(self.record, key=lambda choice: -choice.log_evidence))
