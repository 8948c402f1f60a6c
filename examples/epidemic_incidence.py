"""An epidemic in a school of 500, seen by weekly new cases: its rate of infection, and what fewer contacts from week three on would have spared.

    python examples/epidemic_incidence.py

Reports count what happened during a week, so they are differences of an integral along the path. The share of the infected stays positive
because it is simulated in logarithms. It prints the rate and the total with and without them, and draws the weeks to
``outputs/epidemic_incidence.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.core import Intervention

PEOPLE, RECOVERY, WEEKS, PER_WEEK = 500.0, 0.7, 12, 7
TS = torch.linspace(0, WEEKS, WEEKS * PER_WEEK + 1, dtype=torch.float64)
START = torch.tensor([0.99, 0.01, 0.0], dtype=torch.float64)


def epidemic(rate: Tensor) -> sd.SDE:
    """Return the equation of the shares of susceptible and (in logarithms) infected people, and of the cases so far."""

    def drift(t: Tensor, x: Tensor) -> Tensor:
        susceptible, infected = x.unbind(-1)
        cases = rate * susceptible * infected
        return torch.stack([-cases, cases - RECOVERY * infected], -1)

    def noise(t: Tensor, x: Tensor) -> Tensor:
        # Contacts vary from day to day.
        moved = 0.15 * x[..., 1]
        return sd.Matrix(torch.stack([torch.zeros_like(moved), moved], -1).unsqueeze(-1))

    shares = sd.SDE(drift, noise).transformed(["identity", "log"])
    return shares.with_integral(lambda t, z: (rate * z[..., 0] * z[..., 1].exp()).unsqueeze(-1), dim=2)


def weekly(x: Tensor) -> Tensor:
    """Return the expected new cases of every week."""
    total = x[..., ::PER_WEEK, 2]
    return PEOPLE * (total[..., 1:] - total[..., :-1])


def model(cases: Tensor | None = None) -> Tensor:
    """The rate of infection is uncertain by a factor of two, and cases are counted."""
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.7))
    start = torch.stack([START[0], START[1].log(), START[2]])
    x = sd.infer.sample_path("x", epidemic(rate), start, TS)
    return pyro.sample("cases", dist.Poisson(weekly(x).clamp_min(1e-6)).to_event(1), obs=cases)


def main() -> None:
    """Simulate, fit, halve the contacts in week three, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/epidemic_incidence.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    pyro.set_rng_seed(3)
    cases = pyro.condition(model, {"rate": torch.tensor(1.6, dtype=torch.float64)})()
    post = sd.infer.fit_posterior(model, cases, method="laplace", num_draws=arguments.draws)
    low, middle, high = post.idata.posterior["rate"].quantile([0.05, 0.5, 0.95]).values
    print(f"rate of infection {middle:.2f} ({low:.2f} to {high:.2f}), truly 1.60; k-hat {post.khat:.2f}")

    def fewer(t: Tensor, x: Tensor, own: Tensor) -> Tensor:
        """Half the new cases: of the susceptible, of the infected in logarithms, and of the count."""
        half = 0.5 * own[..., 2]
        return own + torch.stack([half, -half * (-x[..., 1]).exp(), -half], -1)

    open_, spared = (
        weekly(post.predict(TS, num_draws=arguments.draws, do=do).x)
        for do in (None, Intervention(3.0, drift=fewer))
    )
    print(
        f"cases in all {float(open_.sum(-1).mean()):.0f}, with half the contacts from week three on {float(spared.sum(-1).mean()):.0f}"
    )
    draw(cases, open_, spared, arguments.out)
    print(f"wrote {arguments.out}")


def draw(cases: Tensor, as_is: Tensor, spared: Tensor, path: Path) -> None:
    """Draw the cases of every week, as they were and as they would have been."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    weeks = torch.arange(1, WEEKS + 1)
    figure, axis = plt.subplots(figsize=(8, 3.4), constrained_layout=True)
    for values, colour, label in (
        (as_is, "#0072B2", "as it was"),
        (spared, "#D55E00", "half the contacts from week 3"),
    ):
        low, middle, high = values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=values.dtype), 0)
        axis.fill_between(weeks, low, high, color=colour, alpha=0.2, lw=0)
        axis.plot(weeks, middle, color=colour, label=label)
    axis.plot(weeks, cases, "o", color="black", label="reported")
    axis.set(xlabel="week", ylabel="new cases")
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
