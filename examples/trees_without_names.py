"""Spruces without their names: how a population of trees grew between the days when it was measured, and whether snapshots tell who is who.

    python examples/trees_without_names.py

79 trees were measured on five days. Bridges are given each day's sizes and not which tree has which, so they can be held against the
truth: a day that was left out, and the correlation of a tree's first size with its last. It prints both for several strengths of noise and
for a growth law that is refined along with its noise, and draws the bridge to ``outputs/trees_without_names.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.bridges import LinearDrift, SchrodingerBridge, Snapshots, refine, sampling_floor, score
from stochdyn.diagnostics.figures import add_legend

mpl.use("Agg")
import matplotlib.pyplot as plt

F64 = torch.float64


def pairing(bridge: SchrodingerBridge) -> float:
    """Return the correlation of the first size with the last that the bridge has."""
    plan = bridge.coupling(0, len(bridge.snapshots) - 1)
    first, last = bridge.snapshots[0].sample[:, 0], bridge.snapshots[-1].sample[:, 0]
    first, last = ((x - x.mean()) / x.std(correction=0) for x in (first, last))
    return float((plan / plan.sum() * first[:, None] * last).sum())


def main() -> None:
    """Leave out, bridge, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=40, help="draws of the bootstrap of the growth law")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/trees_without_names.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    table = sd.datasets.sitka_spruces()
    sizes = torch.tensor(table["size"], dtype=F64).reshape(-1, 5).T[..., None]  # (days, trees, 1)
    months = (torch.tensor(table["day"][:5], dtype=F64) - table["day"][0]) / 30
    true = float(torch.corrcoef(sizes[[0, -1], :, 0])[0, 1])
    width = 1.645 * (1 - true**2) / len(sizes[0]) ** 0.5
    snapshots = Snapshots(months, list(sizes))
    train, (held,) = snapshots.hold_out(2)

    print("diffusion        W1 on the day left out   correlation of first and last size")
    laws: dict[str, SchrodingerBridge] = {}
    for noise in (0.05, 0.1, 0.2, 0.4):
        laws[f"{noise:.2f}"] = SchrodingerBridge(snapshots, None, noise).solve()
        found = score(SchrodingerBridge(train, None, noise).solve(), held)
        print(
            f"{noise:4.2f}             {found.w1:.3f}                    {pairing(laws[f'{noise:.2f}']):.2f}"
        )
    fit = refine(train, LinearDrift(1), 0.1, learn_diffusion=True, progress=False)
    learnt = float(fit.diffusion.squeeze()) ** 0.5
    full = refine(snapshots, LinearDrift(1), 0.1, learn_diffusion=True, progress=False)
    print(
        f"learnt, {learnt:.2f}     {score(fit.measure, held).w1:.3f}                    {pairing(full.measure):.2f}"
    )
    print(f"truth                                     {true:.2f} ({true - width:.2f} to {true + width:.2f})")
    print(f"two halves of it {sampling_floor(held).w1:.3f}")
    rates = torch.as_tensor(fit.posterior(arguments.draws).posterior["matrix"].values).flatten()
    low, middle, high = (-rates).quantile(rates.new_tensor([0.05, 0.5, 0.95]))
    print(f"growth slows at a rate of {middle:.2f} ({low:.2f} to {high:.2f}) per month")

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
    paths: dict[str, Tensor] = {"the trees": sizes[..., 0].T}
    times = torch.linspace(0, float(months[-1]), 61, dtype=F64)
    for name in ("0.10", "0.40"):
        paths[f"bridge, diffusion {name}"] = laws[name].sample(times, 79, generator=0).x[..., 0]
    for axis, (name, lines) in zip(axes, paths.items(), strict=True):
        clock = months if name == "the trees" else times
        rank = lines[:, 0].argsort().argsort()
        for part, (colour, label) in enumerate(
            [("#0072B2", "smallest third"), ("0.8", "middle"), ("#D55E00", "largest")]
        ):
            chosen = lines[rank * 3 // len(lines) == part]
            axis.plot(30 * clock + table["day"][0], chosen.T, color=colour, lw=0.7, alpha=0.7)
            axis.plot([], [], color=colour, label=label)
        axis.set(xlabel="day of 1988", ylabel="log size" if axis is axes[0] else "")
        axis.text(0.03, 0.97, name, transform=axis.transAxes, va="top")
    axes[0].set_ylim(None, 7.7)
    add_legend(axes[0])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
