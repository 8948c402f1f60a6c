"""Influenza in a boarding school: infection, time before bed, in bed and of recovery, from fourteen days of two counts.

    python examples/school_influenza.py

Of 763 boys an unknown share can be infected. The infectious go to bed, where they pass two stages, and then recover apart. Chance decides
who meets whom, so the numbers follow a chemical Langevin equation, whose paths an extended Kalman filter integrates out. It prints the
times, the reproduction number and how many fell ill beside the 512 of the report, which the fit hasn't seen, and draws both counts to
``outputs/school_influenza.png``.
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
BOYS = 763.0
#: What infection and the four departures change: the susceptible, the infectious, two stages in bed, and those apart.
CHANGE = torch.diag(torch.tensor([-1.0] * 5, dtype=F64)) + torch.diag(torch.ones(4, dtype=F64), 1)
READ = torch.tensor([[0.0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=F64)


def school(
    rates: Tensor, share: Tensor, infectious: Tensor, scale: Tensor, times: Tensor
) -> sd.infer.NonlinearObservations:
    """Return the law of both counts for rates ``(..., 4)`` per day, the share at risk, boys infectious on day 0, and errors."""

    def events(x: Tensor) -> Tensor:
        beta, leave, rise, recover = rates.unbind(-1)
        met = beta * x[..., 0] * x[..., 1] / BOYS
        left = [leave * x[..., 1], 2 * rise * x[..., 2], 2 * rise * x[..., 3], recover * x[..., 4]]
        return torch.stack([met, *left], -1).clamp_min(0.0)

    def noise(t: Tensor, x: Tensor) -> sd.Matrix:
        return sd.Matrix(CHANGE.mT * (events(x) + 1e-9).sqrt().unsqueeze(-2))

    zero = torch.zeros_like(infectious)
    start = torch.stack([BOYS * share - infectious - 3, infectious, zero + 3, zero, zero], -1)
    seen = sd.SDE(lambda t, x: events(x) @ CHANGE, noise)
    return sd.infer.NonlinearObservations(seen, start, times, lambda x: x @ READ.mT, scale[..., None], dt=0.1)


def model(times: Tensor, counts: Tensor) -> None:
    """Sample rates per day, the unknown start and the error of a count, and observe days 1 to 13."""
    centre = torch.tensor([1.5, 1.0, 0.5, 0.5], dtype=F64).log()
    rates = pyro.sample("rates", dist.LogNormal(centre, 0.7).to_event(1))
    share = pyro.sample("share", dist.Beta(torch.tensor(4.0, dtype=F64), 2.0))
    infectious = pyro.sample("infectious", dist.LogNormal(torch.tensor(10.0, dtype=F64).log(), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(5.0, dtype=F64).log(), 1.0))
    pyro.sample("counts", school(rates, share, infectious, scale, times), obs=counts)


def main() -> None:
    """Fit, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--method", default="guide", choices=("guide", "laplace", "nuts"))
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/school_influenza.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    table = sd.datasets.school_influenza()
    times = torch.tensor(table["day"], dtype=F64)[1:]
    counts = torch.tensor([table["in_bed"], table["convalescent"]], dtype=F64).T[1:]
    post = sd.infer.fit_posterior(model, times, counts, method=arguments.method, num_draws=arguments.draws)
    print(post)
    names = ("rates", "share", "infectious", "scale")
    draws = {name: torch.tensor(post.idata.posterior[name].values)[0] for name in names}
    beta, leave, rise, recover = draws["rates"].unbind(-1)
    lines = {
        "reproduction number": draws["share"] * beta / leave,
        "days before bed": 1 / leave,
        "days in bed": 1 / rise,
        "days apart": 1 / recover,
        "at risk": BOYS * draws["share"],
        "infectious on day 0": draws["infectious"],
        "error of a count": draws["scale"],
    }
    days = torch.arange(0.25, 14.1, 0.25, dtype=F64)
    rows = torch.full((len(days), 2), torch.nan, dtype=F64)
    rows[3:52:4] = counts
    states = school(*draws.values(), days).smooth(rows.expand(len(beta), -1, -1))
    spread = states.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    paths = states.mean + spread * torch.randn(
        states.mean.shape, generator=torch.Generator().manual_seed(0), dtype=F64
    )
    lines["fell ill (512 reported)"] = BOYS * draws["share"] - paths[:, -1, 0]
    for name, values in lines.items():
        print(f"{name:23s} {values.mean():6.2f} ({values.quantile(0.05):.2f} to {values.quantile(0.95):.2f})")

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for k, (axis, name, colour) in enumerate(
        zip(axes, ("in_bed", "convalescent"), ("#0072B2", "#D55E00"), strict=True)
    ):
        seen = torch.tensor(table["day"]), torch.tensor(table[name])
        label = name.replace("_", " ")
        sd.diagnostics.plot_paths(
            days, (paths @ READ.mT)[..., k], observations=seen, colour=colour, label=label, ax=axis
        )
        axis.get_legend().remove()
        axis.set(
            title=f"{label}: median, 50 % and 90 %",
            xlabel="days from 22 January 1978",
            ylabel="boys" if k == 0 else "",
            ylim=(0, None),
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
