"""Figures on a GPU, beside those of the processor of the same machine, and the tests that need one.

One command: ``python benchmarks/gpu.py``. Where there is no CUDA device it measures nothing and the table says so;
``--smoke`` runs every case once on the processor, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import machine
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.core import sinkhorn
from stochdyn.core.networks import MLP
from stochdyn.core.sde import Euler
from stochdyn.interpolants import FieldNetwork, Interpolant, InterpolantRegression
from stochdyn.objectives import GaussianObservations, PathELBO

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).parent / "results" / "gpu.json"
TARGET = ROOT / "docs" / "generated" / "gpu_benchmarks.md"
_MISSING = "not measured"

Case = Callable[[torch.device, bool], Callable[[], object]]


class Control(nn.Module):
    """Two hidden layers of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP((3, 64, 64, 2))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the drift of the noise."""
        return self.net(torch.cat([t.expand_as(z[..., :1]), z], -1))


def law(device: torch.device, graph: bool) -> sd.DiffusionMeasure:
    """A law in the plane under a control network."""
    control = Control()
    measure = sd.DiffusionMeasure(
        torch.zeros(2, device=device), sd.SDE(lambda t, x: -x, 0.7), method=Euler(cuda_graph=graph)
    ).controlled(control)
    measure.control_network = control
    return measure.to(device)


def simulation(graph: bool) -> Case:
    """Paths of the controlled law, without gradients."""

    def case(device: torch.device, small: bool) -> Callable[[], object]:
        measure = law(device, graph)
        ts = torch.linspace(0, 1, 11 if small else 201, device=device)
        paths = 8 if small else 16_384

        def run() -> object:
            with torch.no_grad():
                return measure.sample(ts, paths)

        return run

    return case


def path_elbo(device: torch.device, small: bool) -> Callable[[], object]:
    """A step of training of an evidence bound on paths."""
    prior = sd.DiffusionMeasure(torch.zeros(2, device=device), sd.SDE(lambda t, x: -x, 0.7))
    control = Control().to(device)
    posterior = prior.controlled(control)
    posterior.control_network = control
    ts = torch.linspace(0, 1, 11 if small else 101, device=device)
    data = GaussianObservations(ts, ts[[5, 10]], torch.zeros(2, 2, device=device), 0.3)
    return steps(PathELBO(posterior, prior, data, num_particles=8 if small else 4096), None, device, small)


def interpolant(device: torch.device, small: bool) -> Callable[[], object]:
    """A step of training of an interpolant's velocity in 64 dimensions."""
    objective = InterpolantRegression(Interpolant(), velocity=FieldNetwork(64, 512, 3))
    count = 64 if small else 65_536
    pairs = torch.randn(count, 64), torch.randn(count, 64)
    return steps(objective, pairs, device, small, batch_size=32 if small else 8192)


def steps(
    objective: nn.Module, data: Any, device: torch.device, small: bool, **options: Any
) -> Callable[[], object]:
    """Return a run of ten steps of training."""
    count = 2 if small else 10
    return lambda: sd.fit(
        objective, data, steps=count, progress=False, device=device, log_every=count, **options
    )


def transport(device: torch.device, small: bool) -> Callable[[], object]:
    """Entropic optimal transport between two clouds in the plane."""
    n = 20 if small else 4000
    x, y = torch.randn(n, 2, device=device).double(), torch.randn(n, 2, device=device).double() + 1
    return lambda: sinkhorn(x, y, 0.1)


CASES: dict[str, Case] = {
    "16 384 paths, 200 steps, control network": simulation(False),
    "the same in a CUDA graph": simulation(True),
    "ten steps of PathELBO, 4096 paths, 100 steps": path_elbo,
    "ten steps of InterpolantRegression, 8192 points in 64 dimensions": interpolant,
    "Sinkhorn, 4000 by 4000, double precision": transport,
}


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median wall time of a run, the device's work included."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def measure(small: bool) -> dict[str, Any]:
    """Run all cases; those that have no device are None."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda") if torch.cuda.is_available() else None
    rows: dict[str, dict[str, float | None]] = {}
    for name, case in CASES.items():
        row: dict[str, float | None] = {"cpu": None, "gpu": None}
        if small or gpu is not None:
            row["cpu"] = seconds(case(cpu, small), cpu, 1 if small else 3)
        if gpu is not None:
            row["gpu"] = seconds(case(gpu, small), gpu, 1 if small else 10)
        rows[name] = row
    device = None if gpu is None else torch.cuda.get_device_name(gpu)
    return {"machine": machine(), "device": device, "smoke": small, "rows": rows, "tests": None}


def gpu_tests() -> str:
    """Run the tests that need a device, and return what pytest says last."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1]


def render(result: dict[str, Any]) -> str:
    """Return the page of the documentation."""

    def cell(value: float | None) -> str:
        return _MISSING if value is None else f"{value * 1e3:.3g} ms"

    lines = ["| case | processor | GPU | ratio |", "|---|---|---|---|"]
    for name, row in result["rows"].items():
        both = row["cpu"] is not None and row["gpu"] is not None
        ratio = f"{row['cpu'] / row['gpu']:.1f}" if both else _MISSING
        lines.append(f"| {name} | {cell(row['cpu'])} | {cell(row['gpu'])} | {ratio} |")
    if result["device"] is None:
        note = "There was no CUDA device on the machine where this page was made, so nothing was measured."
    else:
        about = result["machine"]
        note = f"{result['device']} beside {about['processor']}, torch {about['torch']}. Tests: {result['tests']}."
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    """Measure, test and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small sizes, once, on the processor too")
    parser.add_argument("--out", type=Path, default=SOURCE)
    parser.add_argument("--table", type=Path, default=TARGET)
    options = parser.parse_args()
    torch.manual_seed(0)
    result = measure(options.smoke)
    if result["device"] is not None:
        result["tests"] = gpu_tests()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not options.smoke:
        options.table.write_text(render(result), encoding="utf-8")
    print(render(result))


if __name__ == "__main__":
    main()
