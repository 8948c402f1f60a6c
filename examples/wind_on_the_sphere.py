"""Real winds from a few hundred stations: the field, how sure it is, its error, and its eyes.

The mean January wind at 12 km height is known at 2000 places. From 400 of them the field is inferred; the kernel is chosen by
evidence. Printed: evidence of every kernel, error and coverage at the held-out places, zeros of the field with their
indices, which sum to 2 on every sphere.

Run it from anywhere: ``python examples/wind_on_the_sphere.py [--out DIR]``. It writes two figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import stochdyn as sd
from stochdyn.vectorfields import RVGP, PointCloud, find_singularities, plot_globe


def main() -> None:
    """Fit, score, find the zeros and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    parser.add_argument("--stations", type=int, default=400)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--month", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    points, wind = sd.datasets.wind_on_sphere(arguments.points, arguments.month)
    cloud = PointCloud(points, dim=2)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    seen, held = order[: arguments.stations], order[arguments.stations :]
    gp = RVGP(cloud, kernel="auto").fit(seen, wind[seen], progress=True)
    print(f"{'kernel':35s} log evidence")
    for choice in gp.candidates:
        print(f"{choice.name:35s} {choice.log_evidence:10.1f}   ({choice.seconds:.1f} s)")
    mean, cov = gp.predict(held)
    error = (mean - wind[held]).norm() / wind[held].norm()
    gap = torch.einsum("qda,qd->qa", gp.frames(held), wind[held] - mean).abs()
    spread = (cov.diagonal(dim1=1, dim2=2) + gp.noise_variance).sqrt()
    print(f"{gp.chosen}: relative error at {len(held)} held-out places {error:.3f}")
    print(f"95 % intervals hold {(gap < 1.96 * spread).double().mean():.1%} of the components")
    zeros = find_singularities(gp, num_draws=100, generator=torch.Generator().manual_seed(0))
    places, index = zeros.positions()
    sure = zeros.probability[zeros.mean_index != 0]
    print(f"{len(index)} zeros of the mean field; their indices sum to {int(index.sum())}")
    latitude = torch.rad2deg(torch.asin(places[:, 2] / places.norm(dim=1)))
    longitude = torch.rad2deg(torch.atan2(places[:, 1], places[:, 0]))
    for row in sure.argsort(descending=True)[:6].tolist():
        kind = "vortex, source or sink" if index[row] > 0 else "saddle"
        print(
            f"  {latitude[row]:6.1f}, {longitude[row]:6.1f}: {kind}, in the same triangle in {sure[row]:.0%} of the draws"
        )
    everywhere, band = gp.predict(slice(None))
    deviation = band.diagonal(dim1=1, dim2=2).sum(-1).sqrt()
    figure, axes = plt.subplots(2, 1, figsize=(9, 9), constrained_layout=True)
    plot_globe(points, everywhere, every=2, scale=1500, label="speed (m/s)", zeros=zeros, ax=axes[0])
    axes[0].set_title(
        f"posterior mean from {arguments.stations} stations; zeros and those of draws: red +1, blue -1"
    )
    plot_globe(
        points,
        everywhere - wind,
        every=2,
        scale=300,
        values=deviation,
        label="posterior deviation (m/s)",
        ax=axes[1],
    )
    stations = points[seen]
    axes[1].scatter(
        torch.rad2deg(torch.atan2(stations[:, 1], stations[:, 0])),
        torch.rad2deg(torch.asin(stations[:, 2])),
        c="white",
        s=3,
    )
    axes[1].set_title("posterior deviation and true error (arrows); stations in white")
    path = arguments.out / "wind_on_the_sphere.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
