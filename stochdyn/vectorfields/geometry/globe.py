"""Latitude and longitude: points, tangent vectors and clouds of the Earth, as a sphere or as the ellipsoid of WGS 84."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    check_event_size,
    check_finite,
    check_positive,
    check_real,
)
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.regression._input import as_float_tensor, as_points, as_vectors

__all__ = ["EARTH", "WGS84", "Globe"]

#: Rounds of the fixed-point iteration for the latitude; each gains about five digits at the Earth's flattening.
_ROUNDS = 6


@dataclass(frozen=True)
class Globe:
    r"""An ellipsoid of revolution with latitudes and longitudes in degrees, and vectors by their parts to the east and north.

    .. math:: x=\big((N+h)\cos\varphi\cos\lambda,\ (N+h)\cos\varphi\sin\lambda,\ ((1-e^2)N+h)\sin\varphi\big),\qquad
        N=\frac{a}{\sqrt{1-e^2\sin^2\varphi}},\quad e^2=f(2-f)

    for the geodetic latitude φ, the longitude λ and the height h. Take :data:`EARTH`, the sphere of the Earth's mean radius,
    where Hodge kernels and maps are wanted and a third of a per cent doesn't matter, as with winds; take :data:`WGS84` for
    positions from satellites.

    Attributes:
        radius: The equatorial radius a; it sets the unit of length.
        flattening: The flattening f, 0 for a sphere.

    Example:
        >>> from stochdyn.vectorfields import RVGP
        >>> latitude, longitude = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)).double() * 20
        >>> cloud = EARTH.cloud(latitude, longitude)
        >>> gp = RVGP(cloud).fit(range(200), EARTH.vectors(latitude, longitude, 8.0, -3.0))
        >>> east, north = EARTH.components(*EARTH.coordinates(cloud.points[:1])[:2], gp.predict_mean([0]))
        >>> round(float(east), 1), round(float(north), 1)
        (8.0, -3.0)

    Reference:
        National Geospatial-Intelligence Agency, "Department of Defense World Geodetic System 1984", NGA.STND.0036, 2014.
    """

    radius: float = 6_371_008.8
    flattening: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self.radius, "radius")
        check_real(self.flattening, "flattening", minimum=0.0, below=1.0)

    @property
    def _squared_eccentricity(self) -> float:
        return self.flattening * (2.0 - self.flattening)

    def points(self, latitude: Any, longitude: Any, altitude: Any = 0.0) -> Tensor:
        """Return points ``(q, 3)`` in space.

        Args:
            latitude: The geodetic latitudes ``(q,)`` in degrees, from -90 to 90, to the north.
            longitude: The longitudes ``(q,)`` in degrees, to the east, in any range.
            altitude: The heights ``(q,)`` above the ellipsoid, in the unit of the radius, or one for all.

        Raises:
            InvalidInputError: If a latitude isn't between -90 and 90.
            ShapeError, NonFiniteError: If the numbers don't fit.
        """
        phi, along = _angles(latitude, longitude)
        height = _like(altitude, phi, "altitude")
        e2 = self._squared_eccentricity
        across = self.radius / (1.0 - e2 * phi.sin() ** 2).sqrt()
        out = (across + height) * phi.cos()
        return torch.stack(
            [out * along.cos(), out * along.sin(), ((1.0 - e2) * across + height) * phi.sin()], -1
        )

    def coordinates(self, points: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return latitudes, longitudes from -180 to 180, and heights of points ``(q, 3)``, each ``(q,)``.

        Args:
            points: The points ``(q, 3)`` in space, in the unit of the radius, outside of the globe's centre.
        """
        x = as_points(points, dim=3).detach().double()
        axis, e2 = torch.hypot(x[:, 0], x[:, 1]), self._squared_eccentricity
        # tan φ = (z + e² N sin φ) / p, a contraction of rate e² from the spherical latitude on
        phi = torch.atan2(x[:, 2], axis * (1.0 - e2))
        for _ in range(_ROUNDS if e2 else 0):
            across = self.radius / (1.0 - e2 * phi.sin() ** 2).sqrt()
            phi = torch.atan2(x[:, 2] + e2 * across * phi.sin(), axis)
        across = self.radius / (1.0 - e2 * phi.sin() ** 2).sqrt()
        # along the normal: p cos φ + z sin φ - a √(1 - e² sin² φ), which is finite at the poles too
        height = axis * phi.cos() + x[:, 2] * phi.sin() - self.radius**2 / across
        return torch.rad2deg(phi), torch.rad2deg(torch.atan2(x[:, 1], x[:, 0])), height

    def frames(self, latitude: Any, longitude: Any) -> Tensor:
        """Return the unit vectors to the east and to the north, ``(q, 3, 2)``.

        Args:
            latitude: The geodetic latitudes ``(q,)`` in degrees.
            longitude: The longitudes ``(q,)`` in degrees.
        """
        phi, along = _angles(latitude, longitude)
        zero = torch.zeros_like(phi)
        east = torch.stack([-along.sin(), along.cos(), zero], -1)
        north = torch.stack([-phi.sin() * along.cos(), -phi.sin() * along.sin(), phi.cos()], -1)
        return torch.stack([east, north], -1)

    def vectors(self, latitude: Any, longitude: Any, east: Any, north: Any) -> Tensor:
        """Return vectors ``(*batch, q, 3)`` in space of their parts to the east and to the north.

        Args:
            latitude: The geodetic latitudes ``(q,)`` in degrees.
            longitude: The longitudes ``(q,)`` in degrees.
            east: The parts to the east, ``(*batch, q)``, or one for all.
            north: The parts to the north, ``(*batch, q)``, or one for all.
        """
        frames = self.frames(latitude, longitude)
        parts = torch.broadcast_tensors(
            _like(east, frames[:, 0, 0], "east"), _like(north, frames[:, 0, 0], "north")
        )
        return torch.einsum("qda,...qa->...qd", frames, torch.stack(parts, -1))

    def components(self, latitude: Any, longitude: Any, vectors: Any) -> tuple[Tensor, Tensor]:
        """Return the parts to the east and to the north of vectors in space, each ``(*batch, q)``.

        Args:
            latitude: The geodetic latitudes ``(q,)`` in degrees.
            longitude: The longitudes ``(q,)`` in degrees.
            vectors: The vectors ``(*batch, q, 3)``.
        """
        frames = self.frames(latitude, longitude)
        v = as_vectors(vectors, len(frames), 3, missing=True).detach().double()
        east, north = torch.einsum("qda,...qd->...qa", frames, v).unbind(-1)
        return east, north

    def cloud(self, latitude: Any, longitude: Any, num_neighbors: int = 10, **options: Any) -> PointCloud:
        """Return the cloud of points on the globe, with exact tangent planes.

        Args:
            latitude: The geodetic latitudes ``(n,)`` in degrees.
            longitude: The longitudes ``(n,)`` in degrees.
            num_neighbors: The number of neighbours of every point in the graph.
            options: Further arguments of :class:`PointCloud`.
        """
        points, frames = self.points(latitude, longitude), self.frames(latitude, longitude)
        return PointCloud(points, num_neighbors, frames=frames, **options)


#: The sphere of the Earth's mean radius, in metres.
EARTH = Globe()
#: The reference ellipsoid of the Global Positioning System, in metres.
WGS84 = Globe(6_378_137.0, 1.0 / 298.257223563)


def _angles(latitude: Any, longitude: Any) -> tuple[Tensor, Tensor]:
    """Return latitudes and longitudes ``(q,)`` in radians."""
    found = []
    for name, value in (("latitude", latitude), ("longitude", longitude)):
        tensor = as_float_tensor(value, name).detach().double()
        if tensor.ndim != 1:
            raise ShapeError(f"{name} must have one axis", got=f"shape {tuple(tensor.shape)}")
        check_finite(tensor, name)
        found.append(tensor)
    check_event_size(found[1], len(found[0]), "longitude")
    if bool((found[0].abs() > 90.0).any()):
        raise InvalidInputError(
            "latitude must lie between -90 and 90 degrees",
            got=float(found[0][found[0].abs().argmax()]),
            hint="longitude is the second argument",
        )
    return torch.deg2rad(found[0]), torch.deg2rad(found[1])


def _like(value: Any, points: Tensor, name: str) -> Tensor:
    """Return one number per point, ``(*batch, q)``."""
    tensor = as_tensor(value, name, like=points, missing=True).detach().to(points)
    if tensor.ndim and tensor.shape[-1] != len(points):
        raise ShapeError(
            f"{name} must hold one number per point",
            got=f"shape {tuple(tensor.shape)}",
            expected=f"(*batch, {len(points)})",
        )
    return tensor if tensor.ndim else tensor.expand(len(points))
