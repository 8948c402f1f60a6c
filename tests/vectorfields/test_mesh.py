"""Meshes: exact sphere spectra by finite elements, and an independent connection Laplacian as oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stochdyn.errors import DisconnectedGraphError, InvalidInputError, ShapeError
from stochdyn.vectorfields import RVGP, PointCloud, find_singularities
from tests.vectorfields.shapes import icosphere


def test_sphere_spectra_are_those_of_finite_elements() -> None:
    vertices, faces = icosphere(3)
    cloud = PointCloud.from_mesh(vertices, faces)
    assert cloud.is_orientable
    assert cloud.dim == 2
    values, _ = cloud.spectrum(30)
    for part, exact, within in zip(values.split([6, 10, 14]), (1, 5, 11), (0.01, 0.01, 0.02), strict=True):
        assert abs(part.mean() / exact - 1) < within
    functions, _ = cloud.spectrum(9, kind="scalar")
    for part, exact in zip(functions.split([1, 3, 5]), (0, 2, 6), strict=True):
        assert abs(part.mean() - exact) < 0.02 * exact + 1e-9


def test_spectrum_agrees_with_another_implementation() -> None:
    """potpourri3d carries vectors by angles in unfolded triangles; the eigenvalues differ by discretisation only."""
    potpourri = pytest.importorskip("potpourri3d")
    from scipy.sparse import diags
    from scipy.sparse.linalg import eigsh

    vertices, faces = icosphere(3)
    vertices = vertices * np.array([1.0, 0.8, 1.4])  # curvature that varies
    ours, _ = PointCloud.from_mesh(vertices, faces).spectrum(24)
    solver = potpourri.MeshVectorHeatSolver(vertices, faces)
    mass = diags(potpourri.vertex_areas(vertices, faces))
    theirs = np.sort(eigsh(solver.get_connection_laplacian().tocsc(), 12, mass.tocsc(), sigma=-1e-3)[0])
    np.testing.assert_allclose(ours[::2].numpy(), theirs, rtol=0.015)


def test_regression_on_a_mesh_and_off_its_vertices() -> None:
    vertices, faces = icosphere(3)
    cloud = PointCloud.from_mesh(torch.as_tensor(vertices), torch.as_tensor(faces))
    spin = torch.as_tensor(np.cross([0.2, 0.4, 1.0], vertices))
    gp = RVGP(cloud, num_eigenpairs=60).fit(range(0, 642, 4), spin[::4])
    assert (gp.predict(range(642))[0] - spin).norm() < 0.01 * spin.norm()
    centres = vertices[faces].mean(1)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    truth = torch.as_tensor(np.cross([0.2, 0.4, 1.0], centres))
    assert (gp.predict(centres)[0] - truth).norm() < 0.03 * truth.norm()


def test_bad_meshes() -> None:
    vertices, faces = icosphere(1)
    with pytest.raises(ShapeError, match="must be triangles"):
        PointCloud.from_mesh(vertices, np.zeros((3, 4), dtype=int))
    with pytest.raises(InvalidInputError, match="whole numbers"):
        PointCloud.from_mesh(vertices, faces.astype(float))
    with pytest.raises(InvalidInputError, match="vertices that don't exist"):
        PointCloud.from_mesh(vertices, faces + 1)
    with pytest.raises(InvalidInputError, match="every vertex must belong"):
        PointCloud.from_mesh(np.concatenate([vertices, [[5.0, 5.0, 5.0]]]), faces)
    flat = vertices.copy()
    flat[faces[0]] = flat[faces[0, 0]]
    with pytest.raises(InvalidInputError, match="must have an area"):
        PointCloud.from_mesh(flat, faces)
    with pytest.raises(ShapeError, match="space of the cloud"):
        PointCloud.from_mesh(vertices[:, :2], faces)


def test_the_way_in_which_faces_turn_does_not_matter() -> None:
    vertices, faces = icosphere(2)
    spin = np.cross([0.2, 0.4, 1.0], vertices)
    random = np.random.default_rng(0).random(len(faces))
    wanted = RVGP(PointCloud.from_mesh(vertices, faces)).fit(range(0, 162, 3), spin[::3])
    for share in (0.3, 0.7, 1.0):
        mixed = np.where((random < share)[:, None], faces[:, ::-1], faces)
        cloud = PointCloud.from_mesh(vertices, mixed)
        found = RVGP(cloud).fit(range(0, 162, 3), spin[::3])
        torch.testing.assert_close(found.predict_mean(range(162)), wanted.predict_mean(range(162)))
        normals = torch.linalg.cross(cloud.frames[..., 0], cloud.frames[..., 1])
        side = -1.0 if share > 0.5 else 1.0  # that of most faces
        assert bool(((normals * side * torch.as_tensor(vertices)).sum(-1) > 0.99).all())
        zeros = find_singularities(found, num_draws=2, generator=0)
        assert int(zeros.mean_index.sum()) == 2


def test_a_mesh_that_has_one_side_only_has_frames_all_the_same() -> None:
    around, across = 60, 7
    u, v = np.meshgrid(
        np.linspace(0, 2 * np.pi, around, endpoint=False), np.linspace(-0.4, 0.4, across), indexing="ij"
    )
    radius = 1 + v * np.cos(u / 2)
    points = np.stack([radius * np.cos(u), radius * np.sin(u), v * np.sin(u / 2)], -1).reshape(-1, 3)
    faces = []
    for i in range(around):
        for j in range(across - 1):
            a, b = i * across + j, i * across + j + 1
            c, d = (a + across, b + across) if i < around - 1 else (across - 1 - j, across - 2 - j)
            faces += [[a, b, c], [b, d, c]]
    cloud = PointCloud.from_mesh(points, faces)
    assert not cloud.is_orientable
    along = np.stack([-radius * np.sin(u), radius * np.cos(u), 0 * u], -1).reshape(-1, 3)
    along[:, :] += np.stack(
        [-v / 2 * np.sin(u / 2) * np.cos(u), -v / 2 * np.sin(u / 2) * np.sin(u), v / 2 * np.cos(u / 2)], -1
    ).reshape(-1, 3)
    kept = torch.einsum("ndm,nd->nm", cloud.frames, torch.as_tensor(along)).norm(dim=-1)
    # the tangent along the band lies in every frame, those at the seam too
    torch.testing.assert_close(kept, torch.as_tensor(along).norm(dim=-1), rtol=5e-3, atol=0)


def test_surfaces_side_by_side_vertices_that_coincide_and_faces_that_come_twice() -> None:
    vertices, faces = icosphere(2)
    both, all_faces = (
        np.concatenate([vertices, vertices + 3.0]),
        np.concatenate([faces, faces[:, ::-1] + 162]),
    )
    with pytest.raises(DisconnectedGraphError):
        PointCloud.from_mesh(both, all_faces)
    cloud = PointCloud.from_mesh(both, all_faces, allow_disconnected=True)
    spin = np.cross([0.2, 0.4, 1.0], np.concatenate([vertices, vertices]))
    gp = RVGP(cloud).fit(range(0, 324, 3), spin[::3])
    assert (gp.predict_mean(range(324)) - torch.as_tensor(spin)).norm() < 0.02 * np.linalg.norm(spin)
    with pytest.raises(InvalidInputError, match="coincide"):  # every triangle with corners of its own
        PointCloud.from_mesh(vertices[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3))
    with pytest.raises(InvalidInputError, match="come once"):
        PointCloud.from_mesh(vertices, np.concatenate([faces, faces[3:4, [1, 2, 0]]]))
