"""Hares and lynxes of the Hudson Bay: growth, predation and noise from 21 years of furs, and the ten years that follow.

    python examples/hares_and_lynxes.py

Predators and prey in logarithms, with noise; the paths are integrated out by an extended Kalman filter, so the posterior is one of six
parameters. It prints them with intervals and draws both species with a forecast to ``outputs/hares_and_lynxes.png``.
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
START = torch.tensor([30.0, 4.0], dtype=F64).log()


def observed(
    growth: Tensor, death: Tensor, hares: Tensor, lynxes: Tensor, noise: Tensor, times: Tensor
) -> sd.infer.NonlinearObservations:
    """Return the law of the log furs: du = growth (1 - v / lynxes) dt + s dW, dv = -death (1 - u / hares) dt + s dW."""

    def drift(t: Tensor, x: Tensor) -> Tensor:
        u, v = x[..., :1].exp(), x[..., 1:].exp()
        ito = 0.5 * noise[..., None].square()
        prey = growth[..., None] * (1 - v / lynxes[..., None])
        predators = death[..., None] * (u / hares[..., None] - 1)
        return torch.cat([prey, predators], -1) - ito

    start = dist.MultivariateNormal(START, 0.04 * torch.eye(2, dtype=F64))
    equation = sd.SDE(drift, sd.Scalar(noise))
    return sd.infer.NonlinearObservations(equation, start, times, lambda x: x, 0.15, start_time=0.0, dt=0.05)


def model(times: Tensor, furs: Tensor) -> None:
    """Sample the parameters and observe the logarithms of the furs."""
    growth = pyro.sample("growth", dist.LogNormal(torch.tensor(-0.7, dtype=F64), 0.5))
    death = pyro.sample("death", dist.LogNormal(torch.tensor(-0.3, dtype=F64), 0.5))
    hares = pyro.sample("hares", dist.LogNormal(torch.tensor(3.5, dtype=F64), 0.5))
    lynxes = pyro.sample("lynxes", dist.LogNormal(torch.tensor(3.0, dtype=F64), 0.5))
    noise = pyro.sample("noise", dist.LogNormal(torch.tensor(-1.5, dtype=F64), 0.5))
    pyro.sample("furs", observed(growth, death, hares, lynxes, noise, times), obs=furs)


def main() -> None:
    """Fit, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/hares_and_lynxes.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    table = sd.datasets.hudson_bay()
    furs = torch.tensor([table["hare"], table["lynx"]], dtype=F64).T.log()
    times = torch.arange(0.25, 21.25, dtype=F64)  # years since the first January, counted in spring
    post = sd.infer.fit_posterior(model, times, furs, num_draws=arguments.draws, seed=0)
    print(post)
    draws = {
        name: torch.tensor(post.idata.posterior[name].values).flatten()
        for name in ("growth", "death", "hares", "lynxes", "noise")
    }
    for name, values in draws.items():
        print(f"{name:7s} {values.mean():.2f} ({values.quantile(0.05):.2f} to {values.quantile(0.95):.2f})")
    period = 2 * torch.pi / (draws["growth"] * draws["death"]).sqrt()  # of small cycles about the fixed point
    print(f"period  {period.mean():.1f} years ({period.quantile(0.05):.1f} to {period.quantile(0.95):.1f})")

    # Rows of NaN are times without data: between the years, and the ten years after them.
    grid = torch.arange(0.25, 31.25, 0.25, dtype=F64)
    rows = torch.full((len(grid), 2), torch.nan, dtype=F64)
    rows[: 4 * len(furs) : 4] = furs
    states = observed(**draws, times=grid).smooth(rows.expand(len(draws["noise"]), -1, -1))
    normal = torch.randn(states.mean.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    paths = (states.mean + states.covariance.diagonal(dim1=-2, dim2=-1).sqrt() * normal).exp()

    figure, axes = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    years = 1899.75 + grid
    for k, (ax, name, colour) in enumerate(zip(axes, ("hare", "lynx"), ("#0072B2", "#D55E00"), strict=True)):
        seen = (1899.75 + times, torch.tensor(table[name]))
        sd.diagnostics.plot_paths(
            years, paths[..., k], observations=seen, forecast_from=1920.25, colour=colour, label=name, ax=ax
        )
        ax.set(xlabel="", ylabel=f"{name} furs, thousands", ylim=(0, 160 if k == 0 else 120))
    axes[-1].set_xlabel("year")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
