"""The reader of fields between the nodes: its prior is the prior, everywhere, and it is continuous at the nodes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from stochdyn.errors import ApproximationWarning
from stochdyn.vectorfields import RVGP, PointCloud, ScalarGP
from stochdyn.vectorfields.geometry import extension
from stochdyn.vectorfields.regression.sites import variogram
from tests.vectorfields.shapes import icosphere, random_sphere

MODELS = {
    "connection": RVGP,
    "projected": lambda c: RVGP(c, "projected"),
    "precision": lambda c: RVGP(c, backend="precision"),
    "ambient": lambda c: RVGP(c, "ambient"),
    "functions": ScalarGP,
    "functions, precision": lambda c: ScalarGP(c, backend="precision"),
}


@pytest.fixture(scope="module", params=["random points", "mesh"])
def cloud(request: pytest.FixtureRequest) -> PointCloud:
    if request.param == "mesh":
        return PointCloud.from_mesh(*icosphere(2))
    return PointCloud(random_sphere(250), 12, dim=2)


def prior(cloud: PointCloud, model: str) -> RVGP | ScalarGP:
    """A process that has seen next to nothing: one vector, with a noise that drowns it."""
    gp = MODELS[model](cloud)
    data = torch.zeros(1, dtype=torch.float64) if isinstance(gp, ScalarGP) else torch.zeros(1, 3).double()
    return gp.fit([0], data, optimize=False, noise_variance=1e9)


def variances(gp: RVGP | ScalarGP, where: object) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        cov = gp.predict(where)[1]
    return cov if isinstance(gp, ScalarGP) else cov.diagonal(dim1=-2, dim2=-1).mean(-1)


@pytest.mark.parametrize("model", MODELS)
def test_the_prior_variance_is_the_amplitude_at_new_points(cloud: PointCloud, model: str) -> None:
    gp = prior(cloud, model)
    inside = torch.as_tensor(random_sphere(300, seed=4))
    at_nodes, at_points = (variances(gp, where) / gp.amplitude for where in (slice(None), inside))
    assert float(at_nodes.mean()) == pytest.approx(1.0, rel=0.05)
    # the mean over the surface, of nodes that differ among themselves by what the quantiles say
    assert float(at_points.mean()) == pytest.approx(1.0, rel=0.1)
    low, high = (float(torch.quantile(at_nodes, q)) for q in (0.01, 0.99))
    assert 0.8 * low < float(at_points.min())
    assert float(at_points.max()) < 1.3 * high
    # far from all nodes it is the amplitude itself, for what is read off them
    far = 30.0 * inside[:5]
    assert variances(gp, far).tolist() == pytest.approx([gp.amplitude] * 5, rel=0.02)
    assert float(torch.as_tensor(gp.predict_mean(slice(None))).abs().max()) < 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_means_and_variances_are_continuous_at_nodes(cloud: PointCloud, model: str) -> None:
    gp = MODELS[model](cloud)
    x = cloud.points[:100]
    field = torch.stack([-x[:, 1], x[:, 0], torch.zeros_like(x[:, 0])], -1)
    field = field - (field * x).sum(-1, keepdim=True) * x / x.norm(dim=-1, keepdim=True) ** 2
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ApproximationWarning
        )  # normals of a mesh differ a little from the points'
        gp.fit(
            range(100), x[:, 0] if isinstance(gp, ScalarGP) else field, optimize=False, noise_variance=1e-3
        )
    way = np.random.default_rng(0).normal(size=(20, 3))
    nodes = slice(100, 120)
    mean, at = gp.predict_mean(nodes), variances(gp, nodes)
    for step in (1e-3, 1e-6):
        moved = cloud.points[nodes] + step * cloud.spacing * torch.as_tensor(way)
        # the field is once differentiable, and so is the reader: the error is of the order of the step
        bound = 30 * step
        assert float((gp.predict_mean(moved) - mean).norm() / mean.norm()) < bound
        assert float((variances(gp, moved) / at - 1).abs().max()) < 30 * bound


@pytest.mark.parametrize("outwards", [1.0, 1.6])
def test_weights_are_the_best_of_length_one(outwards: float) -> None:
    """No other weights of at most that length leave less open: the slope points along the weights where the bound is reached."""
    cloud = PointCloud(random_sphere(200), 12, dim=2)
    x = outwards * random_sphere(100, seed=3)
    distances, nodes = cloud.search.query(x, 12)
    radius = cloud.graph.radius[nodes[:, 0]]
    c, doubt = extension._weights(cloud.array, distances, nodes, radius)
    near = cloud.array[nodes] / radius[:, None, None]
    gram = extension._correlation(np.linalg.norm(near[:, :, None] - near[:, None], axis=-1))
    cross = extension._correlation(distances / radius[:, None])
    length = (c**2).sum(1)
    bound = length > 1 - 1e-6
    assert length.max() < 1 + 1e-9
    assert 0 < bound.sum() < 100 or outwards > 1
    # 1 - 2c'k + c'Kc is least over |c| <= 1 where k - Kc = ρc with ρ >= 0, and ρ = 0 inside
    slope = cross - np.einsum("qij,qj->qi", gram, c)
    rho = (slope * c).sum(1) / length
    assert np.abs(slope - rho[:, None] * c).max() < 1e-6
    assert rho.min() > -1e-6
    assert np.abs(rho[~bound]).max(initial=0.0) < 1e-6
    assert doubt.min() >= -1e-9


@pytest.mark.parametrize("shape", ["random points", "mesh"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_variogram_tells_roughness_from_noise_of_the_nodes(shape: str, noise: float) -> None:
    """Functions of the reader's own covariance, a hundred times wider, and white noise of the nodes: both come out as they are."""
    cloud = (
        PointCloud.from_mesh(*icosphere(3)) if shape == "mesh" else PointCloud(random_sphere(600), 12, dim=2)
    )
    itself, levels = cloud.left_out
    # a Matérn 3/2 correlation of one length everywhere, in units of the reader's length at a typical node
    r = np.linalg.norm(cloud.array[:, None] - cloud.array[None], axis=-1)
    reach = extension._REACH * float(np.median(cloud.graph.radius))
    covariance = extension._correlation(r / (reach / extension._REACH)) + noise * np.eye(len(cloud))
    residuals = []
    for level in levels:
        sees = np.zeros((len(level), len(cloud)))
        np.add.at(sees, (np.arange(len(level))[:, None], level.nodes.numpy()), -level.weights.numpy())
        sees[np.arange(len(level)), itself.nodes[:, 0].numpy()] += 1
        residuals.append(torch.as_tensor(((sees @ covariance) * sees).sum(1)))
    rough, found = (float(v) for v in variogram(levels, residuals))
    assert rough == pytest.approx(
        1.0, rel=0.35
    )  # the reader's length follows the local radius, this one doesn't
    assert found == pytest.approx(noise, abs=0.005)


@pytest.mark.parametrize("backend", ["spectral", "precision"])
@pytest.mark.parametrize("kind", ["rough", "smooth"])
def test_bands_hold_between_the_nodes(backend: str, kind: str) -> None:
    """Four clouds and fields: 95 % bands at new points inside hold 90 to 98.5 % (one draw's coverage scatters by 1.5 %)."""
    scaled = []
    for seed in range(4):
        cloud = PointCloud(random_sphere(300, seed=seed), 12, dim=2)
        inside = random_sphere(300, seed=100 + seed)
        places = np.concatenate([cloud.array, inside])
        rng = np.random.default_rng(seed)
        r = np.linalg.norm(places[:, None] - places[None], axis=-1) / 0.5
        law = (1 + 3**0.5 * r) * np.exp(-(3**0.5) * r) if kind == "rough" else np.exp(-0.5 * r * r)
        values, vectors = np.linalg.eigh(law)
        field = (vectors * np.sqrt(np.maximum(values, 0))) @ rng.normal(size=(len(places), 3))
        noisy = field + 0.1 * rng.normal(size=field.shape)
        field, noisy = (f - (f * places).sum(1, keepdims=True) * places for f in (field, noisy))
        seen = rng.permutation(300)[:150]
        gp = RVGP(cloud, backend=backend).fit(seen, noisy[seen])
        mean, cov = gp.predict(inside)
        error = torch.einsum("qdm,qd->qm", gp.frames(inside), mean - torch.as_tensor(field[300:]))
        scaled.append(error / cov.diagonal(dim1=-2, dim2=-1).sqrt())
    z = torch.cat(scaled)
    assert 0.90 <= float((z.abs() < 1.96).double().mean()) <= 0.985
    assert 0.75 < float(z.square().mean().sqrt()) < 1.25
