"""Simulation-based inference of two moons: posteriors from 10 000 simulations, scored against exact draws."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.datasets import TwoMoons
from stochdyn.interpolants import FieldNetwork, Interpolant, InterpolantGenerator, InterpolantRegression

__all__ = ["measure"]


class WavesOfBoth(nn.Module):
    """A velocity that sees waves of parameters and data together.

    What a simulator says of its parameters often depends on their difference from a function of the data, at a scale far below
    that of the prior: waves of both at once show such differences to a network from the first step on.
    """

    directions: Tensor

    def __init__(
        self, dim: int, data_dim: int, width: int = 128, count: int = 64, finest: float = 30.0
    ) -> None:
        super().__init__()
        unit = nn.functional.normalize(torch.randn(dim + data_dim, count), dim=0)
        self.register_buffer("directions", unit * torch.logspace(0, math.log10(finest), count))
        self.network = FieldNetwork(dim, width=width, depth=4, condition_dim=data_dim + 2 * count)

    def forward(self, t: Tensor, x: Tensor, condition: Tensor) -> Tensor:
        """Return the velocity of the parameters ``(n, d)`` given data ``(n, c)``."""
        # the mean of the end given the point, for standardised data: what the waves are to be waves of
        guess = x * t / ((1 - t).square() + t.square())
        phase = torch.cat([guess, condition], -1) @ self.directions
        # waves finer than the noise on the guess say nothing
        blur = (1 - t) / ((1 - t).square() + t.square()).sqrt()
        seen = torch.exp(-0.5 * (blur * self.directions[: x.shape[-1]].norm(dim=0)).square())
        return self.network(t, x, torch.cat([condition, seen * phase.sin(), seen * phase.cos()], -1))


def train(theta: Tensor, x: Tensor, steps: int) -> InterpolantGenerator:
    """Train a flow of standardised parameters given standardised data."""
    objective = InterpolantRegression(
        Interpolant("one-sided-linear"), velocity=WavesOfBoth(theta.shape[-1], x.shape[-1])
    )
    sd.fit(
        objective, {"x1": theta, "condition": x}, steps=steps, batch_size=512, lr=2e-3, ema=0.998, seed=0,
        progress=False, scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip
    return objective.generator()


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Measure the classifier's accuracy and the transport distance at several observations."""
    task = TwoMoons()
    torch.manual_seed(0)
    theta = task.prior(500 if smoke else 10_000, generator=0)
    x = task.simulate(theta, generator=1)
    center, scale, unit = x.mean(0), x.std(0), 3**-0.5
    start = time.process_time()
    model = train(theta / unit, (x - center) / scale, steps)
    cost = time.process_time() - start
    rows = []
    size = 200 if smoke else 2000
    for k in range(2 if smoke else 5):
        truth = task.prior(1, generator=100 + k)
        seen = task.simulate(truth, generator=200 + k)[0]
        exact = task.posterior(seen, size, generator=k)
        draws = unit * model.sample(4 * size, num_steps=40, condition=(seen - center) / scale, generator=k)
        # what lies outside the prior is left out, as the posterior's own law has nothing there
        inside = (draws.abs() <= 1).all(-1)
        again = task.posterior(seen, size, generator=1000 + k)
        kept = draws[inside][:size]
        score = sd.diagnostics.c2st(kept, exact)
        rows.append(
            {
                "observation": seen.tolist(), "c2st": float(score.mean), "stderr": float(score.stderr),
                "w2": sd.diagnostics.emd(kept, exact, 2), "floor": sd.diagnostics.emd(again, exact, 2),
                "inside the prior": float(inside.double().mean()),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return {
        "simulations": len(theta),
        "rows": rows,
        "training": {"processor seconds": round(cost, 1), "steps": steps},
    }
