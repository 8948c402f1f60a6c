"""The checkerboard: density of the truth, of the probability flow and of the SDE, from one pair of networks.

    python examples/checkerboard.py [--steps 3000] [--out outputs]

Writes ``checkerboard.png`` and prints the divergence of the data from the flow (by exact density) and from the SDE (by weighted paths).
A few minutes on a laptop; ``--steps 200`` shows that it runs.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.interpolants import Interpolant, InterpolantRegression, WhitenedField, plot_densities

mpl.use("Agg")


def checkerboard(n: int) -> Tensor:
    """Eight squares of side two on [-4, 4] x [-4, 4]."""
    x = 4 * torch.rand(n) - 2
    y = torch.rand(n) - 2 * torch.randint(2, (n,))
    return 2 * torch.stack([x, y + torch.remainder(x.floor(), 2)], -1)


def log_density(x: Tensor) -> Tensor:
    """Log density of the checkerboard."""
    u, v = (0.5 * x).unbind(-1)
    inside = (u.abs() <= 2) & (v.abs() <= 2) & (torch.remainder(u.floor() + v.floor(), 2) == 0)
    return torch.where(inside, -math.log(32.0), -math.inf)


def main() -> None:
    """Train, draw and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--epsilon", type=float, default=0.5)
    parser.add_argument("--draws", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    options = parser.parse_args()
    torch.manual_seed(0)

    data, it = checkerboard(200_000), Interpolant("linear", "brownian")
    fields = {
        name: WhitenedField.from_data(it, name, data, width=128, frequencies=64)
        for name in ("velocity", "noise_prediction")
    }
    objective = InterpolantRegression(it, **fields)
    sd.fit(
        objective, data, steps=options.steps, lr=2e-3, batch_size=512,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, options.steps),
    )  # fmt: skip
    model = objective.generator()

    test = checkerboard(200)
    with torch.no_grad():
        flow = log_density(test) - model.log_prob(test, num_steps=40, method="heun")
    weights = model.sde_log_prob(test, options.epsilon, 100, num_particles=16, method="transition")
    diffusion = log_density(test) - weights.log_prob
    for name, gap in (("flow", flow), (f"SDE, epsilon {options.epsilon:g}", diffusion)):
        print(f"KL(data || {name}) = {float(gap.mean()):.3f} ± {float(gap.std() / len(gap) ** 0.5):.3f} nats")

    laws = {
        "truth": log_density,
        "flow": model.sample(options.draws, num_steps=40),
        f"SDE, ε = {options.epsilon:g}": model.sample(options.draws, epsilon=options.epsilon, num_steps=100),
    }
    axes = plot_densities(laws, (-4.5, 4.5, -4.5, 4.5))
    options.out.mkdir(parents=True, exist_ok=True)
    axes[0].figure.savefig(options.out / "checkerboard.png", dpi=150, bbox_inches="tight")
    print(f"wrote {options.out / 'checkerboard.png'}")


if __name__ == "__main__":
    main()
