"""The Rio Negro at Manaus: how long a river remembers, and how far ahead its height can be told.

    python examples/rio_negro.py

90 years of monthly heights, each from its month's mean. Stationary laws with one relaxation time, and with a fast and a slow one, are fitted to
the first 70 years by their exact likelihood. It prints their parameters with intervals, errors and coverage of forecasts of the last 20 years
beside the month's mean and the last height, and the Hurst index with and without a memory of months, which is another way to be slow. The
picture is ``outputs/rio_negro.png``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.diagnostics.figures import add_legend

mpl.use("Agg")
import matplotlib.pyplot as plt

F64 = torch.float64
LEARNT, AHEAD = 840, 12  # months to fit to, months to tell


def positive(name: str, middle: float, spread: float) -> Tensor:
    """Sample a positive parameter about its middle."""
    return pyro.sample(name, dist.LogNormal(torch.tensor(math.log(middle), dtype=F64), spread))


def relaxing(times: Tensor, sizes: Tensor) -> sd.LinearGaussianMeasure:
    """Return the stationary law of parts ``(*batch, K)`` with these relaxation times and standard deviations."""
    zeros = torch.zeros_like(sizes)
    noise = sizes * (2 / times).sqrt()
    variance = sizes.square().diag_embed()
    return sd.LinearGaussianMeasure((-1 / times).diag_embed(), zeros, noise.diag_embed(), zeros, variance)


def model(count: int, months: Tensor, heights: Tensor | None) -> None:
    """Sample relaxation times in months and sizes in metres of one or two parts, and observe their sum."""
    parts = {"fast": 3.0, "slow": 60.0}
    names = list(parts)[:count]
    times = [positive(name, parts[name], 1.0) for name in names]
    sizes = [positive(f"size of {name}", 1.0, 0.7) for name in names]
    law = relaxing(torch.stack(times, -1), torch.stack(sizes, -1))
    error = positive("error", 0.2, 0.7)
    read = torch.ones(1, count, dtype=F64)
    pyro.sample(
        "heights", sd.infer.LinearObservations(law, months, error[..., None, None], read), obs=heights
    )


def main() -> None:
    """Fit, forecast, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("outputs/rio_negro.png"))
    arguments = parser.parse_args()

    table = sd.datasets.rio_negro()
    heights = torch.tensor(table["height"], dtype=F64)[:, None]
    months = torch.arange(len(heights), dtype=F64)
    origins = list(range(LEARNT, len(heights) - AHEAD + 1, 3))
    truth = torch.stack([heights[n : n + AHEAD, 0] for n in origins])
    guesses = {
        "the month's mean": torch.zeros_like(truth),
        "the last height": torch.stack([heights[n - 1].expand(AHEAD) for n in origins]),
    }
    spreads = {}
    for count, title in ((1, "one relaxation"), (2, "fast and slow")):
        post = sd.infer.fit_posterior(
            model, count, months[:LEARNT], heights[:LEARNT], method="laplace", num_draws=arguments.draws
        )
        print(f"{title}: k-hat {post.khat:.2f}; months and metres")
        names = ["fast", "slow", "size of fast", "size of slow", "error"]
        draws = {
            name: torch.tensor(post.idata.posterior[name].values).flatten()
            for name in names
            if name in post.idata.posterior
        }
        for name, values in draws.items():
            low, high = values.quantile(torch.tensor([0.05, 0.95], dtype=F64))
            print(f"  {name:13s} {values.median():6.2f} ({low:.2f} to {high:.2f})")
        times = torch.stack([draws[name] for name in names[:2] if name in draws], -1)
        sizes = torch.stack([draws[name] for name in names[2:4] if name in draws], -1)
        law, read = relaxing(times, sizes), torch.ones(1, count, dtype=F64)
        error = draws["error"][:, None, None]
        means, variances = [], []
        for n in origins:  # ten years say all there is to say of the state now
            known = slice(n - 120, n)
            given = law.conditioned(months[known], heights[known], error, read)
            ahead = months[n : n + AHEAD]
            mean = (given.mean(ahead) @ read.mT)[..., 0]
            within = (read @ given.covariance(ahead) @ read.mT)[..., 0, 0] + error[..., 0].square()
            means.append(mean.mean(0))
            variances.append(within.mean(0) + mean.var(0))
        guesses[title], spreads[title] = torch.stack(means), torch.stack(variances).sqrt()

    print(f"root mean squared error of {len(origins)} forecasts, 1, 3, 6 and 12 months ahead, in metres")
    for name, guess in guesses.items():
        errors = (guess - truth).square().mean(0).sqrt()[[0, 2, 5, 11]]
        print(f"  {name:17s} " + "  ".join(f"{value:.2f}" for value in errors.tolist()))
    for name, spread in spreads.items():
        inside = ((truth - guesses[name]).abs() < 1.645 * spread).double().mean(0)[[0, 2, 5, 11]]
        print(f"  90 % intervals of {name} hold " + ", ".join(f"{value:.0%}" for value in inside.tolist()))

    hurst = {}
    for short, title in ((None, "alone"), ("ar1", "beside memory of months")):
        idata = sd.fractional.infer_hurst(heights[:LEARNT, 0], short_memory=short, predictive=False)
        hurst[title] = torch.tensor(idata.posterior["hurst"].values).flatten()
        print(f"Hurst index {title}: {hurst[title].mean():.2f} ± {hurst[title].std():.2f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[2, 1], layout="constrained")
    years = 1903 + months / 12
    left.plot(years[-300:], heights[-300:, 0], color="0.6", lw=0.8, label="height")
    for k, n in enumerate(origins):
        if (n - LEARNT) % 36 == 0:
            middle, spread = guesses["fast and slow"][k], 1.645 * spreads["fast and slow"][k]
            ahead = years[n : n + AHEAD]
            label = "a year ahead, 90 %" if k == 0 else None
            left.fill_between(
                ahead, middle - spread, middle + spread, color="#0072B2", alpha=0.3, lw=0, label=label
            )
            left.plot(ahead, middle, color="#0072B2", lw=1)
    left.set(xlabel="year", ylabel="above the month's mean, m")
    add_legend(left)
    for (name, guess), colour in zip(guesses.items(), ("0.6", "#E69F00", "#009E73", "#0072B2"), strict=True):
        right.plot(range(1, AHEAD + 1), (guess - truth).square().mean(0).sqrt(), color=colour, label=name)
    right.set(xlabel="months ahead", ylabel="error, m")
    right.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, 1.3), ncols=2)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
