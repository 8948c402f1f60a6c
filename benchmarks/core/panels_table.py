"""Make the table of panels out of the measurements: ``python benchmarks/core/panels_table.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import write_table

HERE = Path(__file__).parent
SOURCE = HERE / "results" / "panels.json"
TARGET = HERE.parents[1] / "docs" / "generated" / "panel_benchmarks.md"


def render(results: Path) -> str:
    """Return the Markdown of one set of measurements."""
    result = json.loads(results.read_text(encoding="utf-8"))
    machine, rows = result["machine"], result["rows"]
    lines = [
        f"Gradient of the evidence of {result['series']} series in a rate for each and a noise strength for all, on "
        f"{machine['processor']} with one thread, torch {machine['torch']}: processor milliseconds, the least of "
        f"{result['repeats']} interleaved repetitions. Series at their own times have 20 to 50 of them; a ratio is their time over that of the row.",
        "",
        "| components of the state | times | milliseconds | ratio |",
        "|--:|---|--:|--:|",
    ]
    own = {row["dim"]: row["milliseconds"] for row in rows if row["case"] == "own times"}
    for row in rows:
        ratio = own[row["dim"]] / row["milliseconds"]
        lines.append(f"| {row['dim']} | {row['case']} | {row['milliseconds']:.1f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_table(render, SOURCE, TARGET, __doc__)
