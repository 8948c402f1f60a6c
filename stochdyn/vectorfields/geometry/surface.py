"""The manifold of a cloud between its nodes, in torch: projection to it, tangent frames, and fields as drifts."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from stochdyn._checks import (
    as_tensor,
    check_event_size,
    check_positive,
    check_type,
)
from stochdyn.core._distance import distance_between
from stochdyn.errors import ApproximationWarning
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.extension import FAR

__all__ = ["Surface", "TangentDiffusion", "TangentDrift"]

#: Up to this many nodes, or on an accelerator, neighbours are found by comparing with all.
_BRUTE = 400


class Surface(nn.Module):
    r"""Local geometry around arbitrary points near a cloud, batched and differentiable in the point.

    At a point x the manifold is a quadratic over the tangent plane, fitted to the neighbours with weights that fall to zero
    at the last one. Its height over the plane at x is where the manifold lies:

    .. math:: \pi(x)=x+h(0),\qquad h(a)=h_0+Ba+a^\top Ca\ \text{ fitted to the normal parts of }x_j-x.

    The error of the projection is of third order in the spacing.

    Args:
        cloud: The points that sample the manifold.
    """

    points: Tensor
    node_frames: Tensor
    radius: Tensor

    def __init__(self, cloud: PointCloud) -> None:
        super().__init__()
        check_type(cloud, PointCloud, "cloud")
        m = cloud.dim
        quadratic = 1 + m + m * (m + 1) // 2
        self.count = min(max(cloud.frame_neighbors, 2 * quadratic), len(cloud))
        self.dim = m
        self.register_buffer("points", torch.as_tensor(cloud.array, device=cloud.device), persistent=False)
        self.register_buffer(
            "node_frames", torch.as_tensor(cloud.node_frames, device=cloud.device), persistent=False
        )
        self.register_buffer(
            "radius", torch.as_tensor(cloud.graph.radius, device=cloud.device), persistent=False
        )
        self._tree: Any = cKDTree(cloud.array)
        self._pairs = torch.triu_indices(m, m)

    def neighbours(self, x: Tensor) -> Tensor:
        """Return the nearest nodes ``(q, K)`` of points ``(q, D)``."""
        with torch.no_grad():
            if x.device.type == "cpu" and self.points.shape[0] > _BRUTE:
                found = self._tree.query(x.detach().double().numpy(), self.count)[1]
                return torch.as_tensor(np.asarray(found).reshape(len(x), -1))
            distances = distance_between(x.detach().double(), self.points)
            return distances.topk(self.count, largest=False, sorted=True).indices

    def weights(self, x: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ways to the neighbours ``(q, K, D)``, and weights ``(q, K)`` that fall to zero at the last."""
        ways = self.points[nodes] - x.unsqueeze(-2)
        squared = ways.square().sum(-1)
        return ways, (1.0 - squared / (squared[..., -1:] * (1 + 1e-6) + 1e-300)).clamp(min=0).square()

    def warn_off(self, ways: Tensor, nodes: Tensor) -> None:
        """Warn if a point is farther from its nearest node than the nodes there are from their neighbours."""
        with torch.no_grad():
            off = ways[:, 0].norm(dim=-1) > FAR * self.radius[nodes[:, 0]]
            if bool(off.any()):
                # the same words every time, so that a simulation says it once
                warnings.warn(
                    "States lie off the cloud, more than a neighbourhood away from all nodes: the drift is extrapolated there. "
                    "Trust paths up to where they leave, or take a cloud that covers where they go.",
                    ApproximationWarning,
                    stacklevel=3,
                )

    def frames(self, nodes: Tensor, weights: Tensor) -> Tensor:
        """Return tangent frames ``(q, D, m)``: the nearest node's, turned into the blend of the neighbours' planes."""
        near = self.node_frames[nodes]
        overlap = near.mT @ near[:, :1]
        blended = (near @ overlap * weights[..., None, None]).sum(1)
        return orthonormalise(blended)

    def fit(self, ways: Tensor, weights: Tensor, frames: Tensor, values: Tensor) -> Tensor:
        """Fit a quadratic over the tangent plane to values at the neighbours ``(q, K, c)``; return it at the point, ``(q, c)``."""
        # in units of the neighbourhood, for the conditioning of the fit
        a = (ways @ frames) / ways[:, -1].norm(dim=-1)[:, None, None]
        # The weighted normal equations of h(a) = h₀ + B a + a'C a; the fit at the point itself is h₀.
        i, j = self._pairs
        design = torch.cat([torch.ones_like(a[..., :1]), a, a[..., i] * a[..., j]], -1)
        weighted = design * weights.unsqueeze(-1)
        gram = weighted.mT @ design
        ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram, weighted.mT @ values)[:, 0]

    @staticmethod
    def normal(ways: Tensor, frames: Tensor) -> Tensor:
        """Return the parts of the ways that are normal to the tangent plane."""
        return ways - ways @ frames @ frames.mT

    def project(self, x: Tensor, max_iterations: int = 1) -> Tensor:
        """Return the points of the manifold next to ``x (*batch, D)``; repeat for points farther away."""
        flat = x.reshape(-1, x.shape[-1]).to(self.points)
        for _ in range(max_iterations):
            nodes = self.neighbours(flat)
            ways, weights = self.weights(flat, nodes)
            frames = self.frames(nodes, weights)
            flat = flat + self.fit(ways, weights, frames, self.normal(ways, frames))
        return flat.reshape(x.shape).to(x.dtype)


def orthonormalise(frames: Tensor) -> Tensor:
    """Return the orthonormal frame of the same span, by Gram and Schmidt, ``(q, D, m)``."""
    columns: list[Tensor] = []
    for column in frames.unbind(-1):
        for before in columns:
            column = column - (column * before).sum(-1, keepdim=True) * before
        columns.append(torch.nn.functional.normalize(column, dim=-1))
    return torch.stack(columns, -1)


class TangentDrift(nn.Module):
    r"""A vector field on a cloud as the drift of an SDE in ambient coordinates.

    Between nodes the field is a quadratic fitted to the neighbours' vectors, read in the tangent plane at x. With
    ``dt`` it also pulls the state back to the manifold,

    .. math:: b(x)=v(\pi(x))+\frac{\pi(x)-x}{\Delta},

    so that every Euler step of length Δ starts by projecting, whatever solver runs it. States that leave an open cloud
    go on by extrapolation, with a warning.

    Args:
        cloud: The points that sample the manifold.
        vectors: The tangent vectors ``(n, D)`` at the nodes, in the unit of the points per unit of time.
        dt: Δ, the step of the time grid; None leaves states where they are.

    Example:
        >>> angle = torch.arange(60, dtype=torch.float64) * 2 * torch.pi / 60
        >>> points = torch.stack([angle.cos(), angle.sin()], -1)
        >>> drift = TangentDrift(PointCloud(points, 6, dim=1), torch.stack([-angle.sin(), angle.cos()], -1))
        >>> drift(torch.tensor(0.0), torch.tensor([[1.0, 0.0]])).round(decimals=2).abs()
        tensor([[0., 1.]])
    """

    vectors: Tensor

    def __init__(self, cloud: PointCloud, vectors: Tensor, dt: float | None = None) -> None:
        super().__init__()
        if dt is not None:
            check_positive(dt, "dt")
        self.surface = Surface(cloud)
        values = as_tensor(vectors, "vectors", 2, "(n, D)", like=self.surface.points).detach()
        check_event_size(values, len(cloud), "vectors", 0)
        check_event_size(values, cloud.ambient_dim, "vectors")
        self.dt = dt
        self.register_buffer("vectors", values.to(self.surface.points))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift at ``x (*batch, D)``; the field doesn't depend on time."""
        check_event_size(x, self.vectors.shape[-1], "x")
        flat = x.reshape(-1, x.shape[-1]).to(self.vectors)
        surface = self.surface
        nodes = surface.neighbours(flat)
        ways, weights = surface.weights(flat, nodes)
        surface.warn_off(ways, nodes)
        frames = surface.frames(nodes, weights)
        # components in this plane are smooth functions of the place, and right at its foot: no transport is needed
        values = self.vectors[nodes] @ frames
        if self.dt is not None:
            values = torch.cat([values, surface.normal(ways, frames)], -1)
        at = surface.fit(ways, weights, frames, values)
        m = surface.dim
        total = (frames @ at[:, :m, None]).squeeze(-1)
        if self.dt is not None:
            total = total + at[:, m:] / self.dt
        return total.reshape(x.shape).to(x.dtype)


class TangentDiffusion(nn.Module):
    """Isotropic noise in the tangent spaces of a cloud: the diffusion of an SDE, with m channels.

    Args:
        cloud: The points that sample the manifold.
        diffusion: The standard deviation σ per square root of time, in the unit of the points.
    """

    def __init__(self, cloud: PointCloud, diffusion: float) -> None:
        super().__init__()
        check_positive(diffusion, "diffusion")
        self.surface = Surface(cloud)
        self.diffusion = float(diffusion)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return ``(*batch, D, m)``."""
        flat = x.reshape(-1, x.shape[-1]).to(self.surface.points)
        nodes = self.surface.neighbours(flat)
        frames = self.surface.frames(nodes, self.surface.weights(flat, nodes)[1])
        return (self.diffusion * frames).reshape(*x.shape, -1).to(x.dtype)
