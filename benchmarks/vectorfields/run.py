"""Accuracy of the kernels on the bunny and on real winds, and speed, against honest rivals in the same run.

    OMP_NUM_THREADS=1 python benchmarks/vectorfields/run.py wind speed
    OMP_NUM_THREADS=1 python benchmarks/vectorfields/run.py bunny --data PATH/TO/bunny.npz

The bunny (the coarse Stanford bunny of the RVGP repository, an ``.npz`` with ``V (2503, 3)``) isn't shipped: Stanford 3D
Scanning Repository, for research, with credit. Each part writes ``results/PART.json``; ``table.py`` makes the table of the
documentation from them. ``--smoke`` runs tiny sizes once and writes nothing unless told to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from models import BUNNY, WIND, evaluate
from problems import bunny_tasks, wind_tasks
from speed import eigenpairs, regression, scaling

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Describe where the numbers come from."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return {
        "processor": names[0] if names else platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "scipy", "gpytorch", "scikit-learn")},
        "clock": "time.process_time",
    }


def accuracy(tasks: list[Any], models: dict[str, Any], skip: set[str]) -> list[dict[str, Any]]:
    """Evaluate every model on every task."""
    rows = []
    for number, task in enumerate(tasks):
        for name, make in models.items():
            if name in skip:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = {"task": task.name, "split": number, "model": name} | evaluate(task, make)
            rows.append(row)
            print(
                f"{task.name}: {name}: {row['error']:.3f} {row['nlpd']:.2f} {row['coverage']:.3f} ({row['seconds']:.1f} s)",
                flush=True,
            )
    return rows


def measure(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one part."""
    smoke = arguments.smoke
    start = time.process_time()
    skip = set(arguments.skip)
    if part == "bunny":
        rows: Any = accuracy(bunny_tasks(arguments.data, smoke, arguments.trials), BUNNY, skip)
    elif part == "wind":
        rows = accuracy(
            wind_tasks(300 if smoke else 2000, (50,) if smoke else (100, 400), 1 if smoke else 2), WIND, skip
        )
    else:
        n, k = (400, 20) if smoke else (10_000, 100)
        rows = {"eigenpairs": eigenpairs(n, k, 1 if smoke else 3)}
        print(rows, flush=True)
        rows["scaling"] = scaling(
            (300, 600) if smoke else (2000, 5000, 10_000, 20_000, 50_000), 20 if smoke else 100
        )
        rows["regression"] = regression(200 if smoke else 2176, 20 if smoke else 100, 2 if smoke else 5)
        print(rows["regression"], flush=True)
    return {
        "part": part,
        "smoke": smoke,
        "machine": machine(),
        "seconds": time.process_time() - start,
        "rows": rows,
    }


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["wind", "speed"], choices=["bunny", "wind", "speed"])
    parser.add_argument("--data", type=Path, help="path of bunny.npz, for the part 'bunny'")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON (default: results/, nothing with --smoke)"
    )
    parser.add_argument("--trials", type=int, default=2, help="random splits of the bunny's smaller tasks")
    parser.add_argument("--skip", nargs="*", default=[], help="models to leave out")
    arguments = parser.parse_args()
    if "bunny" in arguments.parts and arguments.data is None:
        parser.error("the part 'bunny' needs --data PATH")
    torch.set_num_threads(1)
    out = arguments.out or (None if arguments.smoke else RESULTS)
    for part in arguments.parts:
        result = measure(part, arguments)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"wrote {out / part}.json")


if __name__ == "__main__":
    main()
