"""Particle filters against the package particles: processor time for the same variance of the log evidence, in one run.

Three models with one component, whose evidence is known from a grid: an autoregression seen through precise Gaussian noise,
stochastic volatility, and a growth model of two modes. The same series goes to both, once alone and once with others. The package
runs with its defaults and as sequential quasi-Monte Carlo (``qmc=True``); ours with its defaults.

    pip install -c constraints.txt particles
    OMP_NUM_THREADS=1 python benchmarks/core/filters.py

It writes ``benchmarks/core/results/filters.json``; ``filters_table.py`` makes the table. ``--smoke`` runs tiny sizes and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import particles
import pyro.distributions as dist
import torch
from particles import distributions as laws
from particles import kalman
from particles import state_space_models as models
from torch import Tensor

import stochdyn as sd
from stochdyn.errors import ApproximationWarning

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

RESULTS = Path(__file__).parent / "results" / "filters.json"
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
LOG_2PI = math.log(2 * math.pi)


class Growth(models.StateSpaceModel):
    """The growth model of Gordon, Salmond and Smith, with a proposal from the observation linearised at the mean."""

    noise, start = 10**0.5, 2**0.5

    def mean(self, t: int, x: np.ndarray) -> np.ndarray:
        """Return the mean of the state at ``t`` after ``x``."""
        return 0.5 * x + 25 * x / (1 + x * x) + 8 * math.cos(1.2 * t)

    def PX0(self) -> Any:
        """Return the law of the start."""
        return laws.Normal(scale=self.start)

    def PX(self, t: int, xp: np.ndarray) -> Any:
        """Return the law of a state."""
        return laws.Normal(loc=self.mean(t, xp), scale=self.noise)

    def PY(self, t: int, xp: np.ndarray, x: np.ndarray) -> Any:
        """Return the law of an observation."""
        return laws.Normal(loc=x * x / 20, scale=1.0)

    def _linearised(self, mean: Any, scale: float, y: float) -> Any:
        slope = mean / 10
        variance = 1 / (scale**-2 + slope * slope)
        return laws.Normal(
            loc=mean + variance * slope * (y - mean * mean / 20), scale=np.sqrt(variance + 0.0 * mean)
        )

    def proposal0(self, data: Any) -> Any:
        """Return the proposal of the start."""
        return self.PX0()

    def proposal(self, t: int, xp: np.ndarray, data: Any) -> Any:
        """Return the proposal of a state."""
        return self._linearised(self.mean(t, xp), self.noise, data[t])


class Case:
    """One model in both packages, and on a grid."""

    def __init__(
        self,
        name: str,
        theirs: Any,
        length: int,
        drift: Callable[[Any, Tensor], Tensor],
        noise: float,
        start: tuple[float, float],
        weigh: Callable[[Tensor, Tensor], Tensor],
        observe: Callable[[Tensor], Any],
        span: tuple[float, float],
    ) -> None:
        self.name, self.theirs, self.length, self.drift, self.noise = name, theirs, length, drift, noise
        self.start, self.weigh, self.observe, self.span = start, weigh, observe, span

    def data(self, count: int) -> np.ndarray:
        """Return ``count`` series ``(count, T)`` from the model."""
        np.random.seed(1)  # noqa: NPY002, particles draws from the global state
        return np.stack([np.concatenate(self.theirs.simulate(self.length)[1]).ravel() for _ in range(count)])

    def exact(self, y: np.ndarray, points: int = 1000) -> np.ndarray:
        """Return log evidences ``(count,)`` by sums over a grid of the state."""
        x = torch.linspace(*self.span, points, dtype=torch.float64)
        step = x[1] - x[0]
        density = dist.Normal(*self.start).log_prob(x).exp().expand(len(y), points)
        total = torch.zeros(len(y), dtype=torch.float64)
        data = torch.as_tensor(y)
        for k in range(self.length):
            if k:
                mean = x + self.drift(torch.tensor(k - 1.0), x)
                density = density @ (dist.Normal(mean[:, None], self.noise).log_prob(x).exp() * step)
            density = density * self.weigh(x, data[:, k, None]).exp()
            scale = density.sum(-1) * step
            total, density = total + scale.log(), density / scale[:, None]
        return total.numpy()

    def run_theirs(self, y: np.ndarray, method: str, count: int, even: bool) -> np.ndarray:
        """Return log evidences ``(count,)`` by particles, one series after the other; by its SQMC if ``even``."""
        kind = {"bootstrap": models.Bootstrap, "guided": models.GuidedPF}[method]
        found = []
        for row in y:
            run = particles.SMC(fk=kind(ssm=self.theirs, data=row), N=count, qmc=even)
            run.run()
            found.append(run.logLt)
        return np.array(found)

    def run_ours(self, y: np.ndarray, method: str, count: int, dtype: torch.dtype) -> np.ndarray:
        """Return log evidences ``y.shape[:-1]`` by ours, all series at once."""
        data = torch.as_tensor(y).to(dtype)
        mean, scale = (torch.tensor([v], dtype=dtype) for v in self.start)
        rows = data.movedim(-1, 0).unbind(0)
        likelihood: Any = sd.infer.StateLikelihood(lambda x: self.observe(x[..., 0]), data)
        if method == "bootstrap":
            likelihood = lambda k, x: self.weigh(x[..., 0], rows[k])  # noqa: E731
        return (
            sd.infer.particle_filter(
                sd.SDE(self.drift, self.noise),
                dist.Normal(mean, scale).to_event(1),
                torch.arange(self.length, dtype=dtype),
                likelihood,
                count,
                method=method,
                dt=1.0,
            )
            .log_evidence.expand(data.shape[:-1])
            .numpy()
        )


def cases(length: int) -> list[Case]:
    """Return the three models."""
    rho, noise, seen = 0.9, 1.0, 0.2
    linear = Case(
        "linear Gaussian",
        kalman.LinearGauss(rho=rho, sigmaX=noise, sigmaY=seen, sigma0=noise / math.sqrt(1 - rho**2)),
        length,
        lambda t, x: (rho - 1) * x,
        noise,
        (0.0, noise / math.sqrt(1 - rho**2)),
        lambda x, y: -0.5 * ((y - x) / seen).square() - (math.log(seen) + 0.5 * LOG_2PI),
        lambda x: dist.Normal(x, seen),
        (-20.0, 20.0),
    )
    mu, rate, vol = -1.02, 0.9702, 0.178
    volatility = Case(
        "stochastic volatility",
        models.StochVol(mu=mu, rho=rate, sigma=vol),
        length,
        lambda t, x: (rate - 1) * (x - mu),
        vol,
        (mu, vol / math.sqrt(1 - rate**2)),
        lambda x, y: torch.addcmul(-0.5 * LOG_2PI - 0.5 * x, y * y, (-x).exp(), value=-0.5),
        lambda x: dist.Normal(0.0, (0.5 * x).exp()),
        (-7.0, 5.0),
    )
    growth = Case(
        "growth",
        Growth(),
        length,
        lambda t, x: 25 * x / (1 + x * x) - 0.5 * x + 8 * torch.cos(1.2 * (t + 1)),
        Growth.noise,
        (0.0, Growth.start),
        lambda x, y: -0.5 * (y - x * x / 20).square() - 0.5 * LOG_2PI,
        lambda x: dist.Normal(x * x / 20, 1.0),
        (-45.0, 45.0),
    )
    return [linear, volatility, growth]


def timed(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Return milliseconds of the processor, and what ``run`` found."""
    start = time.process_time()
    found = run()
    return 1e3 * (time.process_time() - start), found


def race(
    case: Case, y: np.ndarray, exact: np.ndarray, method: str, count: int, repeats: int
) -> dict[str, Any]:
    """Measure one filter of both packages on the same series, interleaved.

    Time is the least of all runs; the variance of the log evidence is that between runs, the mean over the series.
    """
    series = len(y)
    runs: dict[str, Callable[[], np.ndarray]] = {
        "particles": lambda: case.run_theirs(y, method, count, False),
        "particles SQMC": lambda: case.run_theirs(y, method, count, True),
    }
    for name, dtype in PRECISIONS.items():
        runs[name] = lambda dtype=dtype: case.run_ours(y, method, count, dtype)
    least = dict.fromkeys(runs, math.inf)
    found: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            milliseconds, values = timed(run)
            if number:  # the first one warms up
                least[name] = min(least[name], milliseconds)
                found[name].append(values)
    if series == 1 and count <= 1000:
        # More runs of ours, all at once and each with its own particles, for a variance with less noise.
        for name, dtype in PRECISIONS.items():
            found[name] += list(case.run_ours(np.repeat(y[None], 100, 0), method, count, dtype))
    rows = {}
    for name, values in found.items():
        all_runs = np.stack(values)
        ratio = np.exp(all_runs - exact)
        error = math.sqrt(ratio.var(0, ddof=1).mean() / ratio.size)
        rows[name] = {
            "milliseconds": least[name],
            "variance": float(all_runs.var(0, ddof=1).mean()),
            "runs": len(all_runs),
            "evidence over exact": float(ratio.mean()),
            "stderr": float(error),
        }
    return {"model": case.name, "filter": method, "series": series, "particles": count, "rows": rows}


def main() -> None:
    """Measure all and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ApproximationWarning)
    sizes = [(50, 100, 3), (50, 1000, 2), (1, 100, 40), (1, 1000, 20), (1, 10_000, 8)]
    length = 100
    if options.smoke:
        sizes, length = [(1, 50, 2), (3, 50, 2)], 10
    out = options.out or (None if options.smoke else RESULTS)
    result: dict[str, Any] = {
        "machine": machine("particles", "numpy", "numba"),
        "smoke": options.smoke,
        "length": length,
        "rows": [],
    }
    if out is not None and out.exists():
        # A run that was cut off goes on.
        result["rows"] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    known = {(r["model"], r["filter"], r["series"], r["particles"]) for r in result["rows"]}
    for series, count, repeats in sizes:
        for case in cases(length):
            wanted = [m for m in ("bootstrap", "guided") if (case.name, m, series, count) not in known]
            if not wanted:
                continue
            y = case.data(series)
            exact = case.exact(y)
            for method in wanted:
                row = race(case, y, exact, method, count, repeats)
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
                if out is not None:
                    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
