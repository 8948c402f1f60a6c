"""Make the documentation's tables out of the measurements: ``python benchmarks/bridges/table.py``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TARGET = HERE.parents[1] / "docs" / "generated" / "bridges_benchmarks.md"


def _load(part: str) -> dict[str, Any] | None:
    path = RESULTS / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _numbers(values: list[float], digits: int = 3) -> str:
    return ", ".join(f"{v:.{digits}f}" for v in values)


def _machine(record: dict[str, Any]) -> str:
    own = record["machine"]
    return (
        f"{own['processor']}, {own['threads']} thread of {own['cores']} cores, torch {own['torch']}, POT {own['pot']}, "
        "processor time in seconds on a machine with other work."
    )


def sinkhorn(record: dict[str, Any]) -> list[str]:
    """Solvers of one static coupling."""
    result = record["result"]
    lines = [
        f"**One coupling**: {result['n']} against {result['n']} points in five dimensions, regularisation "
        f"{100 * result['share_of_mean_cost']:g} % of the mean squared distance, to a marginal error of 1e-6. {_machine(record)}",
        "",
        _row("solver", "seconds", "times ours", "marginal error"),
        "|---|--:|--:|--:|",
    ]
    for name, row in result["solvers"].items():
        lines.append(
            _row(
                name,
                f"{row['seconds']:.2f}",
                f"{'more than ' if row['unfinished'] else ''}{row['ratio']:.1f}",
                f"{row['marginal_error']:.0e}",
            )
        )
    if any(row["unfinished"] for row in result["solvers"].values()):
        lines += ["", "*More than*: stopped before it was done."]
    return lines


def memory(record: dict[str, Any]) -> list[str]:
    """Peak memory."""
    lines = [
        "**Memory**: a Brownian bridge between two large snapshots, peak of the whole process, couplings not stored beyond one kernel.",
        "",
        _row(
            "particles",
            "precision",
            "tolerance",
            "peak GiB",
            "of it loaded before",
            "seconds",
            "marginal error",
        ),
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in record["result"]:
        cells = (
            row["n"],
            row["dtype"],
            f"{row['tolerance']:.0e}",
            f"{row['peak_gib']:.2f}",
            f"{row['loaded_gib']:.2f}",
        )
        lines.append(_row(*cells, f"{row['seconds']:.0f}", f"{row['marginal_error']:.0e}"))
    return lines


def atlas(record: dict[str, Any]) -> list[str]:
    """Many cells in many components, with outliers."""
    row = record["result"]
    count = round(row["outliers"] * row["n"])
    return [
        f"**An atlas**: {row['days']} days of {row['n']} cells in {row['dim']} components, {100 * row['outliers']:g} % of them outliers: "
        f"all couplings in {row['seconds']:.0f} s, peak {row['peak_gib']:.2f} GiB, marginal error {row['marginal_error']:.0e}; "
        f"at least {row['outliers_named']} of {count} outliers per day are named, and at most {row['wrongly_named']} cells that are none. "
        f"Iterations of the couplings: {', '.join(map(str, row['iterations']))}"
        + (
            "." if row["converged"] else "; the longest reached their bound before the default error of 1e-6."
        ),
    ]


def race(record: dict[str, Any]) -> list[str]:
    """The first coupling of the atlas by several solvers."""
    result, own = record["result"], record["machine"]
    lines = [
        f"**The first coupling of the atlas by several packages**, on one machine, each in a process of its own: regularisation 0.5, double "
        f"precision, to a marginal error of {result['tolerance']:g}, and about {result['limit']:g} s at most. POT {own['pot']}, "
        f"ott-jax {own.get('ott-jax') or 'not installed'} (jax {own.get('jax') or 'not installed'}, compiled before). Memory is the peak "
        "beyond what the loaded packages take. *Annealed* is ott's own schedule, from 4096 down by a tenth per iteration.",
        "",
        _row("outliers", "solver", "seconds", "iterations", "GiB", "L1 error of the marginals"),
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        error = "not a number" if math.isnan(row["error"]) else f"{row['error']:.0e}"
        cells = (f"{100 * row['outliers']:g} %", row["solver"], f"{row['seconds']:.1f}", row["iterations"])
        lines.append(_row(*cells, f"{row['peak_gib'] - row['loaded_gib']:.2f}", error))
    return lines


def blocks(record: dict[str, Any]) -> list[str]:
    """Couplings in blocks."""
    row = record["result"]
    return [
        f"**In blocks**: {row['days']} days of {row['n']} cells in {row['dim']} components, {row['dtype']}, with `memory` of 2 GiB, "
        "in which one kernel is kept while costs are computed in blocks: "
        f"{row['seconds']:.0f} s for all couplings, peak {row['peak_gib']:.2f} GiB, marginal error {row['marginal_error']:.0e} "
        f"after {', '.join(map(str, row['iterations']))} iterations.",
    ]


def network(record: dict[str, Any]) -> list[str]:
    """Refinement of a network."""
    row = record["result"]
    first, least = row["objective"][0], min(row["objective"])
    return [
        f"**A network as reference**: three days of {row['n']} cells in {row['dim']} components, a drift of width 64, "
        f"{row['iterations']} iterations at `dt=0.05`: {row['seconds']:.0f} s, peak {row['peak_gib']:.2f} GiB; "
        f"the objective falls from {first:.2f} to {least:.2f}.",
    ]


def scaling(record: dict[str, Any]) -> list[str]:
    """Cost against the number of particles."""
    lines = [
        "**Cost against size**, one run each: a coupling at 5 % of the mean cost, and one iteration (projection and bridge) of "
        "Lotka-Volterra's refinement with five snapshots.",
        "",
        _row("what", "particles per snapshot", "seconds", "iterations"),
        "|---|--:|--:|--:|",
    ]
    for row in record["result"]:
        lines.append(_row(row["what"], row["n"], f"{row['seconds']:.2f}", row["iterations"]))
    return lines


def _oscillator(record: dict[str, Any], title: str) -> list[str]:
    lines = [
        f"**{title}**: every second snapshot is held out. W2 of the bridge's draws from it, and the floor: W2 of 250 fresh particles of the "
        "truth from it.",
        "",
        _row("data", "parameters", "iterations", "seconds", "held-out W2", "floor", "largest ratio"),
        "|---|---|--:|--:|---|---|--:|",
    ]
    for name, row in record["result"].items():
        values = ", ".join(f"{k} {v:.4g}" for k, v in row["parameters"].items())
        ratio = f"{max(row['ratio_to_floor']):.2f}"
        lines.append(
            _row(
                name,
                values,
                row["iterations"],
                f"{row['seconds']:.1f}",
                _numbers(row["w2"]),
                _numbers(row["floor"]),
                ratio,
            )
        )
    return lines


def lotka_volterra(record: dict[str, Any]) -> list[str]:
    """Lotka-Volterra."""
    return [
        *_oscillator(record, "Lotka-Volterra, truth (1, 0.4, 0.4, 0.1)"),
        "",
        "With 50 particles per snapshot the estimates of delta spread by about 4 % from data set to data set. The reference implementation "
        "of the publication needs hours for these data (2.8 processor hours extrapolated from a tenth of the particles).",
    ]


def repressilator(record: dict[str, Any]) -> list[str]:
    """The repressilator."""
    return _oscillator(record, "Repressilator, truth (10, 3, 1, 1)")


def gulf(record: dict[str, Any]) -> list[str]:
    """Drifters in the Gulf of Mexico."""
    lines = [
        "**Gulf of Mexico**: drifters in a vortex, times 0, 2, ..., 8 seen and 1, 3, 5, 7 held out. Family and noise are chosen by the mean "
        "W2 to training snapshots left out one at a time. Published for the reference method: 0.073, 0.072, 0.120, 0.094.",
        "",
        _row("file", "family, noise", "W2 left out in training", "held-out W2", "chosen"),
        "|---|---|--:|---|---|",
    ]
    for name, own in record["result"].items():
        for label, row in sorted(own["candidates"].items(), key=lambda item: item[1]["mean_left_out"]):
            mark = "yes" if label == own["chosen"] else ""
            lines.append(_row(name, label, f"{row['mean_left_out']:.3f}", _numbers(row["w2"]), mark))
    return lines


def stem_cells(record: dict[str, Any]) -> list[str]:
    """Human embryonic stem cells."""
    lines = [
        "**Human embryonic stem cells**: 0, 24, 72 h seen; 12 and 36 h held out, noise 0.05. Published 1.08 and 1.33; the second seems "
        "to be the bridge at 48 h scored against cells of 36 h, so both are given.",
        "",
        _row("family", "W2 at 12 h", "W2 at 36 h", "bridge at 48 h against cells of 36 h", "seconds"),
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in record["result"].items():
        cells = (row["w2_at_0.5"], row["w2_at_1.5"], row["w2_of_the_second_at_2.0"])
        label = f"{name}, share {row['growth']:g}" if name == "growing" else name
        lines.append(_row(label, *(f"{c:.3f}" for c in cells), f"{row['seconds']:.1f}"))
    return lines


PARTS = (
    sinkhorn,
    scaling,
    memory,
    atlas,
    race,
    blocks,
    network,
    lotka_volterra,
    repressilator,
    gulf,
    stem_cells,
)


def main() -> None:
    """Write the tables of all parts that were measured."""
    blocks = []
    for part in PARTS:
        record = _load(part.__name__)
        if record is not None:
            blocks += [*part(record), ""]
    # tables of further programs in this folder, written by themselves
    for extra in sorted(RESULTS.glob("*.md")):
        blocks += [extra.read_text(encoding="utf-8").strip(), ""]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text("\n".join(blocks), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
