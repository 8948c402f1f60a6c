"""Bridge matching on Gaussians in 5, 20 and 50 dimensions: ``python benchmarks/bridges/matching.py [--smoke]``.

Both ends are N(-0.1, I) and N(0.1, I), the reference is Brownian of scale one over time one. The exact bridge has the covariance
(sqrt(5) - 1) / 2 in every component. The networks never see the formula, nor that components are independent.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from stochdyn.bridges import BridgeMatching, Snapshots

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

EXACT = (math.sqrt(5) - 1) / 2


def run(dim: int, width: int, steps: int, particles: int, seed: int) -> dict[str, Any]:
    """Train, and measure the law that the forward network makes of fresh particles of the first end."""
    torch.manual_seed(seed)
    snaps = Snapshots([0.0, 1.0], [torch.randn(particles, dim) - 0.1, torch.randn(particles, dim) + 0.1])
    match = BridgeMatching(snaps, 1.0, width=width, refresh=50, num_steps=20, batch_size=512)
    began = time.process_time()
    match.fit(steps, seed=seed, progress=False)
    seconds = time.process_time() - began
    x, y = match.couple(0, 100_000, torch.Generator().manual_seed(seed + 1))
    found = {
        "mean": float(y.mean()),
        "variance": float(y.var(0).mean()),
        "covariance": float(((x - x.mean(0)) * (y - y.mean(0))).mean()),
    }
    truth = {"mean": 0.1, "variance": 1.0, "covariance": EXACT}
    return {
        "dimensions": dim,
        "width": width,
        "steps": steps,
        "seed": seed,
        "seconds": seconds,
        **found,
        # the mean is a hundredth of the spread of a particle, so its error is told in units of that spread too
        "errors": {k: abs(found[k] / truth[k] - 1) for k in truth},
        "mean error / standard deviation": abs(found["mean"] - 0.1),
    }


def main() -> None:
    """Run all dimensions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "matching.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dim in (5, 20, 50):
        for width in (0, 128):
            steps = 100 if options.smoke else 1200 if width else 2000
            rows.append(run(dim, width, steps, 2000 if options.smoke else 200_000, seed=0))
            print(json.dumps(rows[-1]))
    options.out.parent.mkdir(exist_ok=True)
    result = {"machine": machine(), "smoke": options.smoke, "exact": EXACT, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
