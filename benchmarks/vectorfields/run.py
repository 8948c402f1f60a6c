"""Accuracy of the kernels on the bunny and on real winds, and speed, against honest rivals in the same run.

    OMP_NUM_THREADS=1 python benchmarks/vectorfields/run.py wind speed
    OMP_NUM_THREADS=1 python benchmarks/vectorfields/run.py bunny --data PATH/TO/bunny.npz

The bunny (the coarse Stanford bunny of the RVGP repository, an ``.npz`` with ``V (2503, 3)``) isn't shipped: Stanford 3D
Scanning Repository, for research, with credit. Each part writes ``results/PART.json``; ``table.py`` makes the table of the
documentation from them. Rows are kept as they come, and ``--only`` and ``--model`` measure some of them anew; rows of splits
that a task no longer has are dropped. ``--smoke`` runs
tiny sizes once and writes nothing unless told to.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from models import BUNNY, WIND, evaluate
from problems import bunny_tasks, wind_tasks
from speed import eigenpairs, regression, scaling

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

RESULTS = Path(__file__).parent / "results"


Row = dict[str, Any]


def accuracy(tasks: list[Any], models: dict[str, Any], chosen: str, only: str) -> Iterator[Row]:
    """Evaluate the models on the tasks whose names hold the given words."""
    for task in tasks:
        for name, make in models.items():
            if chosen not in name or only not in f"{task.name}, {task.split}":
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = {"task": task.name, "split": task.split, "model": name} | evaluate(task, make)
            scores = f"{row['error']:.3f} {row['nlpd']:.2f} {row['coverage']:.3f} ({row['seconds']:.1f} s)"
            print(f"{task.name}: {name}: {scores}", flush=True)
            yield row


def speed(smoke: bool, only: str, evaluations: int | None) -> Iterator[Row]:
    """Measure what the word ``only`` asks for: eigenpairs, scaling (with a size), regression."""
    if only in "eigenpairs":
        n, k = (400, 20) if smoke else (10_000, 100)
        yield {"task": "eigenpairs"} | eigenpairs(n, k, 1 if smoke else 3)
    for n in (300, 600) if smoke else (2000, 5000, 10_000, 20_000, 50_000):
        if only in f"scaling {n}":
            yield {"task": "scaling", "model": str(n)} | scaling((n,), 20 if smoke else 100)[0]
    if only in "regression":
        n, k, repeats = (200, 20, 2) if smoke else (2176, 100, 5)
        yield {"task": "regression"} | regression(n, k, repeats, evaluations)


def tasks_of(part: str, arguments: argparse.Namespace) -> list[Any]:
    """The fields to be predicted in a part; none for the part about speed."""
    smoke = arguments.smoke
    if part == "bunny":
        return bunny_tasks(arguments.data, smoke, arguments.trials, arguments.only)
    if part == "wind":
        return wind_tasks(300 if smoke else 2000, (50,) if smoke else (100, 400), 1 if smoke else 5)
    return []


def measure(part: str, tasks: list[Any], arguments: argparse.Namespace) -> Iterator[Row]:
    """Run one part, row by row."""
    if part == "speed":
        return speed(arguments.smoke, arguments.only, arguments.evaluations)
    return accuracy(tasks, BUNNY if part == "bunny" else WIND, arguments.model, arguments.only)


def key(row: Row) -> tuple[Any, ...]:
    """What a row is about: a later row about the same takes its place."""
    return row["task"], row.get("split"), row.get("model")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["wind", "speed"], choices=["bunny", "wind", "speed"])
    parser.add_argument("--data", type=Path, help="path of bunny.npz, for the part 'bunny'")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON (default: results/, nothing with --smoke)"
    )
    parser.add_argument("--trials", type=int, default=2, help="random splits of a task of the bunny")
    parser.add_argument("--model", default="", help="only models whose names hold this")
    parser.add_argument("--only", default="", help="only tasks whose names hold this")
    parser.add_argument(
        "--evaluations", type=int, help="stop the dense rival's fit after so many evaluations"
    )
    arguments = parser.parse_args()
    if "bunny" in arguments.parts and arguments.data is None:
        parser.error("the part 'bunny' needs --data PATH")
    torch.set_num_threads(1)
    folder = arguments.out or (None if arguments.smoke else RESULTS)
    for part in arguments.parts:
        path = None if folder is None else folder / f"{part}.json"
        known = (
            json.loads(path.read_text(encoding="utf-8"))["rows"] if path is not None and path.exists() else []
        )
        tasks = tasks_of(part, arguments)
        splits = {name: {t.split for t in tasks if t.name == name} for name in {t.name for t in tasks}}
        rows = {
            key(row): row for row in known if row["task"] not in splits or row["split"] in splits[row["task"]]
        }
        for row in measure(part, tasks, arguments):
            rows[key(row)] = row
            if path is not None:  # row by row, so that an interrupted run loses nothing
                path.parent.mkdir(parents=True, exist_ok=True)
                report = {
                    "part": part,
                    "machine": machine("scipy", "gpytorch", "scikit-learn"),
                    "rows": list(rows.values()),
                }
                path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            else:
                print(row)


if __name__ == "__main__":
    main()
