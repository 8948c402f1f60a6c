"""Sunspots: the period of the cycle with its interval, and forecasts of the years after 1900, which the fit has not seen.

    python examples/sunspot_cycles.py

The square root of the yearly number is a level that wanders slowly, plus an oscillation that noise keeps going. All of it is linear, so
the path is integrated out exactly and the forecast of every later year is Gaussian in closed form. It prints the parameters and the
errors one to ten years ahead, beside those of simpler rules, and draws the last cycles to ``outputs/sunspot_cycles.png``.
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

mpl.use("Agg")
import matplotlib.pyplot as plt

F64 = torch.float64
LEVEL, READ = 6.0, torch.tensor([[1.0, 1.0, 0.0]], dtype=F64)


def law(
    period: Tensor, lifetime: Tensor, amplitude: Tensor, memory: Tensor, wander: Tensor
) -> sd.LinearGaussianMeasure:
    """Return the stationary law of the level and of the two phases of the oscillation; times are years, sizes standard deviations."""
    turn, decay, slow = 2 * math.pi / period, 1 / lifetime, 1 / memory
    zero = torch.zeros_like(turn)
    rows = [[-slow, zero, zero], [zero, -decay, turn], [zero, -turn, -decay]]
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    size = torch.stack([wander, amplitude, amplitude], -1)
    noise = torch.stack([(2 * slow).sqrt(), (2 * decay).sqrt(), (2 * decay).sqrt()], -1) * size
    zeros = torch.zeros_like(size)
    return sd.LinearGaussianMeasure(matrix, zeros, noise.diag_embed(), zeros, size.square().diag_embed())


def model(years: Tensor, roots: Tensor) -> None:
    """Sample the parameters and observe the roots of the numbers, less their level."""

    def positive(name: str, middle: float, spread: float) -> Tensor:
        return pyro.sample(name, dist.LogNormal(torch.tensor(middle, dtype=F64).log(), spread))

    shape = positive("period", 11, 0.3), positive("lifetime", 30, 1.0), positive("amplitude", 3, 0.7)
    slow, error = (positive("memory", 50, 1.0), positive("wander", 1, 0.7)), positive("error", 0.5, 0.7)
    seen = sd.infer.LinearObservations(law(*shape, *slow), years, error[..., None, None], READ)
    pyro.sample("roots", seen, obs=roots)


def main() -> None:
    """Fit, forecast, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--method", default="guide", choices=("guide", "laplace", "nuts"))
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/sunspot_cycles.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    table = sd.datasets.sunspots()
    years = torch.tensor(table["year"], dtype=F64) - table["year"][0]
    roots = torch.tensor(table["number"], dtype=F64).sqrt()[:, None] - LEVEL
    learnt = 200  # 1700 to 1899
    post = sd.infer.fit_posterior(
        model, years[:learnt], roots[:learnt], method=arguments.method, num_draws=arguments.draws
    )
    print(post)
    draws = {
        name: torch.tensor(post.idata.posterior[name].values).flatten()
        for name in ("period", "lifetime", "amplitude", "memory", "wander", "error")
    }
    for name, values in draws.items():
        print(f"{name:9s} {values.mean():6.2f} ({values.quantile(0.05):.2f} to {values.quantile(0.95):.2f})")
    error = draws.pop("error")
    cycles = law(**draws)

    def forecast(known: int, ahead: Tensor) -> Tensor:
        """Return draws of the roots at later years, given the first ``known`` ones."""
        given = cycles.conditioned(years[:known], roots[:known], error[:, None, None], READ)
        mean, spread = given.mean(ahead) @ READ.mT, READ @ given.covariance(ahead) @ READ.mT
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(known), dtype=F64)
        return (mean + (spread[..., 0] + error[:, None, None].square()).sqrt() * noise)[..., 0] + LEVEL

    origins = range(learnt, len(years) - 9, 3)
    ahead = torch.stack([forecast(n, years[n : n + 10]) for n in origins])
    truth = torch.stack([roots[n : n + 10, 0] for n in origins]) + LEVEL
    last = torch.stack([roots[n - 1].expand(10) for n in origins]) + LEVEL
    cycle = torch.stack([roots[n - 11 : n - 1, 0] for n in origins]) + LEVEL
    average = (roots[:learnt].mean() + LEVEL).expand_as(truth)
    print(
        f"root mean squared error of the root of the number, {len(origins)} origins: 1, 3, 5 and 10 years ahead"
    )
    for name, guess in {
        "model": ahead.mean(1),
        "last year": last,
        "11 years ago": cycle,
        "average": average,
    }.items():
        errors = (guess - truth).square().mean(0).sqrt()[[0, 2, 4, 9]]
        print(f"  {name:12s} " + "  ".join(f"{value:.2f}" for value in errors.tolist()))
    low, high = ahead.quantile(torch.tensor([0.05, 0.95], dtype=F64), 1)
    print(f"90 % intervals hold {((truth > low) & (truth < high)).double().mean():.0%}")

    end = len(years) - 12  # the last cycle, 1997 to 2008
    future = torch.linspace(float(years[end]), float(years[-1]) + 10, 89, dtype=F64)
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    axis.plot(1700 + years[end - 60 :], table["number"][end - 60 :], color="0.6", lw=1)
    fan = forecast(end, future).clamp_min(0).square()
    seen = 1700 + years[end - 60 :], torch.tensor(table["number"][end - 60 :])
    sd.diagnostics.plot_paths(
        1700 + future, fan, observations=seen, label="from 1996", colour="#0072B2", ax=axis
    )
    axis.set(xlabel="year", ylabel="sunspots", xlim=(1937, 2018), ylim=(0, None))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
