"""Largest errors of variational evolutions and steady states against exact answers, one JSON per case.

    OMP_NUM_THREADS=1 python benchmarks/povm/accuracy.py ring4-tdvp ring6-tdvp-sampled ...

Without names it lists the cases; ``--smoke`` runs a tiny one and writes nothing. Each case writes
``benchmarks/povm/results/accuracy/<case>.json``, from which ``table.py`` makes the table of the documentation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, source

import stochdyn as sd
from stochdyn.povm import Strings, exact
from stochdyn.povm.master import stationary_probabilities
from stochdyn.povm.systems import ising, reference

RESULTS = Path(__file__).parent / "results" / "accuracy"
TURN = (3, 2, 1, 0)  # by pi about z, for the rotated tetrahedron
RING = "translations+reflections"
COMMUTING = {"system": "commuting_ring", "which": {"dephasing": 0.0}, "rotated": False, "bound": 2e-2}


def torus(shape: tuple[int, int]) -> Strings:
    """All translations of a torus, with the turn about z."""
    turn = Strings.relabelling(shape[0] * shape[1], TURN)
    return Strings.translations(shape, reflections=False) @ turn


#: system, sites, which of its references, last time, ansatz, evolution, bound that the errors should keep
DYNAMICS: dict[str, dict[str, Any]] = {
    "ring4-tdvp": {
        "system": "ising_ring",
        "sites": 4,
        "until": 8.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "tdvp", "num_samples": None},
        "bound": 5e-3,
        "last": 1e-4,
    },
    "ring4-tdvp-natural-order": {
        "system": "ising_ring",
        "sites": 4,
        "until": 8.0,
        "net": {"layers": 1, "width": 16, "heads": 2},
        "run": {"method": "tdvp", "num_samples": None},
        "bound": 5e-3,
        "last": 1e-4,
    },
    "ring4-trapezoid": {
        "system": "ising_ring",
        "sites": 4,
        "until": 1.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "trapezoid", "num_samples": None, "dt": 0.1, "steps": 120},
        "bound": 5e-3,
    },
    "ring4-trapezoid-l2": {
        "system": "ising_ring",
        "sites": 4,
        "until": 1.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "trapezoid", "num_samples": None, "dt": 0.1, "steps": 120, "norm": "l2"},
        "bound": 5e-3,
    },
    "ring4-fit": {
        "system": "ising_ring",
        "sites": 4,
        "until": 8.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "fit", "num_samples": None, "dt": 0.05},
        "bound": 5e-3,
        "last": 1e-4,
    },
    "ring6-tdvp-sampled": {
        "system": "ising_ring",
        "sites": 6,
        "until": 2.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "tdvp", "num_samples": 2000},
        "bound": 1e-2,
    },
    "ring6-tdvp-sampled-natural-order": {
        "system": "ising_ring",
        "sites": 6,
        "until": 2.0,
        "net": {"layers": 1, "width": 16, "heads": 2},
        "run": {"method": "tdvp", "num_samples": 2000},
        "bound": 1e-2,
    },
    "ring6-trapezoid-sampled": {
        "system": "ising_ring",
        "sites": 6,
        "until": 2.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "trapezoid", "num_samples": 1000, "dt": 0.1, "steps": 60},
        "bound": 1e-2,
    },
    "ring6-fit-sampled": {
        "system": "ising_ring",
        "sites": 6,
        "until": 2.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "fit", "num_samples": 2000, "dt": 0.05},
        "bound": 1e-2,
    },
    "xyz8-tdvp-sampled": {
        "system": "xyz_ring",
        "sites": 8,
        "initial": "y-",
        "until": 2.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "tdvp", "num_samples": 2000, "dt": 0.04},
        "bound": 2e-2,
    },
    "torus9-tdvp-one-string": {
        "system": "xyz_torus",
        "sites": 9,
        "until": 2.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "pairs": "all", "strings": "snake"},
        "run": {"method": "tdvp", "num_samples": 400, "dt": 0.04},
        "bound": 3e-2,
    },
    "torus9-tdvp-interactions": {
        "system": "xyz_torus",
        "sites": 9,
        "until": 2.0,
        "ansatz": "AutoregressiveInteractions",
        "net": {"bodies": 3},
        "run": {"method": "tdvp", "num_samples": 20000, "dt": 0.08, "rcond": 1e-4},
        "bound": 3e-2,
    },
    "torus9-tdvp-interactions-strings": {
        "system": "xyz_torus",
        "sites": 9,
        "until": 2.0,
        "ansatz": "AutoregressiveInteractions",
        "net": {"bodies": 3, "strings": torus((3, 3))},
        "run": {"method": "tdvp", "num_samples": 1000, "dt": 0.04, "rcond": 1e-4},
        "bound": 3e-2,
    },
    "torus9-tdvp-eight-snakes": {
        "system": "xyz_torus",
        "sites": 9,
        "until": 2.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "pairs": "all", "strings": "snakes"},
        "run": {"method": "tdvp", "num_samples": 400, "dt": 0.04},
        "bound": 3e-2,
    },
    "torus9-tdvp-symmetry-group": {
        "system": "xyz_torus",
        "sites": 9,
        "until": 2.0,
        "net": {"layers": 1, "width": 16, "heads": 2, "pairs": "all", "strings": torus((3, 3))},
        "run": {"method": "tdvp", "num_samples": 400, "dt": 0.04},
        "bound": 3e-2,
    },
    "torus9-tdvp-translations": {
        "system": "xyz_torus",
        "sites": 9,
        "until": 2.0,
        "net": {
            "layers": 1,
            "width": 16,
            "heads": 2,
            "pairs": "all",
            "strings": Strings.translations((3, 3), reflections=False),
        },
        "run": {"method": "tdvp", "num_samples": 400, "dt": 0.04},
        "bound": 3e-2,
    },
    "commuting32-tdvp": {
        **COMMUTING,
        "sites": 32,
        "until": 3.0,
        "ansatz": "AutoregressiveWindow",
        "net": {"order": 3},
        "run": {"method": "tdvp", "num_samples": 1000, "dt": 0.05},
    },
    "commuting64-tdvp": {
        **COMMUTING,
        "sites": 64,
        "until": 3.0,
        "ansatz": "AutoregressiveWindow",
        "net": {"order": 2},
        "run": {"method": "tdvp", "num_samples": 1000, "dt": 0.05},
    },
    "commuting64-tdvp-order3": {
        **COMMUTING,
        "sites": 64,
        "until": 3.0,
        "ansatz": "AutoregressiveWindow",
        "net": {"order": 3},
        "run": {"method": "tdvp", "num_samples": 1000, "dt": 0.05},
    },
    "commuting32-tdvp-transformer": {
        **COMMUTING,
        "sites": 32,
        "until": 0.5,
        "net": {"layers": 1, "width": 16, "heads": 2},
        "run": {"method": "tdvp", "num_samples": 1500, "dt": 0.05},
        "single": True,
    },
    "commuting64-tdvp-transformer": {
        **COMMUTING,
        "sites": 64,
        "until": 0.25,
        "net": {"layers": 1, "width": 16, "heads": 2},
        "run": {"method": "tdvp", "num_samples": 100, "dt": 0.05},
        "single": True,
    },
}


#: fields, sites, size of the reference, ansatz, solver, bound on the observables
STEADY: dict[str, dict[str, Any]] = {
    "ring6-steady": {
        "fields": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0], "sites": 6, "known": 6,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "newton", "num_samples": None, "max_iterations": 60}, "bound": 5e-3,
    },
    "ring6-steady-sampled": {
        "fields": [0.5, 1.0, 2.0, 4.0], "sites": 6, "known": 6,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {
            "method": "tdvp", "num_samples": 2000, "horizon": 12.0, "dt": 0.15, "observe_samples": 262144,
        },
        "bound": 5e-3,
    },
    "ring6-steady-descent": {
        "fields": [1.0, 2.0], "sites": 6, "known": 6,
        "net": {"layers": 1, "width": 16, "heads": 2, "strings": RING},
        "run": {"method": "trapezoid", "num_samples": None, "steps": 400}, "bound": 5e-3,
    },
    "ring16-steady": {
        "fields": [1.0, 2.0], "sites": 16, "known": 10,
        "ansatz": "AutoregressiveWindow", "net": {"order": 2},
        "run": {
            "method": "tdvp", "num_samples": 2000, "horizon": 12.0, "dt": 0.1, "observe_samples": 65536,
        },
        "bound": 1e-2,
    },
    "ring16-steady-transformer": {
        "fields": [1.0], "sites": 16, "known": 10,
        "net": {"layers": 1, "width": 16, "heads": 2},
        "run": {"method": "newton", "num_samples": 200, "max_iterations": 16}, "bound": 1e-2,
    },
}  # fmt: skip


def ansatz(case: dict[str, Any]) -> sd.povm.Ansatz:
    """Make the ansatz of a case: a transformer, or what it names."""
    return getattr(sd.povm, case.get("ansatz", "AutoregressiveTransformer"))(case["sites"], **case["net"])


PLAIN = ("method", "num_samples", "observe_samples", "gap")


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Return what ``evolve`` takes from a case: the method with its options, and the rest."""
    run = dict(case["run"])
    options = {key: run.pop(key) for key in list(run) if key not in PLAIN}
    kinds = {"tdvp": sd.povm.TDVP, "trapezoid": sd.povm.Trapezoid, "fit": sd.povm.Fit}
    return {**run, "method": kinds[run["method"]](**options)}


def steady_arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Return what ``steady_state`` takes from a case."""
    run = dict(case["run"])
    options = {key: run.pop(key) for key in list(run) if key not in PLAIN}
    if run["method"] == "tdvp":
        horizon = options.pop("horizon", None)
        return {**run, "method": sd.povm.Relaxation(horizon, evolution=sd.povm.TDVP(**options))}
    kinds = {"newton": sd.povm.Newton, "trapezoid": sd.povm.Descent, "combined": sd.povm.Combined}
    return {**run, "method": kinds[run["method"]](**options)}


def steady(case: dict[str, Any], seed: int, progress: bool) -> dict[str, Any]:
    """Find steady states, each from a product state, and compare."""
    povm = sd.povm.Tetrahedral()
    rows = []
    for field in case["fields"]:
        model = ising(case["sites"], 2.0, field)
        _, known = reference("ising_ring", case["known"], steady=True, field=field)
        torch.manual_seed(seed)
        net = ansatz(case).double().set_product_state(povm, "up")
        found = sd.povm.steady_state(
            net,
            model,
            povm,
            observables=["X", "Y", "Z"],
            seed=seed,
            progress=progress,
            **steady_arguments(case),
        )
        row = {
            "field": field,
            "largest": max(abs(found.expect[k] - float(known.expect[k])) for k in "XYZ"),
            "sampling_error": max(found.stderr.values()),
            "residual": found.residual,
            "estimate": found.error_estimate,
            "steps": len(next(iter(found.history.values()))),
            "processor_seconds": round(found.seconds, 1),
        }
        if case["sites"] <= 6:
            truth = exact.steady_state(model, ["Z"]).state
            p = net.probabilities()
            row["trace_distance"] = float(sd.povm.trace_distance(povm.reconstruct(p), truth))
            exact_p = stationary_probabilities(model.master_operator(povm))
            row["total_variation"] = float(sd.povm.total_variation(p, exact_p))
        rows.append(row)
        print(row, flush=True)
    return {
        "rows": rows,
        "largest": max(row["largest"] for row in rows),
        "parameters": net.parameter_vector().numel(),
        "processor_seconds": round(sum(row["processor_seconds"] for row in rows), 1),
    }


def dynamics(case: dict[str, Any], seed: int, progress: bool) -> dict[str, Any]:
    """Run an evolution and compare."""
    povm = sd.povm.Tetrahedral(rotated=case.get("rotated", True))
    which = dict(case.get("which", {}))
    if "initial" in case:
        which["initial"] = case["initial"]
    model, known = reference(case["system"], case["sites"], **which)
    if case["sites"] <= 6:
        times = torch.linspace(0, case["until"], round(case["until"] / 0.125) + 1, dtype=torch.float64)
        truth = exact.evolve(model, known.initial, times, ["X", "Y", "Z", "XX", "YY", "ZZ"]).expect
    else:
        times = known.times[known.times <= case["until"] + 1e-9]
        truth = {name: values[: len(times)] for name, values in known.expect.items()}
    torch.manual_seed(seed)
    net = ansatz(case)
    net = (net if case.get("single") else net.double()).set_product_state(povm, known.initial)
    start = time.process_time()
    run = sd.povm.evolve(
        net,
        model,
        povm,
        times,
        observables=["X", "Y", "Z", "XX", "YY", "ZZ"],
        seed=seed,
        progress=progress,
        **arguments(case),
    )
    seconds = time.process_time() - start
    errors = {name: (run.expect[name] - truth[name]).abs() for name in run.expect}
    one = torch.stack([errors[name] for name in "XYZ"])
    two = torch.stack([errors[name] for name in ("XX", "YY", "ZZ")])
    return {
        "largest": float(one.max()),
        "last": float(one[:, -1].max()),
        "largest_of_pairs": float(two.max()),
        "sampling_error": max(float(v.max()) for n, v in run.stderr.items() if n in "XYZ"),
        "residual": float(run.residual.max()),
        "steps": len(run.steps["t"]),
        "parameters": run.parameters.shape[1],
        "processor_seconds": round(seconds, 1),
        "by_time": {f"{t:g}": float(e) for t, e in zip(times.tolist(), one.max(0).values, strict=True)},
    }


def describe(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case as plain data."""
    return json.loads(json.dumps(case, default=repr))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="names of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a tiny case, to see that it runs")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        print(dynamics({**DYNAMICS["ring4-tdvp"], "until": 0.25}, 0, False))
        return
    if not options.cases:
        print("\n".join([*DYNAMICS, *STEADY]))
    for name in options.cases:
        kind, run = (DYNAMICS, dynamics) if name in DYNAMICS else (STEADY, steady)
        case = kind[name]
        result = {"case": name, "seed": options.seed, "setting": describe(case), "source": source(__file__)}
        result |= run(case, options.seed, options.progress)
        result["kept"] = result["largest"] <= case["bound"] and result.get("last", 0.0) <= case.get(
            "last", 1.0
        )
        result["machine"] = machine("qutip")
        options.out.mkdir(parents=True, exist_ok=True)
        suffix = f"-seed{options.seed}" if options.seed else ""
        (options.out / f"{name}{suffix}.json").write_text(
            json.dumps(result, indent=1) + "\n", encoding="utf-8"
        )
        names = ("largest", "last", "largest_of_pairs", "residual", "steps", "processor_seconds", "kept")
        print(name, {k: result[k] for k in names if k in result}, flush=True)


if __name__ == "__main__":
    main()
