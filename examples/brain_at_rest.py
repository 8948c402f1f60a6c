"""A brain at rest: does its activity run differently forwards and backwards in time?

    python examples/brain_at_rest.py

28 regions were scanned for eight minutes. Their strongest common modes turn in the plane of any two of them, or they don't; if they do, time
has a direction and entropy is produced. The rate is bounded from the trajectory alone, by currents whose coefficients come from other parts
of the scan, and held against linear processes with the same memory that have no direction. It prints rates with errors and the shares of
those processes that reach as much, and draws the turning to ``outputs/brain_at_rest.png``. Blood that answers later in some regions than in
others would give time a direction too.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib as mpl
import torch
from scipy.linalg import logm
from torch import Tensor

import stochdyn as sd
from stochdyn.diagnostics.figures import add_legend

mpl.use("Agg")
import matplotlib.pyplot as plt

F64 = torch.float64


def reversible(x: Tensor, dt: float) -> sd.LinearGaussianMeasure:
    """Return the linear law without a direction of time that has the variances of ``x (T, d)`` and the even part of its memory."""
    lagged = x[1:].mT @ x[:-1] / (len(x) - 1)
    even = 0.5 * (lagged + lagged.mT)  # the components of x are uncorrelated, of variance one
    values, vectors = torch.linalg.eigh(even)
    even = vectors @ values.clamp(0.05, 0.99).diag() @ vectors.mT
    drift = torch.as_tensor(logm(even.numpy()).real / dt)
    zero, eye = torch.zeros(x.shape[1], dtype=F64), torch.eye(x.shape[1], dtype=F64)
    noise = torch.linalg.cholesky(-2 * drift)
    return sd.LinearGaussianMeasure(drift, zero, noise, zero, eye)


def rate(x: Tensor, dt: float) -> sd.nonequilibrium.ShortTimeEntropy:
    """Return the bound on the entropy production at one scan's distance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many currents beside few data: this is what the null law is for
        return sd.nonequilibrium.short_time_entropy(x, dt, lags=(1,))


def main() -> None:
    """Reduce, estimate, compare and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=500, help="trajectories of the law without a direction")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/brain_at_rest.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    table = sd.datasets.brain_at_rest()
    seconds = torch.tensor(table.pop("seconds"), dtype=F64)
    dt = float(seconds[1] - seconds[0])
    z = torch.tensor(list(table.values()), dtype=F64).T
    z = (z - z.mean(0)) / z.std(0)
    modes, strengths, _ = torch.linalg.svd(z, full_matrices=False)
    share = strengths.square().cumsum(0) / strengths.square().sum()
    nulls = {}
    for count in (2, 3, 5, 8):
        x = modes[:, :count] * len(z) ** 0.5
        found = rate(x, dt)
        drawn = reversible(x, dt).sample(seconds, arguments.draws, generator=0).x
        null = torch.tensor([rate(y, dt).rate for y in drawn])
        nulls[count] = (found, null)
        p = (1 + int((null >= found.rate).sum())) / (1 + len(null))
        print(
            f"{count} modes ({share[count - 1]:.0%} of the variance): entropy production {found.rate:.3f} +- {found.stderr:.3f} per "
            f"second, without cross-fitting {found.in_sample:.3f}; p = {p:.3f}"
        )

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    x = modes[:, :2] * len(z) ** 0.5
    left.plot(x[:, 0], x[:, 1], color="0.75", lw=0.8)
    colours = left.scatter(x[:, 0], x[:, 1], c=seconds / 60, s=8, cmap="cividis", zorder=2)
    figure.colorbar(colours, ax=left, label="minutes")
    left.set(xlabel="first mode", ylabel="second mode", aspect="equal")
    right.boxplot(
        [null for _, null in nulls.values()], whis=(5, 95), showfliers=False, medianprops={"color": "0.4"}
    )
    for k, (found, _) in enumerate(nulls.values(), 1):
        right.errorbar(
            k,
            found.rate,
            2 * found.stderr,
            color="#D55E00",
            marker="o",
            capsize=3,
            label="brain, two errors" if k == 1 else None,
        )
    right.plot([], [], color="0.4", label="without a direction, 90 %")
    right.set_xticks(range(1, len(nulls) + 1), [str(count) for count in nulls])
    right.set(xlabel="number of modes", ylabel="entropy production per second")
    add_legend(right)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
