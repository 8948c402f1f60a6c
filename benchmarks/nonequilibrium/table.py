"""Turn the JSON of ``run.py`` into the tables of the documentation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import markdown_table, write_table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TABLE = ROOT / "docs" / "generated" / "nonequilibrium_benchmarks.md"


def render(results: Path) -> str:
    """Return the page."""
    found: dict[str, dict[str, Any]] = {
        p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob("*.json"))
    }
    about = next(iter(found.values()))["machine"]
    lines = [
        "Rates in 1/time, in units of Boltzmann's constant; seconds are processor time of one thread.",
        f"Measured on {about['processor']}, torch {about['torch']}.",
        "",
    ]
    if "beads" in found:
        lines += [
            "**Five beads between two baths, from trajectories alone** (`short_time_entropy`, steps of .01).",
            "",
        ]
        table = [
            [
                "length",
                "series",
                "exact",
                "mean",
                "scatter",
                "Cramér-Rao bound",
                "mean in sample",
                "95 % intervals cover",
                "seconds",
            ]
        ]
        for r in found["beads"]["rows"]:
            table.append(
                [f"{r['horizon']:g}", str(r["repeats"]), f"{r['exact']:.4f}", f"{r['mean']:.4f}", f"{r['sd']:.3f}",
                 f"{r['bound']:.3f}", f"{r['in_sample']:.3f}", f"{r['coverage']:.0%}", f"{r['seconds']:.2f}"]
            )  # fmt: skip
        lines += markdown_table(table)
        lines += [
            "No unbiased method can scatter less than the sixth column, whatever it does with a trajectory of this length.",
            "",
        ]
    if "neep" in found:
        lines += [
            "**The same chain by NEEP** on 10 000 time units; the bound on as many that weren't seen. At this lag the exact value is .6198.",
            "",
        ]
        table = [["current", "bound", "seconds"]]
        table += [
            [r["name"], f"{r['bound']:.3f} ± {r['stderr']:.3f}", f"{r['seconds']:.0f}"]
            for r in found["neep"]["rows"]
        ]
        lines += markdown_table(table)
    if "ring" in found:
        lines += [
            "**A ring whose noise depends on the place**, 20 000 Euler paths of length 10 in steps of .01, five times with a force.",
            "",
        ]
        table = [["constant force", "exact", "trapezoid rule", "ratio of Euler densities (not to be used)"]]
        for r in found["ring"]["rows"]:
            table.append(
                [
                    f"{r['force']:g}",
                    f"{r['exact']:.4f}",
                    f"{r['trapezoid']:.4f} ± {r['stderr']:.4f}",
                    f"{r['euler_ratio']:.4f}",
                ]
            )
        lines += markdown_table(table)
    if "pair" in found:
        lines += [
            "**A pair of swimmers on a ring**, from 20 000 snapshots, on as many others. Exact: .3970, "
            "of it .3645 by the distance, .0324 by the propulsion. "
            "*asymmetry*: the share of the learnt score's Jacobian that isn't symmetric.",
            "",
        ]
        table = [
            [
                "seed",
                "weight of the residual",
                "total",
                "distance",
                "propulsion",
                "sum rule, same snapshots",
                "rms residual",
                "asymmetry",
                "seconds",
            ]
        ]
        for r in found["pair"]["rows"]:
            table.append(
                [str(r["seed"]), f"{r['weight']:g}", f"{r['total']:.4f}", f"{r['x']:.4f}", f"{r['g']:.4f}",
                 f"{r['rule']:.4f} ± {r['rule_stderr']:.4f}", f"{r['residual']:.4f}", f"{r['asymmetry']:.1e}", f"{r['seconds']:.0f}"]
            )  # fmt: skip
        lines += markdown_table(table)
    if "swimmers" in found:
        lines += [
            "**Swimmers in a trap**, a local score from 1500 snapshots, per particle; a free one has .8.",
            "",
        ]
        table = [["swimmers", "from the score", "sum rule, same snapshots", "seconds"]]
        for r in found["swimmers"]["rows"]:
            table.append(
                [
                    str(r["swimmers"]),
                    f"{r['score']:.4f} ± {r['score_stderr']:.4f}",
                    f"{r['rule']:.4f} ± {r['rule_stderr']:.4f}",
                    f"{r['seconds']:.0f}",
                ]
            )
        lines += markdown_table(table)
    if "trajectories" in found:
        lines += [
            "**The same swimmers, each from trajectories alone** (`short_time_entropy` with `PairCurrents`), a hundred of length 10 in steps of .01, "
            "neither forces nor noise known. Pairs and terms linear in the propulsion can't express all of the current: a lower bound.",
            "",
        ]
        table = [["swimmers", "mean of all", "before extrapolation", "lowest, highest", "scatter", "seconds"]]
        for r in found["trajectories"]["rows"]:
            table.append(
                [str(r["swimmers"]), f"{r['rate']:.4f} ± {r['stderr']:.4f}", ", ".join(f"{v:.4f}" for v in r["per_lag"].values()),
                 f"{r['lowest']:.2f}, {r['highest']:.2f}", f"{r['spread']:.3f}", f"{r['seconds']:.0f}"]
            )  # fmt: skip
        lines += markdown_table(table)
    if "counts" in found:
        lines += ["**A cycle of three states, from counted jumps.**", ""]
        table = [["length", "records", "exact", "mean", "scatter", "95 % intervals cover"]]
        for r in found["counts"]["rows"]:
            table.append(
                [
                    f"{r['horizon']:g}",
                    str(r["repeats"]),
                    f"{r['exact']:.4f}",
                    f"{r['mean']:.3f}",
                    f"{r['sd']:.3f}",
                    f"{r['coverage']:.0%}",
                ]
            )
        lines += markdown_table(table)
    return "\n".join(lines)


if __name__ == "__main__":
    write_table(render, RESULTS, TABLE, __doc__)
