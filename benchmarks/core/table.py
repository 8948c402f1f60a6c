"""Make the documentation's table out of the measurements: ``python benchmarks/core/table.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE / "results" / "core.json"
TARGET = HERE.parents[1] / "docs" / "generated" / "core_benchmarks.md"

NETWORKS = {
    "torch layers": ("`nn.Sequential`", "the same"),
    "fused": ("`MLP`", "the same"),
    "fused against torch layers": ("`MLP`", "`nn.Sequential`, same weights"),
}


def render(result: dict[str, Any]) -> str:
    """Return the Markdown of one set of measurements."""
    machine = result["machine"]
    rows = [row for row in result["speed"] if result["smoke"] or row["steps"] > 8]
    lines = [
        f"Measured on {machine['processor']} with {machine['threads']} thread of {machine['cores']} cores, "
        f"Python {machine['python']}, torch {machine['torch']}, torchsde {machine['torchsde']}: processor time in "
        f"milliseconds, the least of {rows[0]['repeats']} interleaved repetitions ({rows[-1]['repeats']} for 1000 "
        f"steps), batch {rows[0]['batch']}. A ratio says how many times longer torchsde takes.",
        "",
        "| equation | network in stochdyn | network in torchsde | steps | pass | stochdyn | torchsde, defaults "
        "| ratio | torchsde, tuned noise | ratio |",
        "|---|---|---|--:|---|--:|--:|--:|--:|--:|",
        *map(_speed_row, rows),
        "",
        '*Defaults*: `sdeint(..., method="euler", dt=...)`, over the noise types that the equation allows (the fastest '
        "to the slowest). *Tuned noise*: a `BrownianInterval` that knows the step and keeps all it has drawn, with "
        "the noise type that comes last in the measurements.",
        "",
        "| back-propagation | plain | checkpointed | memory ratio | time ratio |",
        "|---|--:|--:|--:|--:|",
        *map(_memory_row, result["memory"]),
        "",
        "Growth of the peak resident memory in MiB by one forward and backward pass, in a process of its own; "
        "`checkpoint=True` stores every fourteenth of 200 steps and recomputes the others.",
    ]
    return "\n".join(lines) + "\n"


def _speed_row(row: dict[str, Any]) -> str:
    networks = row["case"].partition(" / ")[2]
    ours, theirs = NETWORKS.get(networks, ("none", "none"))
    contenders = row["contenders"]
    default = [c for name, c in contenders.items() if "ratio" in c and "tuned" not in name]
    tuned = next(c for name, c in contenders.items() if "tuned" in name)
    cells = [
        row["equation"],
        ours,
        theirs,
        str(row["steps"]),
        "forward and backward" if row["backward"] else "forward",
        _milliseconds([contenders["stochdyn"]["total"]]),
        _milliseconds([c["total"] for c in default]),
        _span([c["ratio"] for c in default], 1),
        _milliseconds([tuned["total"]]),
        f"{tuned['ratio']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _memory_row(row: dict[str, Any]) -> str:
    kind, _, networks = row["case"].partition(" / ")
    name = {"memory": "one state with four memory states", "independent": "five states"}.get(kind, "drift -x")
    network = NETWORKS[networks][0] if networks else "no network"
    return (
        f"| {name}, {network}, {row['steps']} steps | {row['plain']:.0f} | {row['checkpointed']:.0f} "
        f"| {row['ratio']:.2f} | {row['slowdown']:.2f} |"
    )


def _milliseconds(seconds: list[float]) -> str:
    return _span([1e3 * s for s in seconds], 0 if min(seconds) >= 0.0995 else 1)


def _span(values: list[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def main() -> None:
    """Write the table."""
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(render(json.loads(SOURCE.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
