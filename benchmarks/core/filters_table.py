"""Make the table of particle filters out of the measurements: ``python benchmarks/core/filters_table.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import markdown_table, write_table

HERE = Path(__file__).parent
SOURCE = HERE / "results" / "filters.json"
TARGET = HERE.parents[1] / "docs" / "generated" / "filter_benchmarks.md"

ORDER = ("linear Gaussian", "stochastic volatility", "growth")


def render(results: Path) -> str:
    """Return the Markdown of one set of measurements."""
    result = json.loads(results.read_text(encoding="utf-8"))
    machine = result["machine"]
    rows: list[list[Any]] = [
        [
            "model",
            "filter",
            "series",
            "particles",
            "ms of `particles`",
            "its variance",
            "ms of its SQMC",
            "its variance",
            "our ms",
            "our variance",
            "ratio",
            "float32: ms",
            "ratio",
            "our evidence / exact",
        ]
    ]
    for row in sorted(
        result["rows"], key=lambda r: (ORDER.index(r["model"]), r["filter"], r["series"], r["particles"])
    ):
        peer, even, double, single = (
            row["rows"][n] for n in ("particles", "particles SQMC", "float64", "float32")
        )
        best = min(peer, even, key=_cost)
        rows.append(
            [
                row["model"],
                row["filter"],
                row["series"],
                row["particles"],
                f"{peer['milliseconds']:.0f}",
                _number(peer["variance"]),
                f"{even['milliseconds']:.0f}",
                _number(even["variance"]),
                f"{double['milliseconds']:.0f}",
                _number(double["variance"]),
                _ratio(best, double),
                f"{single['milliseconds']:.0f}",
                _ratio(best, single),
                _evidence(double),
            ]
        )
    head = (
        f"On {machine['processor']} with one thread, particles {machine['particles']}, torch {machine['torch']}: "
        f"series of {result['length']} values, processor milliseconds for all of them (the least of several interleaved "
        "runs, with the search for the guide in ours), and the variance of the log evidence between runs. The ratio is "
        "time × variance of `particles`, by its default or its sequential quasi-Monte Carlo (SQMC), whichever has less, over ours, "
        "in double and in single precision: above 1 ours needs less time for "
        "the same variance, above 2 less than half.\n\n"
    )
    return head + "\n".join(markdown_table(rows))


def _evidence(ours: dict[str, float]) -> str:
    """Return our evidence over the exact one, where the mean of so few draws says anything of it."""
    if ours["variance"] > 1.0:
        return ""
    off, error = ours["evidence over exact"], ours["stderr"]
    return f"{off:.6f}" if error < 1e-6 else f"{off:.3f} ± {error:.3f}"


def _number(variance: float) -> str:
    return "0" if variance < 1e-9 else f"{variance:.2g}"


def _cost(found: dict[str, float]) -> float:
    return found["milliseconds"] * found["variance"]


def _ratio(peer: dict[str, float], ours: dict[str, float]) -> str:
    if ours["variance"] < 1e-9:
        return "exact"
    return f"{_cost(peer) / _cost(ours):.2g}"


if __name__ == "__main__":
    write_table(render, SOURCE, TARGET, __doc__)
