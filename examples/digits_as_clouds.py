"""Handwritten digits as clouds of points: noise is taken off clouds by a flow that reads the whole cloud, also of digits it never saw.

    python examples/digits_as_clouds.py [--steps 300]

Every image is a cloud: points fall on its pixels in proportion to their ink. Flows learn from 300 images of eight of the digits, and are held
against trivial predictions and against a flow that is blind to the cloud, on later images of the same digits and on two digits that were
left out. It prints the transport distances above what two samples of one cloud are apart, and draws clouds to
``outputs/digits_as_clouds.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import stochdyn as sd
from stochdyn.interpolants import (
    KernelMeans,
    PopulationGenerator,
    PopulationRegression,
    Populations,
    SetEncoder,
    population_table,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

NOISE, POINTS, LEFT_OUT = 0.5, 400, (4, 9)


def clouds(images: Tensor, source: torch.Generator) -> Populations:
    """Return a clean cloud of each image ``(n, 8, 8)``, in units of two pixels, and the same with noise."""
    pixel = torch.multinomial(images.flatten(1), POINTS, replacement=True, generator=source)
    place = torch.stack([pixel % 8, 7 - pixel // 8], -1) + torch.rand(*pixel.shape, 2, generator=source)
    clean = place / 2 - 2
    noised = clean + NOISE * torch.randn(clean.shape, generator=source)
    return Populations(list(noised), list(clean))


def train(data: Populations, steps: int, **options: torch.nn.Module | None) -> PopulationGenerator:
    """Return a flow that was learnt from pairs."""
    torch.manual_seed(0)
    objective = PopulationRegression(2, options.get("encoder"), around=options.get("around"), num_points=128)
    sd.fit(
        objective, data, steps=steps, batch_size=16, lr=3e-3, seed=0,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip
    return objective.generator()


def main() -> None:
    """Learn, compare and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("outputs/digits_as_clouds.png"))
    arguments = parser.parse_args()

    source = torch.Generator().manual_seed(0)
    table = load_digits()
    images, digits = torch.tensor(table.images), torch.tensor(table.target)
    out = (digits[:, None] == torch.tensor(LEFT_OUT)).any(-1)
    first = torch.arange(len(digits)) < 1000
    learnt = clouds(images[first & ~out][:300], source)
    tests = {
        "later images of digits that were seen": clouds(images[~first & ~out][:20], source),
        "digits 4 and 9, which were never seen": clouds(images[~first & out][:20], source),
    }
    flows = {
        "embedding and surroundings": train(
            learnt, arguments.steps // 2, encoder=SetEncoder(2), around=KernelMeans(2)
        ),
        "embedding": train(learnt, arguments.steps, encoder=SetEncoder(2)),
        "blind": train(learnt, arguments.steps),
    }  # what lies around a point costs twice the time of a step
    found = {}
    for part, test in tests.items():
        found[part] = population_table({name: flow.sample for name, flow in flows.items()}, learnt, test)
        print(f"\n{part}\n{found[part]}")

    figure, axes = plt.subplots(3, 5, figsize=(9, 5.6), sharex=True, sharey=True, layout="constrained")
    seen, unseen = tests
    chosen = [(seen, 0), (unseen, 0), (unseen, 1)]
    for place, (row, (part, i)) in enumerate(zip(axes, chosen, strict=True)):
        test, guess = tests[part], found[part].predicted
        drawn = {
            "with noise": test.starts[i], "embedding and\nsurroundings": guess["embedding and surroundings"][i],
            "embedding": guess["embedding"][i], "blind": guess["blind"][i], "clean": test.targets[i],
        }  # fmt: skip
        for axis, (name, points) in zip(row, drawn.items(), strict=True):
            axis.scatter(*points.T, s=2, color="#0072B2", lw=0)
            axis.set(xticks=[], yticks=[], aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
            if place == 0:
                axis.set_title(name, fontsize=10)
        row[0].set_ylabel("seen" if part == seen else "never seen")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
