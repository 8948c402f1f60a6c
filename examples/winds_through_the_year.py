"""Winds at 12 km through the year: the field of every month from 300 stations, and its vortices and saddles followed from month to month.

    python examples/winds_through_the_year.py

All months share one kernel, chosen by evidence, and one factorisation. Zeros of the field move, meet in pairs and vanish; they are followed
through the year in the true field, in the estimate, and in draws of the posterior. It prints errors, coverage and numbers of zeros, and
draws the tracks that last to ``outputs/winds_through_the_year.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.diagnostics.figures import add_legend
from stochdyn.vectorfields import RVGP, PointCloud, track_singularities

mpl.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Fit, score, follow and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--stations", type=int, default=300)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/winds_through_the_year.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    months = [sd.datasets.wind_on_sphere(arguments.points, month) for month in range(1, 13)]
    points, wind = months[0][0], torch.stack([field for _, field in months])
    cloud = PointCloud(points, dim=2)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    seen, held = order[: arguments.stations], order[arguments.stations :]
    gp = RVGP(cloud, kernel="auto").fit(seen, wind[:, seen], progress=False)
    mean, cov = gp.predict(held)
    gap = torch.einsum("qda,mqd->mqa", gp.frames(held), wind[:, held] - mean).abs()
    spread = (cov.diagonal(dim1=-2, dim2=-1) + gp.noise_variance).sqrt()
    error = (mean - wind[:, held]).norm() / wind[:, held].norm()
    print(f"{gp.chosen}: relative error at {len(held)} places without a station {error:.3f}")
    print(f"95 % intervals hold {(gap < 1.96 * spread).double().mean():.1%} of the components")

    def follow(fields: Tensor) -> sd.vectorfields.Tracks:
        """Follow the zeros from January to the next one."""
        return track_singularities(
            cloud, torch.cat([fields, fields[:1]]), torch.arange(1.0, 14.0, dtype=torch.float64)
        )

    true, found = follow(wind), follow(gp.predict_mean(slice(None)))
    drawn = [follow(fields) for fields in gp.sample(arguments.draws, generator=0)]
    for name, tracks in {"truth": [true], "estimate": [found], "draws": drawn}.items():
        vortices = torch.stack([track.counts()[0][:12].double() for track in tracks]).mean(0)
        lasting = torch.tensor([len(track.lasting(6.0)) for track in tracks], dtype=torch.float64)
        by_month = " ".join(f"{count:4.1f}" for count in vortices.tolist())
        print(f"{name:8s} zeros of index 1 by month {by_month}; {lasting.mean():.1f} tracks last half a year")

    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    shades = plt.get_cmap("cividis")
    for tracks, style in ((true, {"ls": "-", "lw": 3.5, "alpha": 0.35}), (found, {"ls": "-", "lw": 1.2})):
        for track in tracks.lasting(3.0):
            longitude = torch.rad2deg(torch.atan2(track.places[:, 1], track.places[:, 0]))
            latitude = torch.rad2deg(torch.asin(track.places[:, 2] / track.places.norm(dim=1)))
            around = (longitude[1:] - longitude[:-1]).abs() > 180
            longitude[1:][around] = torch.nan
            axis.plot(longitude, latitude, color="#0072B2" if track.index > 0 else "#D55E00", **style)
            if tracks is found:
                axis.scatter(longitude, latitude, c=track.ts, cmap=shades, vmin=1, vmax=13, s=14, zorder=3)
    for label, style in {
        "vortex, source or sink": {"color": "#0072B2"},
        "saddle": {"color": "#D55E00"},
        "true field": {"color": "0.3", "lw": 3.5, "alpha": 0.35},
        "from stations": {"color": "0.3", "lw": 1.2},
    }.items():
        axis.plot([], [], label=label, **style)
    bar = figure.colorbar(plt.cm.ScalarMappable(plt.Normalize(1, 13), shades), ax=axis, ticks=range(1, 14, 2))
    bar.set_label("month")
    axis.set(xlabel="longitude", ylabel="latitude", xlim=(-180, 180), ylim=(-90, 90))
    add_legend(axis)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
