"""Turn the JSON of ``run.py`` and ``accuracy.py`` into the tables of the documentation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import write_table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TABLE = ROOT / "docs" / "generated" / "povm_benchmarks.md"

Report = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]]) + "\n"


def place(report: Report) -> str:
    """Say on which machine a report was measured."""
    m = report["machine"]
    parts = [m.get("processor"), f"{m['cores']} cores", f"{m['threads']} thread", f"torch {m['torch']}"]
    parts += [f"QuTiP {m['qutip']}"] if m.get("qutip") else []
    load = m.get("load", m.get("load at end"))
    parts += [f"load {load[0]:g}"] if load else []
    return ", ".join(str(p) for p in parts if p)


def named(report: Report) -> str:
    """Return the name of a case, with the version that it was measured with where that isn't the present one."""
    return report["case"] + (f" ({report['version']})" if "version" in report else "")


def sampling(report: Report) -> str:
    """Sampling with keys and values kept."""
    rows = [
        [
            r["sites"],
            r["batch"],
            f"{r['kept']:.2f}",
            f"{r['again']:.2f}",
            f"**{r['ratio']:.1f}**",
            report["target"],
        ]
        for r in report["rows"]
    ]
    head = ["sites", "samples", "kept (s)", "prefix run again (s)", "ratio", "target"]
    return "### Sampling\n\n" + table(head, rows)


def local(report: Report) -> str:
    """The local estimator."""
    rows = [
        [
            r["sites"],
            r["frame"],
            f"{r['connected']:.0f}",
            r["plain evaluations"],
            f"{1e3 * r['ours'] / r['samples']:.2f}",
            f"{1e3 * r['plain'] / r['samples']:.2f}",
            f"**{r['ratio']:.1f}**",
            report["target"],
        ]
        for r in report["rows"]
    ]
    head = [
        "sites",
        "frame",
        "connected",
        "plain evaluations",
        "ours (ms per sample)",
        "plain (ms)",
        "ratio",
        "target",
    ]
    return (
        "### Local estimator\n\nIsing ring; plain: a forward pass for each of the 16 outcomes of every bond.\n\n"
        + table(head, rows)
    )


def window(report: Report) -> str:
    """Long rings."""
    rows = [
        [
            r["sites"],
            f"{1e3 * r['window']:.3f}",
            f"{1e3 * r['transformer']:.1f}",
            f"**{r['ratio']:.0f}**",
            r["samples"],
            f"{r['step']:.1f}",
        ]
        for r in report["rows"]
    ]
    head = [
        "sites",
        "window (ms per sample)",
        "transformer (ms per sample)",
        "ratio",
        "samples",
        "a step (s)",
    ]
    note = (
        "Local rates of the Ising ring by a window of order 2 and by the transformer of the table above, both in double precision, and one "
        "step of Heun's method by the window.\n\n"
    )
    return "### Long rings\n\n" + note + table(head, rows)


def exact(report: Report) -> str:
    """Exact methods."""
    rows = [
        [
            r["sites"],
            f"{r['qutip']:.2f}",
            f"{r['matrix']:.2f}",
            f"{r['outcomes']:.2f}" if "outcomes" in r else "",
            f"{r['largest difference']:.0e}",
        ]
        for r in report["rows"]
    ]
    head = [
        "sites",
        "QuTiP (s)",
        "our matrix form (s)",
        "all outcome probabilities (s)",
        "largest difference in Z",
    ]
    note = f"\n{report['system']}, eleven times, relative tolerance {report['rtol']:g}.\n\n"
    last, before = report["rows"][-1], report["rows"][-2]
    growth = last["qutip"] / before["qutip"]
    where = (
        f"\nEach site more costs {growth:.1f} times as much here. Up to some ten sites nothing on these pages is a match for "
        "a density matrix, in time or in error; the variational runs are for what comes after.\n"
    )
    return "### Exact evolution\n" + note + table(head, rows) + where


def trajectories(report: Report) -> str:
    """Quantum trajectories by QuTiP."""
    rows = [[r["sites"], f"{r['seconds']:.2f}", f"{r['standard error of Z']:.3f}"] for r in report["rows"]]
    head = ["sites", f"QuTiP, {report['trajectories']} trajectories (s)", "largest standard error of Z"]
    return "### Quantum trajectories\n\n" + table(head, rows)


def estimators(report: Report) -> str:
    """Frames compared."""
    rows = [
        [
            r["frame"],
            f"{r['condition number']:.1f}",
            f"{r['variance of Z']:.0f}",
            *(f"{r[f'connected a site, {m}']:.1f}" for m in ("Ising", "XYZ", "dephasing Ising")),
            *(f"{r[f'largest row sum, {m}']:.0f}" for m in ("Ising", "XYZ", "dephasing Ising")),
        ]
        for r in report["rows"]
    ]
    head = ["frame", "condition of the overlap", "variance of Z"]
    head += [f"connected a site, {m}" for m in ("Ising", "XYZ", "dephasing")]
    head += [f"largest row sum, {m}" for m in ("Ising", "XYZ", "dephasing")]
    return f"### Frames\n\nRings of {report['sites']} sites.\n\n" + table(head, rows)


def inference(report: Report) -> str:
    """Parameters from records."""

    def interval(x: Report) -> str:
        return f"{x['low']:.3f} to {x['high']:.3f}" + ("" if x["inside"] else " (misses)")

    rows = [
        [
            r["method"],
            r["seed"],
            r["records"],
            interval(r["field"]),
            interval(r["decay"]),
            f"{r['khat']:.2f}" if r.get("khat") is not None else "",
            f"{r['seconds']:.0f}",
        ]
        for r in report["rows"]
    ]
    truth = report["truth"]
    head = [
        "method",
        "data set",
        "records",
        f"field, truth {truth['field']:g}",
        f"decay, truth {truth['decay']:g}",
    ]
    head += ["k-hat", "time (s)"]
    note = "Two sites, central 90 % intervals, so one in ten should miss; k-hat under 0.5 is the target.\n\n"
    inside = [r[name]["inside"] for r in report["rows"] if r["method"] == "svi" for name in truth]
    covered = f"\nBy variational inference {sum(inside)} of {len(inside)} intervals hold the truth.\n"
    return "### Parameters from measurement records\n\n" + note + table(head, rows) + covered


def netket(report: Report) -> str:
    """NetKet's density machine."""
    rows = [
        [
            r["field"],
            r["iterations"],
            f"{r['seconds']:.0f}",
            f"{r['compile_seconds']:.0f}",
            f"{r['largest error']:.4f}",
            f"{r['ours']['largest error']:.4f}" if "ours" in r else "",
            f"{r['ours']['seconds']:.0f}" if "ours" in r else "",
        ]
        for r in report["rows"]
    ]
    head = ["field", "iterations", "NetKet (s)", "to compile (s)", "NetKet's error", "our error", "ours (s)"]
    note = (
        "Ising ring of six sites; error: the largest of X, Y, Z. NetKet's density machine (174 parameters) with the settings of "
        "its documentation, the same at every field; where the error is large it had not converged after these "
        "iterations. Our time is that of `ring6-steady` above, which sums over all outcomes up to symmetry; NetKet samples.\n\n"
    )
    return f"### Steady state beside NetKet {report['netket']}\n\n" + note + table(head, rows)


SECTIONS: dict[str, Callable[[Report], str]] = {
    "sampling": sampling,
    "local": local,
    "window": window,
    "netket": netket,
    "exact": exact,
    "trajectories": trajectories,
    "estimators": estimators,
    "inference": inference,
}


def accuracy(reports: Sequence[Report]) -> str:
    """Errors against exact answers."""
    rows = []
    for r in reports:
        setting = r["setting"]
        bound = f"{setting['bound']:g}" if "bound" in setting else ""
        rows.append(
            [
                named(r) + (f", seed {r['seed']}" if r.get("seed") else ""),
                f"{setting['until']:g}",
                r["parameters"],
                setting["run"]["num_samples"] or "all",
                f"{r['largest']:.1e}",
                bound,
                f"{r['last']:.1e}" if "last" in r else "",
                f"{r['largest_of_pairs']:.1e}",
                f"{r['sampling_error']:.1e}" if r.get("sampling_error") else "",
                r.get("steps", ""),
                f"{r['processor_seconds']:.0f}",
                "yes" if r["kept"] else "**no**",
            ]
        )
    head = [
        "case",
        "to time",
        "parameters",
        "draws",
        "largest error",
        "bound",
        "error at the end",
        "largest error of pairs",
        "standard error",
        "steps",
        "time (s)",
        "kept",
    ]
    return (
        "### Accuracy\n\nLargest error over times of X, Y, Z (site means) against exact numbers, and of XX, YY, ZZ (bond means); times "
        "in processor seconds. The number of a name is that of its sites.\n\n" + table(head, rows)
    )


def steady(reports: Sequence[Report]) -> str:
    """Steady states over the field."""
    rows = [
        [
            named(r),
            row["field"],
            r["setting"]["run"]["num_samples"] or "all",
            f"{row['largest']:.1e}",
            f"{r['setting']['bound']:g}",
            f"{row['sampling_error']:.1e}" if row["sampling_error"] else "",
            f"{row['trace_distance']:.3f}" if "trace_distance" in row else "",
            f"{row['estimate']:.1e}" if row.get("estimate") is not None else "",
            f"{row['processor_seconds']:.0f}",
        ]
        for r in reports
        for row in r["rows"]
    ]
    head = ["case", "field", "draws", "largest error", "bound", "standard error", "trace distance"]
    head += ["residual over gap", "time (s)"]
    note = "Ising ring, largest error of X, Y, Z; sixteen sites against the exact numbers of ten.\n\n"
    return "### Steady states\n\n" + note + table(head, rows)


def beside(report: Report, ours: Sequence[Report]) -> None:
    """Put our steady states of six sites into the rows of NetKet's report."""
    rows = {row["field"]: row for r in ours if r["case"] == "ring6-steady" for row in r["rows"]}
    for row in report["rows"]:
        if row["field"] in rows:
            mine = rows[row["field"]]
            row["ours"] = {"largest error": mine["largest"], "seconds": mine["processor_seconds"]}


def render(results: Path) -> str:
    """Return the Markdown of all reports in a folder."""
    parts = []
    found = [json.loads(p.read_text()) for p in sorted((results / "accuracy").glob("*.json"))]
    moving, resting = [r for r in found if "rows" not in r], [r for r in found if "rows" in r]
    for some, write in ((moving, accuracy), (resting, steady)):
        if some:
            old = sorted({r["version"] for r in some if "version" in r})
            note = (
                f" Cases with ({', '.join(old)}) were measured with that version, whose defaults differ."
                if old
                else ""
            )
            parts.append(write(some) + f"\nMeasured on {place(some[-1])}.{note}\n")
    for name, section in SECTIONS.items():
        path = results / "speed" / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text())
            if name == "netket":
                beside(report, resting)
            note = f", with version {report['version']}" if "version" in report else ""
            parts.append(section(report) + f"\nMeasured on {place(report)}{note}.\n")
    return "\n".join(parts)


def main() -> None:
    """Write the tables."""
    write_table(render, RESULTS, TABLE, __doc__)


if __name__ == "__main__":
    main()
