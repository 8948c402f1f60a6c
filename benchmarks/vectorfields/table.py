"""Turn the JSON of ``run.py`` into the tables of the documentation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import markdown_table, write_table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TABLE = ROOT / "docs" / "generated" / "vectorfields_benchmarks.md"


def accuracy(report: dict[str, Any], title: str, text: str) -> list[str]:
    """Models down, tasks across; the mean over splits, the best in bold."""
    rows = report["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    models = sorted(dict.fromkeys(row["model"] for row in rows), key="auto".__eq__)
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["task"]), []).append(row)
    best = {
        task: min(mean(r["error"] for r in cells[m, task]) for m in models if (m, task) in cells)
        for task in tasks
    }
    table = [["model", *tasks]]
    for model in models:
        line = [model]
        for task in tasks:
            found = cells.get((model, task))
            if not found:
                line.append("–")
                continue
            error = mean(r["error"] for r in found)
            shown = f"**{error:.3f}**" if error <= best[task] * 1.0005 else f"{error:.3f}"
            line.append(
                f"{shown} / {mean(r['nlpd'] for r in found):.2f} / {mean(r['coverage'] for r in found):.0%}"
            )
        table.append(line)
    chosen = [
        ["task", "splits", "`auto` chose", "its error: mean (least to most)", "mean / best single kernel's"]
    ]
    for task in tasks:
        auto = cells.get(("auto", task))
        if not auto:
            continue
        singles = [
            mean(r["error"] for r in cells[m, task]) for m in models if m != "auto" and (m, task) in cells
        ]
        errors = [r["error"] for r in auto]
        ratio = f"{mean(errors) / min(singles):.2f}" if singles else "–"
        names = "; ".join(sorted({r["chosen"] for r in auto}))
        spread = f"{mean(errors):.4f} ({min(errors):.4f} to {max(errors):.4f})"
        chosen.append([task, str(len(auto)), names, spread, ratio])
    return [
        f"### {title}",
        "",
        text,
        "",
        *markdown_table(table),
        *(markdown_table(chosen) if len(chosen) > 1 else []),
    ]


def speed(report: dict[str, Any]) -> list[str]:
    """Ratios, and cost against size."""
    rows = report["rows"]
    lines = ["### Speed", "", "Processor seconds, the least of several turns.", ""]
    for row in rows:
        if row["task"] == "eigenpairs":
            lines += [
                f"{row['k']} eigenpairs of the connection Laplacian on {row['n']} points: {row['ours']:.2f} s, against "
                f'{row["theirs"]:.1f} s of `eigsh(which="SM")` on the same matrix, **{row["ratio"]:.1f} times** (target: 5); the '
                f"eigenvalues differ by at most {row['agreement']:.1e}.",
                "",
            ]
        if row["task"] == "regression":
            how = (
                f"that of one evaluation ({row['dense evaluations']} were timed) times the {row['ours evaluations']} that ours took"
                if row["dense stopped early"]
                else f"{row['dense evaluations']} evaluations against {row['ours evaluations']} of ours"
            )
            lines += [
                f"Fit and prediction on {row['n']} points, half of them observed, {row['k']} modes: {row['ours fit']:.3f} + "
                f"{row['ours predict']:.3f} s, against {row['dense fit']:.0f} + {row['dense predict']:.1f} s of a dense {row['rows']} by "
                f"{row['rows']} Gaussian process of the reference's form ({how}), **{row['ratio']:.0f} times** (target: 1000).",
                "",
            ]
    sizes = sorted((row for row in rows if row["task"] == "scaling"), key=lambda row: row["n"])
    if sizes:
        table = [
            [
                "points",
                "graph and frames",
                "100 eigenpairs",
                "fit",
                "prediction",
                "total",
                "per 1000 points",
                "peak memory (MiB)",
            ]
        ]
        for row in sizes:
            seconds = [f"{row[name]:.2f}" for name in ("graph", "spectrum", "fit", "predict", "total")]
            table.append(
                [str(row["n"]), *seconds, f"{1000 * row['total'] / row['n']:.3f}", f"{row['megabytes']:.0f}"]
            )
        lines += ["Cost against size on random points of a sphere:", "", *markdown_table(table)]
    return lines


def coverage(report: dict[str, Any]) -> list[str]:
    """Coverage of 95 % bands, places across."""
    rows = report["rows"]
    table = [["cloud", "kernel", "field", "nodes left out", "inside", "in a hole", "past the border"]]
    cells: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["geometry"], row["model"], row["field"]), {})[row["places"]] = row
    for about, places in cells.items():
        shown = [
            f"{places[p]['coverage']:.1%} ({places[p]['rms z']:.2f})" if p in places else "–"
            for p in ("nodes", "inside", "hole", "border")
        ]
        table.append([*about, *shown])
    text = (
        "Share of the components that 95 % bands hold, with the root mean square of the errors in units of their standard deviation; "
        f"{report['points']} points, half of them observed with a tenth of noise, {report['seeds']} draws of clouds and fields. "
        "Rough fields are drawn from a Matérn 3/2 "
        "process of the surrounding space, smooth ones from a squared exponential, so that only the ambient kernel has the prior of the rough ones."
        " Where a field is smoother than the prior, bands are too wide, most of all far from data, as in the hole: they hold what the "
        "prior allows there. A kernel as smooth as the field (`nu=inf` of the ambient one) narrows them."
    )
    return ["### Coverage between the nodes", "", text, "", *markdown_table(table)]


def render(folder: Path) -> str:
    """Return the Markdown of all parts that were measured."""
    lines: list[str] = []
    machine = None
    titles = {
        "bunny": (
            "Bunny",
            "Relative error of held-out vectors / negative log density / coverage of 95 % intervals, the last two per "
            "tangent component. Least error in bold. The *diffused* field is the RVGP paper's own: random vectors diffused by the same "
            "Laplacian that the connection kernels are made of, then made unit vectors. *Shadow* is a smooth field of space, "
            "projected to the surface. Percentages: share of nodes observed. Holes: all nodes observed but those within 0.015 units "
            "of a place, of which the second is a zero of the field; there the unit vectors jump, which no kernel here can "
            "represent, and all are too sure. Errors are means over random splits; splits on which the candidates of `auto` were "
            "designed aren't used, but for one of the two of the whole bunny (n = 2176), on which the sum was tried first. "
            "The sum of two kernels wasn't fitted around holes: its search on 4000 rows takes many minutes.",
        ),
        "wind": (
            "Wind",
            "Mean wind of January and July at 200 hPa on 2000 points, in units of its root mean square: error / negative log density / coverage; "
            "means over both months and five splits each.",
        ),
    }
    for part in ("coverage", "bunny", "wind", "speed"):
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        machine = report["machine"]
        if part == "coverage":
            lines += coverage(report)
        else:
            lines += speed(report) if part == "speed" else accuracy(report, *titles[part])
    if machine is not None:
        lines.append(
            f"Measured on {machine['cores']} cores ({machine['processor']}), {machine['threads']} thread, other work running, torch "
            f"{machine['torch']}, scipy {machine['scipy']}, gpytorch {machine['gpytorch']}, Python {machine['python']}; "
            "processor time."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the tables."""
    write_table(render, RESULTS, TABLE, __doc__)


if __name__ == "__main__":
    main()
