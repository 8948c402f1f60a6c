"""Time of a gradient of the evidence of a thousand series at their own times, beside a thousand on one common grid.

Run it with one thread and nothing else on the machine:

    OMP_NUM_THREADS=1 python benchmarks/core/panels.py

It writes ``benchmarks/core/results/panels.json``; ``benchmarks/core/panels_table.py`` makes the table of the documentation out of
that file. ``--smoke`` runs everything once on tiny sizes and writes nothing unless told to.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine
from torch import Tensor

import stochdyn as sd

RESULTS = Path(__file__).parent / "results" / "panels.json"
F64 = torch.float64
SHORTEST, LONGEST = 20, 50


def gradient(ts: Tensor, y: Tensor, dim: int) -> Callable[[], object]:
    """Return what takes the gradient of the evidence in the rate of every series and the noise that all share."""
    series = y.shape[0]
    rate = torch.full((series, 1, 1), 0.7, dtype=F64, requires_grad=True)
    noise = torch.full((1,), 0.5, dtype=F64, requires_grad=True)
    matrix = torch.tensor([[0.0, 1.0], [-1.0, -0.5]], dtype=F64) if dim == 2 else -torch.eye(1, dtype=F64)
    eye, zero = torch.eye(dim, dtype=F64), torch.zeros(dim, dtype=F64)

    def run() -> object:
        law = sd.LinearGaussianMeasure(matrix * rate, zero, eye * noise, zero + 1.0)
        site = sd.infer.LinearObservations(law, ts, 0.15, eye[:1])
        return torch.autograd.grad(site.log_prob(y).sum(), [rate, noise])

    return run


def cases(series: int, dim: int) -> dict[str, Callable[[], object]]:
    """Return the panel and common grids as long as its longest and as its mean series."""
    source = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (series,), generator=source).tolist()
    times = [torch.rand(n, generator=source, dtype=F64).mul(10).add(0.01).sort().values for n in lengths]
    panel = sd.Panel.from_arrays(times, [torch.randn(n, 1, generator=source, dtype=F64) for n in lengths])
    found = {"own times": gradient(panel.times, panel.values, dim)}
    for name, count in (("common, as long as the longest", LONGEST), ("common, as many values", 35)):
        y = torch.randn(series, count, 1, generator=source, dtype=F64)
        found[name] = gradient(torch.linspace(0.01, 10, count, dtype=F64), y, dim)
    return found


def main() -> None:
    """Measure all, interleaved, and write the least times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    series, repeats = (5, 1) if options.smoke else (1000, 12)
    rows = []
    for dim in (1, 2):
        runs = cases(series, dim)
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(repeats + 1):  # the first time warms up
            for name, run in runs.items():
                start = time.process_time()
                run()
                best[name] = min(best[name], 1e3 * (time.process_time() - start))
        for name, milliseconds in best.items():
            rows.append({"dim": dim, "case": name, "milliseconds": milliseconds})
            print(f"{dim} components, {name}: {milliseconds:.1f} ms, {best['own times'] / milliseconds:.2f}")
    result = {
        "machine": machine(),
        "smoke": options.smoke,
        "series": series,
        "repeats": repeats,
        "rows": rows,
    }
    out = options.out if options.out is not None else None if options.smoke else RESULTS
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
