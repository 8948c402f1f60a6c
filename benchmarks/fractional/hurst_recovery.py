"""The Hurst index of noisy fractional Ornstein-Uhlenbeck series by variational inference of the path.

    OMP_NUM_THREADS=1 python benchmarks/fractional/hurst_recovery.py --n 200

Each series has an unknown Hurst index, rate and scale. The guide is AutoPathGuide with feedback recomputed for every draw
of these, which start at the Laplace approximation of their posterior; then the stock SVI fits their joint
normal law. No Kalman filter is involved in the fit. The yardstick is the Cramér-Rao bound of the same
noisy problem, rate and scale unknown, from the curvature of its exact Gaussian evidence.

Cells (a Hurst index and a length) are added to the JSON file one by one, so that a long run can be split.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from common import machine
from hurst_problem import STATES, cramer_rao, grid, model, simulate
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_median

import stochdyn as sd
from stochdyn.infer import AutoPathGuide, start_at_mode

RESULTS = Path(__file__).parent / "results" / "hurst_recovery.json"
DRAWS = 4000
#: Draws of the prior at which the search for the mode may begin: of long series the evidence has several modes.
STARTS = 16


def infer(hurst: float, n: int, seed: int, steps: int, particles: int) -> dict[str, float]:
    """Simulate one series and return the posterior of its Hurst index."""
    y, ts = simulate(hurst, n, seed), grid(n)
    begin = time.process_time()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoPathGuide(
        model,
        hidden=(),
        feedback="recomputed",
        rest=lambda m: AutoMultivariateNormal(m, init_loc_fn=init_to_median(num_samples=1), init_scale=0.1),
    )
    start_at_mode(guide, ts, y, num_starts=STARTS)
    optimiser = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.1 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, optimiser, elbo)
    losses = [svi.step(ts, y) for _ in range(steps)]
    with torch.no_grad(), pyro.plate("draws", DRAWS):
        draws = guide.rest(ts, y)["hurst"]
    low, high = (float(q) for q in torch.quantile(draws, torch.tensor([0.05, 0.95], dtype=draws.dtype)))
    return {
        "seed": seed,
        "mean": float(draws.mean()),
        "sd": float(draws.std()),
        "low": low,
        "high": high,
        "elbo": -sum(losses[-5:]) / len(losses[-5:]),
        "seconds": round(time.process_time() - begin, 2),
    }


def summarise(cell: dict[str, Any]) -> dict[str, Any]:
    """Add root mean square error, its ratio to the bound, and coverage."""
    fits, truth = cell["fits"], cell["hurst"]
    rmse = math.sqrt(sum((f["mean"] - truth) ** 2 for f in fits) / len(fits))
    inside = sum(f["low"] <= truth <= f["high"] for f in fits) / len(fits)
    return cell | {"rmse": rmse, "ratio": rmse / cell["cramer_rao"], "coverage of 90 % intervals": inside}


def main() -> None:
    """Run the cells asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one short series, to see that it runs")
    parser.add_argument("--n", type=int, nargs="*", default=[200, 1000])
    parser.add_argument("--hurst", type=float, nargs="*", default=[0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--first", type=int, default=0, help="first seed; series of other seeds in the file are kept"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", sd.errors.ApproximationWarning)
    pyro.enable_validation(False)
    out = options.out or (None if options.smoke else RESULTS)
    lengths, hursts, seeds = options.n, options.hurst, options.seeds
    if options.smoke:
        lengths, hursts, seeds = [30], [0.7], 1
    for n in lengths:
        for hurst in hursts:
            known = json.loads(out.read_text()) if out is not None and out.exists() else {"cells": []}
            fits = [f for c in known["cells"] if (c["n"], c["hurst"]) == (n, hurst) for f in c["fits"]]
            wanted = range(options.first, options.first + seeds)
            fits = [f for f in fits if f["seed"] not in wanted]
            for seed in wanted:
                fits.append(infer(hurst, n, seed, 3 if options.smoke else options.steps, options.particles))
                print(n, hurst, fits[-1], flush=True)
            cell: dict[str, Any] = {
                "n": n, "hurst": hurst, "states": STATES, "cramer_rao": cramer_rao(hurst, n), "fits": fits
            }  # fmt: skip
            cell = summarise(cell)
            print({k: v for k, v in cell.items() if k != "fits"}, flush=True)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                kept = [c for c in known["cells"] if (c["n"], c["hurst"]) != (n, hurst)]
                known = {
                    "machine": machine("torchsde", "pyro-ppl", "jax", "diffrax"),
                    "steps": options.steps,
                    "particles": options.particles,
                    "cells": [*kept, cell],
                }
                out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
