"""Simulation-based inference of two moons: posteriors from 10 000 simulations, scored against exact draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.datasets import TwoMoons
from stochdyn.interpolants import Interpolant, InterpolantGenerator, InterpolantRegression, WhitenedField

__all__ = ["measure", "posterior"]


def posterior(theta: Tensor, x: Tensor, steps: int) -> tuple[InterpolantGenerator, Any, Tensor, Tensor]:
    """Train a flow of the parameters given the data, on the whole line and in the units of the data."""
    inside = torch.distributions.biject_to(torch.distributions.constraints.interval(-1.0, 1.0))
    free = inside.inv(theta.clamp(-1 + 1e-6, 1 - 1e-6))
    center, scale = x.mean(0), x.std(0)
    it = Interpolant("one-sided-linear")
    field = WhitenedField.from_data(
        it, "velocity", free, width=128, depth=4, condition_dim=x.shape[-1] * 17, frequencies=32
    )
    objective = InterpolantRegression(it, velocity=field)
    context = waves((x - center) / scale)
    sd.fit(
        objective, {"x1": free, "condition": context}, steps=steps, batch_size=512, lr=2e-3, ema=0.999, seed=0,
        progress=False, scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip
    return objective.generator(), inside, center, scale


def waves(x: Tensor) -> Tensor:
    """Return a context with sines and cosines of eight frequencies beside it: crescents are a hundredth of the prior wide."""
    angles = x.unsqueeze(-1) * 2.0 ** torch.arange(8) / 2
    return torch.cat([x, angles.sin().flatten(-2), angles.cos().flatten(-2)], -1)


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Measure the classifier's accuracy and the transport distance at several observations."""
    task = TwoMoons()
    torch.manual_seed(0)
    theta = task.prior(500 if smoke else 10_000, generator=0)
    x = task.simulate(theta, generator=1)
    model, inside, center, scale = posterior(theta, x, steps)
    rows = []
    size = 200 if smoke else 2000
    for k in range(2 if smoke else 3):
        truth = task.prior(1, generator=100 + k)
        seen = task.simulate(truth, generator=200 + k)[0]
        exact = task.posterior(seen, size, generator=k)
        draws = inside(
            model.sample(size, num_steps=40, condition=waves((seen - center) / scale), generator=k)
        )
        again = task.posterior(seen, size, generator=1000 + k)
        score = sd.diagnostics.c2st(draws, exact)
        rows.append(
            {
                "observation": seen.tolist(), "c2st": float(score.mean), "stderr": float(score.stderr),
                "w2": sd.diagnostics.emd(draws, exact, 2), "floor": sd.diagnostics.emd(again, exact, 2),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return {"simulations": len(theta), "rows": rows, "steps": steps}
