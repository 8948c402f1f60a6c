"""The wind: its grid, its interpolation, and facts of the atmosphere."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd
from stochdyn.errors import InvalidInputError


def test_grid() -> None:
    wind = sd.datasets.wind_climatology()
    assert wind.eastward.shape == wind.northward.shape == (12, 73, 144)
    assert wind.latitude[0] == 90
    assert wind.longitude[-1] == 357.5
    # the winter jet stream over the western Pacific
    january = wind.eastward[0]
    row, column = divmod(int(january.argmax()), 144)
    assert 60 < january.max() < 80
    assert 25 <= wind.latitude[row] <= 40
    assert 120 <= wind.longitude[column] <= 180


def test_on_the_sphere() -> None:
    points, wind = sd.datasets.wind_on_sphere(500, 1)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(500).double())
    assert (points * wind).sum(-1).abs().max() < 1e-9
    grid = sd.datasets.wind_climatology()
    z = points[:, 2]
    row = int((90 - torch.rad2deg(torch.asin(z[100]))) / 2.5)
    column = int(torch.rad2deg(torch.atan2(points[100, 1], points[100, 0])) % 360 / 2.5)
    corner = grid.eastward[0][[row, row, row + 1, row + 1], [column, (column + 1) % 144] * 2]
    east = torch.stack([-points[100, 1], points[100, 0], torch.zeros(()).double()]) / (1 - z[100] ** 2).sqrt()
    assert corner.min() - 0.5 < (wind[100] * east).sum() < corner.max() + 0.5
    for month in (0, 13):
        with pytest.raises(InvalidInputError, match="month"):
            sd.datasets.wind_on_sphere(10, month)
