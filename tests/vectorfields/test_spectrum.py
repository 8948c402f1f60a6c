"""Eigenvalues against exact ones: spheres, tori, circles, a Klein bottle; symmetries; pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields import PointCloud
from stochdyn.vectorfields.geometry import smallest_eigenpairs
from tests.vectorfields.shapes import (
    clifford_torus,
    fibonacci_sphere,
    klein_bottle,
    random_sphere,
    sphere_frames,
)


def groups(values: torch.Tensor, sizes: tuple[int, ...]) -> np.ndarray:
    """Mean eigenvalue of successive groups."""
    cuts = np.cumsum(sizes)[:-1]
    return np.array([part.mean() for part in np.split(values.numpy()[: sum(sizes)], cuts)])


@pytest.mark.parametrize("neighbors", [10, 20])
def test_sphere(neighbors: int) -> None:
    """Connection Laplacian of the unit sphere: l(l+1) - 1, twice 2l+1 times."""
    values, _ = PointCloud(fibonacci_sphere(1000), neighbors, dim=2).spectrum(48)
    sizes, exact, within = (6, 10, 14, 18), (1, 5, 11, 19), (0.01, 0.02, 0.04, 0.06)
    for got, true, tolerance in zip(groups(values, sizes), exact, within, strict=True):
        assert abs(got / true - 1) < tolerance
    # the groups stand apart, so that the multiplicities are right too
    assert values[5] < 2 < values[6]
    assert values[15] < 7.5 < values[16]
    assert values[29] < 14 < values[30]


def test_sphere_of_another_radius() -> None:
    small = PointCloud(fibonacci_sphere(500), dim=2).spectrum(16)[0]
    large = PointCloud(3 * fibonacci_sphere(500) + 5, dim=2).spectrum(16)[0]
    torch.testing.assert_close(large, small / 9, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_random_points_on_the_sphere() -> None:
    values, _ = PointCloud(random_sphere(4000), 40, dim=2).spectrum(48)
    for got, true, tolerance in zip(
        groups(values, (6, 10, 14, 18)), (1, 5, 11, 19), (0.04, 0.05, 0.06, 0.08), strict=True
    ):
        assert abs(got / true - 1) < tolerance


@pytest.mark.slow
def test_three_sphere() -> None:
    """Exact 1 (4 times), 2 (6), 6 (9), 7 (16) on the unit 3-sphere.

    Means of groups change by 0.002 from one sample to another; the rest of the tolerance is the bias of a Gaussian
    neighbourhood whose squared width is 0.03, which grows with the eigenvalue.
    """
    values, _ = PointCloud(random_sphere(4000, 3), 30).spectrum(35)
    got = groups(values, (4, 6, 9, 16)) / np.array([1, 2, 6, 7])
    assert (got < 1).all()
    assert (1 - got < [0.065, 0.065, 0.085, 0.085]).all()
    gap = values[[4, 10, 19]] / values[[3, 9, 18]]
    assert (gap > torch.tensor([1.7, 2.4, 1.08])).all()


def test_flat_torus() -> None:
    """Two parallel fields, then each eigenvalue of functions twice."""
    cloud = PointCloud(clifford_torus(30), dim=2)
    values, _ = cloud.spectrum(42)
    got = groups(values, (2, 8, 8, 8, 16))
    assert abs(got[0]) < 1e-8
    for value, true in zip(got[1:], (1, 2, 4, 5), strict=True):
        assert abs(value / true - 1) < 0.04
    functions, _ = cloud.spectrum(9, kind="scalar")
    assert abs(functions[0]) < 1e-10
    assert torch.allclose(functions[1:5].mean(), torch.tensor(1.0).double(), rtol=0.02)
    assert torch.allclose(functions[5:9].mean(), torch.tensor(2.0).double(), rtol=0.04)


def test_circle_to_second_order() -> None:
    """Exact 0, 1, 1, 4, 4; the error falls like the square of the spacing."""
    errors = []
    for n in (40, 80):
        angle = 2 * np.pi * np.arange(n) / n
        points = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
        values, _ = PointCloud(points, 4, dim=1).spectrum(5)
        assert abs(values[0]) < 1e-9
        errors.append(abs(values[4].item() - 4))
    assert errors[1] < 0.03
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_klein_bottle_is_not_orientable() -> None:
    """One parallel field along the direction that isn't reflected, none across it."""
    cloud = PointCloud(klein_bottle(30), 10, dim=2)
    assert not cloud.is_orientable
    assert PointCloud(clifford_torus(20), 10, dim=2).is_orientable
    assert cloud.pencil().fibre == 2
    assert not cloud.pencil().paired


def test_flat_klein_bottle_has_one_parallel_field() -> None:
    """The spectrum of a truly flat Klein bottle, built from its known frames: 0 once, then 1 from the reflected part.

    Of the flat torus of periods 2 pi by 2 pi, the fields that survive u -> u + pi, v -> -v are: along u those with
    even (p, cos) or odd (p, sin) waves, across it the opposite; eigenvalues p² + q².
    """
    n = 24
    i, j = np.meshgrid(np.arange(n), np.arange(2 * n), indexing="ij")
    u, v = np.pi * i.ravel() / n, np.pi * j.ravel() / n
    expected = []
    for p in range(-4, 5):
        for q in range(5):
            even = p % 2 == 0
            # along u: cos(q v) needs even p, sin(q v) odd p; across: the other way round
            along = even if q == 0 else True
            across = (not even) if q == 0 else True
            expected += [p * p + q * q] * (int(along) + int(across))
    expected = np.sort(expected)[:12]
    values = _flat_quotient_spectrum(u, v, n, 12)
    np.testing.assert_allclose(values, expected, atol=0.06)


def _flat_quotient_spectrum(u: np.ndarray, v: np.ndarray, n: int, k: int) -> np.ndarray:
    """Spectrum from the graph of a square lattice with the reflecting identification written into the connections."""
    from stochdyn.vectorfields.geometry import NeighborGraph, assemble, masses

    index = np.arange(len(u)).reshape(n, 2 * n)
    flipped = index[:, (-np.arange(2 * n)) % (2 * n)]
    right = np.concatenate([index[1:], flipped[:1]])
    turn = np.tile(np.eye(2), (len(u), 1, 1)).reshape(n, 2 * n, 2, 2)
    turn[-1] = np.diag([1.0, -1.0])
    up = np.roll(index, -1, axis=1)
    a = np.concatenate([index.ravel(), index.ravel()])
    b = np.concatenate([right.ravel(), up.ravel()])
    maps = np.concatenate([turn.reshape(-1, 2, 2), np.tile(np.eye(2), (len(u), 1, 1))])
    swap = a > b
    maps[swap] = maps[swap].transpose(0, 2, 1)
    tails, heads = np.minimum(a, b), np.maximum(a, b)
    step = np.pi / n
    ones = np.ones(len(a))
    graph = NeighborGraph(tails, heads, ones, step * ones, np.full(len(u), step), np.ones(len(u)))
    pencil = assemble(graph, masses(graph, 2, "local"), maps)
    return smallest_eigenpairs(pencil, k)[0]


def test_modes_solve_the_eigenproblem_and_are_normalised() -> None:
    cloud = PointCloud(random_sphere(600), 12, dim=2)
    values, modes = cloud.spectrum(30)
    pencil = cloud.pencil(real=True)
    flat, mass = modes.reshape(-1, 30).numpy(), np.repeat(pencil.mass, 2)
    residual = pencil.matrix @ flat - mass[:, None] * flat * values.numpy()
    assert np.abs(residual).max() < 1e-9 * np.abs(pencil.matrix).max() * np.abs(flat).max()
    gram = flat.T @ (mass[:, None] * flat) / mass.sum()
    np.testing.assert_allclose(gram, np.eye(30), atol=1e-9)


def test_complex_form_has_the_real_spectrum_and_pairs_are_not_split() -> None:
    cloud = PointCloud(random_sphere(500), 12, dim=2)
    values, modes = cloud.spectrum(21)
    assert values.shape == (22,)
    real = smallest_eigenpairs(cloud.pencil(real=True), 22)[0]
    np.testing.assert_allclose(values, real, atol=1e-10)
    assert torch.equal(values[::2], values[1::2])
    # the rotated field lies in the span: the kernel of any function of the Laplacian commutes with the rotation
    turned = torch.stack([-modes[:, 1], modes[:, 0]], 1)
    torch.testing.assert_close(
        torch.einsum("iak,jbk->iajb", modes, modes), torch.einsum("iak,jbk->iajb", turned, turned)
    )


def test_gauge_isometry_and_permutation() -> None:
    points = random_sphere(300)
    exact = sphere_frames(points)
    base = PointCloud(points, 12, frames=exact)
    values, modes = base.spectrum(20)
    lifted = torch.einsum("nda,nak->ndk", base.frames, modes)
    projector = torch.einsum("ndk,mek->ndme", lifted, lifted)
    rng = np.random.default_rng(1)
    turns = np.linalg.qr(rng.normal(size=(300, 2, 2)))[0]
    regauged = PointCloud(points, 12, frames=exact @ turns)
    other, other_modes = regauged.spectrum(20)
    torch.testing.assert_close(other, values, rtol=1e-9, atol=1e-11)
    again = torch.einsum("nda,nak->ndk", regauged.frames, other_modes)
    torch.testing.assert_close(torch.einsum("ndk,mek->ndme", again, again), projector, rtol=0, atol=1e-7)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    moved = PointCloud(points @ rotation.T, 12, frames=rotation @ exact).spectrum(20)[0]
    torch.testing.assert_close(moved, values, rtol=1e-9, atol=1e-11)
    order = rng.permutation(300)
    shuffled = PointCloud(points[order], 12, frames=exact[order])
    values_shuffled, modes_shuffled = shuffled.spectrum(20)
    torch.testing.assert_close(values_shuffled, values, rtol=1e-9, atol=1e-11)
    again = torch.einsum("nda,nak->ndk", shuffled.frames, modes_shuffled)
    expected = projector[order][:, :, order]
    torch.testing.assert_close(torch.einsum("ndk,mek->ndme", again, again), expected, rtol=0, atol=1e-7)


def test_spectra_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = PointCloud(random_sphere(500), 12, dim=2)
    values, modes = cloud.spectrum(30)
    monkeypatch.setattr("stochdyn.vectorfields.geometry.spectrum._solve", None)
    fewer, modes_fewer = cloud.spectrum(10)
    assert torch.equal(fewer, values[:10])
    assert torch.equal(modes_fewer, modes[..., :10])


def test_all_modes_and_no_more() -> None:
    cloud = PointCloud(fibonacci_sphere(60), 8, dim=2)
    values, modes = cloud.spectrum(120)
    flat = modes.reshape(120, 120)
    rebuilt = flat @ torch.diag(values) @ flat.T
    mass = torch.as_tensor(np.repeat(cloud.pencil(real=True).mass, 2))
    dense = torch.as_tensor(cloud.pencil(real=True).matrix.toarray()) / mass[:, None]
    torch.testing.assert_close(
        rebuilt * mass / mass.sum(), dense, rtol=0, atol=1e-9 * float(dense.abs().max())
    )
    with pytest.raises(InvalidInputError, match="not that many eigenpairs"):
        cloud.spectrum(121)
