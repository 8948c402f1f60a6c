"""Single molecules in living cells: how many kinds of motion there are, how fast they are, and how often a molecule goes from one to another.

    python examples/single_molecules.py

A molecule that is bound hardly moves between two frames, and a free one moves far. The state is hidden: a jump process whose rates are
learnt together with the mobilities from the lengths of all steps, its path summed out exactly. Tracks are split in two, and numbers of states
are told apart by the tracks that weren't learnt from. It prints mobilities, shares and rates with intervals, and draws the steps and two
tracks to ``outputs/single_molecules.png``. Fast molecules leave the focal plane and are lost sooner, so their share is too small here.
"""

from __future__ import annotations

import argparse
import math
import warnings
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
FRAME = 0.00748  # seconds
LONGEST = 12  # steps; what comes later is a track of its own


class Steps(sd.jumps.Observation):
    """The squared length of a step in the plane, whose variance in each direction depends on the state, ``(*batch, S)``.

    The derivative of the log evidence by ``tilt (S,)``, at zero, is the expected number of steps in each state.
    """

    def __init__(self, variance: Tensor, tilt: Tensor | None = None) -> None:
        super().__init__()
        self.variance, self.num_states = variance, variance.shape[-1]
        self.tilt = torch.zeros_like(variance) if tilt is None else tilt

    def log_likelihood(self, y: Tensor) -> Tensor:
        """Return the log density of squared steps for each state; zero where there is none."""
        missing = y.isnan()[..., None]
        twice = 2 * self.variance[..., None, :]
        value = self.tilt[..., None, :] - twice.log() - y.nan_to_num()[..., None] / twice
        return value.masked_fill(missing, 0.0)

    def draw(self, states: Tensor) -> Tensor:
        """Draw squared steps, which are exponential."""
        mean = 2 * self.variance.detach().expand(*states.shape[:-1], -1)
        return mean.gather(-1, states) * torch.empty_like(states, dtype=F64).exponential_()


def squared_steps() -> Tensor:
    """Return the squared steps ``(tracks, LONGEST)`` in square micrometres, NaN after the end of a track."""
    table = {name: torch.tensor(values, dtype=F64) for name, values in sd.datasets.single_molecules().items()}
    rows = []
    for track in table["track"].unique():
        place = torch.stack([table["x"], table["y"]], -1)[table["track"] == track]
        for part in place.diff(dim=0).square().sum(-1).split(LONGEST):
            rows.append(torch.cat([part, part.new_full((LONGEST - len(part),), torch.nan)]))
    return torch.stack(rows)


def law(start: Tensor, rates: Tensor) -> sd.jumps.JumpMeasure:
    """Return the hidden process of rates ``(*batch, S, S - 1)`` per frame, row by row without the diagonal."""
    count = start.shape[-1]
    rows = [
        torch.cat([rates[..., i, :i], rates.new_zeros(*rates.shape[:-2], 1), rates[..., i, i:]], -1)
        for i in range(count)
    ]
    return sd.jumps.JumpMeasure(start, torch.stack(rows, -2))


def model(count: int, squared: Tensor) -> None:
    """Sample mobilities in rising order, the error of a position, shares at the start and rates; observe the steps."""
    error = pyro.sample("error", dist.LogNormal(torch.tensor(0.03, dtype=F64).log(), 0.5))
    ratios = pyro.sample("ratios", dist.LogNormal(torch.full((count,), 1.5, dtype=F64), 1.0).to_event(1))
    mobility = pyro.deterministic("mobility", 0.01 * ratios.cumprod(-1), event_dim=1)
    start = pyro.sample("start", dist.Dirichlet(torch.ones(count, dtype=F64)))
    spread = torch.full((count, max(count - 1, 1)), 1.5, dtype=F64)
    rates = pyro.sample("rates", dist.LogNormal(torch.full_like(spread, -3.0), spread).to_event(2))
    seen = Steps(2 * FRAME * mobility + 2 * error[..., None].square())
    with pyro.plate("tracks", len(squared)):
        hidden = sd.jumps.HiddenJumps(law(start, rates), torch.arange(LONGEST, dtype=F64), seen)
        pyro.sample("squared", hidden, obs=squared)


def main() -> None:
    """Fit, compare numbers of states, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("outputs/single_molecules.png"))
    arguments = parser.parse_args()

    squared = squared_steps()
    order = torch.randperm(len(squared), generator=torch.Generator().manual_seed(0))
    learnt, kept = squared[order[::2]], squared[order[1::2]]
    print(f"{len(squared)} tracks, {int((~squared.isnan()).sum())} steps")
    times = torch.arange(LONGEST, dtype=F64)
    warnings.filterwarnings("ignore", "The model and guide can't be run on many draws at once")
    found: dict[int, dict[str, Tensor]] = {}
    for count in (2, 3):
        post = sd.infer.fit_posterior(
            model, count, learnt, method="laplace", num_draws=arguments.draws, progress=False
        )
        value = {
            name: torch.tensor(post.idata.posterior[name].values).flatten(0, 1)
            for name in ("mobility", "error", "start", "rates")
        }
        value["variance"] = 2 * FRAME * value["mobility"] + 2 * value["error"][:, None].square()
        found[count] = value
        scores = torch.stack(
            [
                sd.jumps.log_evidence(law(start, rates), times, kept, Steps(variance)).sum()
                for start, rates, variance in zip(
                    value["start"][:50], value["rates"][:50], value["variance"][:50], strict=True
                )
            ]
        )
        score = float(scores.logsumexp(0)) - math.log(len(scores))
        print(f"\n{count} states: log density of the other half {score:.1f}, k-hat {post.khat:.2f}")
        stationary = sd.jumps.RateMatrix(law(value["start"], value["rates"]).generator.matrix).stationary()
        for k in range(count):
            low, middle, high = value["mobility"][:, k].quantile(torch.tensor([0.05, 0.5, 0.95], dtype=F64))
            print(
                f"  mobility {middle:6.3f} ({low:.3f} to {high:.3f}) µm²/s, share at the first frame {value['start'][:, k].mean():.2f}, "
                f"in the long run {stationary[:, k].mean():.2f}"
            )
        stay = 1000 * FRAME / value["rates"].sum(-1)
        for k in range(count):
            low, middle, high = stay[:, k].quantile(torch.tensor([0.05, 0.5, 0.95], dtype=F64))
            print(f"  stays in state {k}: {middle:.0f} ms ({low:.0f} to {high:.0f})")
        low, middle, high = (1000 * value["error"]).quantile(torch.tensor([0.05, 0.5, 0.95], dtype=F64))
        print(f"  error of a position {middle:.0f} nm ({low:.0f} to {high:.0f})")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = squared[~squared.isnan()].sqrt()
    bins = torch.logspace(-2.3, 0.3, 40, dtype=F64)
    left.hist(steps, bins, color="0.8", density=True, label="steps")
    r = torch.logspace(-2.3, 0.3, 200, dtype=F64)[:, None]
    for (count, value), colour in zip(found.items(), ("#E69F00", "#0072B2"), strict=True):
        variance, start = value["variance"].median(0).values, value["start"].mean(0)
        hidden, tilt = (
            law(start, value["rates"].median(0).values),
            torch.zeros_like(variance, requires_grad=True),
        )
        evidence = sd.jumps.log_evidence(hidden, times, squared, Steps(variance, tilt)).sum()
        shares = torch.autograd.grad(evidence, tilt)[0] / (~squared.isnan()).sum()
        print(
            f"{count} states: shares of all steps " + ", ".join(f"{share:.2f}" for share in shares.tolist())
        )
        density = (shares * r / variance * (-r.square() / (2 * variance)).exp()).sum(-1)
        left.plot(r[:, 0], density, color=colour, label=f"{count} states")
    left.set(xscale="log", xlabel="step, µm", ylabel="density per µm")
    add_legend(left)
    value = {name: each.median(0).values for name, each in found[3].items()}
    start = found[3]["start"].mean(0)
    table = {name: torch.tensor(v, dtype=F64) for name, v in sd.datasets.single_molecules().items()}
    lengths = table["track"].long().bincount()
    colours = ("#0072B2", "#009E73", "#D55E00")
    shown = lengths.argsort(descending=True)[:8].tolist()
    for row, track in enumerate(shown):
        place = torch.stack([table["x"], table["y"]], -1)[table["track"] == track]
        moved = place.diff(dim=0).square().sum(-1)
        given = law(start, value["rates"]).conditioned(
            torch.arange(len(moved), dtype=F64), moved, Steps(value["variance"])
        )
        states = torch.stack([given.marginal(float(j)).probs for j in range(len(moved))]).argmax(-1)
        offset = torch.tensor([1.6 * (row % 4), -1.6 * (row // 4)], dtype=F64) - place.mean(0)
        for j, state in enumerate(states.tolist()):
            right.plot(*(place[j : j + 2] + offset).T, color=colours[state], lw=1)
    for colour, name in zip(colours, ("slow", "middle", "fast"), strict=True):
        right.plot([], [], color=colour, label=name)
    right.set(xlabel="µm (the eight longest tracks, side by side)", ylabel="µm", aspect="equal")
    add_legend(right)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
