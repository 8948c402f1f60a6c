"""Simulation-based calibration of ``fit_rates`` in five designs: is the posterior of the rates right?

    OMP_NUM_THREADS=1 python benchmarks/jumps/sbc.py

Every data set is kept in a file of rows as soon as it is done, so that a run that was stopped goes on where it was.

Log rates of all pairs are standard normal; states of K series are seen exactly at L times, dt apart. Of every data set the rank of one
randomly chosen true log rate among the draws is kept (ranks of several rates of one data set aren't independent), and whether
intervals hold the truth, over all rates.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, panel_of
from scipy.stats import kstest

from stochdyn.jumps import fit_rates, transition

RESULTS = Path(__file__).parent / "results" / "sbc.json"
DESIGNS = [(3, 20, 50, 0.2), (4, 30, 50, 0.2), (6, 300, 100, 0.025), (6, 30, 100, 0.1), (3, 1, 50, 0.2)]
LEVELS = (0.5, 0.8, 0.95)
DRAWS = 1000


def simulate(size: int, paths: int, length: int, dt: float, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return log rates ``(S, S)`` and states ``(K, L)``."""
    source = torch.Generator().manual_seed(seed)
    log_rates = torch.randn(size, size, dtype=torch.float64, generator=source)
    off = log_rates.exp().fill_diagonal_(0.0)
    p = transition(off, dt)
    state = torch.randint(size, (paths,), generator=source)
    states = [state]
    for _ in range(length - 1):
        state = torch.multinomial(p[state], 1, generator=source)[:, 0]
        states.append(state)
    return log_rates, torch.stack(states, -1).numpy()


def one(design: tuple[int, int, int, float], seed: int) -> dict[str, Any]:
    """Return rank, coverage and k-hat of one simulated data set."""
    size, _, _, dt = design
    log_rates, states = simulate(*design, seed)
    panel = panel_of(states, dt, size)
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the draws have a seed of their own, or the first of them would be made of the numbers that the truth is made of
        fit = fit_rates(panel, prior=(0.0, 1.0), num_draws=DRAWS, seed=1_000_000 + seed)
    spent = time.process_time() - begin
    truth = log_rates[fit.links[:, 0], fit.links[:, 1]]
    ranks = (fit.draws < truth).double().mean(0)
    which = np.random.default_rng(seed).integers(len(truth))
    inside = [float(((ranks - 0.5).abs() < level / 2).double().mean()) for level in LEVELS]
    return {
        "rank": float(ranks[which]),
        "inside": inside,
        "khat": fit.khat,
        "effective": fit.effective,
        "moved": fit.moved,
        "seconds": spent,
    }


def rows_of(k: int, seeds: range, path: Path) -> list[dict[str, Any]]:
    """Return the results of some data sets of a design, those that the file doesn't hold yet made now."""
    done: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["design"] == k:
                done[row["seed"]] = row
    for seed in seeds:
        if seed not in done:
            done[seed] = {"design": k, "seed": seed, **one(DESIGNS[k], seed)}
            with path.open("a") as file:
                file.write(json.dumps(done[seed]) + "\n")
    return [done[seed] for seed in seeds]


def summary_of(k: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the rows of a design say of calibration and of the weights."""
    khat = np.array([row["khat"] for row in rows])
    inside = np.array([row["inside"] for row in rows])
    return {
        "design": DESIGNS[k],
        "num": len(rows),
        "pvalue": float(kstest([row["rank"] for row in rows], "uniform").pvalue),
        "coverage": inside.mean(0).round(4).tolist(),
        # over data sets: rates of one data set aren't independent
        "coverage_error": (inside.std(0, ddof=1) / len(rows) ** 0.5).round(4).tolist(),
        "khat": np.quantile(khat, (0.5, 0.95)).round(3).tolist(),
        "share_poor": float((khat > 0.7).mean()),
        "share_moved": float(np.mean([row["moved"] for row in rows])),
        "effective": float(np.median([row["effective"] for row in rows])),
        "milliseconds": float(1000 * np.median([row["seconds"] for row in rows])),
    }


def main() -> None:
    """Run the designs that are asked for, and keep their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--designs", type=int, nargs="*", default=list(range(len(DESIGNS))))
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="seed of the first data set")
    parser.add_argument("--rows", type=Path, default=RESULTS.with_name("sbc.rows.tmp"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text()) if options.out.exists() else {"designs": {}}
    seeds = range(options.first, options.first + options.num)
    for k in options.designs:
        summary = summary_of(k, rows_of(k, seeds, options.rows))
        found["designs"][str(k)] = summary
        found["machine"] = machine("scipy")
        print(json.dumps(summary), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
