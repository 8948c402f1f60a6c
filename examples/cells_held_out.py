"""Cells with a day left out: bridges between the other days, scored on the day that they didn't see.

Give the file of an experiment, or nothing for a simulated branching population:

    python examples/cells_held_out.py
    python examples/cells_held_out.py cells.h5ad --time day --representation X_pca --components 5
    python examples/cells_held_out.py cells.npz --values pcs --labels sample_labels --components 5 --hold-out 2
    python examples/cells_held_out.py days.npz --times 0 12 24 36 72     # one array per day: t0, t1, ...

It compares the Brownian bridge with references that are refined: a linear one and, on request, a smooth landscape that
cells descend; and with the bridge of a population that grows. It prints W1, W2 and MMD on the held-out day, and draws
trajectories and the predicted day.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch

import stochdyn as sd
from stochdyn.bridges import (
    GrowingBridge,
    LinearDrift,
    PotentialDrift,
    SchrodingerBridge,
    Snapshots,
    leave_one_out,
    refine,
    sampling_floor,
    score,
)


def load(options: argparse.Namespace) -> Snapshots:
    """Return the snapshots, each component scaled to variance one over all of them."""
    if options.file is None:
        cells = sd.datasets.branching_cells(num_cells=200, generator=options.seed)
        snaps = Snapshots(cells.times, cells.samples)
    elif options.file.suffix == ".h5ad":
        snaps = sd.bridges.from_anndata(
            options.file, options.time, options.representation, options.components
        )
    else:
        snaps = sd.bridges.from_npz(
            options.file, options.values, options.labels, options.components, options.times
        )
    if options.cells is not None:
        snaps = snaps.subsample(options.cells, torch.Generator().manual_seed(options.seed))
    return snaps.standardised()[0]


def growing(train: Snapshots, diffusion: float, step: float) -> GrowingBridge:
    """Return the bridge of a growing population; its share of growth predicts training days best when they are left out."""

    def make(share: float) -> Callable[[Snapshots], GrowingBridge]:
        return lambda snaps: GrowingBridge(snaps, share, diffusion=diffusion, dt=step).solve()

    shares = {f"{share:g}": make(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
    best = leave_one_out(train, shares, metric="w1", num_samples=500).best if len(train) > 2 else "0.5"
    return make(float(best))(train)


def draw(
    train: Snapshots,
    held: sd.bridges.Snapshot,
    law: SchrodingerBridge,
    name: str,
    best: SchrodingerBridge | GrowingBridge,
    file: Path,
) -> None:
    """Trajectories through the days that were seen, and the day that wasn't, beside its best prediction."""
    from matplotlib import pyplot as plt

    from stochdyn.bridges import plot_trajectories

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    plot_trajectories(law, train, 60, axis=left)
    left.set_title(f"Trajectories, {name}")
    predicted = best.marginal(held.time).sample(len(held), torch.Generator().manual_seed(0))
    for x, label, style in ((held.sample, "seen", "o"), (predicted, "predicted", "x")):
        right.scatter(x[:, 0], x[:, 1], s=12, marker=style, alpha=0.6, label=label)
    right.set(xlabel="component 1", ylabel="component 2", title=f"The held-out time, t = {held.time:g}")
    right.legend()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> dict[str, float]:
    """Hold out, fit, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help=".h5ad or .npz; simulated cells if not given")
    parser.add_argument("--time", default="day", help="column of obs with the time")
    parser.add_argument("--representation", default="X_pca", help="entry of obsm")
    parser.add_argument("--values", help="npz: key of the cells")
    parser.add_argument("--labels", help="npz: key of the cells' times")
    parser.add_argument("--times", type=float, nargs="*", help="npz: one number per snapshot")
    parser.add_argument("--components", type=int)
    parser.add_argument("--cells", type=int, help="at most so many cells per day")
    parser.add_argument("--hold-out", type=int, help="index of the held-out day; the middle one if not given")
    parser.add_argument("--diffusion", type=float, default=0.3)
    parser.add_argument("--max-iterations", type=int, default=3, help="iterations of each refinement")
    parser.add_argument(
        "--landscape", action="store_true", help="refine a landscape too, which takes minutes"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    matplotlib.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    snaps = load(options)
    index = len(snaps) // 2 if options.hold_out is None else options.hold_out
    train, (held,) = snaps.hold_out(index)
    print(f"{snaps}; held out: t = {held.time:g}")
    step = float(train.durations.min()) / 4
    laws, results = {}, {}
    families = {"Brownian": None, "linear": LinearDrift(snaps.dim)}
    if options.landscape:
        families["landscape"] = PotentialDrift.for_snapshots(train, width=16)
    for name, family in families.items():
        began = time.process_time()
        if family is None:
            laws[name] = SchrodingerBridge(train, None, options.diffusion, dt=step).solve()
        else:
            fit = refine(
                train,
                family,
                options.diffusion,
                max_iterations=options.max_iterations,
                dt=step,
                seed=options.seed,
            )
            laws[name] = fit.measure
        found = score(laws[name], held)
        results[name] = found.w1
        print(
            f"{name:10s} W1 {found.w1:.3f}  W2 {found.w2:.3f}  MMD {found.mmd:.3f}  ({time.process_time() - began:.0f} s)"
        )
    began = time.process_time()
    grown = growing(train, options.diffusion, step)
    found = score(grown, held)
    print(
        f"{'growing':10s} W1 {found.w1:.3f}  W2 {found.w2:.3f}  MMD {found.mmd:.3f}  ({time.process_time() - began:.0f} s), "
        f"share of growth {grown.growth:g}"
    )
    floor = sampling_floor(held)
    print(
        f"{'halves':10s} W1 {floor.w1:.3f}  W2 {floor.w2:.3f}  MMD {floor.mmd:.3f}  (what chance makes of two halves of that day)"
    )
    best = min(results, key=lambda name: results[name])
    predicts = grown if found.w1 < results[best] else laws[best]
    results["growing"] = found.w1
    draw(train, held, laws[best], best, predicts, options.out / "cells_held_out.png")
    print(f"wrote {options.out / 'cells_held_out.png'}")
    return results


if __name__ == "__main__":
    main()
