"""Held-out scores of bridges, choice of a family by them, and forecasts past the last snapshot."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_seed,
    as_tensor,
    as_time_grid,
    check_choice,
    check_mapping,
    check_nonempty,
    check_positive,
    check_positive_int,
    check_type,
)
from stochdyn.bridges.data.snapshots import Snapshot, Snapshots
from stochdyn.bridges.laws.marginal import draw_index
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.equation import SDE
from stochdyn.diagnostics.metrics import emd, mmd
from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError, TimeGridError
from stochdyn.run.engine import Resumable, run_to_end
from stochdyn.run.jobs import Jobs

if TYPE_CHECKING:
    from stochdyn.bridges.refinement.refinement import Refinement

__all__ = ["HeldOut", "Score", "forecast", "leave_one_out", "sampling_floor", "score"]


@dataclass(frozen=True)
class Score:
    """Distances of a law from one snapshot.

    Attributes:
        time: The time of the snapshot.
        w1: The Wasserstein distance of first order, Euclidean cost, in units of the state.
        w2: The Wasserstein distance of second order, the root of the mean *squared* distance. Papers call either of them "EMD".
        mmd: The maximum mean discrepancy, Gaussian kernel with the median distance for bandwidth.
        size: The number of particles of the snapshot.
    """

    time: float
    w1: float
    w2: float
    mmd: float
    size: int


@dataclass(frozen=True)
class HeldOut:
    """Scores of several methods on snapshots that they didn't see.

    Attributes:
        scores: The scores by method, one score per held-out snapshot.
        floor: The scores that fresh samples of the truth would have, estimated from halves of the snapshots; see
            :func:`sampling_floor`.
        best: The method with the least mean W2, or W1 if asked for.
        metric: The distance that ``best`` goes by.
    """

    scores: dict[str, list[Score]]
    floor: list[Score]
    best: str
    metric: str

    def mean(self, method: str, metric: str = "w2") -> float:
        """Return a method's mean over the held-out snapshots."""
        values = [getattr(s, metric) for s in self.scores[method]]
        return sum(values) / len(values)

    def table(self) -> str:
        """Return the scores as a Markdown table."""
        times = [s.time for s in self.floor]
        lines = [
            "| method | metric | " + " | ".join(f"t = {t:g}" for t in times) + " | mean |",
            "|---|---|" + "---|" * (len(times) + 1),
        ]
        for name, scores in {**self.scores, "floor (half samples)": self.floor}.items():
            for metric in ("w1", "w2", "mmd"):
                values = [getattr(s, metric) for s in scores]
                cells = " | ".join(f"{v:.3f}" for v in [*values, sum(values) / len(values)])
                lines.append(f"| {name} | {metric.upper()} | {cells} |")
        return "\n".join(lines)


def score(
    law: PathMeasure | Tensor,
    snapshot: Snapshot,
    num_samples: int = 1000,
    generator: torch.Generator | int | None = 0,
) -> Score:
    r"""Return how far a law is from a snapshot, in three distances that are told apart by name.

    .. math:: W_p=\Big(\min_\pi\sum\pi_{ij}|x_i-y_j|^p\Big)^{1/p},\qquad p=1,2

    Args:
        law: The law on paths, or particles ``(n, d)``. Where its states have more components than the snapshot, the first ones
            are compared.
        snapshot: The snapshot to compare with; its weights count.
        num_samples: The number of draws from the law's marginal.
        generator: The source of randomness: a seed, so that scores can be compared, a ``torch.Generator``, or None for torch's
            global one.

    Example:
        >>> seen = Snapshots([0.0, 1.0], [torch.zeros(4, 2), torch.ones(5, 2)])
        >>> round(score(torch.zeros(3, 2), seen[1]).w2, 4)
        1.4142
    """
    check_positive_int(num_samples, "num_samples")
    check_type(snapshot, Snapshot, "snapshot", "snapshots[i] is one")
    if isinstance(law, PathMeasure):
        source = as_generator(generator, snapshot.sample.device)
        x = law.marginal(snapshot.time).sample((num_samples,), source)
    else:
        x = as_tensor(law, "law", 2, "(n, d)", like=snapshot.sample)
    if x.shape[-1] < snapshot.sample.shape[-1]:
        raise ShapeError(
            "law has fewer components than the snapshot",
            got=tuple(x.shape),
            expected=f"(n, {snapshot.sample.shape[-1]})",
        )
    x = x[..., : snapshot.sample.shape[-1]].to(snapshot.sample.dtype)
    x, y, w = x.detach().cpu(), snapshot.sample.cpu(), snapshot.weights.cpu()
    # exact transport of equally weighted draws to weighted particles
    w1, w2 = (emd(x, y, p=p, weights_y=w) for p in (1, 2))
    equal = bool((w - w[0]).abs().max() < 1e-6 * w[0])
    seen = y
    if not equal:
        pick = torch.multinomial(w, max(len(y), 1000), True, generator=torch.Generator().manual_seed(0))
        seen = y[pick]
    return Score(snapshot.time, w1, w2, float(mmd(x, seen)), len(snapshot))


def sampling_floor(snapshot: Snapshot, num_samples: int = 5, seed: int = 0) -> Score:
    """Return the distances between random halves of a snapshot: what chance alone makes of two samples of one law.

    Halves are smaller than the snapshot, so this floor lies above that of a law known exactly, by about the root of two where
    the error falls as the root of the size.

    Args:
        snapshot: The snapshot that is split, at least two particles.
        num_samples: The number of random splits to average over.
        seed: The seed of the splits.

    Raises:
        EmptyDataError: If there are fewer than two particles.
    """
    check_type(snapshot, Snapshot, "snapshot", "snapshots[i] is one")
    check_positive_int(num_samples, "num_samples")
    if len(snapshot) < 2:
        raise EmptyDataError("a snapshot of one particle has no halves", got=len(snapshot))
    generator = torch.Generator(snapshot.sample.device).manual_seed(seed)
    parts = []
    for _ in range(num_samples):
        order = torch.randperm(len(snapshot), generator=generator, device=snapshot.sample.device)
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        half = Snapshot(
            snapshot.time, snapshot.sample[second], snapshot.weights[second] / snapshot.weights[second].sum()
        )
        parts.append(score(snapshot.sample[first], half))
    mean = {name: sum(getattr(p, name) for p in parts) / num_samples for name in ("w1", "w2", "mmd")}
    return Score(snapshot.time, mean["w1"], mean["w2"], mean["mmd"], len(snapshot))


def leave_one_out(
    snapshots: Snapshots,
    methods: Mapping[str, Any],
    indices: Sequence[int] | None = None,
    metric: str = "w2",
    num_samples: int = 1000,
    progress: bool = True,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    **options: Any,
) -> HeldOut:
    """Hold out one inner snapshot after the other, fit every method to the rest, and score it on what it didn't see.

    Args:
        snapshots: The snapshots to hold out from.
        methods: The methods by name: a family (a :class:`DriftFamily`, module, or Pyro model) that is refined with ``options``;
            None for the Brownian bridge; or a function of the training snapshots that returns a law on paths
            (:class:`stochdyn.PathMeasure`) or a :class:`Refinement`. A function of one argument is told from a Pyro model,
            which has none.
        indices: The indices of the snapshots that are held out; all but the first and the last if None.
        metric: The distance that ``best`` goes by: ``"w1"``, ``"w2"`` or ``"mmd"``.
        num_samples: The number of draws from each law.
        progress: Whether to show a progress bar, after two seconds.
        checkpoint: The directory that is saved to after every fit.
        resume: Whether to continue the run in ``checkpoint``.
        executor: An executor of ``concurrent.futures`` for the fits; this thread if None. The answer is the same to the bit.
        options: The arguments of :func:`stochdyn.bridges.refine`, such as ``diffusion``; those of the bridge count for None
            too.

    Raises:
        InvalidInputError: If there is nothing to hold out, or the first or last snapshot should be.
        EmptyDataError: If there are no methods.
        Interrupted: After Ctrl-C; its ``result`` holds the scores so far.

    Example:
        >>> clouds = [torch.linspace(-1, 1, 9)[:, None] + i for i in range(4)]
        >>> held = leave_one_out(Snapshots([0.0, 1.0, 2.0, 3.0], clouds), {"none": None}, diffusion=0.3)
        >>> held.best, len(held.scores["none"])
        ('none', 2)
    """
    check_mapping(methods, "methods", "methods by name")
    check_nonempty(methods, "methods")
    check_type(snapshots, Snapshots, "snapshots")
    check_choice(metric, ("w1", "w2", "mmd"), "metric")
    chosen = list(range(1, len(snapshots) - 1)) if indices is None else [i % len(snapshots) for i in indices]
    if not chosen or any(i in (0, len(snapshots) - 1) for i in chosen):
        raise InvalidInputError(
            "only snapshots between others can be held out",
            got=chosen if chosen else f"{len(snapshots)} snapshots",
            hint="forecast scores the last one",
        )
    seed = as_seed(options.get("seed", 0))
    cases = [(i, name) for i in chosen for name in methods]
    fit_and_score = _FitAndScore(snapshots, methods, num_samples, options)
    identity = {
        "snapshots": snapshots, "methods": dict(methods), "indices": chosen, "num_samples": num_samples, **options
    }  # fmt: skip
    with Jobs(fit_and_score, cases, seed, executor, snapshots.device) as jobs:
        return run_to_end(
            _HoldingOut(snapshots, list(methods), jobs, metric), "held out", identity=identity, randomness=seed,
            device=snapshots.device, progress=progress, checkpoint=checkpoint, resume=resume,
        )  # fmt: skip


@dataclass(frozen=True)
class _FitAndScore:
    """Hold a snapshot out, fit a method to the rest, and score it."""

    snapshots: Snapshots
    methods: Mapping[str, Any]
    num_samples: int
    options: dict[str, Any]

    def __call__(self, case: tuple[int, str]) -> Score:
        i, name = case
        train, (held,) = self.snapshots.hold_out(i)
        return score(_fit(self.methods[name], train, self.options), held, self.num_samples)


class _HoldingOut(Resumable[HeldOut]):
    """One method fitted without one snapshot, after the other."""

    unit = "fit"

    def __init__(self, snapshots: Snapshots, names: list[str], jobs: Jobs[Score], metric: str) -> None:
        self.snapshots, self.jobs, self.metric = snapshots, jobs, metric
        self.cases = jobs.items
        self.total = len(self.cases)
        self.scores: dict[str, list[Score]] = {name: [] for name in names}

    @property
    def finished(self) -> bool:
        """Whether every method was fitted without every snapshot."""
        return self.number >= len(self.cases)

    def step(self) -> None:
        """Take the score of the next method and snapshot."""
        self.scores[self.cases[self.number][1]].append(self.jobs.result(self.number))

    def state(self) -> dict[str, Any]:
        """Return the scores so far."""
        return {"scores": {name: [list(astuple(s)) for s in own] for name, own in self.scores.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from scores."""
        self.scores = {name: [Score(*row) for row in own] for name, own in state["scores"].items()}

    def report(self) -> HeldOut:
        """Return the scores so far, and the best of the methods that have some."""
        means = {
            name: sum(getattr(s, self.metric) for s in own) / len(own)
            for name, own in self.scores.items()
            if own
        }
        best = min(means, key=lambda name: means[name], default="")
        places = dict.fromkeys(i for i, _ in self.cases[: self.number])
        return HeldOut(self.scores, [sampling_floor(self.snapshots[i]) for i in places], best, self.metric)


def _fit(method: Any, train: Snapshots, options: dict[str, Any]) -> PathMeasure:
    from stochdyn.bridges.families.base import DriftFamily
    from stochdyn.bridges.families.pyro_family import required_arguments
    from stochdyn.bridges.refinement.methods import Messages, as_method
    from stochdyn.bridges.refinement.refinement import Refinement, refine

    if method is None:
        chosen = as_method(options.get("method", "sinkhorn"))
        if isinstance(chosen, Messages):
            raise InvalidInputError(
                "the Brownian bridge has no hidden components", hint="score a family for Messages"
            )
        return chosen.bridge(train, None, options.get("diffusion", 0.1), options.get("dt")).solve()
    is_module = isinstance(method, DriftFamily | torch.nn.Module)
    if callable(method) and not is_module and required_arguments(method) == 1:
        fitted: Callable[[Snapshots], PathMeasure | Refinement] = method
        law = fitted(train)
        law = law.measure if isinstance(law, Refinement) else law
        check_type(law, PathMeasure, "what a method returns", "a bridge, or a Refinement")
        return law
    return refine(train, method, **{"progress": False, **options}).measure


@torch.no_grad()
def forecast(
    fit: Refinement,
    ts: Tensor,
    sample_shape: SampleShape = 1000,
    generator: Generator = None,
    posterior: Any = None,
    dt: float | None = None,
) -> PathSample:
    """Run the refined reference on from the last snapshot, for times that no snapshot has seen.

    Args:
        fit: The refinement, as :func:`stochdyn.bridges.refine` returned it.
        ts: The times of the paths, ``(T,)``, the first not before the last snapshot.
        sample_shape: The shape of independent draws, an integer or a tuple.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        posterior: A container from ``fit.posterior``: each trajectory then has parameters of its own, drawn from it, so that
            the forecast carries their uncertainty.
        dt: The largest step of the simulation; that of the fit if None.

    Returns:
        Paths ``(*sample, T, d)``, with the increments since each time before (those of the first time, if it is past the last
        snapshot, aren't kept).

    Raises:
        TimeGridError: If a time lies before the last snapshot.
    """
    times = fit.snapshots.times
    wanted = as_time_grid(ts, min_points=1, like=times).to(times)
    shape, last = as_sample_shape(sample_shape), fit.snapshots[len(times) - 1]
    source, n = as_generator(generator, last.sample.device), math.prod(shape)
    slack = 1e-9 * float(times[-1] - times[0])
    if float(wanted[0]) < last.time - slack:
        raise TimeGridError(
            "a forecast starts at the last snapshot", got=float(wanted[0]), expected=f">= {last.time:g}"
        )
    dt = fit.dt if dt is None else dt
    check_positive(dt, "dt")
    grid, places = _refined(last.time, wanted, float(dt), slack)
    law = fit.states_at(-1)
    start, diffusion = law.particles[draw_index(law.weights, n, source)], fit.reference.sde.diffusion
    if posterior is None:
        families: list[Any] = [fit.family]
    else:
        from stochdyn.bridges.refinement.uncertainty import families_of

        families = families_of(fit, posterior, min(n, 200), source)
    parts = []
    for own, family in zip(start.tensor_split(len(families)), families, strict=True):
        process = DiffusionMeasure(own, SDE(family, diffusion))
        parts.append(_thin(process.sample(grid, (), source), places, wanted))
    x, dw = torch.cat([p.x for p in parts]), torch.cat([p.dw for p in parts])
    return PathSample(
        wanted, x.reshape(*shape, *x.shape[1:]), dw.reshape(*shape, *dw.shape[1:]), {}, fit.reference
    )


def _refined(start: float, ts: Tensor, dt: float, slack: float) -> tuple[Tensor, Tensor]:
    """A grid from ``start`` through all ``ts`` with steps of at most ``dt``, and where ``ts`` are on it."""
    knots = torch.cat((ts.new_tensor([start]), ts)) if float(ts[0]) > start + slack else ts
    pieces = [knots[:1]]
    for a, b in zip(knots[:-1].tolist(), knots[1:].tolist(), strict=True):
        count = max(1, math.ceil((b - a) / dt - 1e-9))
        pieces.append(torch.linspace(a, b, count + 1, dtype=torch.float64, device=ts.device)[1:])
    grid = torch.cat(pieces)
    if len(grid) == 1:  # only the last snapshot's own time was asked for
        grid = torch.cat((grid, grid + dt))
    return grid, (grid[:, None] - ts).abs().argmin(0)


def _thin(path: PathSample, places: Tensor, ts: Tensor) -> PathSample:
    total = torch.cat((torch.zeros_like(path.dw[..., :1, :]), path.dw.cumsum(-2)), -2)
    dw = total[..., places, :].diff(dim=-2)
    return PathSample(ts, path.x[..., places, :], dw, {}, path.law)
