"""Zeros through time: known ways and births, conservation of the index, invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError
from stochdyn.testing import check_forms, check_repetition, check_units
from stochdyn.vectorfields import RVGP, PointCloud, find_singularities, track_singularities
from tests.vectorfields.shapes import fibonacci_sphere, random_sphere


@pytest.fixture(scope="module")
def sphere() -> PointCloud:
    return PointCloud(fibonacci_sphere(400), 12, dim=2)


@pytest.fixture(scope="module")
def sheet() -> PointCloud:
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 25), np.linspace(-1, 1, 25)), -1).reshape(-1, 2)
    return PointCloud(grid + 0.01 * rng.normal(size=grid.shape), 10, dim=2)


def rough(cloud: PointCloud, times: int, seed: int) -> torch.Tensor:
    """Smooth random fields that change with time."""
    generator = torch.Generator().manual_seed(seed)
    _, modes = cloud.modes(30)
    ts = torch.linspace(0, 1, times, dtype=torch.float64)[:, None]
    phase = 2 * math.pi * torch.rand(30, generator=generator, dtype=torch.float64)
    weights = torch.randn(30, generator=generator, dtype=torch.float64) * torch.sin(3 * ts + phase)
    return cloud.sites(slice(None)).to_ambient(torch.einsum("tk,nak->tna", weights, modes))


def test_the_poles_of_a_turning_axis_are_followed(sphere: PointCloud) -> None:
    ts = torch.linspace(0, 2, 41, dtype=torch.float64)
    axis = torch.stack([ts.sin(), 0.3 * ts.cos(), ts.cos()], -1)
    axis = axis / axis.norm(dim=-1, keepdim=True)
    n = len(sphere)
    spin = torch.linalg.cross(axis[:, None].expand(-1, n, 3), sphere.points.expand(41, n, 3))
    tracks = track_singularities(sphere, spin, ts).lasting(2.0)
    assert [(t.index, t.birth, t.death) for t in tracks] == [(1, "time", "time")] * 2
    for track in tracks:
        assert torch.equal(track.ts, ts)
        sign = torch.sign(track.places[0] @ axis[0])
        # a rotation is linear in space, and triangles lie a little inside the sphere
        gap = (track.places / track.places.norm(dim=-1, keepdim=True) - sign * axis).norm(dim=-1)
        assert float(gap.max()) < 0.1 * sphere.spacing
        way = float((axis[1:] - axis[:-1]).norm(dim=-1).sum())
        assert track.length == pytest.approx(way, rel=0.05)


def test_a_pair_is_born_where_and_when_it_must(sheet: PointCloud) -> None:
    """v = (x² - μ(t), y) has no zero for μ < 0, and a source and a saddle at ±√μ after μ = 0."""
    x, y = sheet.points.T
    ts = torch.linspace(-1, 1, 201, dtype=torch.float64)
    fields = torch.stack([x**2 - 0.5 * ts[:, None], y.expand(201, -1)], -1)
    tracks = track_singularities(sheet, fields, ts)
    lasting = tracks.lasting(0.8)
    assert sorted((t.index, t.birth, t.death) for t in lasting) == [(-1, "pair", "time"), (1, "pair", "time")]
    for track in lasting:
        # the interpolant of x² is above it by up to h² / 8, h the longest side of a triangle, so births come late by h² / 4
        assert 0.0 <= float(track.ts[0]) < 0.25 * (2.2 * sheet.spacing) ** 2 + 0.02
        later = track.ts > 0.3
        exact = track.index * (0.5 * track.ts[later]).sqrt()
        assert float((track.places[later, 0] - exact).abs().max()) < 0.5 * sheet.spacing
        assert float(track.places[later, 1].abs().max()) < 0.2 * sheet.spacing
    # backwards in time they vanish together
    back = track_singularities(sheet, fields.flip(0), ts).lasting(0.8)
    assert sorted((t.index, t.birth, t.death) for t in back) == [(-1, "time", "pair"), (1, "time", "pair")]


def test_a_zero_leaves_over_the_border(sheet: PointCloud) -> None:
    x, y = sheet.points.T
    ts = torch.linspace(0, 2, 50, dtype=torch.float64)
    fields = torch.stack([x - ts[:, None], y.expand(50, -1)], -1)
    tracks = track_singularities(sheet, fields, ts).lasting(0.5)
    assert [(t.index, t.birth, t.death) for t in tracks] == [(1, "time", "border")]
    assert float(tracks[0].ts[-1]) == pytest.approx(1.0, abs=0.05)  # the border is at 1
    torch.testing.assert_close(tracks[0].places[:-1, 0], tracks[0].ts[:-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_index_is_conserved(sphere: PointCloud, seed: int) -> None:
    fields = rough(sphere, 60, seed)
    tracks = track_singularities(sphere, fields)
    plus, minus = tracks.counts()
    assert torch.equal(plus - minus, torch.full_like(plus, 2))
    assert not any("border" in (t.birth, t.death) for t in tracks.tracks)
    # births and deaths come in pairs, at the same time and place
    for kind, end in (("birth", 0), ("death", -1)):
        at = {s: [t for t in tracks.tracks if getattr(t, kind) == "pair" and t.index == s] for s in (1, -1)}
        assert len(at[1]) == len(at[-1])
        key = [sorted((float(t.ts[end]), tuple(t.places[end].tolist())) for t in at[s]) for s in (1, -1)]
        assert key[0] == key[1]
    # at every stamp the tracks are where the zeros of that field are
    zeros = find_singularities_of(sphere, fields)
    for k in (0, 20, 59):
        here = torch.stack(
            [
                t.places[int((t.ts == float(k)).nonzero()[0])]
                for t in tracks.tracks
                if bool((t.ts == float(k)).any())
            ]
        )
        places = zeros[k]
        assert len(here) >= len(places)
        assert float(torch.cdist(places, here).min(1).values.max()) < 1e-12


def find_singularities_of(cloud: PointCloud, fields: torch.Tensor) -> list[torch.Tensor]:
    """Zeros of fields that are known at all nodes, by a posterior without noise."""
    gp = RVGP(cloud, num_eigenpairs=2 * len(cloud)).fit(
        slice(None), fields, optimize=False, learn_noise=False, noise_variance=1e-12
    )
    zeros = find_singularities(gp, num_draws=0)
    at = zeros.mean_index.nonzero()
    assert zeros.mean_index.shape == (len(fields), len(zeros.faces))
    return [zeros.mean_places[at[:, 0] == k] for k in range(len(fields))]


def test_zeros_of_many_fields_are_those_of_each(sphere: PointCloud) -> None:
    fields = rough(sphere, 4, 3)
    gp = RVGP(sphere, num_eigenpairs=100).fit(range(0, 400, 2), fields[:, ::2])
    zeros = find_singularities(gp, num_draws=20, generator=0)
    assert zeros.draw_index.shape == (20, 4, len(zeros.faces))
    assert torch.equal(zeros.draw_index.sum(-1), torch.full((20, 4), 2.0).double())
    total, places = zeros.around([0.0, 0.0, 1.0], 3.0)
    assert torch.equal(total, torch.full((20, 4), 2.0).double())
    assert len(places) == len(zeros.draw_places) == int((zeros.draw_index != 0).sum())
    one = RVGP(sphere, gp.kernel).fit(
        range(0, 400, 2), fields[2, ::2], optimize=False, noise_variance=gp.noise_variance
    )
    one.engine.log_amplitude.data.copy_(gp.engine.log_amplitude.data)
    one.engine.condition()
    alone = find_singularities(one, num_draws=0)
    assert torch.equal(alone.mean_index, zeros.mean_index[2])
    assert alone.draw_index.shape == (0, len(zeros.faces))


def test_units_forms_and_repetition() -> None:
    points = random_sphere(200)
    cloud = PointCloud(points, 14, dim=2)
    fields = rough(cloud, 8, 0)
    ts = torch.linspace(0, 1, 8, dtype=torch.float64)

    def ways(given: PointCloud, v: object, clock: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = track_singularities(given, v, clock).tracks
        return torch.cat([t.ts for t in found]), torch.cat([t.places for t in found])

    def in_units(factor: float) -> torch.Tensor:
        times, places = ways(PointCloud(points * factor, 14, dim=2), fields * factor, ts * factor)
        return torch.cat([times, places.flatten()]) / factor

    check_units(in_units)
    check_repetition(lambda: ways(cloud, fields, ts))
    check_forms(lambda v: ways(cloud, v, ts), fields)


def test_bad_input(sphere: PointCloud) -> None:
    fields = torch.zeros(3, 400, 3)
    with pytest.raises(ShapeError, match="ts has the wrong size"):
        track_singularities(sphere, fields, [0.0, 1.0])
    with pytest.raises(TimeGridError):
        track_singularities(sphere, fields, [0.0, 1.0, 1.0])
    with pytest.raises(ShapeError, match="number of times"):
        track_singularities(sphere, fields[0])
    with pytest.raises(ShapeError, match="two times or more"):
        track_singularities(sphere, fields[:1])
    with pytest.raises(InvalidInputError, match="cloud has the wrong type"):
        track_singularities(fields, fields)
    with pytest.raises(InvalidInputError, match="at_least"):
        track_singularities(sphere, rough(sphere, 2, 0)).lasting(-1.0)
