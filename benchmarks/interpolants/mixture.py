"""Five modes in 128 dimensions: every pair of fields and several strengths of noise, beside exact fields."""

from __future__ import annotations

import time
from typing import Any

import torch
from densities import contenders, flow_kl, girsanov, kernel_kl, learn_pairs, levels

from stochdyn.interpolants import GaussianMixture, GaussianMixtureInterpolant, Interpolant

__all__ = ["measure"]


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Train both pairs of fields, and compare laws by density, by Girsanov's bound and by the paper's metric."""
    dim, n, tests, grid = (8, 200, 20, 10) if smoke else (128, 20_000, 100, 50)
    batch, network = (64, {"width": 32, "depth": 2}) if smoke else (512, {"width": 384, "depth": 3})
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, dim, dim, generator=g)
    means = 7.5 * torch.randn(5, dim, generator=g)
    law = GaussianMixture(torch.full((5,), 0.2), means, w.mT @ w / dim + torch.eye(dim))
    it = Interpolant("linear", "brownian")
    pool = 2000 if smoke else 200_000
    x0, x1 = torch.randn(pool, dim, generator=g), law.draw(pool, g)
    nets, seconds = learn_pairs(it, x0, x1, steps, batch, **network)
    test, starts = law.draw(tests, g), torch.randn(n, dim, generator=g)
    fresh, again = law.draw(n, g), law.draw(n, g)
    held = torch.randn(2000, dim, generator=g), law.draw(2000, g)
    log_prob = law.log_prob(test)
    models = contenders(it, GaussianMixtureInterpolant(it, None, law), nets, dim)
    rows: list[dict[str, Any]] = [{"fields": "a second sample", "epsilon": "", **kernel_kl(fresh, again)}]
    for name, model in models.items():
        for label, epsilon in levels(model, models["exact"], held, (0.0, 1.0, 4.0)).items():
            begin = time.process_time()
            noise = torch.Generator().manual_seed(3)
            draws = model.sample(n, epsilon, grid, x0=starts, generator=noise)
            row: dict[str, Any] = {"fields": name, "epsilon": label, **kernel_kl(fresh, draws)}
            if label == "0":
                row |= flow_kl(model, test, log_prob, 30)
            elif name != "exact":
                row["girsanov bound"] = girsanov(model, models["exact"], held, epsilon)
            row["seconds"] = round(time.process_time() - begin, 1)
            rows.append(row)
            print(row, flush=True)
    return {"dim": dim, "steps": steps, "batch": batch, "network": network, "draws": n, "test points": tests,
            "grid": grid, "training seconds": seconds, "rows": rows}  # fmt: skip
