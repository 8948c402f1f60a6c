"""Five modes in 128 dimensions: every pair of fields and several strengths of noise, beside exact fields."""

from __future__ import annotations

import time
from typing import Any

import torch
from densities import PAIRS, TRAINED, contenders, flow_kl, girsanov, kernel_kl, learn_pairs, levels

from stochdyn.interpolants import GaussianMixture, GaussianMixtureInterpolant, Interpolant

__all__ = ["measure", "measure_mixture_long"]


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Train both pairs of fields, and compare laws by density, by Girsanov's bound and by the paper's metric."""
    return _measure(smoke, steps, TRAINED, {"width": 384, "depth": 3}, (0.0, 1.0, 4.0))


def measure_mixture_long(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Velocity and noise_prediction once more, trained longer."""
    return _measure(smoke, steps, PAIRS[:1], {"width": 384, "depth": 3}, (0.0, 1.0))


def _measure(
    smoke: bool,
    steps: int,
    pairs: tuple[tuple[str, str], ...],
    network: dict[str, Any],
    fixed: tuple[float, ...],
) -> dict[str, Any]:
    dim, n, tests, grid = (8, 200, 20, 10) if smoke else (128, 20_000, 100, 50)
    batch = 512
    if smoke:
        batch, network = 64, {"width": 32, "depth": 2}
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, dim, dim, generator=g)
    means = 7.5 * torch.randn(5, dim, generator=g)
    law = GaussianMixture(torch.full((5,), 0.2), means, w.mT @ w / dim + torch.eye(dim))
    it = Interpolant("linear", "brownian")
    pool = 2000 if smoke else 200_000
    x0, x1 = torch.randn(pool, dim, generator=g), law.draw(pool, g)
    nets, seconds = learn_pairs(it, x0, x1, steps, batch, pairs, **network)
    test, starts = law.draw(tests, g), torch.randn(n, dim, generator=g)
    fresh, again = law.draw(n, g), law.draw(n, g)
    held = torch.randn(2000, dim, generator=g), law.draw(2000, g)
    log_prob = law.log_prob(test)
    models = contenders(it, GaussianMixtureInterpolant(it, None, law), nets, dim)
    rows: list[dict[str, Any]] = [{"fields": "a second sample", "epsilon": "", **kernel_kl(fresh, again)}]
    exact = models["exact"]
    if pairs != TRAINED:
        del models["exact"]  # measured with the others
    for name, model in models.items():
        for label, epsilon in levels(model, exact, held, fixed).items():
            begin = time.process_time()
            noise = torch.Generator().manual_seed(3)
            draws = model.sample(n, epsilon, grid, x0=starts, generator=noise)
            row: dict[str, Any] = {"fields": name, "epsilon": label, **kernel_kl(fresh, draws)}
            if label == "0":
                row |= flow_kl(model, test, log_prob, 30)
            elif model is not exact:
                row["girsanov bound"] = girsanov(model, exact, held, epsilon)
            row["seconds"] = round(time.process_time() - begin, 1)
            rows.append(row)
            print(row, flush=True)
    return {"dim": dim, "steps": steps, "batch": batch, "network": network, "draws": n, "test points": tests,
            "grid": grid, "training seconds": seconds, "rows": rows}  # fmt: skip
