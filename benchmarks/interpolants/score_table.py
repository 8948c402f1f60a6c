"""Turn the JSON files of ``score.py`` into the tables of the documentation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import write_table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TABLE = ROOT / "docs" / "generated" / "score_benchmarks.md"

_LAWS = ("ode_truth", "sde_truth", "ode_sde")
_THEIR_POINTS = 100_000 * 200_000

_COST = """\
### What the residual costs

Forward and backward pass at {points} points, {network}, in steps of denoising score matching with the same network
(least processor time of 40 interleaved turns; target: at most {target:g}). *Both* is a training step with score and
residual at the same points; *nested* is automatic differentiation by nested reverse passes.

| dimensions | matching (ms) | exact | two probes | both, exact | both, two probes | nested, exact | nested, two probes |
| --- | --- | --- | --- | --- | --- | --- | --- |"""

_LINE = """\
### The gap on the line, without noise

Three Gaussians under an Ornstein–Uhlenbeck process; potentials of three layers of 48, {steps} steps of {batch} fresh
points, means over {count} seeds. The law of the ODE comes by its monotone flow and that of the SDE from its Fokker–Planck
equation on a grid (both right to 3e-5 for the true score), so differences aren't sampling noise. The last columns are relative
to weight 0: by how much the gap is divided, and the distance of the SDE multiplied.

| weight | ODE–SDE | ODE–truth | SDE–truth | KL(truth to SDE) | mean squared residual | gap ÷ | SDE × | training (s) |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""

_PLANE = """\
### Laws in the plane

Wasserstein distances between histograms of 64 × 64 cells on [-3.5, 3.5]², beside those of Deveney et al. (2025), recomputed
from the histograms that come with their code, with potentials of the same size (three layers of 80). Theirs: 100 000
steps of 200 000 points, 50 000 more for the residual, and 3 million samples by 890 evaluations. Ours: {steps} steps of
{batch} points; the ODE's law from quasi-random starts, the SDE's from its Fokker–Planck equation on a grid. Weights mean different things in
the two, since ours weigh the residual per unit of the log signal-to-noise ratio. *Floor* is the distance of 3 million samples of the
truth to the truth, and of a pair of such samples; the published numbers contain it.

Trained on {share:.0f} times fewer points, ours are ahead in {won} of {cells} cells.

| data | weight | ODE–truth | published | SDE–truth | published | ODE–SDE | published | floor | training (s) |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def cost(report: dict[str, Any]) -> list[str]:
    """Cost of the residual in steps of score matching."""
    lines = [_COST.format(**report)]
    columns = ["residual, exact", "residual, hutchinson", "both, exact", "both, hutchinson"]
    columns += ["residual, plain, exact", "residual, plain, hutchinson"]
    for dim, row in report["rows"].items():
        ratios = " | ".join(f"{row['ratio'][name]:.2f}" for name in columns)
        lines.append(f"| {dim} | {row['milliseconds']['matching']:.1f} | {ratios} |")
    return [*lines, "", _machine(report)]


def line(report: dict[str, Any]) -> list[str]:
    """The study on the line."""
    setting, rows = report["setting"], report["rows"]
    count = min(len(runs) for runs in rows.values())
    names = ["gap", "ode", "sde", "kl_sde", "residual", "seconds"]
    means = {
        label: {n: sum(run[n] for run in runs[:count]) / count for n in names} for label, runs in rows.items()
    }
    base = means.get("0")
    lines = [_LINE.format(**setting, count=count)]
    for label in rows:
        m = means[label]
        ratio = "" if base is None else f"{base['gap'] / m['gap']:.1f} | {m['sde'] / base['sde']:.2f}"
        cells = [f"{m[n]:.4f}" for n in ("gap", "ode", "sde", "kl_sde")]
        lines.append(
            f"| {label} | {' | '.join(cells)} | {m['residual']:.2g} | {ratio} | {m['seconds']:.0f} |"
        )
    return [*lines, "", _machine(report)]


def plane(reports: list[dict[str, Any]]) -> list[str]:
    """Three data sets in the plane beside the published distances."""
    setting = reports[0]["setting"]
    pairs = [
        (row[name], theirs)
        for report in reports
        for weight, row in report["rows"].items()
        for name, theirs in zip(_LAWS, report["published"].get(weight, ()), strict=False)
    ]
    lines = [
        _PLANE.format(
            **setting,
            share=_THEIR_POINTS / (setting["steps"] * setting["batch"]),
            won=sum(ours < theirs for ours, theirs in pairs),
            cells=len(pairs),
        )
    ]
    for report in reports:
        floors = report["floors"]
        for weight, row in sorted(report["rows"].items(), key=lambda item: float(item[0])):
            theirs = report["published"].get(weight)
            cells = []
            for k, name in enumerate(_LAWS):
                cells += [f"{row[name]:.4f}", f"{theirs[k]:.4f}" if theirs else ""]
            lines.append(
                f"| {report['setting']['dataset']} | {float(weight):g} | {' | '.join(cells)} | "
                f"{floors['to_truth']:.4f}, {floors['of_pair']:.4f} | {row['seconds']:.0f} |"
            )
        if "exact" in report:
            e = report["exact"]
            cells = f"{e['ode_truth']:.4f} | | {e['sde_truth']:.4f} | | {e['ode_sde']:.4f} |"
            lines.append(f"| {report['setting']['dataset']} | true score | {cells} | | |")
    return [*lines, "", _machine(reports[0])]


def _machine(report: dict[str, Any]) -> str:
    m = report["machine"]
    return (
        f"Measured on {m['cores']} cores ({m['processor']}), {m['threads']} thread, torch {m['torch']}, "
        f"Python {m['python']}; processor times."
    )


def render(results: Path) -> str:
    """Return the Markdown of all parts that were measured."""
    parts: list[str] = []
    for name, draw in (("cost", cost), ("line", line)):
        path = results / f"score_{name}.json"
        if path.exists():
            parts += [*draw(json.loads(path.read_text())), ""]
    planes = [json.loads(path.read_text()) for path in sorted(results.glob("score_plane_*.json"))]
    planes = [report for report in planes if report["rows"]]
    if planes:
        parts += plane(planes)
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the tables."""
    write_table(render, RESULTS, TABLE, __doc__)


if __name__ == "__main__":
    main()
