"""Meshes: exact sphere spectra by finite elements, and an independent connection Laplacian as oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.vectorfields import RVGP, PointCloud
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
