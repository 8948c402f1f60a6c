"""Make the documentation's tables out of the measurements: ``python benchmarks/jumps/table.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import write_table

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / "docs" / "generated" / "jumps_benchmarks.md"


def render(results: Path) -> str:
    """Return the Markdown of a folder of results."""
    found = {
        name: json.loads((results / f"{name}.json").read_text())
        for name in ("race", "amortised", "sbc", "smfret")
    }
    machine = found["race"]["machine"]
    lines = [
        f"Measured on {machine['processor']}, one thread, torch {machine['torch']}, processor time; the machine had other work "
        f"(load {machine['load'][0]}).",
        "",
        *_races(found["race"]),
        *_ratchet(found["amortised"]["ratchet"]),
        *_coverage(found["amortised"]["coverage"]),
        *_calibration(found["sbc"]["designs"]),
        *_molecules(found["smfret"]),
    ]
    return "\n".join(lines) + "\n"


def _races(race: dict[str, Any]) -> list[str]:
    lines = ["| job | stochdyn | peer | its time | ratio | asked for |", "|---|--:|---|--:|--:|--:|"]
    for row in race["races"]:
        lines.append(
            f"| {row['job']} | {_time(row['seconds'])} | {row['peer']} | {_time(row['peer_seconds'])} | {row['ratio']:.3g} "
            f"| {row['bar']:.2g} |"
        )
    for row in race["alone"]:
        lines.append(f"| {row['job']} | {_time(row['seconds'])} | | | | at most {_time(row['bar'])} |")
    panel = race["alone"][0]
    lines += [
        "",
        f"Heart transplants: −2 log L = {panel['deviance']:.4f}; k-hat over {len(panel['khat'])} seeds "
        f"{min(panel['khat']):.2f} to {max(panel['khat']):.2f}, {min(panel['effective'])} to {max(panel['effective'])} effective draws.",
        "",
    ]
    return lines


def _ratchet(ratchet: dict[str, Any]) -> list[str]:
    lines = [
        f"Discrete flashing ratchet, {ratchet['contexts']} random contexts of 300 paths of 100 points from 2000 of the published paths: root mean "
        "square errors of the 30 rates, of their means over contexts, and of the 12 rates that are zero. The published row is "
        "that of the foundation inference model's notebook, on 50 contexts of the same size.",
        "",
        "| estimate | error | bias | zero rates | milliseconds |",
        "|---|--:|--:|--:|--:|",
    ]
    published = ratchet["published"]
    lines.append(
        f"| published | {published['rmse']:.4f} | {published['bias']:.4f} | {published['zeros']:.4f} | |"
    )
    names = {
        "network": "network alone",
        "exact": "exact likelihood, its maximum",
        "posterior": "exact likelihood, with 1000 posterior draws",
    }
    for key, name in names.items():
        row = ratchet[key]
        lines.append(
            f"| {name} | {row['rmse']:.4f} | {row['bias']:.4f} | {row['zeros']:.4f} | {row['milliseconds']:.0f} |"
        )
    lines += [
        "",
        "Potential, switching and free rate of these maxima, mean and standard deviation over contexts; the truth is one for each. The 2000 paths "
        "have a free rate of their own, which every context drawn from them inherits.",
        "",
        "| data | potential | switching | free |",
        "|---|--:|--:|--:|",
    ]
    for name, row in ratchet["parameters"].items():
        cells = " | ".join(
            f"{m:.4f} ± {s:.3f}" if s else f"{m:.4f}" for m, s in zip(row["mean"], row["std"], strict=True)
        )
        lines.append(f"| {name} | {cells} |")
    return [*lines, ""]


def _coverage(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Coverage of the network's 50, 80 and 95 % intervals of the rates of links, fresh data sets of 100 series of 50 visits, with the label error "
        "told to it and not; *drawn* is a label error drawn as in training. Where the error isn't told and is the largest of the training, two "
        "states can't be calibrated: their labels don't tell errors from jumps, and a posterior is right on average over its prior only.",
        "",
        "| states | label error | rates | told: 50 | 80 | 95 | not told: 50 | 80 | 95 | links right (told) |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    half = len(rows) // 2
    for told, hidden in zip(rows[:half], rows[half:], strict=True):
        numbers = " | ".join(f"{c:.3f}" for c in (*told["coverage"], *hidden["coverage"]))
        error = "drawn" if told["label_error"] is None else f"{told['label_error']:g}"
        lines.append(f"| {told['states']} | {error} | {told['rates']} | {numbers} | {told['links']:.3f} |")
    return [*lines, ""]


def _calibration(designs: dict[str, Any]) -> list[str]:
    lines = [
        "Simulation-based calibration of `fit_rates`: states, series, visits, interval; p-value of uniform ranks; coverage; k-hat.",
        "",
        "| design | data sets | p | 50 | 80 | 95 | k-hat median, 95 % | share above 0.7 | effective of 2000 | ms |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in designs.values():
        size, series, visits, dt = row["design"]
        low, high = row["khat"]
        coverage = " | ".join(f"{c:.3f}" for c in row["coverage"])
        lines.append(
            f"| {size}, {series}, {visits}, {dt:g} | {row['num']} | {row['pvalue']:.3f} | {coverage} | {low:.2f}, {high:.2f} "
            f"| {100 * row['share_poor']:.1f} % | {row['effective']:.0f} | {row['milliseconds']:.0f} |"
        )
    return lines


def _molecules(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"Single molecules: {found['traces']} simulated traces of ebFRET, {found['frames']} frames, a Gaussian level per state; log-likelihood of "
        "a jump process and of hmmlearn's model with free transition probabilities, each from clusters of the frames.",
        "",
        "| states | log-likelihood | hmmlearn | levels | stays in frames | s.d. of log rates | seconds | hmmlearn |",
        "|--:|--:|--:|---|---|---|--:|--:|",
    ]
    for states, fit in found["fits"].items():
        own, other = fit["stochdyn"], fit["hmmlearn"]
        spread = [s for row in own["log_rate_std"] for s in row if s > 0]
        lines.append(
            f"| {states} | {own['log_likelihood']:.2f} | {other['log_likelihood']:.2f} | {', '.join(f'{x:.3f}' for x in own['levels'])} "
            f"| {', '.join(f'{x:.0f}' for x in own['dwell_frames'])} | {min(spread):.2f} to {max(spread):.2f} "
            f"| {own['seconds']:.1f} | {other['seconds']:.1f} |"
        )
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


if __name__ == "__main__":
    write_table(render, HERE / "results", TARGET, __doc__)
