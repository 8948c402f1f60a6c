"""Score diffusion: the cost of the residual, the ODE-SDE gap on the line without noise, and three laws in the plane.

    OMP_NUM_THREADS=1 python benchmarks/interpolants/score.py cost
    OMP_NUM_THREADS=1 python benchmarks/interpolants/score.py line
    OMP_NUM_THREADS=1 python benchmarks/interpolants/score.py plane --dataset blob

Each part writes its own JSON; ``--smoke`` runs it at a size of seconds. Times are processor times of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from laws_1d import evaluate
from planar import (
    DATA,
    PUBLISHED,
    Fresh,
    adam,
    blob_truth,
    cosine,
    distances,
    floors,
    horizon_law,
    make,
    prior_of,
    residual_on_data,
    train,
    true_histogram,
)
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.core import unbiased_square
from stochdyn.interpolants import (
    OU,
    FunctionPotential,
    NoisedMixture,
    Potential,
    PotentialNetwork,
    ScoreMatching,
)
from stochdyn.objectives import UniformPoints

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

RESULTS = Path(__file__).parent / "results"
N = 2000


class PlainPotential(nn.Module):
    """The same layers as a potential network out of torch's own, differentiated by nested reverse passes."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        sizes = [dim + 1, width, width, width]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return ``(n, 1)``."""
        return self.net(torch.cat([t, x], -1))


def contenders(dim: int, width: int = 80) -> dict[str, Callable[[], Tensor]]:
    """Losses whose forward and backward pass is timed."""
    torch.manual_seed(0)
    process = OU()
    x0 = torch.randn(N, dim)
    ours = PotentialNetwork(process, dim, width, zero_last=False)
    plain = FunctionPotential(process, PlainPotential(dim, width))

    def matching(phi: Potential, fp_weight: float, method: str) -> Callable[[], Tensor]:
        diff = ScoreMatching(process, phi, fp_weight=fp_weight, residual=method)  # type: ignore[arg-type]
        return lambda: diff(x0).loss

    def residual(phi: Potential, method: str) -> Callable[[], Tensor]:
        t = 1e-3 + 4.9 * torch.rand(N, 1)

        def loss() -> Tensor:
            r = phi.score_and_residual(t, x0, method).residuals  # type: ignore[arg-type]
            return unbiased_square(r).mean() if method == "hutchinson" else r[0].square().mean()

        return loss

    methods = ["exact", "hutchinson"]
    made = {"matching": matching(ours, 0.0, "exact"), "matching, plain": matching(plain, 0.0, "exact")}
    made |= {f"residual, {m}": residual(ours, m) for m in methods}
    made |= {f"both, {m}": matching(ours, 0.1, m) for m in methods}
    made |= {f"residual, plain, {m}": residual(plain, m) for m in methods}
    return made


def cost(smoke: bool) -> dict[str, Any]:
    """Time every contender in turn, again and again, so that a busy moment hits all alike."""
    rows = {}
    for dim in (2, 10):
        losses = contenders(dim)
        best = dict.fromkeys(losses, float("inf"))
        for _ in range(3 if smoke else 40):
            for name, loss in losses.items():
                begin = time.process_time()
                loss().backward()
                best[name] = min(best[name], time.process_time() - begin)
        ratios = {name: value / best["matching"] for name, value in best.items()}
        rows[str(dim)] = {"milliseconds": {k: 1e3 * v for k, v in best.items()}, "ratio": ratios}
    return {"points": N, "network": "3 hidden layers of 80, tanh", "target": 4.0, "rows": rows}


# weight, weight in time, and whether the residual is taken in a box
LINE_RUNS: dict[str, tuple[float, str, bool]] = {
    "0": (0.0, "log-snr", False),
    "0.1": (0.1, "log-snr", False),
    "1": (1.0, "log-snr", False),
    "10": (10.0, "log-snr", False),
    "1, in a box": (1.0, "log-snr", True),
    "0.01, unweighted in time": (0.01, "none", False),
    "0.1, unweighted in time": (0.1, "none", False),
}


def line_truth() -> NoisedMixture:
    """Three Gaussians on the line under an Ornstein-Uhlenbeck process."""
    means, spread = torch.tensor([[-2.0], [0.0], [1.5]]), torch.tensor([0.3, 0.2, 0.4])
    return NoisedMixture(OU(horizon=3.0, start=0.01), torch.tensor([0.4, 0.2, 0.4]), means, spread.square())


def line_run(name: str, seed: int, steps: int, batch: int) -> dict[str, float]:
    """Train one potential and compare its two laws with the truth, without Monte Carlo noise in the comparison."""
    begin = time.process_time()
    truth = line_truth()
    torch.manual_seed(seed)
    process = truth.process
    phi = PotentialNetwork.from_data(process, truth.sample(0.0, 20_000), width=48)
    weight, in_time, boxed = LINE_RUNS[name]
    side = 3.5 * torch.ones(1)
    box = UniformPoints(-side, side, process.start, process.horizon, batch) if boxed else None
    diff = ScoreMatching(
        process,
        phi,
        fp_weight=weight,
        residual_weight=in_time,  # type: ignore[arg-type]
        collocation=box,
    )
    fresh = Fresh(diff, lambda: truth.sample(0.0, batch))
    sd.fit(fresh, steps=steps, lr=3e-3, seed=seed, optimizer=adam, scheduler=cosine(steps), progress=False)
    trained = time.process_time() - begin
    row = evaluate(line_truth(), diff.score)
    torch.manual_seed(0)
    t = diff.draw_times(20_000, torch.empty(0))
    x = process.perturb(t, truth.sample(0.0, 20_000), torch.randn(20_000, 1))
    with torch.no_grad():
        r = diff.fokker_planck_residual(t, x)
    squares = (r * 2 * process.variance(t).squeeze(-1) / process.squared_diffusion(t).squeeze(-1)).square()
    return {**row, "residual": squares.mean().item(), "seconds": trained}


def line(runs: list[str], seeds: int, smoke: bool, out: Path) -> dict[str, Any]:
    """Run the named weights over the seeds; keep what an interrupted run has done."""
    steps, batch = (30, 64) if smoke else (3000, 1024)
    report = _resume(out, {"steps": steps, "batch": batch})
    for name in runs:
        for seed in range(1 if smoke else seeds):
            done = report["rows"].setdefault(name, [])
            if len(done) > seed:
                continue
            done.append(line_run(name, seed, steps, batch))
            _write(out, report)
            print(name, seed, {k: round(v, 4) for k, v in done[-1].items()}, flush=True)
    return report


def plane(dataset: str, weights: list[float], chunk: int | None, smoke: bool, out: Path) -> dict[str, Any]:
    """Train potentials of the published size at several weights, and compare histograms as published.

    With ``chunk`` the first model that isn't finished is trained for so many steps only, or evaluated.
    """
    steps, batch = (20, 64) if smoke else (30_000, 1024)
    report = _resume(out, {"dataset": dataset, "steps": steps, "batch": batch, "width": 80})
    report["published"] = {str(w): row for w, row in PUBLISHED[dataset].items()}
    truth = true_histogram(dataset, 1 if smoke else 60)
    if "floors" not in report:
        report["floors"] = floors(dataset, truth, 30_000 if smoke else 3_000_000)
    if dataset == "blob" and "exact" not in report and report["rows"]:
        exact = blob_truth(OU(horizon=4.0, start=5e-4))
        report["exact"] = distances(truth, exact.process, exact.score, horizon_law(exact), smoke)
    for weight in map(str, weights):
        if weight in report["rows"]:
            continue
        progress = report.setdefault("progress", {}).setdefault(weight, {"step": 0, "seconds": 0.0})
        diff = make(dataset, float(weight))
        if chunk is None or progress["step"] < steps:
            begin, until = time.process_time(), None if chunk is None else progress["step"] + chunk
            folder = None if chunk is None else out.with_name(f"{out.stem}_{weight}")
            progress["step"] = train(dataset, diff, steps, batch, folder, until)
            progress["seconds"] += time.process_time() - begin
            _write(out, report)
            if chunk is not None:
                return report
        else:
            train(dataset, diff, steps, batch, out.with_name(f"{out.stem}_{weight}"))
        row = distances(truth, diff.process, diff.score, prior_of(diff), smoke)
        report["rows"][weight] = {**row, "residual": residual_on_data(dataset, diff), **progress}
        del report["progress"][weight]
        _write(out, report)
        print(dataset, weight, report["rows"][weight], flush=True)
        if chunk is not None:
            return report
    return report


def _resume(out: Path, setting: dict[str, Any]) -> dict[str, Any]:
    if out.exists():
        report: dict[str, Any] = json.loads(out.read_text())
        if report["setting"] == setting:
            return report
    return {"machine": machine(), "setting": setting, "rows": {}}


def _write(out: Path, report: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["cost", "line", "plane"])
    parser.add_argument("--dataset", choices=sorted(DATA), default="blob")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 1.0, 10.0])
    parser.add_argument("--chunk", type=int, help="steps of training in one call, to be called again")
    parser.add_argument("--runs", nargs="+", choices=list(LINE_RUNS), default=list(LINE_RUNS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    suffix = f"_{options.dataset}" if options.part == "plane" else ""
    out = options.out or RESULTS / f"score_{options.part}{suffix}.json"
    if options.part == "cost":
        report = {"machine": machine(), **cost(options.smoke)}
        print(json.dumps(report["rows"], indent=1))
    elif options.part == "line":
        report = line(options.runs, options.seeds, options.smoke, out)
    else:
        report = plane(options.dataset, options.weights, options.chunk, options.smoke, out)
    _write(out, report)


if __name__ == "__main__":
    main()
