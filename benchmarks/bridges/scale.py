"""Large data: an atlas with outliers, other solvers on it, couplings in blocks, the refinement of a network.

Each runs in a process of its own, for its memory.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

__all__ = ["atlas", "blocks", "network", "race"]

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
}}))
"""

# One coupling by one solver, which may take so many seconds: how many iterations that is, is measured first.
_RACE = """
n, dim, share, solver, tolerance, limit = {n}, {dim}, {share}, "{solver}", {tolerance}, {limit}
x, y = (cloud(n, dim, k, share).double() for k in range(2))
reg = 2 * 0.5**2
loaded = 0.0


def clocked(run, *args):
    global loaded
    loaded = loaded or peak()
    start = time.process_time()
    return run(*args), time.process_time() - start


def stochdyn():
    sd.sinkhorn(x[:50], y[:50], reg)  # what is loaded at the first call
    plan, seconds = clocked(lambda: sd.sinkhorn(x, y, reg, tolerance=tolerance))
    return plan.plan(), seconds, plan.num_iterations


def pot():
    import ot

    a = torch.full((n,), 1 / n, dtype=torch.float64).numpy()
    first, second, method = x.numpy(), y.numpy(), solver.removeprefix("POT ")

    def run(most, least):
        cost = ot.dist(first, second)
        return ot.sinkhorn(a, a, cost, reg, method=method, numItermax=most, stopThr=least, log=True, warn=False)

    # its rules look at the L2 norm of one marginal's error, which is at least the L1 norm over the root of n
    most = max(20, int(limit * 20 / clocked(run, 20, 0.0)[1]))
    (plan, log), seconds = clocked(run, most, tolerance / n**0.5)
    return torch.as_tensor(plan), seconds, int(log.get("niter", log.get("n_iter", most)))


def ott():
    import jax
    import numpy as np
    from ott.geometry import epsilon_scheduler, pointcloud
    from ott.solvers import linear

    jax.config.update("jax_enable_x64", True)
    first, second = jax.numpy.asarray(x.numpy()), jax.numpy.asarray(y.numpy())

    def compiled(most):
        def solve(p, q):
            eps = epsilon_scheduler.Epsilon(reg, init=2.0**12, decay=0.9) if "annealed" in solver else reg
            out = linear.solve(pointcloud.PointCloud(p, q, epsilon=eps), threshold=tolerance, max_iterations=most)
            return out.f, out.g, out.n_iters

        made = jax.jit(solve).lower(first, second).compile()
        return lambda: jax.block_until_ready(made(first, second))

    # compiled before it is clocked
    short = compiled(20)
    short()
    most = max(20, 10 * int(limit * 2 / clocked(short)[1]))
    (f, g, count), seconds = clocked(compiled(most))
    f, g = (torch.as_tensor(np.array(z)) for z in (f, g))
    plan = ((f[:, None] + g - torch.cdist(x, y).square()) / reg).exp()
    return plan, seconds, int(count)


plan, seconds, iterations = dict(sto=stochdyn, POT=pot, ott=ott)[solver[:3]]()
used = peak()
error = max(float((plan.sum(axis) - 1 / n).abs().sum()) for axis in (0, 1))
print(json.dumps({{
    "solver": solver, "outliers": share, "seconds": seconds, "iterations": iterations, "error": error,
    "peak_gib": used, "loaded_gib": loaded,
}}))
"""

_SOLVERS = (
    "stochdyn",
    "POT sinkhorn",
    "POT sinkhorn_stabilized",
    "POT sinkhorn_log",
    "ott-jax",
    "ott-jax, annealed",
)

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
    out = subprocess.run([sys.executable, "-c", _HEAD + code], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def atlas(smoke: bool) -> dict[str, Any]:
    """Five days in twenty components, of which one cell in a hundred is an outlier."""
    sizes = {"n": 100, "dim": 5, "days": 3} if smoke else {"n": 3000, "dim": 20, "days": 5}
    return _run(_COUPLINGS.format(**sizes, share=0.01, dtype="float64", options={}))


def blocks(smoke: bool) -> dict[str, Any]:
    """Days of twenty thousand cells: of matrices only one kernel is kept, in two GiB, and costs are computed in blocks."""
    sizes = {"n": 200, "dim": 5, "days": 3} if smoke else {"n": 20_000, "dim": 5, "days": 5}
    memory = 2**18 if smoke else 2**31
    options = {"memory": memory, "tolerance": 1e-3}
    return _run(_COUPLINGS.format(**sizes, share=0.0, dtype="float32", options=options))


def race(smoke: bool) -> dict[str, Any]:
    """The first coupling of the atlas, without and with outliers, by several solvers in turn, each in a process of its own."""
    sizes = {"n": 100, "dim": 5, "limit": 0.1} if smoke else {"n": 3000, "dim": 20, "limit": 20.0}
    solvers = [name for name in _SOLVERS if "ott" not in name or importlib.util.find_spec("ott") is not None]
    rows = []
    for share in (0.0, 0.01):
        for solver in solvers:
            rows.append(_run(_RACE.format(**sizes, share=share, solver=solver, tolerance=1e-4)))
            print(rows[-1], flush=True)
    return {**sizes, "tolerance": 1e-4, "rows": rows}


def network(smoke: bool) -> dict[str, Any]:
    """Five iterations of a refinement of a network of width 64 on three days of 1500 cells in five components."""
    sizes = {"n": 40, "dim": 2, "iterations": 1} if smoke else {"n": 1500, "dim": 5, "iterations": 5}
    return _run(_NETWORK.format(**sizes))
