"""Theophylline in the blood of twelve people: absorption, elimination and volume of each person and of the population.

    python examples/theophylline.py

The drug passes from the gut into one compartment of blood, whose concentration also wanders on its own; the equation is linear, so paths
are integrated out exactly. It prints the population with intervals and draws every person's concentrations to
``outputs/theophylline.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd

mpl.use("Agg")
import matplotlib.pyplot as plt

F64 = torch.float64
BLOOD = torch.tensor([[0.0, 1.0]], dtype=F64)


def blood(rates: Tensor, wander: Tensor, dose: Tensor) -> sd.LinearGaussianMeasure:
    """Return the law of gut and blood, in mg per litre; ``rates (..., 12, 3)`` of absorption, elimination, and volume per weight."""
    absorption, elimination, volume = rates.unbind(-1)
    zero = torch.zeros_like(absorption)
    rows = [[-absorption, zero], [absorption, -elimination]]
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    noise = torch.stack([zero, wander.expand_as(zero)], -1)[..., None]
    start = torch.stack([dose / volume, zero], -1)
    return sd.LinearGaussianMeasure(matrix, torch.zeros_like(start), noise, start, initial_time=-0.01)


def model(panel: sd.Panel, dose: Tensor) -> None:
    """Rates and volumes differ between people by a factor, whose spread is learnt."""
    centre = torch.tensor([1.5, 0.08, 0.5], dtype=F64).log()
    typical = pyro.sample("typical", dist.LogNormal(centre, 0.5).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(torch.full((3,), -1.2, dtype=F64), 0.7).to_event(1))
    wander = pyro.sample("wander", dist.LogNormal(torch.tensor(-1.0, dtype=F64), 1.0))
    error = pyro.sample("error", dist.LogNormal(torch.tensor(-1.0, dtype=F64), 0.7))
    with pyro.plate("person", len(panel)):
        own = pyro.sample("own", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
        rates = pyro.deterministic("rates", typical * (spread * own).exp(), event_dim=1)
        law = blood(rates, wander, dose)
        scale = error[..., None, None]
        pyro.sample("y", sd.infer.LinearObservations(law, panel.times, scale, BLOOD), obs=panel.values)


def main() -> None:
    """Fit, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--method", default="guide", choices=("guide", "laplace", "nuts"))
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/theophylline.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    panel = sd.Panel(sd.datasets.theophylline(), "subject", "time", "concentration", "dose", dtype=F64)
    dose = panel.covariates[:, 0, 0]
    post = sd.infer.fit_posterior(model, panel, dose, method=arguments.method, num_draws=arguments.draws)
    print(post)
    draws = {
        name: torch.tensor(post.idata.posterior[name].values).flatten(0, 1)
        for name in ("typical", "spread", "wander", "error", "rates")
    }
    lines = {"absorption per hour": 0, "elimination per hour": 1, "litres per kg": 2}
    lines = {name: draws["typical"][:, k] for name, k in lines.items()}
    lines |= {
        f"spread of {name}": draws["spread"][:, k]
        for k, name in enumerate(("absorption", "elimination", "volume"))
    }
    for name, values in (lines | {"wandering": draws["wander"], "error": draws["error"]}).items():
        print(f"{name:22s} {values.mean():.3f} ({values.quantile(0.05):.3f} to {values.quantile(0.95):.3f})")

    law = blood(draws["rates"], draws["wander"][:, None], dose)
    given = law.conditioned(panel.times, panel.values, draws["error"][:, None, None, None], BLOOD)
    hours = torch.linspace(0, 25, 101, dtype=F64)
    paths = given.sample(hours, generator=0).x[..., 1]
    figure, axes = plt.subplots(3, 4, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
    for k, axis in enumerate(axes.flat):
        seen = panel.times[k], panel.values[k, :, 0]
        sd.diagnostics.plot_paths(
            hours, paths[:, k], observations=seen, colour="#0072B2", label="blood", ax=axis
        )
        axis.get_legend().remove()
        half = (0.693147 / draws["rates"][:, k, 1]).quantile(torch.tensor([0.05, 0.95], dtype=F64))
        axis.text(24.5, 12.4, f"half-life {half[0]:.1f} to {half[1]:.1f} h", ha="right", va="top", fontsize=8)
        axis.set(xlabel="", ylabel="", ylim=(0, 13))
    figure.supxlabel("hours")
    figure.supylabel("theophylline, mg per litre")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
