"""DiffusionPath is the law of the Euler scheme: its shapes, its density, its draws, its errors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

from stochdyn.core import SDE, Diagonal, Matrix, Scalar
from stochdyn.errors import (
    DeviceMismatchError,
    DiffusionError,
    DtypeMismatchError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    SingularDiffusionError,
    StochdynError,
    TimeGridError,
)
from stochdyn.infer import DiffusionPath
from tests.infer.exact import F64, TwoStates, linear_path

TS = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.7, 1.0], dtype=F64)


def ou(rate=1.0, scale=1.0):
    return SDE(lambda t, x: -torch.as_tensor(rate)[..., None] * x, scale)


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("sample", [(), (4,), (4, 5)])
@pytest.mark.parametrize(
    ("start", "rate", "scale", "batch"),
    [
        (torch.zeros(2), 1.0, 1.0, ()),
        (torch.zeros(3, 2), 1.0, 1.0, (3,)),
        (torch.zeros(2), torch.ones(3), 1.0, (3,)),
        (torch.zeros(2), 1.0, Scalar(torch.ones(3)), (3,)),
        (torch.zeros(2), torch.ones(7, 1), Scalar(torch.ones(3)), (7, 3)),
        (torch.zeros(3, 2), torch.ones(7, 1), Diagonal(torch.ones(2)), (7, 3)),
        (torch.zeros(2), 1.0, Matrix(torch.eye(2).expand(3, 2, 2)), (3,)),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.ones(3), 1.0, (3,)),
        (dist.Normal(torch.zeros(3, 2), 1.0).to_event(1), torch.ones(7, 1), 1.0, (7, 3)),
    ],
)
def test_shapes_are_sample_batch_event(sample, start, rate, scale, batch):
    path = DiffusionPath(ou(rate, scale), start, torch.linspace(0, 1, 6))
    assert (path.batch_shape, path.event_shape) == (batch, (6, 2))
    x = path.sample(sample)
    assert x.shape == (*sample, *batch, 6, 2)
    assert path.log_prob(x).shape == (*sample, *batch)


def test_batch_of_the_noise_counts():
    noise = TwoStates(torch.rand(3, 2, dtype=F64))
    path = DiffusionPath(SDE(lambda t, x: -x, 1.0, noise), torch.zeros(2, dtype=F64), TS)
    assert path.batch_shape == (3,)
    assert path.sample((4,)).shape == (4, 3, 6, 2)


@pytest.mark.parametrize("start", [torch.ones(2), dist.Normal(torch.zeros(2), 1.0).to_event(1)])
def test_expand_makes_independent_copies_of_one_law(start):
    path = DiffusionPath(ou(), start, torch.linspace(0, 1, 6))
    wide = path.expand([4, 3])
    x = wide.sample((5,))
    assert x.shape == (5, 4, 3, 6, 2)
    assert len(torch.unique(x[..., -1, 0])) == 60
    torch.testing.assert_close(wide.log_prob(x), path.log_prob(x))
    assert type(wide.support) is type(path.support)
    assert wide.expand([2, 4, 3]).batch_shape == (2, 4, 3)


def test_series_in_a_plate_are_independent():
    with pyro.plate("series", 5):
        x = pyro.sample("x", DiffusionPath(ou(), torch.zeros(1), torch.linspace(0, 1, 4)))
    assert x.shape == (5, 4, 1)
    assert len(torch.unique(x[:, -1])) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, Scalar(0.5), torch.tensor(0.5)])
def test_precision_is_that_of_the_start(dtype, time, scale):
    path = DiffusionPath(SDE(lambda t, x: -x, scale), torch.zeros(2, dtype=dtype), TS.to(time))
    x = path.sample()
    assert x.dtype == dtype
    assert path.log_prob(x).dtype == dtype


# ----------------------------------------------------------------------------------------------- density


def test_log_prob_is_the_product_of_gaussian_transitions():
    def drift(t, x):
        return torch.sin(3 * t) - x**3

    def strength(t, x):
        return 0.3 + 0.2 * torch.cos(x + t) ** 2

    start = dist.Normal(torch.tensor([0.5, -1.0], dtype=F64), 0.7).to_event(1)
    path = DiffusionPath(SDE(drift, strength), start, TS)
    x = path.sample((3,))
    want = start.log_prob(x[:, 0])
    for n in range(len(TS) - 1):
        dt = TS[n + 1] - TS[n]
        mean = x[:, n] + drift(TS[n], x[:, n]) * dt
        sd = strength(TS[n], x[:, n]) * math.sqrt(dt)
        want = want + torch.distributions.Normal(mean, sd).log_prob(x[:, n + 1]).sum(-1)
    torch.testing.assert_close(path.log_prob(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("square", [True, False])
def test_log_prob_of_linear_equation_is_a_dense_gaussian(square):
    a = torch.tensor([[-1.0, 0.4], [-0.7, -0.5]], dtype=F64)
    g = torch.tensor([[0.6, 0.2], [0.0, 0.3]] if square else [[0.6, 0.2, 0.1], [0.0, 0.3, -0.4]], dtype=F64)
    start = torch.tensor([1.0, -0.5], dtype=F64)
    path = DiffusionPath(SDE(lambda t, x: x @ a.T, g), start, TS)
    x = path.sample((4,))
    law = linear_path(a, g, TS, start).dense()
    torch.testing.assert_close(path.log_prob(x), law.log_prob(x[:, 1:].flatten(1)), rtol=1e-10, atol=1e-10)


def test_log_prob_of_a_random_start_is_a_dense_gaussian():
    a, g = torch.tensor([[-1.0]], dtype=F64), torch.tensor([[0.5]], dtype=F64)
    mean, cov = torch.tensor([0.3], dtype=F64), torch.tensor([[0.8]], dtype=F64)
    law = linear_path(a, g, TS, mean, cov)
    flat = law.factor.flatten(0, 1)
    dense = torch.distributions.MultivariateNormal(law.mean.flatten(), flat @ flat.T)
    path = DiffusionPath(SDE(lambda t, x: -x, 0.5), dist.MultivariateNormal(mean, cov), TS)
    x = path.sample((4,))
    torch.testing.assert_close(path.log_prob(x), dense.log_prob(x.flatten(1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "scale", [Scalar(torch.tensor([0.5, 1.0, 2.0], dtype=F64)), Diagonal(torch.rand(3, 2, dtype=F64) + 0.5)]
)
def test_batched_parameters_are_rows_of_single_ones(scale):
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    path = DiffusionPath(ou(rate, scale), torch.ones(2, dtype=F64), TS)
    x = path.sample((4,))
    for i in range(3):
        single = DiffusionPath(ou(rate[i], type(scale)(scale.value[i])), torch.ones(2, dtype=F64), TS)
        torch.testing.assert_close(path.log_prob(x)[:, i], single.log_prob(x[:, i]), rtol=1e-12, atol=1e-12)


def test_draws_have_the_moments_of_the_scheme():
    a, g = torch.tensor([[-1.0, 0.4], [-0.7, -0.5]], dtype=F64), torch.eye(2, dtype=F64) * 0.6
    start = torch.tensor([1.0, -0.5], dtype=F64)
    n = 4000
    x = DiffusionPath(SDE(lambda t, x: x @ a.T, 0.6), start, TS).sample((n,))
    law = linear_path(a, g, TS, start)
    sd = (law.factor**2).sum(-1).sqrt()
    # 4.5 standard errors at 10 numbers each: a false alarm once in 7 000 seeds
    assert bool(((x.mean(0) - law.mean).abs() <= 4.5 * sd / n**0.5 + 1e-12).all())
    assert bool(((x.var(0) - sd**2).abs() <= 4.5 * sd**2 * (2 / n) ** 0.5 + 1e-12).all())


# --------------------------------------------------------------------------------------------- gradients


def test_rsample_is_differentiable_in_all_parameters():
    def end(rate, scale, start):
        torch.manual_seed(1)
        return DiffusionPath(ou(rate, Scalar(scale)), start, TS).rsample((3,))

    inputs = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.8, 0.5)]
    start = torch.tensor([0.5, 1.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (*inputs, start))


def test_log_prob_is_differentiable_in_all_parameters():
    x = torch.randn(6, 2, dtype=F64)

    def value(rate, scale, x):
        return DiffusionPath(ou(rate, Scalar(scale)), x.detach()[0], TS).log_prob(x)

    rate, scale = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.8, 0.5))
    assert torch.autograd.gradcheck(value, (rate, scale, x.requires_grad_()))


# ----------------------------------------------------------------------------------------- fixed start


def test_start_is_no_part_of_a_pinned_event():
    path = DiffusionPath(ou(), torch.tensor([2.0]), torch.linspace(0, 1, 6))
    x = path.sample((3,))
    assert torch.equal(x[:, 0], torch.full((3, 1), 2.0))
    assert biject_to(path.support).inv(x).shape == (3, 5, 1)
    assert bool(path.support.check(x).all())


def test_observed_path_is_scored():
    ts = torch.linspace(0, 4, 401, dtype=F64)
    torch.manual_seed(3)
    data = DiffusionPath(ou(torch.tensor(1.0, dtype=F64), 0.5), torch.ones(1, dtype=F64), ts).sample((20,))

    def model(data):
        rate = pyro.param("rate", torch.tensor(0.3, dtype=F64))
        with pyro.plate("series", 20):
            pyro.sample("x", DiffusionPath(ou(rate, 0.5), torch.ones(1, dtype=F64), ts), obs=data)

    # The likelihood of an observed path is quadratic in the rate: one Newton step is the maximum.
    total = pyro.poutine.trace(model).get_trace(data).log_prob_sum()
    rate = pyro.param("rate")
    slope = torch.autograd.grad(total, rate, create_graph=True)[0]
    curvature = torch.autograd.grad(slope, rate)[0]
    estimate = (rate - slope / curvature).detach()
    before, after, dt = data[:, :-1], data[:, 1:], ts[1] - ts[0]
    want = -(before * (after - before)).sum() / (before**2 * dt).sum()
    torch.testing.assert_close(estimate, want)
    assert abs(float(estimate) - 1.0) < 4 * float((-curvature).rsqrt())


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "sde",
    [
        SDE(lambda t, x: -x, torch.tensor([[1.0], [0.5]])),
        SDE(lambda t, x: -x, torch.tensor([[1.0, 2.0], [0.5, 1.0]])),
        SDE(lambda t, x: -x, 1.0, TwoStates()),
        SDE(lambda t, x: -x, lambda t, x: torch.ones(*x.shape, 1)),
    ],
    ids=["narrow", "singular", "memory", "narrow-varying"],
)
def test_no_density_where_the_noise_is_singular(sde):
    path = DiffusionPath(sde, torch.zeros(2), torch.linspace(0, 1, 6))
    x = path.sample()
    assert x.shape == (6, 2)
    with pytest.raises(SingularDiffusionError, match="sample_path"):
        path.log_prob(x)


GOOD = {"sde": SDE(lambda t, x: -x, 1.0), "initial": torch.zeros(2), "ts": torch.linspace(0, 1, 6)}
BAD = [
    ("unsorted", {"ts": torch.tensor([0.0, 0.5, 0.4])}, TimeGridError, r"ts\[2\]=0.4 after ts\[1\]=0.5"),
    ("repeated", {"ts": torch.tensor([0.0, 0.5, 0.5])}, TimeGridError, "increase strictly"),
    ("one time", {"ts": torch.tensor([0.0])}, TimeGridError, "at least 2"),
    ("table of times", {"ts": torch.zeros(3, 2)}, TimeGridError, "increase strictly"),
    ("NaN time", {"ts": torch.tensor([0.0, torch.nan, 1.0])}, NonFiniteError, r"ts\[1\]"),
    ("NaN start", {"initial": torch.tensor([0.0, torch.nan])}, NonFiniteError, r"initial\[1\]"),
    ("scalar start", {"initial": torch.tensor(0.0)}, ShapeError, "initial"),
    ("integer start", {"initial": torch.zeros(2, dtype=torch.long)}, InvalidInputError, "floating"),
    ("scalar law", {"initial": dist.Normal(0.0, 1.0)}, ShapeError, "vector event"),
    ("number as start", {"initial": 0.0}, InvalidInputError, "distribution or a tensor"),
    ("negative", {"sde": SDE(lambda t, x: -x, lambda t, x: -torch.ones_like(x))}, DiffusionError, "positive"),
    ("zero", {"sde": SDE(lambda t, x: -x, lambda t, x: torch.zeros_like(x))}, DiffusionError, "positive"),
    ("NaN diffusion", {"sde": SDE(lambda t, x: -x, lambda t, x: x / 0)}, NonFiniteError, "diffusion"),
    ("wrong diffusion", {"sde": SDE(lambda t, x: -x, torch.ones(3))}, ShapeError, "diffusion"),
    ("wrong drift", {"sde": SDE(lambda t, x: torch.zeros(3), 1.0)}, ShapeError, "drift"),
    ("no SDE", {"sde": torch.nn.Linear(2, 2)}, InvalidInputError, "sde has the wrong type"),
    ("solver", {"method": "rk4"}, InvalidInputError, "'euler'"),
    ("device of times", {"ts": torch.linspace(0, 1, 6, device="meta")}, DeviceMismatchError, "ts on meta"),
    ("device of start", {"initial": torch.zeros(2, device="meta")}, DeviceMismatchError, "initial on meta"),
    (
        "device of equation",
        {"sde": SDE(torch.nn.Bilinear(1, 2, 2, device="meta"), 1.0)},
        DeviceMismatchError,
        "drift.weight on meta",
    ),
    (
        "precision of drift",
        {"sde": SDE(lambda t, x: -torch.ones(1, dtype=F64) * x, 1.0)},
        DtypeMismatchError,
        "drift torch.float64",
    ),
    (
        "precision of diffusion",
        {"sde": SDE(lambda t, x: -x, torch.ones(2, dtype=F64))},
        DtypeMismatchError,
        "diffusion torch.float64",
    ),
]


@pytest.mark.parametrize(("change", "error", "match"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_told_at_once(change, error, match):
    with pytest.raises(error, match=match) as caught:
        DiffusionPath(**{**GOOD, **change})
    assert isinstance(caught.value, StochdynError)


BAD_PATHS = [
    ("event size", lambda x: x[..., :1], ShapeError, "axis -1"),
    ("grid size", lambda x: x[:-1], ShapeError, "axis -2"),
    ("no time", lambda x: x[0], ShapeError, "time, dim"),
    ("batch", lambda x: x.expand(3, 6, 2), ShapeError, r"\(..., 4, 6, 2\)"),
    (
        "NaN",
        lambda x: torch.where(torch.arange(6)[:, None] == 2, torch.nan, x),
        NonFiniteError,
        r"path\[0, 2, 0\]",
    ),
    ("other start", lambda x: x + 1, InvalidInputError, "fixed start"),
]


@pytest.mark.parametrize(
    ("change", "error", "match"), [b[1:] for b in BAD_PATHS], ids=[b[0] for b in BAD_PATHS]
)
def test_bad_paths_are_told_at_once(change, error, match):
    path = DiffusionPath(**GOOD).expand([4])
    x = path.sample()
    bad = change(x if error is NonFiniteError else x[0])
    with pytest.raises(error, match=match):
        path.log_prob(bad)
    # Pyro adds the name of the site and keeps ours as the cause.
    with pytest.raises(ValueError, match="site 'x'") as caught:
        pyro.poutine.trace(lambda: pyro.sample("x", path, obs=bad)).get_trace().log_prob_sum()
    assert isinstance(caught.value.__cause__, error)


def test_times_may_be_numbers_of_any_kind():
    want = DiffusionPath(**GOOD)
    x = want.sample()
    for ts in (GOOD["ts"].tolist(), GOOD["ts"].numpy()):
        torch.testing.assert_close(DiffusionPath(**{**GOOD, "ts": ts}).log_prob(x), want.log_prob(x))
