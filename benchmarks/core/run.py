"""Time and memory of the core against torchsde, on the same machine in the same run.

Run it with one thread and nothing else on the machine:

    OMP_NUM_THREADS=1 python benchmarks/core/run.py

It writes ``benchmarks/core/results/core.json``; ``benchmarks/core/table.py`` makes the table of the
documentation out of that file. ``--smoke`` runs everything once on tiny sizes and writes nothing unless told to.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from measure import agreement, machine, peak_memory, race
from problems import IndependentStates, MemoryStates, Problem, TrivialDrift, layered

from stochdyn.core import MLP

RESULTS = Path(__file__).parent / "results" / "core.json"
HIDDEN = (64, 64)


def problem_of(case: str, batch: int, steps: int) -> Problem:
    """Build a case: ``trivial-1``, ``trivial-5``, or an equation and the networks of the two sides."""
    torch.manual_seed(0)
    if case.startswith("trivial"):
        return TrivialDrift(batch, steps, int(case[-1]))
    kind, networks = case.split(" / ")
    memory = kind == "memory"
    fused = MLP((6, *HIDDEN, 1 if memory else 5))
    sides = {
        "torch layers": (layered(fused), layered(fused)),
        "fused": (fused, fused),
        "fused against torch layers": (fused, layered(fused)),
    }[networks]
    return (MemoryStates if memory else IndependentStates)(batch, steps, *sides)


#: Cases, steps, whether to differentiate, and what the number is about.
CASES: list[tuple[str, int, bool]] = [
    ("memory / torch layers", 200, True),
    ("memory / fused", 200, True),
    ("memory / fused against torch layers", 200, True),
    ("independent / torch layers", 200, True),
    ("independent / fused", 200, True),
    ("independent / fused against torch layers", 200, True),
    ("trivial-1", 200, False),
    ("trivial-1", 200, True),
    ("trivial-5", 200, False),
    ("trivial-5", 200, True),
    ("trivial-1", 1000, False),
    ("trivial-1", 1000, True),
    ("trivial-5", 1000, False),
    ("trivial-5", 1000, True),
    ("memory / torch layers", 1000, True),
    ("memory / fused", 1000, True),
    ("memory / fused against torch layers", 1000, True),
]


MEMORY_CASES = ("memory / torch layers", "memory / fused", "independent / fused", "trivial-5")


def measure(smoke: bool, repeats: int) -> dict[str, Any]:
    """Run all cases."""
    batch = 16 if smoke else 1024
    start = time.perf_counter()
    rows = []
    for case, steps, backward in CASES:
        steps = 8 if smoke else steps
        problem = problem_of(case, batch, steps)
        row = {"case": case, "equation": problem.name, "batch": batch, "steps": steps}
        row |= race(problem, repeats if steps <= 200 else max(2, repeats // 2), backward)
        if backward:
            # A power of two: otherwise torchsde's clock, a running sum in float32, misses the end by a rounding.
            row["agreement"] = agreement(problem_of(case, batch, 64))
        rows.append(row)
        ratios = {n: round(r["ratio"], 2) for n, r in row["contenders"].items() if "ratio" in r}
        print(f"{case}, {steps} steps, {'with' if backward else 'no'} backward: {ratios}", flush=True)
    memory = []
    for case in MEMORY_CASES[:1] if smoke else MEMORY_CASES:
        batch, steps = (256, 64) if smoke else (1024, 200)
        row = {"case": case, "batch": batch, "steps": steps} | peak_memory(case, batch, steps)
        problem = problem_of(case, batch, steps)
        row |= _checkpointed_time(problem, 1 if smoke else repeats)
        memory.append(row)
        print(
            f"{case}, checkpointed: {row['ratio']:.2f} of the memory, {row['slowdown']:.2f} of the time",
            flush=True,
        )
    return {
        "smoke": smoke,
        "machine": machine("torchsde"),
        "seconds": round(time.perf_counter() - start, 1),
        "speed": rows,
        "memory": memory,
    }


def _checkpointed_time(problem: Problem, repeats: int) -> dict[str, float]:
    best = {False: float("inf"), True: float("inf")}
    for _ in range(repeats + 1):
        for checkpoint in best:
            start = time.process_time()
            torch.autograd.grad(problem.ours(checkpoint), problem.parameters())
            best[checkpoint] = min(best[checkpoint], time.process_time() - start)
    return {
        "seconds plain": best[False],
        "seconds checkpointed": best[True],
        "slowdown": best[True] / best[False],
    }


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, one repetition, to see that it runs"
    )
    parser.add_argument(
        "--out", type=Path, help=f"where to write the JSON (default: {RESULTS.name} in results/)"
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="interleaved repetitions (half of it for 1000 steps)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.smoke, 1 if arguments.smoke else arguments.repeats)
    out = arguments.out or (None if arguments.smoke else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
