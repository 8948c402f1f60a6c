"""From a panel of patients to survival curves, and from a noisy current to the paths of a channel.

1. Heart transplants: exact maximum and posterior of seven rates between stages of disease, survival with intervals, and the
   states with their rates.
2. A channel that opens and shuts behind noise: the posterior of its state over time, with paths drawn from it.

Run it from anywhere: ``python examples/heart_transplants.py [--out DIR]``. It takes seconds and writes a figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

import stochdyn as sd

LINKS = ((0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (2, 1), (2, 3))


def transplants() -> sd.jumps.RatePosterior:
    """Fit the heart-transplant panel."""
    panel = sd.jumps.PanelData(
        sd.datasets.heart_transplants()._asdict(), "subject", "years", "state", exact_entry=[4]
    )
    mask = np.zeros((4, 4), dtype=bool)
    for i, j in LINKS:
        mask[i, j] = True
    return sd.jumps.fit_rates(panel, mask, prior=(-1.0, 1.5))


def main() -> None:
    """Fit, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    options = parser.parse_args()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fit = transplants()
    print(fit.report())
    years = torch.linspace(0, 15, 61, dtype=torch.float64)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    names = ["no disease", "mild", "severe"]
    alive = torch.stack([1 - sd.jumps.transition(q, years)[:, :3, 3] for q in fit.rate_draws[:200]])
    low, middle, high = alive.quantile(alive.new_tensor([0.025, 0.5, 0.975]), 0)
    for k, name in enumerate(names):
        axes[0].fill_between(years, low[:, k], high[:, k], alpha=0.25, color=f"C{k}", linewidth=0)
        axes[0].plot(years, middle[:, k], color=f"C{k}", label=name)
    axes[0].set_xlabel("years")
    axes[0].set_ylabel("survival")
    axes[0].legend()
    sd.jumps.plot_states(sd.jumps.RateMatrix(fit.rates), [*names, "death"], axes[1])
    channel = sd.jumps.JumpMeasure([0.5, 0.5], [[0.0, 0.7], [1.9, 0.0]])
    times = torch.arange(1, 60, dtype=torch.float64) * 0.2
    path = channel.sample_record(12.0, generator=4)
    source = torch.Generator().manual_seed(0)
    current = path.at(times) + 0.4 * torch.randn(59, dtype=torch.float64, generator=source)
    posterior = channel.conditioned(times, current, sd.jumps.GaussianLevels([0.0, 1.0], 0.4))
    sd.jumps.plot_state_posterior(posterior, torch.linspace(0, 12, 241), 3, ["shut", "open"], axes[2])
    axes[2].plot(times, current, "k.", markersize=3)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "heart_transplants.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
