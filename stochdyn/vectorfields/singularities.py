"""Zeros of vector fields on surfaces: where they are, their index, and how sure the posterior is of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_ndim, check_positive, check_positive_int, check_type
from stochdyn.core.law.marginals import Generator
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.connection import connect
from stochdyn.vectorfields.geometry.triangulation import triangles_of
from stochdyn.vectorfields.regression._input import as_index, as_vectors
from stochdyn.vectorfields.regression.rvgp import RVGP

__all__ = ["Singularities", "field_index", "find_singularities", "triangulate"]


#: Triangles of fields whose indices are held at once.
_BLOCK = 8_000_000


def require_surface(cloud: PointCloud) -> None:
    if cloud.dim != 2 or not cloud.is_orientable:
        raise InvalidInputError(
            "the index of a zero is defined here on orientable surfaces",
            got=f"dimension {cloud.dim}, {'' if cloud.is_orientable else 'not '}orientable",
        )


def triangulate(cloud: PointCloud) -> np.ndarray:
    """Return triangles ``(F, 3)`` of nodes that cover the surface, counter-clockwise in the nodes' frames.

    The faces of a mesh; for a cloud see :func:`~stochdyn.vectorfields.geometry.triangulation.triangles_of`. An open
    surface, such as a cap of a sphere, stays open. :func:`inspect_triangles` tells the Euler characteristic of the result.

    Args:
        cloud: The points on an orientable surface.

    Warns:
        ApproximationWarning: If the triangles of a cloud have gaps, overlap, or leave nodes out.
    """
    require_surface(cloud)
    faces = triangles_of(cloud) if cloud.faces is None else cloud.faces.cpu().numpy()
    origin, frames = cloud.array[faces[:, :1]], cloud.node_frames[faces[:, 0]]
    flat = (cloud.array[faces[:, 1:]] - origin) @ frames
    backwards = flat[:, 0, 0] * flat[:, 1, 1] - flat[:, 0, 1] * flat[:, 1, 0] < 0
    faces = faces.astype(np.int64)
    faces[backwards] = faces[backwards][:, ::-1]
    return faces


def turns(cloud: PointCloud, components: Tensor, loops: np.ndarray) -> Tensor:
    """Return the index of fields ``(*batch, n, 2)`` around loops of nodes ``(F, r)``, ``(*batch, F)`` real numbers."""
    field = torch.complex(components[..., 0], components[..., 1])
    total = components.new_zeros(*components.shape[:-2], len(loops))
    holonomy = np.ones(len(loops), dtype=complex)
    # Σ angle(v_{k+1}, O v_k) + Ω = 2π times a whole number (Crane et al., section 8).
    for k in range(loops.shape[1]):
        here, there = loops[:, k], loops[:, (k + 1) % loops.shape[1]]
        maps = connect(cloud.node_frames, there, here)
        turn = maps[:, 0, 0] + 1j * maps[:, 1, 0]
        holonomy = holonomy * turn
        carried = field[..., here] * torch.as_tensor(turn, device=field.device)
        total = total + torch.angle(field[..., there] * carried.conj())
    return (total + torch.as_tensor(np.angle(holonomy), device=field.device)) / (2 * torch.pi)


def field_index(cloud: PointCloud, vectors: Any, loop: Sequence[int]) -> Tensor:
    r"""Return how often a field turns around a closed loop of nodes: the sum of the indices of the zeros inside.

    .. math:: \frac1{2\pi}\Big(\sum_k\angle\big(v_{k+1},O_{k+1,k}v_k\big)+\Omega\Big)

    with Ω the rotation by parallel transport around the loop, which must enclose less curvature than π. A vortex, a source and a
    sink have index 1, a saddle -1.

    Args:
        cloud: The points on an orientable surface.
        vectors: The vectors ``(*batch, n, D)`` at all nodes, or at the nodes of the loop, ``(*batch, len(loop), D)``.
        loop: The neighbouring nodes in order, in either direction.

    Returns:
        ``(*batch)`` whole numbers.

    Reference:
        Hopf, "Vektorfelder in n-dimensionalen Mannigfaltigkeiten", 1927; Crane, de Goes, Desbrun and Schröder, "Digital geometry
        processing with discrete exterior calculus", 2013, section 8.
    """
    require_surface(cloud)
    nodes = as_index(loop, len(cloud), "loop").numpy()
    if len(nodes) < 3:
        raise InvalidInputError("a loop needs at least three nodes", got=len(nodes))
    v = torch.as_tensor(vectors).detach().to(cloud.device, torch.float64)
    if v.ndim >= 2 and v.shape[-2] == len(nodes):
        everywhere = v.new_zeros(*v.shape[:-2], len(cloud), v.shape[-1])
        everywhere[..., nodes, :] = v
        v = everywhere
    v = as_vectors(v, len(cloud), cloud.ambient_dim)
    flat = (cloud.array[nodes] - cloud.array[nodes].mean(0)) @ cloud.node_frames[nodes[0]]
    after = np.roll(flat, -1, axis=0)
    if (flat[:, 0] * after[:, 1] - flat[:, 1] * after[:, 0]).sum() < 0:
        nodes = nodes[::-1].copy()
    return turns(cloud, cloud.sites(slice(None)).to_tangent(v), nodes[None])[..., 0].round()


@dataclass(frozen=True)
class Singularities:
    """Zeros of the mean field, and of draws from the posterior.

    Attributes:
        faces: The triangles ``(F, 3)`` of nodes.
        mean_index: The index ``(F,)`` of the posterior mean in each triangle.
        draw_index: The index ``(S, F)`` of each draw.
        mean_places: The places ``(z, D)`` where the zeros lie within the triangles, in the order of
            ``mean_index.nonzero()``.
        draw_places: The places ``(Z, D)`` of the draws' zeros, in the order of ``draw_index.nonzero()``.
    """

    faces: Tensor
    mean_index: Tensor
    draw_index: Tensor
    mean_places: Tensor
    draw_places: Tensor

    @property
    def probability(self) -> Tensor:
        """Share of the draws with a zero in each triangle, ``(F,)``."""
        return (self.draw_index != 0).double().mean(0)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return the places ``(z, D)`` of the zeros of the mean field, and their indices ``(z,)``."""
        return self.mean_places, self.mean_index[self.mean_index != 0]

    def around(self, centre: Any, radius: float) -> tuple[Tensor, Tensor]:
        """Return the total index near a place: of every draw ``(S, *batch)``, and the places of the draws' zeros there ``(z, D)``.

        Args:
            centre: The place ``(D,)`` around which zeros are counted.
            radius: The distance within which zeros count.
        """
        check_positive(radius, "radius")
        places = self.draw_places
        middle = torch.as_tensor(centre, dtype=places.dtype, device=places.device)
        if middle.shape != places.shape[1:]:
            raise ShapeError(
                "centre must be a point",
                got=f"shape {tuple(middle.shape)}",
                expected=f"({places.shape[1]},)",
            )
        near = (places - middle).norm(dim=-1) <= radius
        field, face = self.draw_index.flatten(0, -2).nonzero()[near].unbind(1)
        index = self.draw_index.new_zeros(self.draw_index.shape[:-1])
        flat = index.flatten().index_add(0, field, self.draw_index.flatten(0, -2)[field, face])
        return flat.reshape(index.shape), places[near]


def find_singularities(
    gp: RVGP, num_draws: int = 200, generator: Generator = None, faces: Any = None
) -> Singularities:
    """Find the zeros of fitted fields with their indices, and how the posterior spreads over both.

    To follow the zeros of fields at successive times see :func:`~stochdyn.vectorfields.track_singularities`.

    Args:
        gp: A Gaussian process that was fitted on an orientable surface.
        num_draws: The number of fields drawn from the joint posterior; 0 for the zeros of the mean alone.
        generator: The source of randomness.
        faces: The triangles ``(F, 3)`` of nodes; by default those of :func:`triangulate`.

    Returns:
        Indices by triangle, of the mean field and of every draw; of every field where many were fitted.

    Raises:
        InvalidInputError: If the manifold isn't an orientable surface.

    Example:
        >>> from stochdyn.datasets import wind_on_sphere
        >>> points, _ = wind_on_sphere(200)
        >>> spin = torch.linalg.cross(torch.tensor([[0.0, 0.0, 1.0]]).double().expand_as(points), points)
        >>> gp = RVGP(PointCloud(points, dim=2), num_eigenpairs=30).fit(range(200), spin)
        >>> zeros = find_singularities(gp, num_draws=10)
        >>> int(zeros.mean_index.sum()), zeros.positions()[1].tolist()
        (2, [1.0, 1.0])
    """
    check_type(gp, RVGP, "gp")
    check_positive_int(num_draws, "num_draws", minimum=0)
    cloud = gp.cloud
    require_surface(cloud)
    everywhere = cloud.sites(slice(None))
    mean = gp.predict_mean(everywhere)
    triangles = triangulate(cloud) if faces is None else as_triangles(faces, cloud)
    source = as_generator(generator, cloud.device)
    corners = torch.as_tensor(triangles, device=cloud.device)

    def zeros(fields: Tensor) -> tuple[Tensor, Tensor]:
        components = everywhere.to_tangent(fields.double()).flatten(0, -3)
        index = turns(cloud, components, triangles).round()
        places = places_of(cloud, components, corners, index.nonzero())
        return index.reshape(*fields.shape[:-2], -1), places

    mean_index, mean_places = zeros(mean[None])
    # in blocks, since many draws of many fields would fill the memory
    block = max(1, _BLOCK // (max(1, mean[..., 0, 0].numel()) * len(triangles)))
    found = [
        zeros(gp.sample(min(block, num_draws - start), everywhere, source))
        for start in range(0, num_draws, block)
    ]
    if not found:
        found = [(mean_index[:0], mean_places[:0])]
    return Singularities(
        corners,
        mean_index[0],
        torch.cat([index for index, _ in found]),
        mean_places,
        torch.cat([places for _, places in found]),
    )


def places_of(cloud: PointCloud, components: Tensor, faces: Tensor, at: Tensor) -> Tensor:
    """Return where fields ``(S, n, 2)`` vanish within triangles, ``(Z, D)``, for pairs ``at (Z, 2)`` of field and triangle.

    The field is taken as linear in the triangle, in the frame of its first corner.
    """
    draw, corners = at[:, 0], faces[at[:, 1]]
    first = corners[:, :1].expand_as(corners).cpu().numpy()
    maps = torch.as_tensor(connect(cloud.node_frames, first.ravel(), corners.cpu().numpy().ravel()))
    values = torch.einsum(
        "zkab,zkb->zka", maps.reshape(*corners.shape, 2, 2).to(components), components[draw[:, None], corners]
    )
    # The barycentric coordinates of the zero of a linear field: the cross products v_j × v_k, over their sum.
    after, last = values.roll(-1, 1), values.roll(-2, 1)
    share = after[..., 0] * last[..., 1] - after[..., 1] * last[..., 0]
    share = (share * share.sum(1, keepdim=True).sign()).clamp(min=0)
    share = share + 1e-300  # where all three values are parallel the centre will do
    return torch.einsum("zk,zkd->zd", share / share.sum(1, keepdim=True), cloud.points[corners].to(share))


def as_triangles(faces: Any, cloud: PointCloud) -> np.ndarray:
    """Return faces as ``(F, 3)`` nodes of a cloud."""
    tensor = torch.as_tensor(faces)
    check_ndim(tensor, 2, "faces", "(F, 3)")
    flat = as_index(tensor.reshape(-1), len(cloud), "faces")
    return flat.reshape(-1, 3).numpy()
