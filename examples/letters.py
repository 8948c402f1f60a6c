"""Letters as populations: noise is removed from point clouds by a flow that reads the whole cloud, also of letters it never saw.

    python examples/letters.py [--steps 800] [--out outputs]

An embedding tells the flow which letter a cloud is like, and kernel means what the cloud looks like around each point, which holds for every letter.

Writes ``letters.png`` and prints the transport distances of unseen letters beside those of a blind flow and of trivial predictions. A few minutes
on a laptop; ``--steps 20`` shows that it runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch

import stochdyn as sd
from stochdyn.datasets import letters
from stochdyn.interpolants import (
    FieldNetwork,
    KernelMeans,
    PopulationRegression,
    Populations,
    SetEncoder,
    population_table,
)

mpl.use("Agg")


def main() -> None:
    """Train, carry three letters, and draw them."""
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    options = parser.parse_args()
    torch.manual_seed(0)

    seen = letters("ABCDEFGHIJKLMNOPQRSTUVWZ", count=20, generator=0)  # all but X and Y
    train = Populations(seen.starts, seen.targets)
    encoder = SetEncoder(2)
    around = KernelMeans(2)
    network = FieldNetwork(2, width=128, depth=3, condition_dim=encoder.out + around.out)
    objective = PopulationRegression(2, encoder, "paired", around=around, velocity=network, num_points=256)
    blind = PopulationRegression(
        2, None, "paired", velocity=FieldNetwork(2, width=128, depth=3), num_points=256
    )
    for each in (objective, blind):
        sd.fit(
            each, train, steps=options.steps, batch_size=8, lr=2e-3,
            scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, options.steps),
        )  # fmt: skip
    model = objective.generator()

    unseen = letters("XY", count=5, size=800, generator=6)
    test = Populations(unseen.starts, unseen.targets)
    print("letters that were never seen")
    print(population_table({"flow": model.sample, "blind flow": blind.generator().sample}, train, test))

    shown = letters("KYX", count=1, size=800, generator=5)
    figure, axes = plt.subplots(3, 3, figsize=(7.5, 7.5), sharex=True, sharey=True, layout="constrained")
    for row, name, noised, clean in zip(axes, shown.names, shown.starts, shown.targets, strict=True):
        carried = model.sample(noised, 20)
        unseen = " (never seen)" if name in "XY" else ""
        for axis, points, title in (
            (row[0], noised, f"{name}{unseen}, noised"), (row[1], carried, "carried"), (row[2], clean, "clean"),
        ):  # fmt: skip
            axis.scatter(*points.T, s=1.5, color="tab:blue", linewidths=0)
            axis.set_title(title, fontsize=9)
            axis.set_aspect("equal")
        before, after = (sd.diagnostics.emd(x[:400], clean[:400], 1) for x in (noised, carried))
        print(f"{name}: W1 to the clean letter {before:.3f} before, {after:.3f} after")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "letters.png", dpi=110)
    plt.close(figure)
    print(f"wrote {options.out / 'letters.png'}")


if __name__ == "__main__":
    main()
