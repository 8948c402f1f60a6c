"""Make the table of throughput out of the measurements: ``python benchmarks/core/scale_table.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import write_table

HERE = Path(__file__).parent
SOURCE = HERE / "results" / "scale.json"
TARGET = HERE.parents[1] / "docs" / "generated" / "scale_benchmarks.md"


def render(results: Path) -> str:
    """Return the Markdown of one set of measurements."""
    result = json.loads(results.read_text(encoding="utf-8"))
    machine, training = result["machine"], result["training"]
    lines = [
        f"Series per processor second, each of {result['times']} values at irregular times of its own, on {machine['processor']} with one "
        f"thread, torch {machine['torch']}; from one Parquet file in batches of {result['batch']} (after a pass that counts the "
        "series). Evidence is exact, with its gradient in rate and noise; a posterior is one draw of every path by a trained encoder. "
        f"Training that encoder, in batches of {training['batch']}, takes in {_short(training['series per second'])} series a second.",
        "",
        "| series | file | reading | evidence and gradient | amortised posterior | largest memory of the process |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        rates = [_short(row["series"] / row["seconds"][n]) for n in ("reading", "evidence", "posterior")]
        lines.append(
            f"| {row['series']:,} | {row['file megabytes']:.3g} MB | {' | '.join(rates)} | {row['megabytes']:.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def _short(rate: float) -> str:
    """Return a rate with two digits."""
    return f"{float(f'{rate:.2g}'):,.0f}"


if __name__ == "__main__":
    write_table(render, SOURCE, TARGET, __doc__)
