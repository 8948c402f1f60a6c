"""Make the tables of cells, bridge matching and coverage: ``python benchmarks/bridges/table_inference.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / "docs" / "generated"


def cells(result: dict[str, Any]) -> str:
    """W1 on left-out times."""
    rows = result["rows"]
    methods = list(rows[0]["w1"])
    times = " | ".join(f"t = {row['time']:g}" for row in rows)
    lines = [f"| W1, lower is better | {times} | mean |", "|---|" + "--:|" * (len(rows) + 1)]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    for name in methods:
        own = [mean(row["w1"][name]) for row in rows]
        lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in [*own, mean(own)]) + " |")
    floor = [row["floor"] for row in rows]
    lines.append(
        "| halves of the held-out time | " + " | ".join(f"{v:.3f}" for v in [*floor, mean(floor)]) + " |"
    )
    chosen = ", ".join(f"{row['diffusion']:g}" for row in rows)
    growth = ", ".join(f"{row['growth']:g} ({row['ridge']:g})" for row in rows)
    static = mean([mean(row["w1"]["static optimal transport, midpoint"]) for row in rows])
    grown = mean([mean(row["w1"]["growing bridge, 5000 draws"]) for row in rows])
    seeds = len(next(iter(rows[0]["w1"].values())))
    size, components = result["cells"][0], result.get("components", 5)
    lines += [
        "",
        f"Data: {result['data']}, {components} components, {size} cells per time; means over {seeds} seeds; flow matching trained for "
        f"{result['steps']} steps (TorchCFM {result['machine'].get('torchcfm', '?')}). Chosen without the held-out time: diffusions "
        f"{chosen}; shares of growth (ridges) {growth}. The growing bridge is {1 - grown / static:.1%} below the static midpoint. "
        f"{_machine(result)}",
    ]
    return "\n".join(lines) + "\n"


def matching(result: dict[str, Any]) -> str:
    """Gaussian benchmark of bridge matching."""
    lines = [
        "| dimensions | drift | mean (0.1) | variance (1) | covariance (0.6180) | processor seconds |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        drift = "affine" if row["width"] == 0 else f"affine and network of width {row['width']}"
        lines.append(
            f"| {row['dimensions']} | {drift} | {row['mean']:.4f} | {row['variance']:.4f} | {row['covariance']:.4f} | {row['seconds']:.0f} |"
        )
    return "\n".join([*lines, "", _machine(result)]) + "\n"


def coverage(result: dict[str, Any]) -> str:
    """Coverage of intervals."""
    by = ", ".join(f"{name} {value:.0%}" for name, value in result["by parameter"].items())
    seconds = [row["posterior seconds"] for row in result["rows"]]
    return (
        f"Nominal {result['level']:.0%}, {result['data sets']} simulated Lotka-Volterra data sets of 50 particles per snapshot: "
        f"covered {result['coverage']:.1%} of {4 * result['data sets']} ({by}); {result['draws']} draws in "
        f"{sum(seconds) / len(seconds):.0f} processor seconds. {_machine(result)}\n"
    )


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['processor']}, {machine['threads']} thread of {machine['cores']} cores, torch {machine['torch']}."


def main() -> None:
    """Write every table whose measurements are there."""
    for name, render in {
        "cells": cells,
        "cells_ten": cells,
        "matching": matching,
        "coverage": coverage,
    }.items():
        source = HERE / "results" / f"{name}.json"
        if source.exists():
            target = TARGET / f"bridges_{name}.md"
            target.write_text(render(json.loads(source.read_text())), encoding="utf-8")
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
