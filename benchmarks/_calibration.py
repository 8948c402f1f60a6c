"""What benchmarks of calibration share: ranks of the truth among posterior draws, their coverage, and runs that can be cut off.

Where the truth is drawn from the prior, its rank among the draws of a right posterior is uniform, and a central interval of the
level p covers it in a share p of the data sets.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import machine, markdown_table
from torch import Tensor

from stochdyn.errors import StochdynError

__all__ = [
    "DRAWS",
    "F64",
    "LEVELS",
    "coverage_table",
    "posterior_rank",
    "run_calibration",
    "seed_of",
    "summary",
]

LEVELS = (0.5, 0.8, 0.95)
DRAWS = 999
F64 = torch.float64

Kind = Callable[[torch.Generator], dict[str, float]]


def posterior_rank(draws: Any, truth: float) -> float:
    """Return the share of the draws below the truth."""
    values = draws if isinstance(draws, Tensor) else torch.as_tensor(draws.values)
    return float((values.flatten() < truth).double().mean())


def seed_of(g: torch.Generator) -> int:
    """A seed per data set: one for all would give all of them the same error of the draws, and so ranks that aren't uniform."""
    return int(torch.randint(2**31, (), generator=g))


def summary(rows: list[dict[str, float]], name: str) -> dict[str, Any]:
    """Coverage of central intervals, how many binomial errors it is off, and the p-value of uniform ranks."""
    from scipy.stats import kstest

    ranks = torch.tensor([row[name] for row in rows], dtype=F64)
    found: dict[str, Any] = {"data_sets": len(rows)}
    for level in LEVELS:
        covered = float(((ranks - 0.5).abs() < level / 2).double().mean())
        found[f"{level:.0%}"] = covered
        found[f"{level:.0%} off"] = (covered - level) / math.sqrt(level * (1 - level) / len(rows))
    found["p_uniform"] = float(kstest(ranks.numpy(), "uniform").pvalue)
    return found


def coverage_table(report: dict[str, Any], said: dict[str, str], subject: str) -> list[str]:
    """Return the lines of a table with a row for each parameter of each kind; ``said`` maps kinds to what they are called."""
    rows = []
    for kind, name in said.items():
        for parameter, found in report.get(kind, {}).get("summary", {}).items():
            cells = [
                f"{100 * found[level]:.0f} % ({found[level + ' off']:+.1f})"
                for level in (f"{p:.0%}" for p in LEVELS)
            ]
            rows.append([name, parameter, found["data_sets"], *cells, f"{found['p_uniform']:.2f}"])
    head = [subject, "parameter", "data sets", "50 % intervals", "80 %", "95 %", "p of uniform ranks"]
    return markdown_table([head, *rows])


def run_calibration(kinds: dict[str, Kind], results: Path, description: str | None) -> None:
    """Add data sets of each kind until there are as many as wanted; a run that is cut off goes on where it was.

    Each data set has a seed of its own, and its ranks are added to the JSON file as soon as they are known. ``khat`` among them is kept
    and isn't a rank. A fit that ends in an error of the library is counted by its name.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=list(kinds), default=list(kinds))
    parser.add_argument("--out", type=Path, default=results)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for kind in options.only:
        while True:
            state = json.loads(options.out.read_text()) if options.out.exists() else {}
            own = state.setdefault(kind, {"rows": [], "seconds": 0.0})
            failed = own.setdefault("failed", {})
            index = len(own["rows"]) + len(failed)
            if index >= options.count:
                break
            start = time.process_time()
            try:
                own["rows"].append(kinds[kind](torch.Generator().manual_seed(20260101 + index)))
            except StochdynError as error:
                failed[str(index)] = type(error).__name__
            own["seconds"] += time.process_time() - start
            own["summary"] = {n: summary(own["rows"], n) for n in own["rows"][0] if n != "khat"}
            state["machine"] = machine()
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        print(kind, own["summary"], f"{own['seconds'] / index:.2f} s each", flush=True)
