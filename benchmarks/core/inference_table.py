"""Make the table of inference steps out of the measurements: ``python benchmarks/core/inference_table.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import write_table

HERE = Path(__file__).parent
SOURCE = HERE / "results" / "inference.json"
TARGET = HERE.parents[1] / "docs" / "generated" / "inference_benchmarks.md"


def render(results: Path) -> str:
    """Return the Markdown of one set of measurements."""
    result = json.loads(results.read_text(encoding="utf-8"))
    lines = [
        "Processor time of one SVI step in milliseconds, the least of 40, with one thread on a machine of two cores that others "
        "use as well; both versions were measured one after the other. In brackets: how often a step runs the user's model.",
        "",
        "| model | version 0.1.0 | now | ratio |",
        "|---|--:|--:|--:|",
    ]
    for case, columns in result.items():
        old, new = columns["0.1.0"], columns["now"]
        ratio = old["milliseconds"] / new["milliseconds"]
        cells = [f"{c['milliseconds']:.1f} ({c['model_runs']})" for c in (old, new)]
        lines.append(f"| {case} | {cells[0]} | {cells[1]} | {ratio:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_table(render, SOURCE, TARGET, __doc__)
