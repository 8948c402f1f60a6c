"""Latitude and longitude: known places, there and back, frames by differences, winds in any unit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.testing import check_forms, check_order, check_units
from stochdyn.vectorfields import EARTH, RVGP, WGS84, Globe, HodgeMatern

LATITUDE = torch.tensor([-90.0, -33.9, 0.0, 48.8562, 89.999, 90.0], dtype=torch.float64)
LONGITUDE = torch.tensor([10.0, 151.2, -180.0, 2.3508, -75.0, 0.0], dtype=torch.float64)


def test_known_points_of_the_ellipsoid() -> None:
    semi_minor = 6_356_752.314245  # of the standard
    points = WGS84.points([0.0, 90.0, 0.0], [0.0, 0.0, 90.0], [0.0, 0.0, 100.0])
    exact = torch.tensor([[6_378_137.0, 0, 0], [0, 0, semi_minor], [0, 6_378_237.0, 0]], dtype=torch.float64)
    torch.testing.assert_close(points, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("globe", [EARTH, WGS84, Globe(1.0, 0.1)])
def test_there_and_back(globe: Globe) -> None:
    height = torch.linspace(-0.001, 0.05, 6).double() * globe.radius
    latitude, longitude, altitude = globe.coordinates(globe.points(LATITUDE, LONGITUDE, height))
    atol = 1e-9 if globe.flattening < 0.01 else 1e-4
    torch.testing.assert_close(latitude, LATITUDE, rtol=0, atol=atol)
    torch.testing.assert_close(altitude, height, rtol=0, atol=atol * globe.radius)
    turn = torch.deg2rad(longitude - LONGITUDE)[1:5]
    assert float(turn.sin().abs().max()) < 1e-12


@pytest.mark.parametrize("globe", [EARTH, WGS84])
def test_frames_are_the_slopes_of_the_points(globe: Globe) -> None:
    latitude, longitude, step = LATITUDE[1:4], LONGITUDE[1:4], 1e-4
    frames = globe.frames(latitude, longitude)
    for k, moves in enumerate(((0.0, step), (step, 0.0))):
        ways = globe.points(latitude + moves[0], longitude + moves[1]) - globe.points(
            latitude - moves[0], longitude - moves[1]
        )
        torch.testing.assert_close(
            torch.nn.functional.normalize(ways, dim=-1), frames[..., k], rtol=0, atol=1e-8
        )
    eye = torch.eye(2).double().expand(3, 2, 2)
    torch.testing.assert_close(frames.mT @ frames, eye)


def test_vectors_and_their_parts() -> None:
    east, north = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    vectors = WGS84.vectors(LATITUDE, LONGITUDE, east, north)
    assert vectors.shape == (4, 6, 3)
    for got, wanted in zip(WGS84.components(LATITUDE, LONGITUDE, vectors), (east, north), strict=True):
        torch.testing.assert_close(got, wanted)
    # a wind to the north at the equator is along the axis
    torch.testing.assert_close(
        EARTH.vectors([0.0], [77.0], 0.0, 2.0), torch.tensor([[0.0, 0.0, 2.0]]).double()
    )


def test_invariances() -> None:
    check_units(lambda factor: Globe(6_378_137.0 * factor, 1 / 298.257).points(LATITUDE, LONGITUDE) / factor)
    check_forms(lambda latitude: WGS84.points(latitude, LONGITUDE), LATITUDE)
    both = torch.stack([LATITUDE, LONGITUDE], -1)
    check_order(lambda at: WGS84.points(at[:, 0], at[:, 1]), both, equivariant=True)


@pytest.mark.parametrize("globe", [EARTH, WGS84])
def test_a_regional_wind_is_predicted(globe: Globe) -> None:
    """Solid rotation about a tilted axis, from sixty stations between 30 and 50 degrees north."""
    rng = np.random.default_rng(0)
    latitude, longitude = rng.uniform(30, 50, 200), rng.uniform(-10, 20, 200)
    cloud = globe.cloud(latitude, longitude, 12)
    assert cloud.dim == 2
    axis = torch.tensor([0.3, 0.2, 1.0]).double() * 10 / globe.radius
    wind = torch.linalg.cross(axis.expand_as(cloud.points), cloud.points)
    east, north = globe.components(latitude, longitude, wind)
    again = globe.vectors(latitude, longitude, east, north)
    gp = RVGP(cloud).fit(range(60), again[:60])
    gap = gp.predict_mean(range(60, 200)) - again[60:]
    assert float(gap.norm() / again[60:].norm()) < 0.05


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match=r"between -90 and 90 degrees; got 100\.0"):
        EARTH.points([100.0], [0.0])
    with pytest.raises(ShapeError, match="longitude has the wrong size"):
        EARTH.points([1.0, 2.0], [0.0])
    with pytest.raises(ShapeError, match="one axis"):
        EARTH.points([[1.0]], [0.0])
    with pytest.raises(ShapeError, match="east must hold one number per point"):
        EARTH.vectors([1.0], [0.0], [1.0, 2.0], 0.0)
    with pytest.raises(InvalidInputError, match="flattening"):
        Globe(1.0, 1.0)
    with pytest.raises(InvalidInputError, match="radius"):
        Globe(-1.0)
    rng = np.random.default_rng(0)
    with pytest.raises(InvalidInputError, match="EARTH"):
        HodgeMatern(WGS84.cloud(rng.uniform(-80, 80, 60), rng.uniform(0, 360, 60)))
    assert math.isclose(EARTH.radius, 6_371_008.8)
