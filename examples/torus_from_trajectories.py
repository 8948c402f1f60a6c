"""A flow on a torus, from fifty noisy trajectories: the drift, the diffusion, and what geometry is worth.

A particle drifts around both circles of a torus while noise shakes it. Fifty trajectories are observed; neither the torus nor the field
is told. A cloud is built out of the visited places, and the posterior of the drift is exact, since the Girsanov likelihood is
quadratic in it. A Gaussian process of flat space, whose correlations depend on Euclidean distances, is fitted to the same numbers: its
evidence and error beside those of the connection kernel show what the manifold adds.

Run it from anywhere: ``python examples/torus_from_trajectories.py [--out DIR]``. It writes a figure.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.vectorfields import RVGP, cloud_of_paths, plot_field, plot_trajectories

MAJOR, MINOR, NOISE = 2.0, 0.7, 0.4


def torus_field(x: Tensor) -> Tensor:
    """Drift around both circles, faster at the top."""
    rho = x[..., :2].norm(dim=-1)
    around = torch.stack([-x[..., 1] / rho, x[..., 0] / rho, torch.zeros_like(rho)], -1)
    through = (
        torch.stack([-x[..., 2] * x[..., 0] / rho, -x[..., 2] * x[..., 1] / rho, rho - MAJOR], -1) / MINOR
    )
    return around * (1 + x[..., 2:]) + 0.7 * through


def to_torus(x: Tensor) -> Tensor:
    """The nearest point of the torus."""
    rho = x[..., :2].norm(dim=-1, keepdim=True)
    ring = torch.cat([x[..., :2] / rho * MAJOR, torch.zeros_like(rho)], -1)
    return ring + MINOR * torch.nn.functional.normalize(x - ring, dim=-1)


def simulate(paths: int, num_steps: int, dt: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Euler steps with tangent noise, each followed by the projection to the torus: ``ts (T,)``, ``x (paths, T, 3)``."""
    x = to_torus(
        torch.randn(paths, 3, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 2.0, 0.7])
    )
    states = [x]
    for _ in range(num_steps):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) * NOISE * math.sqrt(dt)
        rho = x[..., :2].norm(dim=-1, keepdim=True)
        outward = torch.nn.functional.normalize(
            x - torch.cat([x[..., :2] / rho * MAJOR, 0 * rho], -1), dim=-1
        )
        noise = noise - (noise * outward).sum(-1, keepdim=True) * outward
        x = to_torus(x + dt * torus_field(x) + noise)
        states.append(x)
    return dt * torch.arange(num_steps + 1, dtype=torch.float64), torch.stack(states, 1)


def main() -> None:
    """Simulate, infer, compare and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    parser.add_argument("--paths", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dt", type=float, default=0.02)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    ts, x = simulate(arguments.paths, arguments.steps, arguments.dt, generator)
    cloud = cloud_of_paths((ts, x), spacing=0.03, dim=2)
    print(cloud)
    gp = RVGP(cloud).fit_paths((ts, x))
    truth = torus_field(to_torus(cloud.points))
    mean, cov = gp.predict(slice(None))
    error = (mean - truth).norm() / truth.norm()
    spread = cov.diagonal(dim1=1, dim2=2)
    gap = torch.einsum("qda,qd->qa", gp.frames(slice(None)), truth - mean)
    print(f"drift from {arguments.paths} trajectories of {arguments.steps} steps: relative error {error:.3f}")
    print(f"95 % intervals hold {(gap.abs() < 1.96 * spread.sqrt()).double().mean():.1%} of the components")
    print(f"diffusion {gp.diffusion:.4f} (true {NOISE})")

    # Evidence of the same numbers, thinned so that dense kernels can follow.
    stride = max(1, arguments.steps // 10)
    thin = (ts[::stride], x[:, ::stride])
    print(f"\nlog evidence of one step in {stride}, in tangent components, and error of the drift:")
    rivals = {"connection": "connection", "projected scalar": "projected", "flat space, Matérn": "ambient"}
    for name, kernel in rivals.items():
        other = RVGP(cloud, kernel).fit_paths(thin)
        gap = (other.predict_mean(slice(None)) - truth).norm() / truth.norm()
        print(f"  {name:20s} {other.log_marginal_likelihood():10.1f}   {gap:.3f}")

    sde = gp.as_sde(dt=arguments.dt)
    start = cloud.points[::40]
    new = sd.DiffusionMeasure(start, sde).sample(ts, generator=generator)
    off = (to_torus(new.x) - new.x).norm(dim=-1).mean()
    print(f"\nnew trajectories of the inferred SDE stay {off:.3f} from the torus on average")
    figure = plt.figure(figsize=(12, 6), constrained_layout=True)
    for place, title in (
        (1, "inferred drift and its deviation"),
        (2, "observed (orange) and new trajectories (green)"),
    ):
        axes = figure.add_subplot(1, 2, place, projection="3d")
        axes.set_title(title)
        axes.view_init(50, 30)
        if place == 1:
            plot_field(cloud.points, mean, values=spread.sum(-1).sqrt(), label="posterior deviation", ax=axes)
        else:
            plot_trajectories(x, num_paths=12, ax=axes)
            plot_trajectories(new.x, num_paths=12, colour="C2", ax=axes)
            axes.set_box_aspect((1, 1, 0.4))
    path = arguments.out / "torus_from_trajectories.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
