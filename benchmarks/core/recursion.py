"""Moments of linear-Gaussian chains: steps one by one against the scan in logarithmic depth, and what is chosen.

Run it with one thread and nothing else on the machine:

    OMP_NUM_THREADS=1 python benchmarks/core/recursion.py

It writes ``benchmarks/core/results/recursion.json``. ``--smoke`` runs tiny sizes once and writes nothing; ``--device cuda``
measures on a GPU, by the wall clock, and prints only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochdyn.core.gaussian import gaussian_moments, recursion

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

RESULTS = Path(__file__).parent / "results" / "recursion.json"
STEPS, SIZES, BATCHES = (64, 250, 1000), (1, 3, 6, 12, 25), (1, 8, 32, 128)
_MOST = 4_000_000  # numbers in a covariance tensor


def chain(steps: int, size: int, batch: int, device: str) -> tuple[Tensor, ...]:
    """Return a stable chain as the arguments of :func:`gaussian_moments`, in float64."""
    g = torch.Generator().manual_seed(0)
    a = 0.5 * torch.randn(steps, batch, size, size, generator=g, dtype=torch.float64) / size**0.5
    eye = torch.eye(size, dtype=torch.float64).expand(steps, batch, size, size).contiguous()
    offset = torch.randn(steps, batch, size, generator=g, dtype=torch.float64)
    return tuple(x.to(device) for x in (a, offset, eye, offset[0] * 0, eye[0]))


def least(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Return the least milliseconds of a call: of the processor, or on a GPU by the clock."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(repeats + 1):
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return 1e3 * best


def measure(steps: int, size: int, batch: int, device: str, repeats: int) -> dict[str, Any]:
    """Time both ways and the chosen one, forward alone and with the gradient."""
    parts = chain(steps, size, batch, device)
    leaves = [x.clone().requires_grad_() for x in parts]

    def forward() -> None:
        with torch.no_grad():
            gaussian_moments(*parts)

    def backward() -> None:
        mean, cov = gaussian_moments(*leaves)
        torch.autograd.grad(mean.sum() + cov.sum(), leaves)

    row: dict[str, Any] = {"steps": steps, "states": size, "batch": batch}
    own = recursion._scans
    for name, rule in (("walk", lambda *_: False), ("scan", lambda *_: True), ("chosen", own)):
        recursion._scans = rule  # type: ignore[assignment]
        row[name] = {"forward": least(forward, repeats, device), "both": least(backward, repeats, device)}
    recursion._scans = own
    return row


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    sizes = [(s, z, b) for s in STEPS for z in SIZES for b in BATCHES if s * b * z * z <= _MOST]
    if options.smoke:
        sizes = [(8, 2, 1), (40, 2, 1)]
    rows = [measure(*size, options.device, 1 if options.smoke else 3) for size in sizes]
    for row in rows:
        times = ", ".join(
            f"{name} {row[name]['forward']:.2f} ({row[name]['both']:.2f})"
            for name in ("walk", "scan", "chosen")
        )
        print(f"N={row['steps']} z={row['states']} B={row['batch']}: {times} ms")
    if not options.smoke and options.device == "cpu":
        RESULTS.write_text(
            json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
