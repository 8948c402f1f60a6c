"""Time of a step of variational inference of latent paths, in processor milliseconds.

Run it with one thread and nothing else on the machine:

    OMP_NUM_THREADS=1 python benchmarks/core/inference.py

It writes the column ``--column`` (by default "now") of ``benchmarks/core/results/inference.json`` and leaves the other columns
as they are; ``benchmarks/core/inference_table.py`` makes the table of the documentation out of that file. With ``PYTHONPATH`` set to
another version of the library it measures that one.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

import stochdyn as sd

RESULTS = Path(__file__).parent / "results" / "inference.json"
F64 = torch.float64


def readme() -> tuple[Any, ...]:
    """The first example of the README: a double well with memory, two parameters, a control network."""
    ts = torch.linspace(0, 5, 51)
    seen = torch.arange(0, 51, 5)[1:]
    noise = sd.fractional.MarkovNoise(0.7, 6, 5.0, 0.1)

    def model(y: Any = None) -> Any:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
        sde = sd.SDE(lambda t, x: rate[..., None] * (x - x**3), sd.Scalar(scale), noise)
        x = sd.infer.sample_path("x", sde, torch.zeros(1), ts)
        return pyro.sample("y", dist.Normal(x[..., seen, 0], 0.1).to_event(1), obs=y)

    y = pyro.condition(model, {"rate": torch.tensor(2.0), "scale": torch.tensor(0.6)})()
    return model, sd.infer.AutoPathGuide(model), (y,), 4


def nile() -> tuple[Any, ...]:
    """The level of the Nile: 663 years, eight memory states, a random start with a past."""
    rate, mean, scale, error = (torch.tensor(v, dtype=F64) for v in (0.9, 1150.0, 85.0, 35.0))
    noise = sd.fractional.MarkovNoise(0.8, 8, 720.0, 1.0)
    years = torch.arange(622.0, 1285.0, dtype=F64)
    level = 1150 + 80 * torch.randn(663, dtype=F64, generator=torch.Generator().manual_seed(0))

    def model(ts: Any, level: Any) -> None:
        sde = sd.SDE(lambda t, x: -rate * (x - mean), sd.Scalar(scale), noise=noise)
        start = dist.Normal(mean.expand(1), 120.0).to_event(1)
        path = sd.infer.sample_path("path", sde, start, ts)
        pyro.sample("level", dist.Normal(path[..., 0], error).to_event(1), obs=level)

    return model, sd.infer.AutoPathGuide(model, hidden=()), (years, level), 4


def recomputed(random_start: bool = False) -> tuple[Any, ...]:
    """Feedback recomputed for every draw of a Hurst index and a scale: 40 steps, five memory states."""
    ts = torch.linspace(0, 2, 41, dtype=F64)
    y = 0.2 * torch.randn(40, dtype=F64, generator=torch.Generator().manual_seed(0)).cumsum(0)

    def model(ts: Any, y: Any) -> None:
        hurst = pyro.sample("hurst", dist.Uniform(y.new_tensor(0.0), 1.0))
        scale = pyro.sample("scale", dist.LogNormal(y.new_tensor(0.0), 1.0))
        sde = sd.SDE(lambda t, x: -x, sd.Scalar(scale), sd.fractional.MarkovNoise(hurst, 5, 2.0, 0.05))
        zero = y.new_zeros(1)
        x = sd.infer.sample_path("x", sde, dist.Normal(zero, 1.0).to_event(1) if random_start else zero, ts)
        pyro.sample("y", dist.Normal(x[..., 1:, 0], 0.1).to_event(1), obs=y)

    guide = sd.infer.AutoPathGuide(model, hidden=(), feedback="recomputed", rest=AutoMultivariateNormal)
    return model, guide, (ts, y), 8


def recomputed_brownian() -> tuple[Any, ...]:
    """The same for a Brownian path of 50 steps with an unknown rate."""
    ts = torch.linspace(0, 1, 51)

    def model(y: Any) -> None:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        sde = sd.SDE(lambda t, x: -rate[..., None] * x, 0.5)
        x = sd.infer.sample_path("x", sde, torch.ones(1), ts, noise_space=True)
        pyro.sample("y", dist.Normal(x[..., 10::10, 0], 0.1).to_event(1), obs=y)

    guide = sd.infer.AutoPathGuide(model, hidden=(), feedback="recomputed", rest=AutoMultivariateNormal)
    return model, guide, (torch.tensor([0.8, 0.7, 0.5, 0.4, 0.3]),), 4


CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "README, first example": readme,
    "Nile, 663 years": nile,
    "recomputed feedback, memory": recomputed,
    "recomputed feedback, memory and random start": lambda: recomputed(True),
    "recomputed feedback, Brownian": recomputed_brownian,
}


def measure(case: str, repeats: int) -> dict[str, float]:
    """Return the least time of a step in milliseconds, and how often the model runs in it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    model, guide, args, particles = CASES[case]()
    runs = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        return model(*args, **kwargs)

    guide._model = (counted,)
    guide(*args)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(counted, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    best = float("inf")
    for repeat in range(repeats + 2):
        runs, start = 0, time.process_time()
        svi.step(*args)
        if repeat > 1:
            best = min(best, time.process_time() - start)
    return {"milliseconds": round(1e3 * best, 2), "model_runs": runs}


def main() -> None:
    """Measure all cases and write the column."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--column", default="now")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for case in CASES:
        found.setdefault(case, {})[options.column] = measure(case, options.repeats)
        print(case, found[case][options.column], flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
