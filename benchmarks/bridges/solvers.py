"""Static couplings: time against POT and geomloss in one run, cost against size, and memory at 20 000 particles."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import stochdyn as sd

__all__ = ["memory", "scaling", "sinkhorn"]


def clouds(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two Gaussian clouds in five dimensions."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 5, generator=g, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), (y + 1).to(dtype)


def sinkhorn(smoke: bool, log_iterations: int = 20_000, repeats: int = 3) -> dict[str, Any]:
    """Solve to an L1 marginal error of 1e-6 with every solver in turn; least processor time of the repeats.

    POT's log-domain solver is slow; stopped after fewer iterations than it needs, its time is a lower bound and marked so.
    """
    import ot

    n, share, repeats = (200, 0.05, 1) if smoke else (2000, 0.01, repeats)
    x, y = clouds(n)
    cost = torch.cdist(x, y).square()
    reg = share * float(cost.mean())
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    options = {"stopThr": 1e-6, "numItermax": 20_000, "warn": False}

    def pot(method: str, numpy: bool) -> Tensor:
        a, matrix = (weights.numpy(), cost.numpy()) if numpy else (weights, cost)
        most = log_iterations if method == "sinkhorn_log" else 20_000
        return torch.as_tensor(
            ot.sinkhorn(a, a, matrix, reg, method=method, **{**options, "numItermax": most})
        )

    contenders: dict[str, tuple[Callable[[], Tensor], int]] = {
        "stochdyn, double precision": (lambda: sd.sinkhorn(x, y, reg).plan(), repeats),
        "stochdyn, single precision, 1e-5": (
            lambda: sd.sinkhorn(x.float(), y.float(), reg, tolerance=1e-5).plan(),
            repeats,
        ),
        "POT sinkhorn, numpy": (lambda: pot("sinkhorn", True), repeats),
        "POT sinkhorn, torch": (lambda: pot("sinkhorn", False), repeats),
        "POT sinkhorn_log, torch": (lambda: pot("sinkhorn_log", False), 1),
    }
    if importlib.util.find_spec("geomloss") is not None and not smoke:
        contenders["geomloss, fixed schedule"] = (lambda: geomloss_plan(x, y, reg), 1)
    if importlib.util.find_spec("ott") is not None:
        contenders["ott-jax, compiled before"] = (ott_solver(x, y, reg), repeats)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, float] = {}
    for k in range(repeats):
        for name, (run, own) in contenders.items():
            if k >= own:
                continue
            start = time.process_time()
            plan = run()
            seconds[name].append(time.process_time() - start)
            target = weights.to(plan)
            errors[name] = max(float((plan.sum(axis) - target).abs().sum()) for axis in (0, 1))
    ours = min(seconds["stochdyn, double precision"])
    rows = {
        name: {
            "seconds": min(s),
            "repeats": len(s),
            "ratio": min(s) / ours,
            "marginal_error": errors[name],
            "unfinished": errors[name] > 5e-6,
        }
        for name, s in seconds.items()
    }
    return {"n": n, "share_of_mean_cost": share, "solvers": rows}


def ott_solver(x: Tensor, y: Tensor, reg: float) -> Callable[[], Tensor]:
    """Return a function that solves by ott-jax in double precision, compiled and run once before."""
    import jax
    import numpy as np
    from ott.geometry import pointcloud
    from ott.solvers import linear

    jax.config.update("jax_enable_x64", True)

    @jax.jit
    def plan(a: Any, b: Any) -> Any:
        geometry = pointcloud.PointCloud(a, b, epsilon=reg)
        return linear.solve(geometry, threshold=1e-6, max_iterations=20_000).matrix

    first, second = jax.numpy.asarray(x.numpy()), jax.numpy.asarray(y.numpy())

    def solve() -> Tensor:
        return torch.as_tensor(np.array(plan(first, second).block_until_ready()))

    solve()
    return solve


def geomloss_plan(x: Tensor, y: Tensor, reg: float) -> Tensor:
    """Return the plan of geomloss's annealed loop; its cost is half the square."""
    from geomloss import SamplesLoss

    f, g = SamplesLoss("sinkhorn", p=2, blur=(reg / 2) ** 0.5, scaling=0.9, debias=False, potentials=True)(
        x, y
    )
    matrix = torch.cdist(x, y).square() / 2
    return torch.exp((f.reshape(-1, 1) + g.reshape(1, -1) - matrix) / (reg / 2)) / (len(x) * len(y))


def scaling(smoke: bool) -> list[dict[str, Any]]:
    """Processor seconds against the number of particles: couplings, and one iteration of Lotka-Volterra's refinement."""
    rows = []
    for n in (100, 200) if smoke else (250, 500, 1000, 2000, 4000):
        x, y = clouds(n)
        reg = 0.05 * float(torch.cdist(x[:200], y[:200]).square().mean())
        start = time.process_time()
        plan = sd.sinkhorn(x, y, reg)
        rows.append(
            {
                "what": "coupling",
                "n": n,
                "seconds": time.process_time() - start,
                "iterations": plan.num_iterations,
            }
        )
    for n in (20,) if smoke else (25, 50, 100, 200):
        data = sd.datasets.lotka_volterra(n, times=[0.0, 2.0, 4.0, 6.0, 8.0])
        snaps = sd.bridges.Snapshots(data.times, data.samples)
        family = sd.bridges.LotkaVolterra()
        with torch.no_grad():
            family.theta.copy_(torch.tensor([1.0, 0.4, 0.4, 0.1]))
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sd.bridges.refine(
                snaps, family, 0.1, max_iterations=1, dt=0.1, method=sd.bridges.Sinkhorn(from_family=True)
            )
        # one projection and two bridges
        rows.append(
            {"what": "refinement", "n": n, "seconds": (time.process_time() - start) / 2, "iterations": 1}
        )
    return rows


_CHILD = """
import resource, sys, time, torch
import stochdyn as sd
torch.set_num_threads(1)
n, dtype = {n}, torch.{dtype}
g = torch.Generator().manual_seed(0)
x = torch.randn(n, 5, generator=g).to(dtype); y = (torch.randn(n, 5, generator=g) + 1).to(dtype)
snaps = sd.bridges.Snapshots([0.0, 1.0], [x, y])
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
start = time.process_time()
bridge = sd.bridges.SchrodingerBridge(snaps, diffusion={sigma}, tolerance={tolerance}).solve()
solved = time.process_time() - start
bridge.sample(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 1000, g)
print(base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, solved, float(bridge.marginal_errors.max()),
      bridge.plans[0].num_iterations, bridge.converged)
"""


def memory(smoke: bool) -> list[dict[str, Any]]:
    """Peak resident memory of a Brownian bridge between large snapshots, each in a process of its own."""
    rows = []
    cases = [(1000, "float32", 1e-4)] if smoke else [(5000, "float64", 1e-6), (20_000, "float32", 1e-4)]
    for n, dtype, tolerance in cases:
        code = _CHILD.format(n=n, dtype=dtype, sigma=1.0, tolerance=tolerance)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        base, peak, seconds, error, iterations, converged = out.stdout.split()
        rows.append(
            {
                "n": n, "dtype": dtype, "tolerance": tolerance, "loaded_gib": float(base), "peak_gib": float(peak),
                "seconds": float(seconds), "marginal_error": float(error), "iterations": int(iterations),
                "converged": converged == "True",
            }
        )  # fmt: skip
    return rows
