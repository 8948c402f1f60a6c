"""Bridges of fractional Brownian motion by variational inference, held against the exact law.

X starts at 0, dX = -theta X dt + dB^H, and X(2) = 0 is observed with standard deviation 0.1. The Gaussian posterior needs no
simulated path; its standard deviation over time is drawn beside that of the exact process, for a rough, a Brownian and a smooth
index, with the bound beside the exact evidence.

Run it from anywhere: ``python examples/fractional_bridge.py [--theta 0] [--out DIR]``.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.diagnostics import plot_paths
from stochdyn.fractional import (
    AffineDrift,
    GaussianELBO,
    GaussianPosterior,
    MarkovNoise,
    fbm_covariance,
)

END, SCALE, STEPS = 2.0, 0.1, 200


def exact(ts: Tensor, hurst: float, theta: float) -> tuple[Tensor, float]:
    """Return the exact standard deviation of the bridge at ``ts[1:]`` (type II) and the log evidence."""
    t = ts[1:]
    cov = fbm_covariance(t, hurst, kind="II")
    if theta:
        # X = B - theta int e^(-theta (t - s)) B(s) ds, by the trapezoid rule
        lag = t[:, None] - t[None, :]
        weight = torch.where(lag >= 0, torch.exp(-theta * lag.clamp_min(0)), torch.zeros_like(lag)) * (
            t[1] - t[0]
        )
        weight = weight - 0.5 * torch.diag(weight.diagonal())
        move = torch.eye(len(t), dtype=t.dtype) - theta * weight
        cov = move @ cov @ move.T
    total = float(cov[-1, -1]) + SCALE**2
    std = (cov.diagonal() - cov[:, -1] ** 2 / total).sqrt()
    return std, -0.5 * math.log(2 * math.pi * total)


def main() -> None:
    """Fit, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theta", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    options = parser.parse_args()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    warnings.simplefilter("ignore", sd.errors.ApproximationWarning)
    ts = torch.linspace(0, END, STEPS + 1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    print("   H   sd(0.5)  exact   sd(1)   exact   bound   evidence")
    for ax, hurst in zip(axes, (0.2, 0.5, 0.8), strict=True):
        noise = MarkovNoise(hurst, horizon=END, dt=END / STEPS)
        drift = AffineDrift(-options.theta * torch.eye(1, dtype=torch.float64))
        prior = sd.DiffusionMeasure(zero, sd.SDE(drift, 1.0, noise))
        objective = GaussianELBO(
            GaussianPosterior(prior, ts), sd.GaussianObservations(ts, ts[-1:], zero, SCALE)
        )
        objective.posterior.linearise(objective.likelihood)
        with torch.no_grad():
            bound = float(objective(None).terms["elbo"])
            std = objective.posterior.variance.sqrt()[:, 0]
            path, _ = objective.posterior.sample(500, torch.Generator().manual_seed(0))
        true, evidence = exact(ts, hurst, options.theta)
        quarter, half = STEPS // 4, STEPS // 2
        print(
            f"{hurst:5.1f}  {std[quarter]:.4f}  {true[quarter - 1]:.4f}  {std[half]:.4f}  {true[half - 1]:.4f}  {bound:.4f}  {evidence:.4f}"
        )
        plot_paths(ts, path.x[..., 0], levels=(0.95,), num_lines=4, ax=ax)
        for sign in (-1.96, 1.96):
            ax.plot(
                ts[1:],
                sign * true,
                color="black",
                linestyle="--",
                linewidth=1,
                label="exact" if sign > 0 else None,
            )
        ax.set_title(f"H = {hurst}")
        ax.label_outer()
        ax.get_legend().remove()  # one for all, beside the last
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "fractional_bridge.png", dpi=120)
    print(f"wrote {options.out / 'fractional_bridge.png'}")


if __name__ == "__main__":
    main()
