"""Tomorrow's returns of two stock markets: their joint density given today, by a conditional interpolant.

    python examples/next_day_returns.py

The returns of Frankfurt and London are told from the volatility of the last weeks and from yesterday's returns. A flow learns their
conditional law on the first four fifths of the days and is scored on the rest, which it hasn't seen, beside Gaussian laws: one for all days,
and one whose covariance follows the last weeks. It prints log scores with their errors and draws two densities to
``outputs/next_day_returns.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.interpolants import Interpolant, InterpolantRegression, WhitenedField

mpl.use("Agg")
import matplotlib.pyplot as plt

NAMES, SPLIT = ("DAX", "FTSE"), 1500


def smoothed(returns: Tensor, decay: float = 0.94) -> Tensor:
    """Return the covariance ``(n, 2, 2)`` of the days before each day, with weights that fall with age."""
    now = returns[:100].mT @ returns[:100] / 100
    found = []
    for row in returns:
        found.append(now)
        now = decay * now + (1 - decay) * torch.outer(row, row)
    return torch.stack(found)


def context(returns: Tensor, covariance: Tensor) -> Tensor:
    """Return what is known the evening before: log volatilities and correlation of the last weeks, and yesterday's returns."""
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = covariance[:, :1, 1] / deviation.prod(-1, keepdim=True)
    return torch.cat([deviation.log(), correlation, (returns / deviation).roll(1, 0)], -1)


def main() -> None:
    """Train, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/next_day_returns.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    table = sd.datasets.stock_indices()
    returns = 100 * torch.tensor([table[name] for name in NAMES], dtype=torch.float64).log().diff().T
    covariance = smoothed(returns)
    known = context(returns, covariance)
    known = ((known - known[:SPLIT].mean(0)) / known[:SPLIT].std(0)).float()
    # The flow learns what is left in units of the last weeks, and the Jacobian brings it back.
    root = torch.linalg.cholesky(covariance)
    units = torch.linalg.solve_triangular(root, returns[..., None], upper=False)[..., 0].float()
    learn = slice(100, SPLIT)
    torch.manual_seed(0)
    path = Interpolant("one-sided-linear")
    field = WhitenedField.from_data(path, "velocity", units[learn], width=32, condition_dim=known.shape[1])
    batch = {"x1": units[learn], "condition": known[learn]}
    objective = InterpolantRegression(path, velocity=field)
    sd.fit(objective, batch, steps=arguments.steps, batch_size=256, lr=1e-3, ema=0.99, seed=0)
    flow = objective.generator()

    jacobian = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    held = slice(SPLIT, None)
    with torch.no_grad():
        scores = {
            "flow": flow.log_prob(units[held], num_steps=30, condition=known[held]).double() - jacobian[held]
        }
    normal = torch.distributions.MultivariateNormal
    scores["Gaussian of the last weeks"] = normal(returns.new_zeros(2), covariance[held]).log_prob(
        returns[held]
    )
    overall = normal(returns[:SPLIT].mean(0), returns[:SPLIT].mT.cov())
    scores["one Gaussian"] = overall.log_prob(returns[held])
    print(
        f"mean log density of {len(scores['flow'])} days that no fit has seen, and what the flow gains a day"
    )
    for name, score in scores.items():
        gain = scores["flow"] - score
        error = gain.std() / len(gain) ** 0.5
        print(f"  {name:27s} {score.mean():.3f}   {gain.mean():+.3f} +- {error:.3f}")

    volatility = covariance[held, 0, 0]
    days = {"a calm day": int(volatility.argmin()), "a wild day": int(volatility.argmax())}
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 4), layout="constrained")
    grid = torch.linspace(-1, 1, 61, dtype=torch.float64)
    for axis, (name, k) in zip(axes, days.items(), strict=True):
        day = SPLIT + k
        size = 3.5 * float(covariance[day].diagonal().max().sqrt())
        places = size * torch.cartesian_prod(grid, grid)
        inside = torch.linalg.solve_triangular(root[day], places.mT, upper=False).mT.float()
        with torch.no_grad():
            density = (
                flow.log_prob(inside, num_steps=30, condition=known[day].expand(len(inside), -1))
                .exp()
                .double()
            )
        for values, colour, label in (
            (density, "#0072B2", "flow"),
            (
                normal(returns.new_zeros(2), covariance[day]).log_prob(places).exp() * root[day].det(),
                "#D55E00",
                "Gaussian",
            ),
        ):
            order = values.sort(descending=True).values
            levels = [float(order[(order.cumsum(0) > p * order.sum()).nonzero()[0, 0]]) for p in (0.95, 0.5)]
            axis.contour(size * grid, size * grid, values.reshape(61, 61).T, levels, colors=colour)
            axis.plot([], [], color=colour, label=f"{label}: 50 and 95 %")
        near = slice(day, min(day + 10, len(returns)))
        axis.plot(*returns[near].T, "k.", label="ten days from then on")
        axis.text(0.03, 0.97, name, transform=axis.transAxes, va="top")
        axis.set(
            xlabel="return of the DAX, %",
            ylabel="return of the FTSE, %",
            xlim=(-size, size),
            ylim=(-size, size),
        )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
