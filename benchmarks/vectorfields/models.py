"""The models of the accuracy table, and what is measured of their predictions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from gpytorch.kernels import ScaleKernel
from problems import Task
from torch import Tensor

from stochdyn.vectorfields import (
    RVGP,
    AmbientKernel,
    ConnectionMatern,
    HodgeMatern,
    PointCloud,
    hodge_compositional,
)
from stochdyn.vectorfields.regression import decode


class EigenvectorKernel(AmbientKernel):
    """The baseline of the RVGP paper: a squared exponential of scalar Laplacian eigenvectors as coordinates."""

    def __init__(self, cloud: PointCloud, num_eigenpairs: int = 100) -> None:
        super().__init__(cloud, math.inf)
        modes = cloud.modes(min(num_eigenpairs, len(cloud)), "scalar")[1][:, 0]
        self.register_buffer("coordinates", modes, persistent=False)
        self.base_kernel.lengthscale = 3.0 * num_eigenpairs**0.5

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sites, along = decode(self.cloud, x)
        return self.coordinates[sites.nodes[:, 0]], torch.einsum("nda,na->nd", sites.frames, along)


def wide_cloud(cloud: PointCloud) -> PointCloud:
    """The same points with wide Gaussian weights, good for eigenvalues and bad for thin shapes."""
    return PointCloud(cloud.points, 30, 2, allow_disconnected=True)


def along_and_through(cloud: PointCloud) -> RVGP:
    """Correlations along the manifold plus correlations through space."""
    along = ConnectionMatern(cloud, 1.5, trainable_nu=True)
    return RVGP(cloud, ScaleKernel(along) + ScaleKernel(AmbientKernel(cloud, 1.5)))


BUNNY: dict[str, Callable[[PointCloud], RVGP]] = {
    "connection, 100 modes, ν learnt (the paper's)": lambda c: RVGP(
        c, ConnectionMatern(c, 1.5, min(100, 2 * len(c)), trainable_nu=True)
    ),
    "connection, 300 modes": lambda c: RVGP(c, ConnectionMatern(c, 1.5, 300, trainable_nu=True)),
    "connection, full rank, ν = 2": lambda c: RVGP(c, backend="precision", nu=2),
    "connection, full rank, ν = 3": lambda c: RVGP(c, backend="precision", nu=3),
    "projected scalar": lambda c: RVGP(c, "projected"),
    "ambient Matérn 3/2": lambda c: RVGP(c, "ambient"),
    "ambient squared exponential": lambda c: RVGP(c, "ambient", nu=math.inf),
    "squared exponential of eigenvectors": lambda c: RVGP(c, EigenvectorKernel(c)),
    "connection, 30 Gaussian neighbours, 100 modes": lambda c: RVGP(wide_cloud(c), num_eigenpairs=100),
    "connection, 300 modes + ambient Matérn 3/2": along_and_through,
    "auto": lambda c: RVGP(c, "auto"),
}

WIND: dict[str, Callable[[PointCloud], RVGP]] = {
    "connection, 200 modes": lambda c: RVGP(c, num_eigenpairs=200),
    "connection, full rank, ν = 2": lambda c: RVGP(c, backend="precision", nu=2),
    "connection, full rank, ν = 3": lambda c: RVGP(c, backend="precision", nu=3),
    "projected scalar, 120 modes": lambda c: RVGP(c, "projected", num_eigenpairs=120),
    "ambient Matérn 3/2": lambda c: RVGP(c, "ambient"),
    "ambient Matérn 5/2": lambda c: RVGP(c, "ambient", nu=2.5),
    "ambient squared exponential": lambda c: RVGP(c, "ambient", nu=math.inf),
    "exact Hodge, degree 14": lambda c: RVGP(c, HodgeMatern(c)),
    "exact divergence-free, degree 14": lambda c: RVGP(c, HodgeMatern(c, part="divergence_free")),
    "exact Hodge-compositional, degree 20, ν learnt": lambda c: RVGP(
        c, hodge_compositional(c, 1.5, 20, True)
    ),
    "connection, 300 modes + ambient Matérn 3/2": along_and_through,
    "auto": lambda c: RVGP(c, "auto"),
}


def evaluate(task: Task, make: Callable[[PointCloud], RVGP]) -> dict[str, Any]:
    """Fit and score: relative L2 error of held-out vectors, log density and coverage per tangent component."""
    start = time.process_time()
    gp = make(task.cloud).fit(task.train, task.field[task.train])
    fitted = time.process_time() - start
    mean, cov = gp.predict(task.test, with_noise=True)
    truth = task.field[task.test]
    gap = torch.einsum("qda,qd->qa", gp.frames(task.test), truth - mean)
    factor = torch.linalg.cholesky(cov)
    half = torch.linalg.solve_triangular(factor, gap[..., None], upper=False)[..., 0]
    log_det = factor.diagonal(dim1=1, dim2=2).log().mean()
    spread = cov.diagonal(dim1=1, dim2=2).sqrt()
    # the share of the vectors that differs from the graph's planes counts as error too
    return {
        "error": float((mean - truth).norm() / truth.norm()),
        "nlpd": float(0.5 * half.square().mean() + 0.5 * math.log(2 * math.pi) + log_det),
        "coverage": float((gap.abs() < 1.96 * spread).double().mean()),
        "log_evidence": float(gp.log_marginal_likelihood()),
        "noise_variance": gp.noise_variance,
        "chosen": gp.chosen,
        "seconds": fitted,
    }
