"""One score, two laws: the gap between ODE and SDE against the weight of the Fokker-Planck residual.

1. A mixture on the line is noised by an Ornstein-Uhlenbeck process, and potentials are trained at several weights.
2. For each the law of the probability-flow ODE and that of the reverse SDE are compared with each other and with the
   data, and the residual's own diagnostics are printed: its size, the evidence bound and the energy of the mismatch.

Run it from anywhere: ``python examples/ode_sde_gap.py [--out DIR] [--steps 3000]``. It writes a figure.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.interpolants import (
    OU,
    NoisedMixture,
    PotentialNetwork,
    ScoreMatching,
    energy_identity,
    evidence_bound,
    plot_laws,
    plot_residual_profile,
)

WEIGHTS = (0.0, 0.1, 1.0, 10.0)


def truth() -> NoisedMixture:
    """Three Gaussians under an Ornstein-Uhlenbeck process."""
    means, spread = torch.tensor([[-2.0], [0.0], [1.5]]), torch.tensor([0.3, 0.2, 0.4])
    return NoisedMixture(OU(horizon=3.0, start=0.01), torch.tensor([0.4, 0.2, 0.4]), means, spread.square())


def train(weight: float, data: Tensor, steps: int) -> ScoreMatching:
    """Fit a potential at one weight of the residual."""
    process = truth().process
    torch.manual_seed(0)
    phi = PotentialNetwork.from_data(process, data, width=48)
    diff = ScoreMatching(process, potential=phi, fp_weight=weight)

    def cosine(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    sd.fit(diff, data, steps=steps, batch_size=512, lr=3e-3, scheduler=cosine)
    return diff


def judge(diff: ScoreMatching, data: Tensor, n: int) -> dict[str, float]:
    """Distances between the laws, and what the residual says."""
    rev = diff.generator()
    g = torch.Generator().manual_seed(1)
    ode, sde = (rev.sample(n, method, 100, generator=g) for method in ("ode", "sde"))
    with torch.no_grad():
        bound = evidence_bound(rev.potential, data[:2000], rev.prior, num_draws=64, generator=g)
    energy = energy_identity(
        rev.potential, rev.prior, num_samples=500, num_steps=60, num_particles=32, generator=g
    )
    return {
        "gap": sd.diagnostics.emd(ode, sde),
        "ODE to data": sd.diagnostics.emd(ode, data),
        "SDE to data": sd.diagnostics.emd(sde, data),
        "evidence bound": bound.value.mean().item(),
        "energy": energy.mismatch.mean.item(),
        "energy error": energy.mismatch.stderr.item(),
    }


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--points", type=int, default=100_000)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = truth().sample(0.0, 400_000)
    fits, rows = [], []
    for weight in WEIGHTS:
        begin = time.process_time()
        fits.append(train(weight, data, options.steps))
        rows.append(judge(fits[-1], data, options.points))
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in rows[-1].items())
        print(f"weight {weight:g}: {numbers} ({time.process_time() - begin:.0f} s of processor time)")
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for ax, k in ((axes[0], 0), (axes[1], 2)):
        plot_laws(
            fits[k].generator(), data, num_samples=options.points, bins=120, bound=3.5, axes=(ax, ax, ax)
        )
        ax.set_title(f"weight {WEIGHTS[k]:g}")
    for k, diff in enumerate(fits):
        plot_residual_profile(diff, data[:4000], label=f"weight {WEIGHTS[k]:g}", colour=f"C{k}", ax=axes[2])
    places = range(len(WEIGHTS))
    for name in ("gap", "ODE to data", "SDE to data"):
        axes[3].semilogy(places, [row[name] for row in rows], "o-", label=name)
    axes[3].set_xticks(places, [f"{w:g}" for w in WEIGHTS])
    axes[3].set(xlabel="weight of the residual", ylabel=r"$W_2$")
    axes[3].legend()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "ode_sde_gap.png"
    figure.savefig(path, dpi=120)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
