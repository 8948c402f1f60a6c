"""Refinements on known and on real systems: parameters, held-out distances, processor time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.bridges import (
    ComponentFeatures,
    EllipticVortex,
    GrowingBridge,
    LambOseen,
    LinearDrift,
    LotkaVolterra,
    Repressilator,
    SchrodingerBridge,
    Sinkhorn,
    Snapshots,
    leave_one_out,
    refine,
)

__all__ = ["gulf", "lotka_volterra", "repressilator", "stem_cells"]

DRAWS = 500
GROWTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def held_out(
    law: SchrodingerBridge | GrowingBridge, times: list[float], samples: list[Tensor], seeds: int = 3
) -> list[float]:
    """W2 (square root of the optimal squared distance) between draws of the bridge and unseen particles, mean over draws."""
    scores = []
    for t, sample in zip(times, samples, strict=True):
        draws = [law.marginal(t).sample(DRAWS, torch.Generator().manual_seed(s)) for s in range(seeds)]
        scores.append(sum(sd.diagnostics.emd(d, sample, p=2) for d in draws) / seeds)
    return scores


def _load(data: Path | None, name: str) -> list[Tensor] | None:
    if data is None or not (data / name).exists():
        return None
    return [torch.as_tensor(x, dtype=torch.float64) for x in np.load(data / name)]


def _record(fit: Any, seconds: float, scores: list[float], floor: list[float]) -> dict[str, Any]:
    return {
        "parameters": {k: v.tolist() for k, v in fit.parameters.items()} if fit is not None else {},
        "iterations": len(fit.history) if fit is not None else 0,
        "stopped": fit.history.stopped if fit is not None else "",
        "seconds": seconds,
        "w2": scores,
        "floor": floor,
        "ratio_to_floor": [s / f for s, f in zip(scores, floor, strict=True)],
    }


def floors(fresh: list[Tensor], seen: list[Tensor]) -> list[float]:
    """W2 between fresh particles of the truth and those that were held out."""
    return [sd.diagnostics.emd(a, b, p=2) for a, b in zip(fresh, seen, strict=True)]


def _oscillator(
    samples: list[Tensor], times: list[float], fresh: list[Tensor], family: Any, smoke: bool, **options: Any
) -> dict[str, Any]:
    train = Snapshots(times[::2], samples[::2])
    start = time.process_time()
    fit = refine(train, family, diffusion=0.1, **options)
    seconds = time.process_time() - start
    scores = held_out(fit.measure, times[1::2], samples[1::2])
    return _record(fit, seconds, scores, floors(fresh[1::2], samples[1::2]))


def lotka_volterra(data: Path | None, smoke: bool) -> dict[str, Any]:
    """The published data and three simulated sets; every second snapshot is held out."""
    times = [float(t) for t in range(9)]
    options: dict[str, Any] = {"max_iterations": 2 if smoke else 10, "dt": 0.25 if smoke else 0.08}
    fresh = sd.datasets.lotka_volterra(250, generator=99).samples
    out = {}
    published = _load(data, "LV_data.npy")
    if published is not None:
        out["published data"] = _oscillator(published, times, fresh, LotkaVolterra(), smoke, **options)
        out["published data, accelerated"] = _oscillator(
            published, times, fresh, LotkaVolterra(), smoke, method=Sinkhorn(accelerate=True), **options
        )
    for seed in range(1 if smoke else 3):
        own = sd.datasets.lotka_volterra(20 if smoke else 50, generator=seed)
        out[f"simulated, seed {seed}"] = _oscillator(
            own.samples, times, fresh, LotkaVolterra(), smoke, **options
        )
    return out


def repressilator(data: Path | None, smoke: bool) -> dict[str, Any]:
    """The published data and one simulated set; every second snapshot is held out."""
    times = [0.75 * t for t in range(11)]
    options = {
        "max_iterations": 2 if smoke else 15,
        "dt": 0.3 if smoke else 0.15,
        "method": Sinkhorn(num_nodes=200_000, accelerate=True),
    }
    fresh = sd.datasets.repressilator(250, generator=99).samples
    out = {}
    published = _load(data, "repres_data.npy")
    if published is not None:
        out["published data"] = _oscillator(published, times, fresh, Repressilator(), smoke, **options)
    own = sd.datasets.repressilator(15 if smoke else 50, generator=0)
    out["simulated"] = _oscillator(own.samples, times, fresh, Repressilator(), smoke, **options)
    return out


def cubic_streams(t: Tensor, x: Tensor) -> Tensor:
    """The flows of all stream functions of third degree in the plane, without divergence, ``(..., 2, 9)``."""
    first, second = x.unbind(-1)
    zero = torch.zeros_like(first)
    columns = []
    for degree in (1, 2, 3):
        for i in range(degree + 1):
            j = degree - i
            along = first**i * j * second ** (j - 1) if j else zero
            across = -i * first ** (i - 1) * second**j if i else zero
            columns.append(torch.stack((along, across), -1))
    return torch.stack(columns, -1)


def _vortex(current: bool) -> Callable[[Snapshots], Any]:
    return lambda snaps: LambOseen(centres=torch.cat(snaps.samples).mean(0)[None], current=current)


# One list for both files.
GULF: tuple[tuple[str, Callable[[Snapshots], Any] | None, tuple[float, ...]], ...] = (
    ("no drift", None, (0.1, 0.05)),
    ("linear", lambda snaps: LinearDrift(2), (0.1, 0.05)),
    ("elliptic vortex", lambda snaps: EllipticVortex(), (0.1, 0.05)),
    ("Lamb-Oseen vortex", _vortex(False), (0.05,)),
    ("Lamb-Oseen vortex and current", _vortex(True), (0.05,)),
    ("cubic stream function", lambda snaps: ComponentFeatures(cubic_streams, 2), (0.05,)),
)


def _candidates() -> dict[str, tuple[Callable[[Snapshots], Any] | None, float]]:
    return {f"{name}, noise {s:g}": (make, s) for name, make, noises in GULF for s in noises}


def _solve(
    make: Callable[[Snapshots], Any] | None, noise: float, snaps: Snapshots, outer: int
) -> SchrodingerBridge:
    if make is None:
        return SchrodingerBridge(snaps, diffusion=noise).solve()
    thinned = snaps.subsample(40, torch.Generator().manual_seed(0))
    fit = refine(
        thinned,
        make(snaps),
        diffusion=noise,
        max_iterations=outer,
        dt=0.4,
        method=Sinkhorn(num_nodes=30000, accelerate=True),
    )
    return SchrodingerBridge(snaps, fit.family, noise, dt=0.4).solve()


def gulf(
    data: Path | None, smoke: bool, families: Sequence[str] = (), earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Drifters in a vortex of the Gulf of Mexico: the family and its noise are chosen by leaving out training snapshots.

    Families can be run one by one; ``earlier`` holds the results of the others.
    """
    out: dict[str, Any] = {}
    for name in ("GoMvortex_data.npy", "GoMvortexsmall_data.npy"):
        samples = _load(data, name)
        if samples is None:
            continue
        if smoke:
            samples = [s[:15] for s in samples]
        times = [float(t) for t in range(9)]
        train = Snapshots(times[::2], samples[::2])
        rows: dict[str, Any] = dict(earlier[name]["candidates"]) if earlier else {}
        for label, (make, noise) in _candidates().items():
            if families and label.split(", noise")[0] not in families:
                continue
            if smoke and "elliptic" not in label and "no drift" not in label:
                continue
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                inner = []
                for i in (1, 2, 3):
                    rest, (left,) = train.hold_out(i)
                    law = _solve(make, noise, rest, 2 if smoke else 15)
                    inner += held_out(law, [left.time], [left.sample], 1)
                law = _solve(make, noise, train, 2 if smoke else 15)
            rows[label] = {
                "left_out": inner,
                "mean_left_out": sum(inner) / len(inner),
                "objective": float(law.objective),
                "w2": held_out(law, times[1::2], samples[1::2]),
                "seconds": time.process_time() - start,
            }
            print(name, label, rows[label], flush=True)
        best = min(rows, key=lambda label: rows[label]["mean_left_out"])
        out[name] = {"candidates": rows, "chosen": best, "w2": rows[best]["w2"]}
    return out


def _growing(train: Snapshots, noise: float) -> GrowingBridge:
    """The bridge of a growing population whose share of growth predicts the inner training snapshots best."""

    def make(growth: float) -> Callable[[Snapshots], GrowingBridge]:
        return lambda snaps: GrowingBridge(snaps, growth, diffusion=noise).solve()

    held = leave_one_out(train, {f"{g:g}": make(g) for g in GROWTHS})
    return make(float(held.best))(train)


def stem_cells(data: Path | None, smoke: bool) -> dict[str, Any]:
    """Human embryonic stem cells, 0/24/72 h seen, 12 h and 36 h held out; in units of 24 h these are 0, 1, 3 and 0.5, 1.5."""
    if data is None or not (data / "hESC_data_nopickle.npz").exists():
        return {}
    arrays = np.load(data / "hESC_data_nopickle.npz")
    cells = [torch.as_tensor(arrays[f"t{i}"], dtype=torch.float64) for i in range(5)]
    if smoke:
        cells = [c[:20] for c in cells]
    train = Snapshots([0.0, 1.0, 3.0], [cells[0], cells[2], cells[4]])
    out = {}
    for name, family in {"no drift": None, "linear": LinearDrift(5), "growing": GROWTHS}.items():
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if family is None:
                law = SchrodingerBridge(train, diffusion=0.05).solve()
            elif name == "growing":
                law = _growing(train, 0.05)
            else:
                law = refine(train, family, diffusion=0.05, max_iterations=5).measure
        scores = held_out(law, [0.5, 1.5, 2.0], [cells[1], cells[3], cells[3]])
        out[name] = {
            "growth": getattr(law, "growth", 0.0),
            "w2_at_0.5": scores[0],
            "w2_at_1.5": scores[1],
            "w2_of_the_second_at_2.0": scores[2],
            "seconds": time.process_time() - start,
        }
        print("stem cells", name, out[name], flush=True)
    return out
