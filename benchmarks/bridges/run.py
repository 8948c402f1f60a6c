"""Measurements of the Schrödinger bridges: static solvers against peers, refinements on known and real systems.

    OMP_NUM_THREADS=1 python benchmarks/bridges/run.py --data FOLDER

``--data`` is a folder with the published snapshots (``LV_data.npy``, ``repres_data.npy``, ``GoMvortex_data.npy``,
``GoMvortexsmall_data.npy``, ``hESC_data_nopickle.npz``); without it only simulated ones are used. Every part writes a
JSON file of its own to ``--out``; ``table.py`` makes the documentation's tables out of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import scale
import solvers
import systems
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

RESULTS = Path(__file__).parent / "results"
PARTS = (
    "sinkhorn",
    "scaling",
    "memory",
    "atlas",
    "race",
    "blocks",
    "network",
    "lotka_volterra",
    "repressilator",
    "gulf",
    "stem_cells",
)


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--data", type=Path, help="folder with the published snapshots")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, nothing written unless --out is given"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each solver's run, of which the fastest counts"
    )
    parser.add_argument(
        "--log-iterations", type=int, default=20_000, help="bound on those of POT's log-domain solver"
    )
    parser.add_argument(
        "--families", nargs="*", default=(), help="of the gulf part: only these; results of others are kept"
    )
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    out = args.out or (None if args.smoke else RESULTS)
    for part in args.parts:
        start = time.process_time()
        if hasattr(solvers, part):
            extra = (
                {"log_iterations": args.log_iterations, "repeats": args.repeats} if part == "sinkhorn" else {}
            )
            result = getattr(solvers, part)(args.smoke, **extra)
        elif hasattr(scale, part):
            result = getattr(scale, part)(args.smoke)
        else:
            options: dict[str, Any] = {}
            if part == "gulf" and args.families:
                before = (out or RESULTS) / "gulf.json"
                kept = json.loads(before.read_text(encoding="utf-8"))["result"] if before.exists() else None
                options = {"families": args.families, "earlier": kept}
            result = getattr(systems, part)(args.data, args.smoke, **options)
        record = {
            "part": part,
            "smoke": args.smoke,
            "machine": machine("pot", "ott-jax", "jax"),
            "seconds": time.process_time() - start,
            "result": result,
        }
        print(json.dumps(record, indent=1))
        if out is not None and result:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
