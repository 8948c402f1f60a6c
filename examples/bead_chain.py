"""What a chain of beads between two heat baths dissipates: exactly, from its equation, and from trajectories alone.

    python examples/bead_chain.py

It prints three estimates of the entropy production rate and draws them, and the part of every bead, to ``outputs/bead_chain.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import stochdyn as sd
from stochdyn import nonequilibrium as ne


def main() -> None:
    """Simulate, estimate in three ways, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--horizon", type=float, default=4000.0, help="length of the recorded trajectory")
    parser.add_argument("--draws", type=int, default=20_000, help="independent draws of the steady state")
    parser.add_argument("--out", type=Path, default=Path("outputs/bead_chain.png"), help="file of the figure")
    arguments = parser.parse_args()

    force = torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1) - 2 * torch.eye(5)
    chain = ne.LinearSteadyState(force, torch.diag((2 * torch.linspace(1, 10, 5)).sqrt()))
    beads = {f"bead {i + 1}": [i] for i in range(5)}

    x = chain.sample(arguments.draws, generator=0)
    rule = ne.sum_rule(chain.sde, x)
    torch.manual_seed(0)
    score = ne.SteadyScore(x, hidden=(32,))
    sd.fit(ne.SteadyScoreMatching(chain.sde, score), x, steps=50, lr=1e-3, batch_size=2000, progress=False)
    current = ne.SteadyCurrent(chain.sde, score)
    fresh = chain.sample(arguments.draws, generator=1)
    learnt = ne.entropy_production_rate(current, fresh)
    parts = ne.entropy_production_rate(current, fresh, by=beads)

    dt = 0.01
    ts = dt * torch.arange(int(arguments.horizon / 10 / dt)).double()
    found = ne.short_time_entropy(chain.law.sample(ts, 10, generator=2).x, dt, by=beads)

    rows = {
        "closed form": (chain.rate, 0.0),
        "equation and draws: sum rule": (float(rule), float(rule.stderr)),
        "equation and draws: learnt score": (float(learnt), float(learnt.stderr)),
        "trajectories alone": (found.rate, found.stderr),
    }
    for name, (rate, error) in rows.items():
        print(f"{name:34s} {rate:.4f} +- {error:.4f}")
    draw(rows, chain.component_rates, parts, found.parts, arguments.out)
    print(f"wrote {arguments.out}")


def draw(
    rows: dict[str, tuple[float, float]],
    exact: torch.Tensor,
    parts: dict[str, sd.core.Estimate],
    alone: dict[str, float],
    path: Path,
) -> None:
    """Draw the rates with their intervals, and the part of each bead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    colours = ["#000000", "#0072B2", "#009E73", "#D55E00"]
    for place, (rate, error) in enumerate(rows.values()):
        left.errorbar(rate, -place, xerr=1.96 * error, fmt="o", color=colours[place], capsize=4, markersize=7)
    left.axvline(rows["closed form"][0], color="#999999", lw=1, zorder=0)
    left.set_yticks([-k for k in range(len(rows))], list(rows))
    left.set(xlabel="entropy production rate per time, with 95 % intervals", ylim=(-3.5, 0.5))
    places = torch.arange(5)
    right.bar(places - 0.27, exact, 0.27, color=colours[0], label="closed form")
    right.bar(places, [float(v) for v in parts.values()], 0.27, color=colours[2], label="learnt score")
    right.bar(places + 0.27, list(alone.values()), 0.27, color=colours[3], label="trajectories alone")
    right.set_xticks(places, ["cold end", "2", "3", "4", "hot end"])
    right.set(xlabel="bead", ylabel="part of each bead per time")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
