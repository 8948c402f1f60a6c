"""Choice of a kernel by evidence: the candidates, and the engine that serves each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpytorch.kernels import AdditiveKernel, Kernel, ScaleKernel

from stochdyn.errors import InvalidInputError
from stochdyn.run.progress import progress_bar
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

__all__ = ["Candidate", "Choice", "candidates", "choose", "make_engine"]

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


def choose(
    cloud: PointCloud,
    data: Observations,
    prepare: Callable[[Engine], None],
    progress: bool = True,
) -> tuple[Candidate, Kernel | None, Engine, list[Choice]]:
    """Fit every candidate and return the one of the highest evidence, with the record of all.

    Args:
        cloud: The points that sample the manifold.
        data: What was observed.
        prepare: A function that sets the noise of an engine and optimises it.
        progress: Whether to show a bar.
    """
    best: tuple[Candidate, Kernel | None, Engine] | None = None
    highest, record = -math.inf, []
    found: dict[str, float] = {}
    for candidate in progress_bar(candidates(cloud, data.rows), "kernels", progress):
        near = max((found[name] for name in candidate.akin), default=highest)
        if highest - near > _HOPELESS * data.rows:
            continue
        start = time.process_time()
        kernel = candidate.make()
        if kernel is not None:
            kernel = kernel.double().to(cloud.device)
        engine = make_engine(cloud, data, kernel, candidate.backend, candidate.nu)
        prepare(engine)
        evidence = float(engine.evidence().detach())
        found[candidate.name] = evidence
        record.append(Choice(candidate.name, evidence, time.process_time() - start))
        if evidence > highest:
            highest, best = evidence, (candidate, kernel, engine)
    if best is None:
        raise InvalidInputError("no kernel could be fitted", got="evidence that isn't finite for any")
    return (*best, sorted(record, key=lambda choice: -choice.log_evidence))
