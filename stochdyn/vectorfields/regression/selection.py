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
    PlainEngine,
    SpectralEngine,
    feature_terms,
)
from stochdyn.vectorfields.regression.groups import GroupedEngine
from stochdyn.vectorfields.regression.hyper import hyper_parameters, set_hyper_parameters
from stochdyn.vectorfields.regression.kernels import ConnectionMatern, ProjectedMatern
from stochdyn.vectorfields.regression.observations import Groups, Observations
from stochdyn.vectorfields.regression.precision import PrecisionEngine

__all__ = ["Best", "Candidate", "Choice", "KernelSearch", "candidates", "make_engine"]

Result = TypeVar("Result")

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
class Best:
    """The candidate of the highest evidence so far: its number, itself, its kernel (None for sparse ones) and its engine."""

    number: int
    candidate: Candidate
    kernel: Kernel | None
    engine: Engine


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
    found = [Candidate(along, connection)]
    if not cloud.of_functions:  # the projected field of one component is the same as the connection's
        found.append(Candidate("projected", lambda: ProjectedMatern(cloud, 1.5, trainable_nu=True)))
    if rows <= MAX_DENSE_ROWS:
        found += [
            Candidate("ambient Matérn 3/2", lambda: AmbientKernel(cloud, 1.5)),
            Candidate("ambient Matérn 5/2", lambda: AmbientKernel(cloud, 2.5)),
            Candidate("ambient squared exponential", lambda: AmbientKernel(cloud, math.inf)),
        ]
    if not cloud.of_functions and sphere_of(cloud.points, closed=True) is not None:
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


def make_engine(cloud: PointCloud, groups: Groups, kernel: Kernel | None, backend: str, nu: float) -> Engine:
    """Return the engine for a kernel; without one, the sparse engine of smoothness ν."""
    made: list[PrecisionEngine] = []

    def make(data: Observations) -> PlainEngine:
        if backend == "precision":
            scale = None if kernel is None else float(kernel.lengthscale.detach())
            density = made[0].density if made else None  # it depends on the cloud alone
            made.append(PrecisionEngine(data, cloud, nu, scale, density=density))
            return made[-1]
        if kernel is None:
            raise InvalidInputError("there is no kernel yet", hint="kernel='auto' is chosen by fit")
        if feature_terms(kernel) is not None:
            return SpectralEngine(data, kernel).to(cloud.device)
        return DenseEngine(data, kernel, cloud).to(cloud.device)

    return make(groups.parts[0]) if len(groups.parts) == 1 else GroupedEngine(groups, make)


class KernelSearch(Resumable[Result]):
    """The trial of every candidate kernel as a long run: one step per candidate.

    Its state is the record, and the hyper-parameters of the best so far, from which its engine is made again.

    Args:
        cloud: The points that sample the manifold.
        groups: What was observed.
        prepare: A function that sets the noise of an engine and optimises it.
        take: A function that makes the result out of the best candidate so far, its kernel, its engine and the record;
            the first three are None where no candidate has been fitted yet.
    """

    unit = "kernel"

    def __init__(
        self,
        cloud: PointCloud,
        groups: Groups,
        prepare: Callable[[Engine], None],
        take: Callable[[Best | None, list[Choice]], Result],
    ) -> None:
        self.cloud, self.groups, self.prepare, self.take = cloud, groups, prepare, take
        self.candidates = candidates(cloud, groups.rows)
        self.total = len(self.candidates)
        self.record: list[Choice] = []
        self.best: Best | None = None

    @property
    def finished(self) -> bool:
        """Whether all candidates have been tried or passed over."""
        return self.number >= len(self.candidates)

    def step(self) -> None:
        """Fit the next candidate, unless its like is hopelessly behind."""
        candidate = self.candidates[self.number]
        found = {choice.name: choice.log_evidence for choice in self.record}
        highest = max(found.values(), default=-math.inf)
        near = max((found[name] for name in candidate.akin if name in found), default=highest)
        values = sum(part.components.numel() for part in self.groups.parts)
        if highest - near > _HOPELESS * values:
            return
        start = time.process_time()
        engine, kernel = self._make(candidate)
        self.prepare(engine)
        evidence = float(engine.evidence().detach())
        self.record.append(Choice(candidate.name, evidence, time.process_time() - start))
        if evidence > highest:
            self.best = Best(self.number, candidate, kernel, engine)

    def _make(self, candidate: Candidate) -> tuple[Engine, Kernel | None]:
        kernel = candidate.make()
        if kernel is not None:
            kernel = kernel.double().to(self.cloud.device)
        return make_engine(self.cloud, self.groups, kernel, candidate.backend, candidate.nu), kernel

    def describe(self) -> dict[str, str]:
        """Return the best kernel so far, for the bar."""
        return {} if self.best is None else {"best": self.best.candidate.name}

    def state(self) -> dict[str, Any]:
        """Return the record, and the number and hyper-parameters of the best candidate."""
        best = self.best
        return {
            "record": [(c.name, c.log_evidence, c.seconds) for c in self.record],
            "best": -1 if best is None else best.number,
            "parameters": {} if best is None else hyper_parameters(best.engine),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Make the best candidate's engine again, with the hyper-parameters that it had."""
        self.record = [Choice(str(name), float(e), float(s)) for name, e, s in state["record"]]
        number, self.best = int(state["best"]), None
        if number >= 0:
            candidate = self.candidates[number]
            engine, kernel = self._make(candidate)
            set_hyper_parameters(engine, state["parameters"])
            self.best = Best(number, candidate, kernel, engine)

    def keep(self) -> tuple[list[Choice], Best | None]:
        """Return record and best: a step adds to the one and replaces the other."""
        return list(self.record), self.best

    def put_back(self, kept: tuple[list[Choice], Best | None]) -> bool:
        """Go back to what :meth:`keep` returned."""
        self.record, self.best = kept
        return True

    def report(self) -> Result:
        """Return what the caller makes of the best candidate so far."""
        if self.finished and self.best is None:
            raise InvalidInputError("no kernel could be fitted", got="evidence that isn't finite for any")
        return self.take(self.best, sorted(self.record, key=lambda choice: -choice.log_evidence))
