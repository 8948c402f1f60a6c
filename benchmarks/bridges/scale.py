"""Large data: an atlas with outliers, couplings in blocks, and the refinement of a network; each in a process of its own, for its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

__all__ = ["atlas", "blocks", "network"]

_HEAD = """
import json, resource, time, warnings
import torch
import stochdyn as sd
torch.set_num_threads(1)
warnings.simplefilter("ignore")
g = torch.Generator().manual_seed(0)


def cloud(n, dim, t, share=0.0):
    # two branches that part while they move on; the first so many particles are outliers
    side = torch.where(torch.rand(n, generator=g) < 0.5, 1.0, -1.0)
    x = 0.5 * torch.randn(n, dim, generator=g)
    x[:, 0] += 0.5 * t
    x[:, 1] += 0.3 * side * t
    far = round(share * n)
    x[:far] += 8 * torch.randn(far, dim, generator=g)
    return x


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
"""

_COUPLINGS = """
n, dim, days, share, dtype, options = {n}, {dim}, {days}, {share}, torch.{dtype}, {options}
snaps = sd.bridges.Snapshots([float(k) for k in range(days)], [cloud(n, dim, k, share).to(dtype) for k in range(days)])
start = time.process_time()
law = sd.bridges.SchrodingerBridge(snaps, diffusion=0.5, **options).solve()
seconds = time.process_time() - start
used = peak()
far = [set(own.tolist()) for own in law.outliers()]
print(json.dumps({{
    "n": n, "dim": dim, "days": days, "outliers": share, "dtype": "{dtype}", "seconds": seconds, "peak_gib": used,
    "converged": law.converged, "marginal_error": float(law.marginal_errors.max()),
    "iterations": [plan.num_iterations for plan in law.plans],
    "outliers_named": min(len(own & set(range(round(share * n)))) for own in far),
    "wrongly_named": max(len(own - set(range(round(share * n)))) for own in far),
    "races": races(snaps, law, {race}),
}}))
"""

_RACE = """
def races(snaps, law, limit):
    # the first coupling by POT's solvers, each stopped after so many iterations, and by ours to the same tolerance
    if not limit:
        return []
    import ot

    x, y = snaps[0].sample, snaps[1].sample
    a, b = snaps[0].weights.numpy(), snaps[1].weights.numpy()
    cost = ot.dist(x.numpy(), y.numpy())
    reg = 2 * 0.5**2
    rows = []
    start = time.process_time()
    plan = sd.sinkhorn(x, y, reg, cost=None, tolerance=1e-4)
    rows.append({"solver": "stochdyn", "seconds": time.process_time() - start, "iterations": plan.num_iterations,
                 "error": float(plan.marginal_error)})
    for method, most in (("sinkhorn", limit), ("sinkhorn_stabilized", limit), ("sinkhorn_log", max(1, limit // 10))):
        start = time.process_time()
        found = ot.sinkhorn(a, b, cost, reg, method=method, numItermax=most, stopThr=1e-12)
        seconds = time.process_time() - start
        error = float(abs(found.sum(1) - a).sum() + abs(found.sum(0) - b).sum())
        rows.append({"solver": "POT " + method, "seconds": seconds, "iterations": most, "error": error})
    return rows
"""

_NETWORK = """
n, dim, steps = {n}, {dim}, {iterations}
snaps = sd.bridges.Snapshots([0.0, 1.0, 2.0], [cloud(n, dim, 3.0 * k).double() for k in range(3)])
family = sd.bridges.NeuralDrift.for_snapshots(snaps, 64)
start = time.process_time()
fit = sd.bridges.refine(snaps, family, diffusion=0.5, dt=0.05, max_iterations=steps, progress=False)
print(json.dumps({{
    "n": n, "dim": dim, "iterations": len(fit.history), "seconds": time.process_time() - start, "peak_gib": peak(),
    "objective": fit.history.objective.tolist(), "stopped": fit.history.stopped,
}}))
"""


def _run(code: str) -> dict[str, Any]:
    out = subprocess.run(
        [sys.executable, "-c", _HEAD + _RACE + code], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def atlas(smoke: bool) -> dict[str, Any]:
    """Five days in twenty components, of which one cell in a hundred is an outlier."""
    sizes = {"n": 100, "dim": 5, "days": 3} if smoke else {"n": 3000, "dim": 20, "days": 5}
    return _run(_COUPLINGS.format(**sizes, share=0.01, dtype="float64", options={}, race=0 if smoke else 200))


def blocks(smoke: bool) -> dict[str, Any]:
    """Days of twenty thousand cells, whose couplings are computed in blocks of one GiB."""
    sizes = {"n": 200, "dim": 5, "days": 3} if smoke else {"n": 20_000, "dim": 5, "days": 5}
    memory = 2**16 if smoke else 2**30
    options = {"memory": memory, "tolerance": 1e-3}
    return _run(_COUPLINGS.format(**sizes, share=0.0, dtype="float32", options=options, race=0))


def network(smoke: bool) -> dict[str, Any]:
    """Five iterations of a refinement of a network of width 64 on three days of 1500 cells in five components."""
    sizes = {"n": 40, "dim": 2, "iterations": 1} if smoke else {"n": 1500, "dim": 5, "iterations": 5}
    return _run(_NETWORK.format(**sizes))
