"""Turn the JSON of ``run.py`` into the table of the documentation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "cpu.json"
TABLE = ROOT / "docs" / "generated" / "core_benchmarks.md"


def render(report: dict[str, Any]) -> str:
    """Return the Markdown of a report."""
    machine, setting = report["machine"], report["setting"]
    lines = [
        "Ratio: time of the other divided by ours, so more is better; the least processor time of several turns.",
        "",
        "| setting | steps | against | ours (ms) | theirs (ms) | ratio | target |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        mine = row["times"]["stochdyn"][row["key"]]
        for name, ratio in row["ratios"].items():
            target = f"{row['target']:g}" if name.startswith("torchsde") else ""
            cells = [row["name"], row["steps"], name, f"{mine:.1f}", f"{row['times'][name][row['key']]:.1f}"]
            lines.append("| " + " | ".join(map(str, [*cells, f"{ratio:.2f}", target])) + " |")
    memory = report["memory"]
    lines += [
        "",
        f"Tensors kept for back-propagation at once: {memory['plain_bytes'] / 1e6:.1f} MB plainly, "
        f"{memory['checkpointed_bytes'] / 1e6:.1f} MB with recomputed segments, "
        f"a ratio of {memory['ratio']:.2f} (target: at most 0.55).",
        "",
        f"Measured on {machine['cores']} cores ({machine['processor']}), {machine['threads']} thread, "
        f"torch {machine['torch']}, torchsde {machine['torchsde']}, Python {machine['python']}; "
        f"batch {setting['batch']}, {setting['states']} states, {setting['network']}, {setting['dtype']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(render(json.loads(options.result.read_text())))


if __name__ == "__main__":
    main()
