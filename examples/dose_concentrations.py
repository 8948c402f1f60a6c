"""Concentrations of a drug after two doses: rates of absorption and elimination, and what skipping the second dose would have done.

    python examples/dose_concentrations.py

A drug is swallowed twice, absorbed from the gut and eliminated from the blood, where the concentration also wanders on its own. Ten
samples of blood, one of them lost, give the rates. The same draws then say what would have happened without the second dose. It prints
both and draws them to ``outputs/dose_concentrations.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.core import Doses, Interpolation, Intervention

TIMES = torch.tensor([0.5, 1.0, 2.0, 4.0, 7.0, 9.0, 12.5, 13.0, 15.0, 20.0], dtype=torch.float64)
DOSES = Doses(torch.tensor([0.0, 12.0], dtype=torch.float64), 10.0)
TS = DOSES.grid(torch.linspace(0, 24, 97, dtype=torch.float64))
SEEN = torch.searchsorted(TS, TIMES)


def compartments(rates: Tensor, dose: Interpolation) -> sd.SDE:
    """Return the equation of gut and blood, with ``rates (..., 2)`` of absorption and elimination."""

    def drift(t: Tensor, x: Tensor) -> Tensor:
        gut, blood = x.unbind(-1)
        absorbed = rates[..., 0] * gut
        return torch.stack([dose(t)[..., 0] - absorbed, absorbed - rates[..., 1] * blood], -1)

    return sd.SDE(drift, torch.tensor([[0.0], [0.2]], dtype=torch.float64))


def model(y: Tensor | None = None) -> Tensor:
    """Rates are uncertain by a factor of two; samples of blood have errors of 0.3."""
    centre = torch.tensor([1.0, 0.2], dtype=torch.float64).log()
    rates = pyro.sample("rates", dist.LogNormal(centre, 0.7).to_event(1))
    sde = compartments(rates, DOSES.rate(TS))
    x = sd.infer.sample_path("x", sde, torch.zeros(2, dtype=torch.float64), TS)
    site = dist.Normal(x[..., SEEN, 1], torch.tensor(0.3, dtype=torch.float64)).to_event(1)
    if y is None:
        return pyro.sample("y", site)
    return sd.infer.observe("y", site, y)


def main() -> None:
    """Simulate, fit, ask what would have been, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/dose_concentrations.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    pyro.set_rng_seed(1)
    truth = torch.tensor([0.8, 0.15], dtype=torch.float64)
    y = pyro.condition(model, {"rates": truth})().clone()
    y[5] = torch.nan
    post = sd.infer.fit_posterior(model, y, method="laplace", num_draws=arguments.draws)
    rates = post.idata.posterior["rates"]
    for k, name in enumerate(("absorption", "elimination")):
        low, middle, high = rates[..., k].quantile([0.05, 0.5, 0.95]).values
        print(f"{name:12s} {middle:.2f} ({low:.2f} to {high:.2f}), truly {float(truth[k]):.2f}")

    taken = post.predict(TS, num_draws=arguments.draws)
    # From twelve hours on nothing enters the gut; rates and noise of every draw stay what they were.
    dose = DOSES.rate(TS)
    skipped = post.predict(
        TS,
        num_draws=arguments.draws,
        do=Intervention(12.0, drift=lambda t, x, own: own - dose(t) * torch.tensor([1.0, 0.0])),
    )
    at = int(torch.searchsorted(TS, torch.tensor(16.0, dtype=torch.float64)))
    print(
        f"at 16 h: {float(taken.mean[at, 1]):.1f} as it was, {float(skipped.mean[at, 1]):.1f} without the second dose"
    )
    draw(y, taken, skipped, arguments.out)
    print(f"wrote {arguments.out}")


def draw(y: Tensor, taken: sd.infer.PathDraws, skipped: sd.infer.PathDraws, path: Path) -> None:
    """Draw the concentration as it was, and as it would have been."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.4), constrained_layout=True)
    for draws, colour, label in ((taken, "#0072B2", "two doses"), (skipped, "#D55E00", "one dose")):
        low, middle, high = draws.quantile(torch.tensor([0.05, 0.5, 0.95]))[..., 1]
        axis.fill_between(TS, low, high, color=colour, alpha=0.2, lw=0)
        axis.plot(TS, middle, color=colour, label=label)
    axis.plot(TIMES, y, "o", color="black", label="samples")
    axis.set(xlabel="hours", ylabel="concentration", xlim=(0, 24))
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
