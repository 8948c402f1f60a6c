"""Point clouds: what they accept, what they refuse, and the extension of fields to new points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import (
    ApproximationWarning,
    DisconnectedGraphError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
)
from stochdyn.vectorfields import PointCloud
from tests.vectorfields.shapes import clifford_torus, fibonacci_sphere, random_sphere, sphere_frames, torus


def killing(points: np.ndarray) -> torch.Tensor:
    """A rotation of the sphere about a tilted axis."""
    return torch.as_tensor(np.cross(np.array([0.3, -0.5, 1.0]), points))


def test_precision_and_names_follow_the_points() -> None:
    cloud = sd.vectorfields.PointCloud(torch.as_tensor(fibonacci_sphere(200)).float(), dim=2)
    values, modes = cloud.spectrum(10)
    assert values.dtype == modes.dtype == cloud.frames.dtype == torch.float32
    assert cloud.frames.shape == (200, 3, 2)
    assert cloud.connections.shape == (cloud.edges.shape[0], 2, 2)
    assert cloud.is_connected
    assert cloud.is_orientable
    assert "200 points of dimension 2 in 3" in repr(cloud)
    assert len(cloud) == 200


def test_new_points_get_the_field_of_their_surroundings() -> None:
    points, new = random_sphere(2000), random_sphere(300, seed=1)
    cloud = PointCloud(points, 20, dim=2)
    sites, nodes = cloud.sites(new), cloud.sites(slice(None))
    truth, field = killing(new), nodes.to_tangent(killing(points))
    read = sites.to_ambient(sites.extend(field[..., None])[..., 0])
    assert (read - truth).norm() < 0.02 * truth.norm()
    # modes far below the limit of resolution keep their size between the nodes
    modes = cloud.modes(100)[1]
    assert 0.95 < sites.extend(modes).square().mean() < 1.05


def test_reading_is_continuous_at_the_nodes() -> None:
    cloud = PointCloud(random_sphere(400), 12, dim=2)
    field = cloud.sites(slice(None)).to_tangent(killing(cloud.points))[..., None]
    away = torch.nn.functional.normalize(
        cloud.points[:50] + 1e-7 * torch.as_tensor(random_sphere(50, seed=3)), dim=-1
    )
    near, at = cloud.sites(away), cloud.sites(range(50))
    gap = near.to_ambient(near.extend(field)[..., 0]) - at.to_ambient(at.extend(field)[..., 0])
    assert gap.abs().max() < 1e-5


def test_new_points_at_nodes_are_the_nodes() -> None:
    cloud = PointCloud(random_sphere(400), 12, dim=2)
    modes = cloud.modes(20)[1]
    sites = cloud.sites(cloud.points[:30])
    torch.testing.assert_close(sites.extend(modes), modes[:30])


def test_far_points_are_told() -> None:
    cloud = PointCloud(fibonacci_sphere(200), dim=2)
    with pytest.warns(ApproximationWarning, match="1 of 2 points lie off the cloud"):
        cloud.sites([[0.0, 0.0, 1.0], [0.0, 0.0, 9.0]])


@pytest.mark.parametrize("points", [fibonacci_sphere(400), random_sphere(800), clifford_torus(20)])
def test_dimension_two_is_found(points: np.ndarray) -> None:
    assert PointCloud(points).dim == 2


def test_other_dimensions_are_found() -> None:
    rng = np.random.default_rng(0)
    assert PointCloud(random_sphere(1500, 3)).dim == 3
    assert PointCloud(torus(1500), 15).dim == 2
    t = np.linspace(0, 10, 300)
    assert PointCloud(np.stack([np.cos(t), np.sin(t), 0.3 * t], 1), 4).dim == 1
    cube = rng.random((1500, 3)) @ np.linalg.qr(rng.normal(size=(6, 6)))[0][:3]
    assert PointCloud(cube).dim == 3


def test_an_uncertain_dimension_is_told() -> None:
    rng = np.random.default_rng(0)
    thick = np.concatenate([rng.random((600, 2)), 0.12 * rng.random((600, 1))], 1)
    with pytest.warns(ApproximationWarning, match="dimension of the points is uncertain"):
        PointCloud(thick)


def test_pieces_are_named() -> None:
    points = np.concatenate([fibonacci_sphere(150), fibonacci_sphere(50) + 10])
    with pytest.raises(
        DisconnectedGraphError, match=r"2 components: component 0 of 150 .*such as 0, 1, 2.*of 50"
    ):
        PointCloud(points, 8, dim=2)
    cloud = PointCloud(points, 8, dim=2, allow_disconnected=True)
    assert not cloud.is_connected
    assert np.bincount(cloud.graph.components()).tolist() == [150, 50]


def test_coinciding_points_are_named() -> None:
    points = fibonacci_sphere(100)
    points[70] = points[3]
    with pytest.raises(InvalidInputError, match="points 3 and 70 coincide"):
        PointCloud(points, 8, dim=2)
    with pytest.raises(InvalidInputError, match="coincide"):
        PointCloud(np.zeros((30, 3)), 8, dim=2)


def test_bad_points() -> None:
    points = fibonacci_sphere(100)
    with pytest.raises(InvalidInputError, match="8 points, num_neighbors=10"):
        PointCloud(points[:8])
    with pytest.raises(InvalidInputError, match=r"dim=4.*at most 3"):
        PointCloud(points, dim=4)
    with pytest.raises(InvalidInputError, match="dim must be"):
        PointCloud(points, dim=0)
    with pytest.raises(ShapeError, match="points has the wrong number of axes"):
        PointCloud(points[:, 0])
    points[7, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"points\[7, 1\]=nan"):
        PointCloud(points)
    with pytest.raises(InvalidInputError, match="must be real numbers"):
        PointCloud([["a", "b"]])
    with pytest.raises(InvalidInputError, match="empty"):
        PointCloud(np.zeros((0, 3)))


def test_bad_frames_and_options() -> None:
    points = fibonacci_sphere(100)
    frames = sphere_frames(points)
    with pytest.raises(InvalidInputError, match="orthonormal"):
        PointCloud(points, frames=2 * frames)
    with pytest.raises(ShapeError, match="frames don't fit"):
        PointCloud(points, frames=frames[:50])
    with pytest.raises(ShapeError, match="dim and frames disagree"):
        PointCloud(points, dim=1, frames=frames)
    for option in ("graph", "weights", "normalization", "search"):
        with pytest.raises(InvalidInputError, match="is unknown"):
            PointCloud(points, dim=2, **{option: "banana"})


def test_nodes_in_any_container() -> None:
    cloud = PointCloud(fibonacci_sphere(50), 8, dim=2)
    mask = np.zeros(50, dtype=bool)
    mask[[3, 7]] = True
    for index in (
        [3, 7],
        (3, 7),
        np.array([3, 7], dtype=np.int16),
        [np.int64(3), np.int32(7)],
        torch.tensor([3, 7], dtype=torch.int32),
        mask,
        torch.as_tensor(mask),
        range(3, 8, 4),
        slice(3, 8, 4),
    ):
        assert cloud.sites(index).nodes[:, 0].tolist() == [3, 7]
    assert cloud.sites(np.int64(4)).nodes.tolist() == [[4]]


def test_bad_nodes() -> None:
    cloud = PointCloud(fibonacci_sphere(50), 8, dim=2)
    with pytest.raises(InvalidInputError, match=r"index\[1\]=50; expected 0 to 49"):
        cloud.sites([0, 50])
    with pytest.raises(InvalidInputError, match=r"index\[0\]=-1"):
        cloud.sites([-1])
    with pytest.raises(ShapeError, match="one entry per node"):
        cloud.sites(np.ones(49, dtype=bool))
    with pytest.raises(InvalidInputError, match="empty"):
        cloud.sites([])
    with pytest.raises(InvalidInputError, match="empty"):
        cloud.sites(np.zeros(50, dtype=bool))
    with pytest.raises(ShapeError, match="one axis"):
        cloud.sites([[1, 2], [3, 4]])
    with pytest.raises(ShapeError, match="space of the cloud"):
        cloud.sites([[1.0, 2.0]])
