"""Make the table of calibration out of the measurements: ``python benchmarks/core/calibration_table.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _calibration import coverage_table
from _common import write_table

HERE = Path(__file__).parent
SOURCE = HERE / "results" / "calibration.json"
TARGET = HERE.parents[1] / "docs" / "generated" / "calibration_benchmarks.md"
SAID = {
    "relaxation": "Ornstein–Uhlenbeck process, 30 noisy values, path integrated out",
    "subjects": "hierarchy of eight such processes, 12 values each at times of their own",
    "growth": "logistic growth with noise, 16 Poisson counts, path sampled",
    "channel": "hidden jumps between two states, 101 noisy values, path summed out",
}


def render(results: Path) -> str:
    """Return the Markdown of one set of measurements."""
    report = json.loads(results.read_text(encoding="utf-8"))
    kinds = [report[kind] for kind in SAID if kind in report]
    seconds = [kind["seconds"] / len(kind["rows"]) for kind in kinds]
    poor = sum(row["khat"] > 0.7 for kind in kinds for row in kind["rows"])
    total = sum(len(kind["rows"]) for kind in kinds)
    failed = [error for kind in kinds for error in kind.get("failed", {}).values()]
    lines = [
        "How many central intervals of `fit_posterior` with its defaults cover the truth, over data sets whose parameters and paths are drawn "
        "from the prior, and by how many binomial errors that is off; p-value of uniform ranks (Kolmogorov–Smirnov).",
        "",
        *coverage_table(report, SAID, "model"),
        f"A fit takes {min(seconds):.1f} to {max(seconds):.1f} processor seconds on a busy {report['machine']['processor']}, torch "
        f"{report['machine']['torch']}. All fits count, the {poor} of {total} that warned of a k-hat above 0.7 included.",
        f"Left out are {len(failed)} that ended in an error: {', '.join(sorted(set(failed)))}."
        if failed
        else "",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_table(render, SOURCE, TARGET, __doc__)
