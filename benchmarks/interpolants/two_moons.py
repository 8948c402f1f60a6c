"""Simulation-based inference of two moons: posteriors from 10 000 simulations, scored against exact draws."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.datasets import TwoMoons
from stochdyn.interpolants import Interpolant, InterpolantGenerator, InterpolantRegression, WhitenedField

__all__ = ["measure", "posterior"]

Context = Callable[[Tensor], Tensor]


def posterior(theta: Tensor, x: Tensor, steps: int) -> tuple[InterpolantGenerator, Context]:
    """Train a flow of the parameters given the data; return it with the function that makes contexts of data."""
    center, scale = x.mean(0), x.std(0)

    def context(data: Tensor) -> Tensor:
        return (data - center) / scale

    it = Interpolant("one-sided-linear")
    field = WhitenedField.from_data(
        it, "velocity", theta, width=128, depth=6, condition_dim=x.shape[-1], skips=True
    )
    objective = InterpolantRegression(it, velocity=field, times="late")
    sd.fit(
        objective, {"x1": theta, "condition": context(x)}, steps=steps, batch_size=512, lr=2e-3, ema=0.999, seed=0,
        progress=False, scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip
    return objective.generator(), context


def inside(model: InterpolantGenerator, context: Tensor, size: int, seed: int) -> tuple[Tensor, float]:
    """Return draws within the bounds of the prior, and the share of draws that weren't."""
    draws = model.sample(2 * size, num_steps=40, condition=context, generator=seed)
    kept = draws[(draws.abs() <= 1).all(-1)]
    return kept[:size], 1 - len(kept) / len(draws)


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Measure the classifier's accuracy and the transport distance at several observations."""
    task = TwoMoons()
    torch.manual_seed(0)
    theta = task.prior(500 if smoke else 10_000, generator=0)
    clock = time.process_time()
    model, context = posterior(theta, task.simulate(theta, generator=1), steps)
    cost = time.process_time() - clock
    rows = []
    few, many = (100, 200) if smoke else (2000, 10_000)
    for k in range(2 if smoke else 10):
        truth = task.prior(1, generator=100 + k)
        seen = task.simulate(truth, generator=200 + k)[0]
        # the first three in the sizes of the published benchmark
        size = many if k < 3 else few
        exact = task.posterior(seen, size, generator=k)
        draws, outside = inside(model, context(seen), size, k)
        again = task.posterior(seen, few, generator=1000 + k)
        score = sd.diagnostics.c2st(draws, exact)
        rows.append(
            {
                "observation": seen.tolist(), "draws": len(draws), "c2st": float(score.mean), "stderr": float(score.stderr),
                "w2": sd.diagnostics.emd(draws[:few], exact[:few], 2), "floor": sd.diagnostics.emd(again, exact[:few], 2),
                "outside": outside,
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return {"simulations": len(theta), "rows": rows, "steps": steps, "training seconds": round(cost, 1)}
