"""Coverage of posterior intervals on simulated Lotka-Volterra data: ``python benchmarks/bridges/intervals.py [--smoke]``.

Each data set has fresh particles at every snapshot; each posterior is a bootstrap by linear response.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import stochdyn as sd
from stochdyn.bridges import LotkaVolterra, Sinkhorn, Snapshots, bootstrap, refine

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

NAMES = ("alpha", "beta", "gamma", "delta")


def run(seed: int, draws: int) -> dict[str, Any]:
    """Fit one data set and look where the truth lies in each interval."""
    data = sd.datasets.lotka_volterra(50, times=[0.0, 2.0, 4.0, 6.0, 8.0], generator=seed)
    began = time.process_time()
    fit = refine(
        Snapshots(data.times, data.samples),
        LotkaVolterra(),
        0.1,
        max_iterations=20,
        dt=0.1,
        tolerance=0.02,
        method=Sinkhorn(num_nodes=40000),
    )
    fitted = time.process_time()
    idata = bootstrap(fit, draws, seed=seed)
    ended = time.process_time()
    rows = {}
    for name in NAMES:
        values = torch.as_tensor(idata.posterior[name].values.copy()).flatten()
        low, high = (float(values.quantile(q)) for q in (0.05, 0.95))
        truth = data.parameters[name]
        rows[name] = {
            "estimate": float(fit.parameters[name]),
            "mean": float(values.mean()),
            "interval": [low, high],
            "covered": low <= truth <= high,
        }
    return {
        "seed": seed,
        "parameters": rows,
        "refinement seconds": fitted - began,
        "posterior seconds": ended - fitted,
    }


def main() -> None:
    """Run all data sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--first", type=int, default=0, help="first data set; earlier results are kept")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "coverage.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, draws = (1, 20) if options.smoke else (options.count, 200)
    rows = json.loads(options.out.read_text())["rows"] if options.first and options.out.exists() else []
    for seed in range(options.first, options.first + count):
        rows.append(run(seed, draws))
        print(json.dumps(rows[-1]), flush=True)
    hits = [rows_["covered"] for row in rows for rows_ in row["parameters"].values()]
    result = {
        "machine": machine(),
        "smoke": options.smoke,
        "level": 0.9,
        "draws": draws,
        "data sets": len(rows),
        "coverage": sum(hits) / len(hits),
        "by parameter": {n: sum(r["parameters"][n]["covered"] for r in rows) / len(rows) for n in NAMES},
        "rows": rows,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(result["coverage"], result["by parameter"])


if __name__ == "__main__":
    main()
