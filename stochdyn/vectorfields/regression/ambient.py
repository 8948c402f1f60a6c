"""Kernels made of scalar kernels of the surrounding space: tangent projection, and modulation of other kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel
from gpytorch.priors import LogNormalPrior

from stochdyn._checks import check_type, is_real
from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.operators import DenseCovariance
from stochdyn.vectorfields.regression.rows import decode

__all__ = ["AmbientKernel", "ScalarFactor"]


class _OverPoints(Kernel):
    """A kernel of rows that is made of a scalar kernel of ambient points."""

    def __init__(self, cloud: PointCloud, base: Kernel | float = 1.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_type(cloud, PointCloud, "cloud")
        if not is_real(base):
            check_type(base, Kernel, "base", "a scalar gpytorch kernel, or nu of a Matérn one")
        self.cloud = cloud
        self.base_kernel = base if isinstance(base, Kernel) else _scalar(cloud, float(base))
        self.double().to(cloud.device)


class AmbientKernel(_OverPoints):
    r"""Independent fields in every ambient coordinate, projected to the tangent spaces: :math:`K(x,x')=T_x^\top T_{x'}\,k(x,x')`.

    The simple rival of kernels that know the manifold: k sees Euclidean distances.

    Args:
        cloud: The points that sample the manifold.
        base: A scalar gpytorch kernel of ambient points with k(x, x) = 1, or a number: ν = 1/2, 3/2, 5/2 of a Matérn
            kernel, ``math.inf`` for the squared exponential.

    Raises:
        InvalidInputError: If ν has another value.

    Example:
        >>> angle = torch.arange(40, dtype=torch.float64) * 2 * torch.pi / 40
        >>> circle = PointCloud(torch.stack([angle.cos(), angle.sin()], -1), num_neighbors=4, dim=1)
        >>> AmbientKernel(circle, 1.5)(circle.rows([0, 20])).shape
        torch.Size([2, 2])
    """

    def forward(self, x1: Any, x2: Any, diag: bool = False, **params: Any) -> Any:
        """Return the kernel between rows."""
        # The row of (x, t) and (x', t') is t·t' k(x, x'), with t and t' as ambient vectors.
        (p1, t1), (p2, t2) = self._split(x1), self._split(x2)
        if diag:
            return self.base_kernel(p1, p2, diag=True) * (t1 * t2).sum(-1)
        return DenseCovariance(self.base_kernel(p1, p2).to_dense() * (t1 @ t2.mT))

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points and ambient directions of rows."""
        ambient = self.cloud.ambient_dim
        if x.shape[-1] > 1:
            return x[..., 1 : 1 + ambient], x[..., 1 + ambient :]
        sites, along = decode(self.cloud, x)
        return sites.points, torch.einsum("nda,na->nd", sites.frames, along)


class ScalarFactor(_OverPoints):
    """A scalar kernel of ambient points as a factor of kernels of vector fields: all components get the same value.

    Args:
        cloud: The points that sample the manifold.
        base: A scalar gpytorch kernel, or ν as in :class:`AmbientKernel`.

    Example:
        >>> from stochdyn.vectorfields import ConnectionMatern
        >>> angle = torch.arange(40, dtype=torch.float64) * 2 * torch.pi / 40
        >>> circle = PointCloud(torch.stack([angle.cos(), angle.sin()], -1), num_neighbors=4, dim=1)
        >>> (ConnectionMatern(circle, num_eigenpairs=9) * ScalarFactor(circle))(circle.rows([0, 20])).shape
        torch.Size([2, 2])
    """

    def forward(self, x1: Any, x2: Any, diag: bool = False, **params: Any) -> Any:
        """Return the kernel between rows, blind to their directions."""
        p1, p2 = (self._points(x) for x in (x1, x2))
        value = self.base_kernel(p1, p2, diag=diag)
        return value if diag else DenseCovariance(value.to_dense())

    def _points(self, x: torch.Tensor) -> torch.Tensor:
        ambient = self.cloud.ambient_dim
        return x[..., 1 : 1 + ambient] if x.shape[-1] > 1 else decode(self.cloud, x)[0].points


def _scalar(cloud: PointCloud, nu: float) -> Kernel:
    size = float((cloud.points - cloud.points.mean(0)).norm(dim=1).mean())
    prior = LogNormalPrior(math.log(size), 1.5)
    if math.isinf(nu):
        kernel: Kernel = RBFKernel(lengthscale_prior=prior)
    elif nu in (0.5, 1.5, 2.5):
        kernel = MaternKernel(nu=nu, lengthscale_prior=prior)
    else:
        raise InvalidInputError("nu of an ambient kernel is limited", got=nu, expected="0.5, 1.5, 2.5 or inf")
    kernel.double()
    kernel.lengthscale = size
    return kernel
