"""Compute the tables of the theory pages; they go to ``docs/generated`` whenever the documentation is built."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import ApproximationWarning
from stochdyn.fractional import MarkovNoise, geometric_speeds, optimal_weights

FOLDER = Path(__file__).parent / "generated"


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", lambda app: write_tables())
    app.connect("source-read", lambda app, page, source: _without_missing_tables(source))
    return {"parallel_read_safe": True}


def write_tables() -> None:
    """Write all tables, touching only those that changed."""
    FOLDER.mkdir(exist_ok=True)
    for name, rows in {"tightness": tightness(), "markov_errors": markov_errors()}.items():
        path, text = FOLDER / f"{name}.md", _table(rows)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _without_missing_tables(source: list[str]) -> None:
    """Say so where a page includes measurements that this checkout doesn't hold."""
    source[0] = re.sub(
        r"```\{include\} (?:\.\./)?generated/(\w+\.md)\n```",
        lambda found: found[0] if (FOLDER / found[1]).exists() else "*Not measured in this checkout.*",
        source[0],
    )


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines) + "\n"


def tightness() -> list[list[str]]:
    """Best bounds of a guide that shares the diffusion and of one that doesn't, for one terminal observation."""
    rate, horizon, y, variance = 0.7, 2.0, 0.8, 0.01
    speeds = geometric_speeds(5, 0.05, 20.0)
    weights, _ = optimal_weights(0.3, speeds, horizon)
    rows = [
        ["steps", "log evidence of the scheme", "best ELBO, shared diffusion", "best ELBO, free variances"]
    ]
    for n in (50, 100, 200, 400, 800, 1600, 3200):
        response = euler_response(n, horizon / n, rate, speeds, weights)
        step_variance = response.square() * horizon / n
        later = variance + step_variance.cumsum(0) - step_variance
        ratio = step_variance / later
        gap = 0.5 * (ratio - ratio.log1p()).sum()
        total = step_variance.sum() + variance
        evidence = -0.5 * (2 * math.pi * total).log() - 0.5 * y**2 / total
        rows.append([f"{n}", f"{evidence:.3f}", f"{evidence - gap:.2f}", f"{evidence:.3f}"])
    return rows


def euler_response(n: int, dt: float, rate: float, speeds: Tensor, weights: Tensor) -> Tensor:
    """Response ``(n,)`` of X to an increment 0, 1, ... steps before the end, in the Euler scheme of (X, Y)."""
    size = len(speeds) + 1
    step = torch.zeros(size, size, dtype=torch.float64)
    step[0, 0] = 1 - rate * dt
    step[0, 1:] = -weights * speeds * dt
    step[1:, 1:] = torch.diag(1 - speeds * dt)
    state = torch.cat([weights.sum()[None], torch.ones_like(weights)])
    out = []
    for _ in range(n):
        out.append(state[0])
        state = step @ state
    return torch.stack(out)


def markov_errors() -> list[list[str]]:
    """Nats per 100 steps that default noise loses on a grid of 100 steps."""
    indices = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95]
    rows = [["type", "K", *(f"H = {h}" for h in indices)]]
    ts = torch.linspace(0, 1, 101, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        for kind, states in (("II", 5), ("II", 8), ("II", 12), ("I", 8), ("I", 10), ("I", 16)):
            losses = (MarkovNoise(h, states, 1.0, 1 / 100, kind).divergence(ts).per_step for h in indices)
            rows.append([kind, f"{states}", *(f"{100 * x:.2g}" for x in losses)])
    return rows


if __name__ == "__main__":
    write_tables()
