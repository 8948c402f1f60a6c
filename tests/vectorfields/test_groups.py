"""Fields seen at different places: missing vectors by field, conditions, trials; each as if it were alone with the same prior."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import EmptyDataError, InvalidInputError, UnavailableError
from stochdyn.testing import check_order, check_units
from stochdyn.vectorfields import RVGP, PointCloud, ScalarGP
from stochdyn.vectorfields.regression import hyper_parameters, set_hyper_parameters
from tests.vectorfields.shapes import random_sphere, sphere_frames

OPTIONS = [{"num_eigenpairs": 60}, {"backend": "precision"}, {"kernel": "ambient"}]


@pytest.fixture(scope="module")
def cloud() -> PointCloud:
    points = random_sphere(150)
    return PointCloud(points, 12, frames=sphere_frames(points))


@pytest.fixture(scope="module")
def fields(cloud: PointCloud) -> torch.Tensor:
    """Three noisy fields (3, 80, 3), of which different vectors are missing."""
    generator = torch.Generator().manual_seed(0)
    x = cloud.points[:80]
    rotations = torch.stack([torch.linalg.cross(axis.expand_as(x), x) for axis in torch.eye(3).double()])
    y = rotations + 0.1 * torch.randn(3, 80, 3, generator=generator, dtype=torch.float64)
    y = cloud.sites(range(80)).to_ambient(cloud.sites(range(80)).to_tangent(y))
    y[0, [2, 5]] = math.nan
    y[2, 40:50] = math.nan
    return y


def alone(gp: RVGP, cloud: PointCloud, options: dict, y: torch.Tensor) -> RVGP:
    """One field fitted by itself, with the hyper-parameters of many."""
    seen = ~y.isnan().any(-1)
    one = RVGP(cloud, **options).fit(
        torch.arange(80)[seen], y[seen], optimize=False, noise_variance=gp.noise_variance
    )
    values = hyper_parameters(gp.engine.members[0])
    set_hyper_parameters(one.engine, values)
    one.engine.condition()
    return one


@pytest.mark.parametrize("options", OPTIONS)
def test_each_field_has_the_posterior_that_it_has_alone(
    cloud: PointCloud, fields: torch.Tensor, options: dict
) -> None:
    gp = RVGP(cloud, **options).fit(range(80), fields)
    where = range(100, 150)
    mean, cov = gp.predict(where)
    assert mean.shape == (3, 50, 3)
    assert cov.shape == (3, 50, 2, 2)
    evidence = 0.0
    for i in range(3):
        one = alone(gp, cloud, options, fields[i])
        m, c = one.predict(where)
        torch.testing.assert_close(mean[i], m, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(cov[i], c, rtol=1e-7, atol=1e-9)
        evidence += float(one.log_marginal_likelihood())
    assert float(gp.log_marginal_likelihood()) == pytest.approx(evidence, rel=1e-9)
    ambient = gp.predict(where, covariance="ambient")[1]
    assert ambient.shape == (3, 50, 3, 3)
    torch.testing.assert_close(gp.frames(where).mT @ ambient @ gp.frames(where), cov)


@pytest.mark.parametrize("options", OPTIONS)
def test_draws_have_each_field_s_moments(cloud: PointCloud, fields: torch.Tensor, options: dict) -> None:
    gp = RVGP(cloud, **options).fit(range(80), fields)
    where, n = [3, 45, 120], 2000
    drawn = cloud.sites(where).to_tangent(gp.sample(n, where, 0))
    mean, cov = gp.predict(where)
    variance = cov.diagonal(dim1=-2, dim2=-1)
    gap = (drawn.mean(0) - cloud.sites(where).to_tangent(mean)) / variance.sqrt()
    # 18 numbers each: five standard errors are left by one run in a hundred thousand
    assert gap.abs().max() < 5 / math.sqrt(n)
    assert (drawn.var(0) / variance - 1).abs().max() < 5 * math.sqrt(2 / n)


def test_the_hyper_parameters_are_at_the_summed_optimum(cloud: PointCloud, fields: torch.Tensor) -> None:
    """No hyper-parameter of the joint fit can be moved either way for a higher evidence and prior."""
    gp = RVGP(cloud, num_eigenpairs=60).fit(range(80), fields)
    engine = gp.engine
    slopes = torch.autograd.grad(engine.evidence(), [engine.log_amplitude, engine.log_noise])
    assert max(float(s.abs()) for s in slopes) < 1e-3 * fields.numel()
    sparse = RVGP(cloud, backend="precision").fit(range(80), fields)
    best = float(sparse.engine.evidence())
    for name, parameter in sparse.engine.named_parameters():
        if name.endswith("log_lengthscale"):
            continue  # it has a prior besides
        for step in (-0.3, 0.3):
            parameter.data.add_(step)
            assert float(sparse.engine.evidence()) < best
            parameter.data.sub_(step)


def test_fields_are_in_any_order_and_company(cloud: PointCloud, fields: torch.Tensor) -> None:
    def predicted(y: torch.Tensor) -> torch.Tensor:
        gp = RVGP(cloud, num_eigenpairs=60)
        gp.kernel.lengthscale = 1.0
        return gp.fit(range(80), y, optimize=False, learn_noise=False, noise_variance=0.01).predict_mean(
            range(100, 110)
        )

    check_order(predicted, fields, equivariant=True)
    one = predicted(fields)
    flipped = predicted(fields.flip(0))
    torch.testing.assert_close(flipped.flip(0), one)


def test_units_of_the_field_and_of_length(fields: torch.Tensor) -> None:
    points = random_sphere(150)

    def answer(factor: float) -> torch.Tensor:
        cloud = PointCloud(points * factor, 12, frames=sphere_frames(points))
        gp = RVGP(cloud, num_eigenpairs=60).fit(range(80), fields * factor)
        mean, cov = gp.predict(range(100, 110))
        return torch.cat([mean.flatten() / factor, cov.flatten() / factor**2])

    check_units(answer, rtol=1e-4)


def test_labels_give_every_condition_a_field(cloud: PointCloud, fields: torch.Tensor) -> None:
    nodes = torch.cat([torch.arange(80)[~y.isnan().any(-1)] for y in fields])
    rows = torch.cat([y[~y.isnan().any(-1)] for y in fields])
    names = [
        name for name, y in zip("zay", fields, strict=True) for _ in range(int((~y.isnan().any(-1)).sum()))
    ]
    together = RVGP(cloud, num_eigenpairs=60).fit(range(80), fields)
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    mixed = torch.cat([torch.tensor([0, 78, 160]), mixed[~torch.isin(mixed, torch.tensor([0, 78, 160]))]])
    gp = RVGP(cloud, num_eigenpairs=60).fit(
        nodes[mixed], rows[mixed], labels=[names[i] for i in mixed.tolist()]
    )
    assert gp.labels == ["z", "a", "y"]
    torch.testing.assert_close(gp.predict_mean([100]), together.predict_mean([100]), rtol=1e-5, atol=1e-6)
    drift = gp.as_drift(field="a")
    torch.testing.assert_close(drift.vectors, gp.predict_mean(slice(None))[1])
    with pytest.raises(InvalidInputError, match=r"many fields were fitted at once.*'z', 'a', 'y'"):
        gp.as_drift()
    with pytest.raises(InvalidInputError, match="no such condition"):
        gp.as_sde(0.1, field="b")
    with pytest.raises(InvalidInputError, match="condition of every vector"):
        gp.fit(nodes, rows, labels=names[:-1])
    with pytest.raises(InvalidInputError, match="one vector per row"):
        gp.fit(range(80), fields, labels=["a"] * 80)
    with pytest.raises(InvalidInputError, match="comparable"):
        gp.fit(range(2), rows[:2], labels=["a", None])


def test_conditions_of_trajectories(cloud: PointCloud) -> None:
    """Trials of two conditions turn opposite ways around the same circle; the fields come apart, the diffusion is common."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * torch.pi * torch.arange(60, dtype=torch.float64) / 60
    ring = PointCloud(torch.stack([angle.cos(), angle.sin()], -1), 6, dim=1)
    trials, names = [], []
    for k in range(6):
        way, n = (1.0, 150) if k % 2 == 0 else (-0.5, 200)
        dw = 0.2 * math.sqrt(0.01) * torch.randn(n - 1, generator=generator, dtype=torch.float64)
        turn = torch.cat([torch.zeros(1).double(), (way * 0.01 + dw).cumsum(0)]) + k
        trials.append((0.01 * torch.arange(n), torch.stack([turn.cos(), turn.sin()], -1)))
        names.append("there" if way > 0 else "back")
    gp = RVGP(ring, num_eigenpairs=30).fit_paths(trials, labels=names)
    assert gp.labels == ["there", "back"]
    assert gp.diffusion == pytest.approx(0.2, rel=5 / math.sqrt(2 * 1050))
    turn = torch.stack([-angle.sin(), angle.cos()], -1)
    mean, cov = gp.predict(slice(None))
    speed = (mean * turn).sum(-1)
    # the speed averaged over the circle, against its own error: sigma / sqrt(time seen)
    for i, (way, seen) in enumerate(((1.0, 4.5), (-0.5, 6.0))):
        assert abs(float(speed[i].mean()) - way) < 5 * 0.2 / math.sqrt(seen)
    assert cov.shape == (2, 60, 1, 1)
    path = gp.measure(ring.points[:1], dt=0.01, field="back").sample(
        torch.linspace(0, 1, 101).double(), 50, 0
    )
    turned = torch.atan2(path.x[..., -1, 1], path.x[..., -1, 0])
    assert float(turned.mean()) == pytest.approx(float(speed[1].mean()), abs=5 * 0.2 / math.sqrt(50) + 0.05)


def test_storage(cloud: PointCloud, fields: torch.Tensor, tmp_path: object) -> None:
    for options in OPTIONS:
        gp = RVGP(cloud, **options).fit(range(80), fields)
        again = RVGP(cloud, **options)
        again.load_state_dict(gp.state_dict())
        sd.save(gp, tmp_path)
        for other in (again, sd.load(tmp_path), pickle.loads(pickle.dumps(gp)), copy.deepcopy(gp)):
            assert torch.equal(other.predict_mean([100]), gp.predict_mean([100]))
            assert torch.equal(other.sample(2, [100], 0), gp.sample(2, [100], 0))
    points = random_sphere(30, seed=5)
    rotation = torch.as_tensor(np.cross([0.0, 0.0, 1.0], points))
    at_points = RVGP(cloud, num_eigenpairs=40).fit(points, rotation, np.arange(1, 31))
    again = RVGP(cloud, num_eigenpairs=40)
    again.load_state_dict(at_points.state_dict())
    assert torch.equal(again.predict([1])[1], at_points.predict([1])[1])
    with pytest.raises(InvalidInputError, match="another kernel or backend"):
        RVGP(cloud, backend="precision").load_state_dict(at_points.state_dict())
    with pytest.raises(InvalidInputError, match="isn't what state_dict"):
        RVGP(cloud).load_state_dict({"banana": 1})
    with pytest.raises(UnavailableError, match="no posterior yet"):
        RVGP(cloud).state_dict()


def test_draws_for_arviz(cloud: PointCloud, fields: torch.Tensor) -> None:
    gp = RVGP(cloud, num_eigenpairs=40).fit(range(80), fields)
    data = gp.to_inference_data([100, 101], num_draws=50)
    assert dict(data.posterior.sizes) == {"chain": 1, "draw": 50, "field_0": 3, "site": 2, "coordinate": 3}
    np.testing.assert_array_equal(data.posterior["field"].values[0], gp.sample(50, [100, 101], 0).numpy())
    assert data.posterior.attrs["noise_variance"] == pytest.approx(gp.noise_variance)
    one = ScalarGP(cloud, num_eigenpairs=40).fit(range(4), [1.0, 2.0, 1.0, 2.0], labels=[1, 2, 1, 2])
    posterior = one.to_inference_data([7], num_draws=3).posterior
    assert posterior["condition"].values.tolist() == [1, 2]
    assert posterior["field"].dims == ("chain", "draw", "condition", "site")


def test_noise_of_new_observations(cloud: PointCloud, fields: torch.Tensor) -> None:
    gp = RVGP(cloud, num_eigenpairs=60).fit(range(80), fields[1], np.linspace(0.5, 2, 80))
    clean = gp.predict([100, 101])[1]
    for variances, factor in ((None, [1.0, 1.0]), ([4.0, 9.0], [4.0, 9.0])):
        noisy = gp.predict([100, 101], with_noise=True, variances=variances)[1]
        added = (noisy - clean) / gp.noise_variance
        torch.testing.assert_close(
            added, torch.tensor(factor).double()[:, None, None] * torch.eye(2).double()
        )
    with pytest.raises(InvalidInputError, match="with_noise=True"):
        gp.predict([100], variances=[1.0])


def test_bad_groups(cloud: PointCloud, fields: torch.Tensor) -> None:
    y = fields.clone()
    y[1] = math.nan
    with pytest.raises(EmptyDataError, match="none in field 1"):
        RVGP(cloud).fit(range(80), y)
    gp = RVGP(cloud, num_eigenpairs=20).fit(range(80), fields.reshape(3, 1, 80, 3))
    assert gp.as_drift(field=(2, 0)).vectors.shape == (150, 3)
    for wrong in (2, (3, 0), "a"):
        with pytest.raises(InvalidInputError, match="place of a field in the batch"):
            gp.as_drift(field=wrong)
    one = RVGP(cloud, num_eigenpairs=20).fit(range(80), fields[1])
    with pytest.raises(InvalidInputError, match="one field was fitted"):
        one.as_drift(field=0)
