"""Are the exact posteriors of the Hurst index calibrated? Ranks and coverage over data sets drawn from the prior.

Run: ``python -m benchmarks.fractional.calibration --out benchmarks/fractional/results/calibration.json``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chisquare

from benchmarks.fractional.common import machine
from stochdyn.fractional import infer_hurst, infer_roughness, sample_fbm, sample_fgn

LEVELS = (0.5, 0.9)
DRAWS = 999


def series(hurst: float, g: torch.Generator) -> Any:
    """A series of 100 increments."""
    return infer_hurst(3 + 2 * sample_fgn(hurst, 100, generator=g), num_draws=DRAWS, predictive=False)


def gaps(hurst: float, g: torch.Generator) -> Any:
    """The same with a tenth of the values missing."""
    y = sample_fgn(hurst, 100, generator=g)
    y[torch.randperm(100, generator=g)[:10]] = torch.nan
    return infer_hurst(y, num_draws=DRAWS, predictive=False)


def several(hurst: float, g: torch.Generator) -> Any:
    """Ten series of 12 values with scales of their own."""
    rows = [(k + 1) * sample_fgn(hurst, 12, generator=g) for k in range(10)]
    return infer_hurst(rows, num_draws=DRAWS, predictive=False)


def tracks(hurst: float, g: torch.Generator) -> Any:
    """Eight tracks of 15 points in the plane, with drifts, and errors that are known."""
    rows = []
    for _ in range(8):
        x = sample_fbm(hurst, 14, horizon=14.0, sample_shape=2, generator=g).T
        x = x + 0.3 * torch.randn(15, 2, generator=g, dtype=x.dtype)
        rows.append(x + torch.arange(15.0)[:, None] * torch.randn(2, generator=g, dtype=x.dtype))
    return infer_roughness(rows, obs_scale=0.3, num_draws=DRAWS)


def calibrate(infer: Callable[[float, torch.Generator], Any], count: int) -> dict[str, Any]:
    """Ranks of the truth among the draws of each data set, with H uniform."""
    start, ranks = time.process_time(), []
    g = torch.Generator().manual_seed(20260101)
    for _ in range(count):
        hurst = float(torch.rand((), generator=g, dtype=torch.float64).clamp(0.001, 0.999))
        draws = infer(hurst, g).posterior["hurst"].values
        ranks.append(float((draws < hurst).mean()))
    found = np.array(ranks)
    counts = np.histogram(found, bins=10, range=(0, 1))[0]
    coverage = {f"{level:.0%}": float((np.abs(found - 0.5) < level / 2).mean()) for level in LEVELS}
    return {
        "data_sets": count,
        "coverage": coverage,
        "ranks": counts.tolist(),
        "p_uniform": float(chisquare(counts).pvalue),
        "seconds_per_data_set": (time.process_time() - start) / count,
    }


def main() -> None:
    """Calibrate each kind of data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table: dict[str, Any] = {"machine": machine()}
    for infer in (series, gaps, several, tracks):
        table[infer.__name__] = calibrate(infer, options.count)
        print(infer.__name__, table[infer.__name__], flush=True)
    if options.out:
        options.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
