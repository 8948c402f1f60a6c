"""Exact kernels of vector fields on spheres: Hodge and Bochner, divergence-free, curl-free, compositional."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import AdditiveKernel, ScaleKernel
from torch import Tensor

from stochdyn._checks import check_choice
from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.regression._input import as_count
from stochdyn.vectorfields.regression.kernels import SpectralKernel
from stochdyn.vectorfields.regression.sites import Sites

__all__ = ["HodgeMatern", "hodge_compositional", "sphere_of", "vector_harmonics"]

_PARTS = ("both", "divergence_free", "curl_free")
#: Points whose distance to the centre varies by less than this share of their extent lie on a sphere.
_ROUND = 3e-4


def sphere_of(points: Tensor, *, closed: bool = False) -> tuple[Tensor, float] | None:
    """Return centre and radius of the sphere in space on which ``(n, 3)`` points lie, or None if they don't.

    With ``closed`` they must lie all around it, and not on a cap alone.
    """
    if points.shape[-1] != 3 or points.shape[0] < 5:
        return None
    x = points.double()
    middle = x.mean(0)
    # |x - c|² = R² is linear in c and R² - |c|²: 2 x·c + (R² - |c|²) = |x|², by least squares about the middle.
    design = torch.cat([2 * (x - middle), torch.ones_like(x[:, :1])], -1)
    square = ((x - middle) ** 2).sum(-1, keepdim=True)
    # by singular values: the default driver's choice of pivots changes the last bits from call to call
    solution = torch.linalg.lstsq(design, square, driver="gelsd").solution[:, 0]
    centre = middle + solution[:3]
    distance = (x - centre).norm(dim=-1)
    radius = float(distance.mean())
    flat = torch.linalg.matrix_rank(x - middle, rtol=1e-6) < 3
    extent = min(radius, float((x - middle).norm(dim=-1).max()))
    if flat or float((distance - radius).abs().max()) > _ROUND * extent:
        return None
    one_sided = float((x - centre).mean(0).norm()) > 0.3 * radius
    return None if closed and one_sided else (centre, radius)


def vector_harmonics(points: Tensor, degree: int) -> Tensor:
    r"""Return the gradients of all real spherical harmonics up to a degree, :math:`\nabla Y_{lm}/\sqrt{l(l+1)}`.

    In Cartesian form :math:`Y_{lm}=N_{lm}Q_{lm}(z)\,\mathrm{Re}\,(x+iy)^m` and Im, with the derivatives
    :math:`Q_{lm}=d^mP_l/dz^m` by their recurrences, so the poles are points like any other.

    Args:
        points: The points ``(q, 3)`` on the unit sphere.
        degree: The highest degree l.

    Returns:
        ``(q, 3, degree (degree + 2))``, by degree from 1 on, 2 l + 1 for each; orthonormal over the sphere.
    """
    x, y, z = points.double().unbind(-1)
    # Re and Im of (x + iy)^m by (x + iy)^{m+1} = (x + iy)(x + iy)^m.
    cosine, sine = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(degree + 1):
        cosine.append(x * cosine[-1] - y * sine[-1])
        sine.append(x * sine[-1] + y * cosine[-2])
    q = _legendre_derivatives(z, degree)
    zero = torch.zeros_like(x)
    out = []
    for l in range(1, degree + 1):  # noqa: E741, the name of the degree
        for m in range(-l, l + 1):
            k = abs(m)
            # N_lm / √(l(l+1)), and the gradient of N_lm Q_lm(z) Re (x + iy)^m less its radial part.
            norm = math.sqrt((2 * l + 1) / (4 * math.pi * l * (l + 1)))
            norm *= math.exp(0.5 * (math.lgamma(l - k + 1) - math.lgamma(l + k + 1))) * (
                math.sqrt(2) if k else 1
            )
            wave = cosine[k] if m >= 0 else sine[k]
            along_x, along_y = zero, zero
            if k:
                along_x = k * (cosine[k - 1] if m >= 0 else sine[k - 1])
                along_y = k * (-sine[k - 1] if m >= 0 else cosine[k - 1])
            slope = torch.stack([q[l][k] * along_x, q[l][k] * along_y, q[l][k + 1] * wave], -1)
            out.append(norm * (slope - (slope * points).sum(-1, keepdim=True) * points))
    return torch.stack(out, -1)


def _legendre_derivatives(z: Tensor, degree: int) -> list[list[Tensor]]:
    """Return the m-th derivative of the Legendre polynomial of degree l at ``[l][m]``, for m up to l + 1."""
    zero = torch.zeros_like(z)
    q = [[zero] * (degree + 3) for _ in range(degree + 1)]
    odd = 1.0
    for m in range(degree + 1):
        q[m][m] = torch.full_like(z, odd)
        if m + 1 <= degree:
            q[m + 1][m] = (2 * m + 1) * z * q[m][m]
        for l in range(m + 2, degree + 1):  # noqa: E741
            q[l][m] = ((2 * l - 1) * z * q[l - 1][m] - (l + m - 1) * q[l - 2][m]) / (l - m)
        odd *= 2 * m + 1
    return q


class HodgeMatern(SpectralKernel):
    r"""Matérn kernel of vector fields on a sphere, from its exact eigenfields.

    .. math:: K=\sum_ls_l\sum_m\big(E_{lm}E_{lm}^\top+B_{lm}B_{lm}^\top\big),\qquad
        E_{lm}=\frac{\nabla Y_{lm}}{\sqrt{l(l+1)}},\quad B_{lm}=\hat r\times E_{lm},\quad\lambda_l=\frac{l(l+1)}{R^2}

    Gradients E are free of curl, their rotations B free of divergence. The Bochner (connection) Laplacian has the same
    eigenfields with the eigenvalues :math:`(l(l+1)-1)/R^2`.

    Args:
        cloud: The points, which lie on a sphere in space.
        nu: The smoothness ν, or ``math.inf`` for the squared exponential.
        max_degree: The highest degree l of the harmonics.
        part: Which fields the kernel holds: ``"both"``; ``"divergence_free"`` (B alone), for flows of incompressible
            fluids; or ``"curl_free"`` (E alone), for gradients.
        laplacian: The Laplacian whose eigenvalues weigh the harmonics: ``"hodge"``, or ``"bochner"``, which
            :class:`~stochdyn.vectorfields.regression.kernels.ConnectionMatern` approximates. Their predictions hardly
            differ.
        trainable_nu: Whether ν is learnt too.
        lengthscale_prior: The prior of the length scale, as in
            :class:`~stochdyn.vectorfields.regression.kernels.ConnectionMatern`.

    Raises:
        InvalidInputError: If the points don't lie on a sphere.

    Reference:
        Robert-Nicoud, Krause and Borovitskiy, "Intrinsic Gaussian vector fields on manifolds", 2024, section 4.
    """

    def __init__(
        self,
        cloud: PointCloud,
        nu: float = 1.5,
        max_degree: int = 14,
        part: str = "both",
        laplacian: str = "hodge",
        trainable_nu: bool = False,
        lengthscale_prior: Any = "default",
        **kwargs: Any,
    ) -> None:
        check_choice(part, _PARTS, "part")
        check_choice(laplacian, ("hodge", "bochner"), "laplacian")
        self.max_degree = as_count(max_degree, "max_degree")
        if cloud.of_functions:
            raise InvalidInputError(
                "the harmonics are those of vector fields, not of functions", hint="use ConnectionMatern"
            )
        found = sphere_of(cloud.points)
        if found is None:
            raise InvalidInputError(
                "the points don't lie on a sphere in three dimensions",
                hint="use ConnectionMatern, which needs no sphere; for WGS 84 take the points of vectorfields.EARTH",
            )
        degree = np.repeat(np.arange(1, max_degree + 1), 2 * np.arange(1, max_degree + 1) + 1)
        values = (degree * (degree + 1) - (1.0 if laplacian == "bochner" else 0.0)) / found[1] ** 2
        copies = 2 if part == "both" else 1
        eigenvalues = torch.as_tensor(np.tile(values, copies), device=cloud.device)
        # features have mean square 1 / 8 pi each in the two components
        power = torch.full_like(eigenvalues, 1 / (8 * math.pi))
        super().__init__(cloud, eigenvalues, power, nu, trainable_nu, lengthscale_prior, **kwargs)
        self.part = part
        self.centre = found[0]
        # the first of many equal eigenvalues would set the scale: take that of the fourth degree
        self.lengthscale = found[1] * math.sqrt((2.0 * nu if math.isfinite(nu) else 2.0) / 20.0)

    def features(self, sites: Sites) -> Tensor:
        """Return the harmonics of the two kinds at the sites, in their tangent frames, ``(q, 2, k)``."""
        outward = torch.nn.functional.normalize(sites.points - self.centre.to(sites.points), dim=-1)
        gradient = vector_harmonics(outward, self.max_degree)
        parts = [gradient] if self.part != "divergence_free" else []
        if self.part != "curl_free":
            parts.append(torch.linalg.cross(outward[..., None].expand_as(gradient), gradient, dim=1))
        return torch.einsum("qda,qdk->qak", sites.frames, torch.cat(parts, -1))


def hodge_compositional(
    cloud: PointCloud, nu: float = 1.5, max_degree: int = 14, trainable_nu: bool = False
) -> AdditiveKernel:
    """Return the sum of a divergence-free and a curl-free kernel, each with its own amplitude and length scale.

    The data decide how much of the field is rotation and how much is source.

    Args:
        cloud: The points, which lie on a sphere in space.
        nu: The smoothness ν, or ``math.inf`` for the squared exponential.
        max_degree: The highest degree l of the harmonics.
        trainable_nu: Whether the smoothness of each part is learnt too.

    Reference:
        Robert-Nicoud, Krause and Borovitskiy, "Intrinsic Gaussian vector fields on manifolds", 2024, section 4.3.
    """
    parts = [
        ScaleKernel(HodgeMatern(cloud, nu, max_degree, part, trainable_nu=trainable_nu)).double()
        for part in ("divergence_free", "curl_free")
    ]
    for part in parts:
        part.outputscale = 0.5
    return AdditiveKernel(*parts)
