"""Processor time: eigenpairs against the plain iteration, regression against dense algebra, and cost against size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse.linalg import eigsh

from stochdyn.vectorfields import RVGP, ConnectionMatern, PointCloud
from stochdyn.vectorfields.geometry import smallest_eigenpairs
from stochdyn.vectorfields.regression import engines, log_evidence


def random_sphere(n: int) -> np.ndarray:
    """Independent uniform points."""
    x = np.random.default_rng(0).normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def eigenpairs(n: int, k: int, repeats: int) -> dict[str, Any]:
    """Ours against ``eigsh(which="SM")`` on the same real matrix, as the reference calls it."""
    cloud = PointCloud(random_sphere(n), 10, 2)
    real = cloud.pencil(real=True).symmetric()
    ours, theirs, values = math.inf, math.inf, {}
    for turn in range(repeats):
        start = time.process_time()
        values["ours"] = smallest_eigenpairs(cloud.pencil(), k)[0]
        ours = min(ours, time.process_time() - start)
        if turn == 0 or n < 5000:
            start = time.process_time()
            values["theirs"] = np.sort(eigsh(real, k, which="SM")[0])
            theirs = min(theirs, time.process_time() - start)
    agreement = float(np.abs(values["ours"][:k] - values["theirs"]).max())
    return {"n": n, "k": k, "ours": ours, "theirs": theirs, "ratio": theirs / ours, "agreement": agreement}


def dense_reference(
    phi: torch.Tensor, values: torch.Tensor, y: torch.Tensor, new: torch.Tensor, evaluations: int | None
) -> dict[str, Any]:
    """A GP in the reference's form: ambient rows, the rank-k kernel as a dense N by N matrix, Cholesky and L-BFGS.

    Hyper-parameters are κ, ν, the amplitude and the noise; the optimiser is the one that ours uses, to the same tolerance,
    or stopped after so many evaluations.
    """
    count = 0

    def parts(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kappa, nu, amplitude, noise = raw.exp()
        log = -nu * torch.log(2 * nu / kappa**2 + values)
        weight = torch.exp(log - log.max())
        s = amplitude * weight / weight.mean()
        covariance = (phi * s) @ phi.T
        return s, torch.linalg.cholesky(covariance + noise * torch.eye(len(y), dtype=y.dtype))

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal count
        count += 1
        raw = torch.tensor(flat, requires_grad=True)
        _, factor = parts(raw)
        half = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
        loss = (0.5 * half.square().sum() + factor.diagonal().log().sum()) / len(y)
        loss.backward()
        return loss.item(), raw.grad.numpy()

    start = time.process_time()
    begin = np.log([1.0, 1.5, float(y.square().mean()), 0.05 * float(y.square().mean())])
    bounds = [(v - 8, v + 8) for v in begin]
    options = {"maxiter": 100, "ftol": 1e-7, "maxfun": evaluations or 1000}
    best = minimize(cost, begin, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    fitted = time.process_time()
    with torch.no_grad():
        s, factor = parts(torch.as_tensor(best.x))
        cross = (new * s) @ phi.T
        mean = cross @ torch.cholesky_solve(y[:, None], factor)
        half = torch.linalg.solve_triangular(factor, cross.T, upper=False)
        variance = (new.square() * s).sum(1) - half.square().sum(0)
    return {
        "evaluations": count,
        "fit": fitted - start,
        "predict": time.process_time() - fitted,
        "mean": mean[:, 0],
        "variance": variance,
    }


def regression(n: int, k: int, repeats: int, evaluations: int | None = None) -> dict[str, Any]:
    """Fit and predict of half of the nodes: feature space against dense algebra with ambient rows.

    With ``evaluations`` the dense fit is stopped early, and its time is that of one evaluation times as many as ours took.
    """
    cloud = PointCloud(random_sphere(n), 10, 2)
    spin = torch.linalg.cross(torch.tensor([[0.3, -0.5, 1.0]]).double().expand(n, 3), cloud.points)
    generator = torch.Generator().manual_seed(0)
    field = (
        spin + torch.sin(3 * cloud.points) + 0.2 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    )
    sites = cloud.sites(slice(None))
    field = sites.to_ambient(sites.to_tangent(field))
    train, test = torch.arange(0, n, 2), torch.arange(1, n, 2)
    kernel = ConnectionMatern(cloud, 1.5, k, trainable_nu=True)
    start_state = {name: p.detach().clone() for name, p in kernel.named_parameters()}
    ours_fit = ours_predict = math.inf
    for _ in range(repeats):
        kernel.load_state_dict(start_state, strict=False)
        count = 0

        def counted(stats: Any, weights: Any, noise: Any) -> Any:
            nonlocal count
            count += 1
            return log_evidence(stats, weights, noise)

        engines.log_evidence = counted
        start = time.process_time()
        gp = RVGP(cloud, kernel).fit(train, field[train])
        middle = time.process_time()
        mean, _ = gp.predict(test)
        ours_fit = min(ours_fit, middle - start)
        ours_predict = min(ours_predict, time.process_time() - middle)
    values, modes = cloud.modes(k)
    lifted = torch.einsum("nda,nak->ndk", cloud.frames, modes)
    dense = dense_reference(
        lifted[train].flatten(0, 1), values, field[train].flatten(), lifted[test].flatten(0, 1), evaluations
    )
    dense_fit = dense["fit"] * (1 if evaluations is None else count / dense["evaluations"])
    ours, theirs = ours_fit + ours_predict, dense_fit + dense["predict"]
    gap = (dense["mean"].reshape(-1, 3) - mean).norm() / mean.norm()
    return {
        "n": n,
        "k": k,
        "rows": 3 * len(train),
        "ours fit": ours_fit,
        "ours predict": ours_predict,
        "ours evaluations": count,
        "dense fit": dense_fit,
        "dense predict": dense["predict"],
        "dense evaluations": dense["evaluations"],
        "ratio": theirs / ours,
        "dense stopped early": evaluations is not None,
        "means differ by": float(gap),
    }


# Linux hands ru_maxrss down from the parent process; VmHWM is the process's own.
_CHILD = """
import pathlib, re, sys, time, resource, json; sys.path.insert(0, {folder!r})
import torch
torch.set_num_threads(1)
from speed import random_sphere
from stochdyn.vectorfields import RVGP, PointCloud
import stochdyn.vectorfields.geometry.spectrum, scipy.sparse.linalg, sklearn.neighbors
small = PointCloud(random_sphere(500), 10, 2)
RVGP(small, num_eigenpairs=20).fit(range(100), torch.ones(100, 3).double() - small.points[:100])
status = pathlib.Path("/proc/self/status")
def peak_kib():
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak_kib()
points = random_sphere({n})
a = time.process_time(); cloud = PointCloud(points, 10, 2)
b = time.process_time(); cloud.spectrum({k})
c = time.process_time()
field = torch.linalg.cross(torch.tensor([[0.3, -0.5, 1.0]]).double().expand({n}, 3), cloud.points)
gp = RVGP(cloud, num_eigenpairs={k}).fit(range(0, {n}, 2), field[::2])
d = time.process_time(); mean, cov = gp.predict(range(1, {n}, 2))
e = time.process_time()
error = float((mean - field[1::2]).norm() / field[1::2].norm())
peak = (peak_kib() - before) / 1024
print(json.dumps(dict(n={n}, k={k}, graph=b-a, spectrum=c-b, fit=d-c, predict=e-d, total=e-a, megabytes=peak, error=error)))
"""


def scaling(sizes: tuple[int, ...], k: int) -> list[dict[str, Any]]:
    """Processor seconds and growth of the peak memory by size, each in a process of its own."""
    rows = []
    for n in sizes:
        code = _CHILD.format(folder=str(Path(__file__).parent), n=n, k=k)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows
