"""The reader of fields between the nodes: its prior is the prior, everywhere, and it is continuous at the nodes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from stochdyn.errors import ApproximationWarning
from stochdyn.vectorfields import RVGP, PointCloud, ScalarGP
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
