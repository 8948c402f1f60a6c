"""Interpolants beside TorchCFM and beside exact answers, on the same machine in the same run.

Run it with one thread:

    OMP_NUM_THREADS=1 python benchmarks/interpolants/run.py PART

where PART is ``speed``, ``coupling``, ``transport``, ``sampling``, ``mixture``, ``mixture_long``, ``checkerboard``, ``populations``, ``two_moons``,
``nuts`` or ``jobs``; each writes ``benchmarks/interpolants/results/PART.json``, and ``benchmarks/interpolants/table.py`` makes the tables of the
documentation out of those files. ``--smoke`` runs on tiny sizes and writes nothing unless told to.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path

import torch
from data import machine

RESULTS = Path(__file__).parent / "results"
#: Part, the module that measures it, seeds and training steps of a full run.
PARTS = {
    "speed": ("speed", 1, 0),
    "coupling": ("speed", 1, 0),
    "transport": ("transport", 5, 1200),
    "sampling": ("sampling", 2, 1200),
    "mixture": ("mixture", 1, 6000),
    "mixture_long": ("mixture", 1, 15_000),
    "checkerboard": ("checkerboard", 1, 4000),
    "populations": ("populations", 1, 1500),
    "two_moons": ("two_moons", 1, 4000),
    "nuts": ("nuts", 1, 300),
    "jobs": ("jobs", 1, 1500),
}


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"which parts: {', '.join(PARTS)}; all if none")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for the JSON files (default: results/)")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--steps", type=int, help="training steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    for part in arguments.parts or PARTS:
        module, seeds, steps = PARTS[part]
        seeds = arguments.seeds or (1 if arguments.smoke else seeds)
        steps = arguments.steps or (20 if arguments.smoke else steps)
        where, start, cpu = (
            machine("torchcfm", "POT", "torchdiffeq"),
            time.perf_counter(),
            time.process_time(),
        )
        measure = importlib.import_module(module)
        function = getattr(measure, f"measure_{part}", None) or measure.measure
        result = function(arguments.smoke, seeds, steps)
        result |= {
            "smoke": arguments.smoke,
            "machine": where,
            "seconds": round(time.perf_counter() - start, 1),
            "processor seconds": round(time.process_time() - cpu, 1),
        }
        out = arguments.out or (None if arguments.smoke else RESULTS)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"wrote {out / part}.json")


if __name__ == "__main__":
    main()
