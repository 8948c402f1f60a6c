"""Muscle cells through three days: bridges between the days, each scored on a day that it didn't see.

    python examples/muscle_cells.py

Every cell was destroyed when its genes were read, so the days are populations without names. One of the two inner days is left out; bridges
between the others predict it, beside the days before and after it and half of either. It prints distances with the distance of two halves of
the day itself, and draws three of the genes to ``outputs/muscle_cells.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch

import stochdyn as sd
from stochdyn.bridges import LinearDrift, SchrodingerBridge, Snapshots, refine, sampling_floor, score
from stochdyn.diagnostics.figures import add_legend

mpl.use("Agg")
import matplotlib.pyplot as plt

F64 = torch.float64


def main() -> None:
    """Leave out a day, predict it, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=5, help="of the refinement of a linear drift")
    parser.add_argument("--out", type=Path, default=Path("outputs/muscle_cells.png"))
    arguments = parser.parse_args()

    table = sd.datasets.muscle_cells()
    hours = torch.tensor(table.pop("hours"), dtype=F64)
    genes = list(table)
    levels = torch.tensor([table[name] for name in genes], dtype=F64).T
    levels = (levels - levels.mean(0)) / levels.std(0)
    days = hours.unique() / 24
    cells = Snapshots(days, [levels[hours == 24 * day] for day in days])

    for held_out in (1, 2):
        train, (held,) = cells.hold_out(held_out)
        before, after = cells[held_out - 1].sample, cells[held_out + 1].sample
        half = min(len(before), len(after))
        guesses = {
            "the day before": before,
            "the day after": after,
            "half of either": torch.cat([before[:half], after[:half]]),
        }
        found = {name: score(guess, held) for name, guess in guesses.items()}
        for noise in (0.3, 0.6, 1.2):
            found[f"bridge, diffusion {noise}"] = score(
                SchrodingerBridge(train, None, noise).solve(), held, 2 * half
            )
        fit = refine(train, LinearDrift(len(genes)), 0.6, max_iterations=arguments.iterations, progress=False)
        found["refined linear drift, 0.6"] = score(fit.measure, held, 2 * half)
        floor = sampling_floor(held)
        print(
            f"\n{24 * held_out} hours left out: W1 {floor.w1:.2f} and W2 {floor.w2:.2f} between two halves of it"
        )
        for name, each in found.items():
            print(f"  {name:26s} W1 {each.w1:.2f}  W2 {each.w2:.2f}  MMD {each.mmd:.3f}")

    bridge = SchrodingerBridge(cells, None, 0.6).solve()
    times = torch.linspace(0, float(days[-1]), 49, dtype=F64)
    paths = bridge.sample(times, 300, generator=0).x
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for axis, name in zip(axes, ("CDK1", "MYOG", "MYH3"), strict=True):
        k = genes.index(name)
        low, middle, high = paths[..., k].quantile(torch.tensor([0.1, 0.5, 0.9], dtype=F64), 0)
        axis.fill_between(24 * times, low, high, color="#0072B2", alpha=0.25, lw=0, label="bridge, 80 %")
        axis.plot(24 * times, middle, color="#0072B2", label="median")
        jitter = 4 * torch.rand(len(hours), generator=torch.Generator().manual_seed(0)) - 2
        axis.plot(hours + jitter, levels[:, k], ".", color="0.4", ms=3, label="cells")
        axis.set(xlabel="hours", ylabel=f"{name}, standard deviations", xticks=[0, 24, 48, 72])
    add_legend(axes[0])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
