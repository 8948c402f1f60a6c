"""Where swimmers produce entropy: two on a ring exactly, many in a trap by a score learnt from snapshots.

    python examples/trapped_swimmers.py
    python examples/trapped_swimmers.py --swimmers 64 --snapshots 400 --batch 16 --steps 1200

Self-propelled particles repel each other. For two on a ring the steady density is known, and with it the local rate of entropy production.
For many in a harmonic trap the score, a local function of each particle and its neighbours, is learnt from snapshots and gives the
rate of every particle. It prints rates by the score and by the sum rule, which agree where the score is right, and draws where entropy
is produced to ``outputs/trapped_swimmers.png``. Two minutes; eight with 64 swimmers,
most of them to draw snapshots. The rate of 64 then stays below the sum rule by a
seventh or more, on the snapshots of the training too: take the total from the rule.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import stochdyn as sd
from stochdyn import nonequilibrium as ne
from stochdyn.core import Hutchinson


def main() -> None:
    """Take the pair from its exact density, learn the score of the rest, compare with the sum rule, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swimmers", type=int, default=16)
    parser.add_argument("--snapshots", type=int, default=1500, help="snapshots to learn from")
    parser.add_argument("--batch", type=int, default=64, help="snapshots in a step of the optimiser")
    parser.add_argument("--steps", type=int, default=900, help="steps of the optimiser")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/trapped_swimmers.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    pair = sd.datasets.swimmer_pair()
    assert pair.score is not None
    places = pair.sample(40_000, generator=0)
    local = ne.SteadyCurrent(pair.sde, pair.score).local(places)
    assert isinstance(local, Tensor)
    print(f"two on a ring   {pair.entropy_production:.4f} exactly, {float(local.mean()):.4f} on draws")

    number = arguments.swimmers
    trap = sd.datasets.trapped_swimmers(number)
    held = max(arguments.snapshots // 3, 2)
    states = trap.sample(arguments.snapshots + held, generator=0).float()
    train, test = states[:-held], states[-held:]
    torch.manual_seed(0)
    score = ne.ParticleScore(num_extra=2, cutoff=3.5, base=trap.base_score, num_neighbors=15)
    sde = sd.SDE(trap.sde.drift, sd.Diagonal(torch.tensor([0.2] * 4).sqrt().repeat(number)))
    objective = ne.SteadyScoreMatching(sde, score, method=Hutchinson(num_probes=1))
    decay = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=arguments.steps)
    sd.fit(
        objective, train, steps=arguments.steps, lr=3e-3, scheduler=decay, batch_size=arguments.batch, seed=0
    )

    current = ne.SteadyCurrent(sde, score)
    particles = {str(i): list(range(4 * i, 4 * i + 4)) for i in range(number)}
    rates = torch.stack(list(current.local(test, by=particles).values()), -1).detach()
    rule = ne.sum_rule(sde, test, base=trap.base_score)
    each = rates.sum(-1) / number
    print(
        f"from the score  {float(each.mean()):.4f} +- {float(each.std() / len(each) ** 0.5):.4f} per particle"
    )
    print(f"by the sum rule {float(rule) / number:.4f} +- {float(rule.stderr) / number:.4f} per particle")
    print("a free swimmer  0.8000 per particle")
    draw(places, local, test.unflatten(-1, (number, 4)), rates, arguments.out)
    print(f"wrote {arguments.out}")


def draw(places: Tensor, local: Tensor, states: Tensor, rates: Tensor, path: Path) -> None:
    """Draw the pair's rate by distance and propulsion, a snapshot with every particle's rate, and the mean rate by place."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (first, left, right) = plt.subplots(1, 3, figsize=(16.5, 4.6), constrained_layout=True)
    ceiling = float(local.quantile(0.99))
    shown = first.hexbin(*places.mT, C=local, gridsize=50, mincnt=3, vmin=0.0, vmax=ceiling, cmap="viridis")
    first.set(title="two on a ring, exactly", xlabel="distance", ylabel="difference of propulsions")
    figure.colorbar(shown, ax=first, label="entropy production rate")
    place, heading = states[0, :, :2], states[0, :, 2:]
    limits = {"vmin": 0.0, "vmax": float(rates.quantile(0.95)), "cmap": "viridis"}
    shown = left.scatter(*place.mT, c=rates[0], s=150, edgecolor="black", linewidth=0.5, **limits)
    left.quiver(*place.mT, *heading.mT, color="black", width=0.004, scale=25)
    left.set(title="a snapshot: swimmers and their propulsion", xlabel="x", ylabel="y", aspect="equal")
    figure.colorbar(shown, ax=left, label="entropy production rate")
    where, values = states[..., :2].flatten(0, 1), rates.flatten()
    shown = right.hexbin(*where.mT, C=values, gridsize=18, mincnt=5, **limits)
    right.set(
        title=f"mean rate by place, {rates.shape[-1]} in a trap", xlabel="x", ylabel="y", aspect="equal"
    )
    figure.colorbar(shown, ax=right, label="entropy production rate")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
