"""Embryoid body, five components, leave one time out: W1 of bridges, of static transport and of flow matching.

``python benchmarks/bridges/cells.py --data FOLDER [--seeds 5] [--smoke]`` with ``eb_test.npz`` and ``eb_val.npz`` (keys ``X``, ``ts``) in the folder;
without ``--data`` on a simulated branching population. Every method sees the same cells and is scored by the same W1 (Euclidean cost).
Whatever a bridge is free to choose is chosen by leaving out one of the *training* snapshots in turn: the held-out time plays no part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells_peers import FlowMatching
from torch import Tensor

import stochdyn as sd
from stochdyn.bridges import DensityTrend, GrowingBridge, SchrodingerBridge, Snapshots, sampling_floor, score

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

DIFFUSIONS = (0.1, 0.2, 0.3, 0.5)
# what a bridge of a growing population may choose from, at the diffusion that was chosen without growth
GROWTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RIDGES = (0.1, 0.3, 1.0, 3.0)
CELLS = 550


def load(folder: Path | None, smoke: bool, components: int = 5) -> Snapshots:
    """Return the first components of all cells, each scaled to variance one."""
    if folder is None:
        cells = sd.datasets.branching_cells(60 if smoke else 300)
        return Snapshots(cells.times, cells.samples).standardised()[0]
    files = [np.load(folder / f"{name}.npz") for name in ("eb_test", "eb_val")]
    values = np.concatenate([file["X"][:, :components] for file in files])
    labels = np.concatenate([file["ts"] for file in files])
    values = (values - values.mean(0)) / values.std(0)
    limit = 60 if smoke else None
    return Snapshots(list(range(5)), [torch.tensor(values[labels == t][:limit]) for t in range(5)])


def midpoint(snaps: Snapshots, i: int) -> tuple[Tensor, Tensor]:
    """Points and weights of the displacement interpolation between the neighbours of snapshot ``i``."""
    import ot

    x, y = snaps.samples[i - 1].numpy(), snaps.samples[i + 1].numpy()
    a, b = (np.full(len(z), 1 / len(z)) for z in (x, y))
    plan = ot.emd(a, b, ot.dist(x, y))
    first, second = plan.nonzero()
    times = snaps.times
    share = float((times[i] - times[i - 1]) / (times[i + 1] - times[i - 1]))
    points = (1 - share) * x[first] + share * y[second]
    return torch.tensor(points), torch.tensor(plan[first, second])


def bridge_score(train: Snapshots, held: Any, diffusion: float, samples: int, seed: int) -> float:
    """W1 of the Brownian bridge's marginal."""
    law = SchrodingerBridge(train, None, diffusion, dt=0.25, tolerance=0.0001).solve()
    return score(law, held, samples, torch.Generator().manual_seed(seed)).w1


def choose_diffusion(train: Snapshots) -> float:
    """The strength that predicts the training snapshots best when each inner one is left out."""
    totals = dict.fromkeys(DIFFUSIONS, 0.0)
    for j in range(1, len(train) - 1):
        inner, (held,) = train.hold_out(j)
        for diffusion in DIFFUSIONS:
            totals[diffusion] += bridge_score(inner, held, diffusion, CELLS, 0)
    return min(totals, key=lambda d: totals[d])


def growing(train: Snapshots, growth: float, ridge: float, diffusion: float) -> GrowingBridge:
    """The bridge of a growing population."""
    trend = DensityTrend(train, ridge=ridge)
    return GrowingBridge(train, growth, trend, diffusion=diffusion, dt=0.25, tolerance=0.0001).solve()


def choose_growth(train: Snapshots, diffusion: float) -> tuple[float, float]:
    """The share of growth and the ridge that predict the training snapshots best when each inner one is left out."""
    totals: dict[tuple[float, float], float] = {}
    for growth, ridge in itertools.product(GROWTHS, RIDGES):
        if growth or ridge == RIDGES[0]:  # without growth there is no trend
            parts = [(*train.hold_out(j),) for j in range(1, len(train) - 1)]
            laws = [(growing(inner, growth, ridge, diffusion), held) for inner, (held,) in parts]
            seeded = torch.Generator().manual_seed
            totals[growth, ridge] = sum(score(law, held, 1000, seeded(0)).w1 for law, held in laws)
    return min(totals, key=lambda k: totals[k])


def held_out(snaps: Snapshots, i: int, seeds: int, steps: int) -> dict[str, Any]:
    """Score all methods on snapshot ``i``."""
    train, (held,) = snaps.hold_out(i)
    points, weights = midpoint(snaps, i)
    scores: dict[str, list[float]] = {
        "static optimal transport, midpoint": [sd.diagnostics.emd(points, held.sample, 1, weights_x=weights)]
        * seeds
    }
    seconds: dict[str, float] = {}
    began = time.process_time()
    diffusion = choose_diffusion(train)
    law = SchrodingerBridge(train, None, diffusion, dt=0.25, tolerance=0.0001).solve()
    for count in (CELLS, 5000):
        scores[f"bridge, {count} draws"] = [
            score(law, held, count, torch.Generator().manual_seed(seed)).w1 for seed in range(seeds)
        ]
    seconds["bridge"] = time.process_time() - began
    began = time.process_time()
    growth, ridge = choose_growth(train, diffusion)
    grown = growing(train, growth, ridge, diffusion).marginal(held.time)
    for count in (CELLS, 5000):
        draws = [grown.sample(count, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
        scores[f"growing bridge, {count} draws"] = [score(x, held).w1 for x in draws]
    seconds["growing bridge"] = time.process_time() - began
    before = snaps.samples[i - 1].float()
    span = float(snaps.times[i + 1] - snaps.times[i - 1])
    for kind in ("OT-CFM", "SF2M"):
        began, values = time.process_time(), []
        for seed in range(seeds):
            flow = FlowMatching(kind, train.times.tolist(), [x.float() for x in train.samples], steps, seed)
            pushed = flow.push(before, float(snaps.times[i - 1]), float(snaps.times[i]), span)
            values.append(sd.diagnostics.emd(pushed, held.sample.float(), 1))
        scores[kind] = values
        seconds[kind] = time.process_time() - began
    floor = sampling_floor(held).w1
    row = {
        "time": float(snaps.times[i]),
        "diffusion": diffusion,
        "growth": growth,
        "ridge": ridge,
        "floor": floor,
        "w1": scores,
        "seconds": seconds,
    }
    print(
        json.dumps({"time": row["time"], **{k: round(float(np.mean(v)), 3) for k, v in scores.items()}}),
        flush=True,
    )
    return row


def main() -> None:
    """Run all held-out times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with eb_test.npz and eb_val.npz")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--components", type=int, default=5, help="of the embryoid body")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the flow-matching methods")
    parser.add_argument(
        "--times", type=int, nargs="*", help="held-out snapshots; all inner ones if not given"
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cells.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*torchdyn.*")
    snaps = load(options.data, options.smoke, options.components)
    seeds, steps = (1, 30) if options.smoke else (options.seeds, options.steps)
    rows = [held_out(snaps, i, seeds, steps) for i in options.times or range(1, len(snaps) - 1)]
    if options.out.exists() and options.times:
        # held-out times can be run one by one: the others are kept
        kept = json.loads(options.out.read_text())["rows"]
        rows = sorted(
            [r for r in kept if r["time"] not in {q["time"] for q in rows}] + rows, key=lambda r: r["time"]
        )
    result = {
        "machine": machine("torchcfm", "pot"),
        "data": "embryoid body" if options.data else "simulated",
        "cells": list(snaps.sizes),
        "components": snaps.dim,
        "steps": steps,
        "smoke": options.smoke,
        "rows": rows,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
