"""sample_path: one joint law, whether the random sites are the path or its driving increments."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive

from stochdyn.core import SDE, Matrix, Scalar, integrate
from stochdyn.errors import (
    DiffusionError,
    InvalidInputError,
    NonFiniteError,
    SingularDiffusionError,
    TimeGridError,
)
from stochdyn.fractional import MarkovNoise
from stochdyn.infer import DiffusionPath, NoiseReparam, Panel, PathIncrements, sample_path
from stochdyn.infer.distributions import is_degenerate, start_of
from stochdyn.testing import check_forms
from tests.infer.exact import F64, TwoStates, linear_path

TS = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.7, 1.0], dtype=F64)
ZERO = torch.zeros(2, dtype=F64)
RANDOM = dist.MultivariateNormal(ZERO, torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64))
DRIFTS = {
    "linear": lambda t, x: -0.7 * x,
    "well": lambda t, x: x - x**3,
}
DIFFUSIONS = {
    "scalar": (0.5, lambda t, x: 2 * math.log(0.5)),
    "diagonal": (torch.tensor([0.5, 2.0], dtype=F64), lambda t, x: 0.0),
    "matrix": (torch.tensor([[1.0, 0.3], [0.2, 0.8]], dtype=F64), lambda t, x: math.log(0.74)),
    "state": (
        lambda t, x: 0.5 + 0.3 * torch.cos(x) ** 2,
        lambda t, x: (0.5 + 0.3 * torch.cos(x) ** 2).log().sum(-1),
    ),
}


def random_sites(trace):
    return list(poutine.util.prune_subsample_sites(trace).stochastic_nodes)


@pytest.mark.parametrize("start", [ZERO, RANDOM], ids=["fixed", "random"])
@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=str)
@pytest.mark.parametrize("drift", DRIFTS, ids=str)
def test_noise_form_has_the_same_joint_law(drift, diffusion, start):
    strength, log_det = DIFFUSIONS[diffusion]
    sde = SDE(DRIFTS[drift], strength)

    def model(noise_space):
        return sample_path("x", sde, start, TS, noise_space=noise_space)

    centred, noisy = (poutine.trace(model).get_trace(flag) for flag in (None, True))
    assert random_sites(centred) == ["x"]
    assert random_sites(noisy) == (["x_dw"] if start is ZERO else ["x_0", "x_dw"])
    noisy.compute_log_prob()
    x = noisy.nodes["x"]["value"]
    # log p(x) = log p(e) - log |dx / de|, the latter being the product of the determinants of G
    volume = sum(log_det(TS[n], x[n]) for n in range(len(TS) - 1))
    want = noisy.nodes["x_dw"]["log_prob"] - volume
    if start is RANDOM:
        want = want + noisy.nodes["x_0"]["log_prob"]
    torch.testing.assert_close(DiffusionPath(sde, start, TS).log_prob(x), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("start", [ZERO, RANDOM], ids=["fixed", "random"])
def test_reparametrised_site_is_the_noise_form(start):
    sde = SDE(DRIFTS["well"], 0.5)

    def centred():
        return pyro.sample("x", DiffusionPath(sde, start, TS))

    trace = poutine.trace(poutine.reparam(centred, {"x": NoiseReparam()})).get_trace()
    assert random_sites(trace) == (["x_dw"] if start is ZERO else ["x_0", "x_dw"])
    fixed = {n: trace.nodes[n]["value"] for n in random_sites(trace)}
    direct = poutine.trace(
        poutine.condition(lambda: sample_path("x", sde, start, TS, noise_space=True), fixed)
    )
    assert torch.equal(direct.get_trace().nodes["x"]["value"], trace.nodes["x"]["value"])
    assert trace.nodes["x"]["is_observed"]
    assert float(trace.nodes["x"]["fn"].log_prob(trace.nodes["x"]["value"])) == 0.0


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("start", [ZERO, RANDOM], ids=["fixed", "random"])
def test_path_with_memory_has_the_moments_of_its_linear_law(start, past):
    a, g = (
        torch.tensor([[-0.7, 0.2], [0.0, -1.0]], dtype=F64),
        torch.tensor([[0.5, 0.1], [0.0, 0.4]], dtype=F64),
    )
    noise = TwoStates(past=past)
    sde = SDE(lambda t, x: x @ a.T, g, noise)
    n = 3000

    def model():
        with pyro.plate("n", n):
            return sample_path("x", sde, start, TS)

    trace = poutine.trace(model).get_trace()
    names = (["x_0"] if start is RANDOM else []) + (["x_past"] if past else []) + ["x_dw"]
    assert random_sites(trace) == names
    if past:
        assert trace.nodes["x_past"]["fn"].event_shape == (2, 2)
    law = linear_path(a, g, TS, ZERO, RANDOM.covariance_matrix if start is RANDOM else None, noise)
    x = trace.nodes["x"]["value"].flatten(1)
    flat = law.factor.flatten(0, 1)
    cov = flat @ flat.T
    sd = cov.diagonal().sqrt()
    # 12 means and 78 covariances at 5 standard errors: a false alarm once in 20 000 seeds
    assert bool((x.mean(0).abs() <= 5 * sd / n**0.5 + 1e-12).all())
    error = ((cov**2 + sd[:, None] ** 2 * sd**2) / n).sqrt()
    assert bool(((x.T @ x / n - cov).abs() <= 5 * error + 1e-12).all())


def test_memory_noise_of_the_library_is_stepped_like_the_linear_law():
    noise = MarkovNoise(0.3, num_states=5, horizon=1.0, dt=0.1)
    law = linear_path(
        torch.tensor([[-0.7]], dtype=F64),
        torch.tensor([[0.8]], dtype=F64),
        TS,
        torch.ones(1, dtype=F64),
        noise=noise,
    )
    sde = SDE(lambda t, x: -0.7 * x, 0.8, noise)
    trace = poutine.trace(lambda: sample_path("x", sde, torch.ones(1, dtype=F64), TS)).get_trace()
    e = trace.nodes["x_dw"]["value"] / trace.nodes["x_dw"]["fn"].scale
    want = law.mean + law.factor[..., 1:] @ e.flatten()
    torch.testing.assert_close(trace.nodes["x"]["value"], want, rtol=1e-10, atol=1e-12)


def test_noise_that_reaches_some_components_is_sampled_by_its_increments():
    push = torch.tensor([[0.0], [0.7]], dtype=F64)
    a = torch.tensor([[0.0, 1.0], [-1.0, -0.3]], dtype=F64)
    sde = SDE(lambda t, x: x @ a.T, push)
    trace = poutine.trace(lambda: sample_path("x", sde, ZERO, TS)).get_trace()
    assert random_sites(trace) == ["x_dw"]
    assert trace.nodes["x_dw"]["value"].shape == (5, 1)
    e = trace.nodes["x_dw"]["value"] / trace.nodes["x_dw"]["fn"].scale
    want = linear_path(a, push, TS, ZERO).factor[..., 2:] @ e.flatten()
    torch.testing.assert_close(trace.nodes["x"]["value"], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("diffusion", "noise", "degenerate"),
    [
        (1.0, None, False),
        (torch.ones(2), None, False),
        (torch.eye(2), None, False),
        (torch.ones(2, 3).cumsum(1) ** 2 * torch.tensor([[1.0], [-2.0]]) + torch.eye(2, 3), None, False),
        (torch.ones(2, 1), None, True),
        (torch.ones(2, 2), None, False),
        (lambda t, x: Matrix(torch.ones(2, 1)), None, True),
        (1.0, TwoStates(), True),
    ],
)
def test_noise_without_a_density_is_recognised_by_its_form(diffusion, noise, degenerate):
    assert is_degenerate(SDE(lambda t, x: -x, diffusion, noise), torch.zeros(2), TS) is degenerate


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-40, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "diffusion",
    [
        lambda s: torch.stack([torch.stack([s * 0 + 1, s * 0]), torch.stack([s * 0, s])]),
        lambda s: Matrix(s * torch.eye(2)),
    ],
    ids=["one component", "both"],
)
def test_sites_do_not_depend_on_the_values_of_parameters(diffusion, scale):
    def model():
        s = pyro.sample("s", dist.Delta(torch.tensor(scale)))
        return sample_path("x", SDE(lambda t, x: -x, diffusion(s)), torch.zeros(2), TS.float())

    try:
        trace = poutine.trace(model).get_trace()
    except (DiffusionError, NonFiniteError):  # a strength that isn't one
        return
    assert random_sites(trace) == ["s", "x"]


def test_a_singular_square_matrix_is_told_what_to_do():
    path = DiffusionPath(SDE(lambda t, x: -x, torch.ones(2, 2, dtype=F64)), ZERO, TS)
    with pytest.raises(SingularDiffusionError, match="noise_space=True"):
        path.log_prob(path.sample())


def test_another_solver_is_sampled_by_its_noise():
    sde = SDE(lambda t, x: -x, 0.5)
    trace = poutine.trace(lambda: sample_path("x", sde, ZERO, TS, method="heun")).get_trace()
    assert random_sites(trace) == ["x_dw"]
    with pytest.raises(SingularDiffusionError, match="heun"):
        sample_path("x", sde, ZERO, TS, method="heun", noise_space=False)


def test_series_without_a_plate_have_noise_of_their_own():
    start = torch.zeros(3, 1)
    trace = poutine.trace(lambda: sample_path("x", SDE(lambda t, x: -x, 1.0), start, TS, noise_space=True))
    x = trace.get_trace().nodes["x"]["value"]
    assert x.shape == (3, 6, 1)
    assert len(torch.unique(x[:, -1])) == 3


def test_random_starts_without_a_plate_are_independent():
    sde = SDE(lambda t, x: -x, Scalar(torch.tensor([1.0, 1.0, 1.0])))
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    trace = poutine.trace(lambda: sample_path("x", sde, start, TS, noise_space=True)).get_trace()
    assert len(torch.unique(trace.nodes["x_0"]["value"])) == 3


@pytest.mark.parametrize("method", ["heun", "milstein"])
def test_solver_is_the_one_asked_for(method):
    sde = SDE(lambda t, x: -x, lambda t, x: 0.5 * x)
    start = torch.ones(1, dtype=F64)
    trace = poutine.trace(lambda: sample_path("x", sde, start, TS, method, noise_space=True)).get_trace()
    dw = trace.nodes["x_dw"]["value"]
    want, euler = (integrate(sde, start, TS, dw, method=m).x for m in (method, "euler"))
    assert torch.equal(trace.nodes["x"]["value"], want)
    assert not torch.allclose(want, euler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_that_of_the_start(dtype):
    sde = SDE(lambda t, x: -x, 1.0, TwoStates(past=True))
    trace = poutine.trace(lambda: sample_path("x", sde, torch.zeros(1, dtype=dtype), TS)).get_trace()
    assert {trace.nodes[n]["value"].dtype for n in ("x", "x_dw", "x_past")} == {dtype}


def test_gradient_reaches_the_parameters_through_the_noise_form():
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
    dw = torch.randn(5, 1, dtype=F64) * 0.4

    def end(rate):
        sde = SDE(lambda t, x: -rate * x, 0.5)
        model = poutine.condition(
            lambda: sample_path("x", sde, torch.ones(1, dtype=F64), TS, noise_space=True), {"x_dw": dw}
        )
        return model()[-1, 0]

    assert torch.autograd.gradcheck(end, (rate,))


class TestPathIncrements:
    def test_density_and_draws_are_those_of_brownian_increments(self):
        law = PathIncrements(SDE(lambda t, x: -x, 1.0), ZERO, TS)
        assert (law.batch_shape, law.event_shape) == ((), (5, 2))
        dw = law.sample((3,))
        want = torch.distributions.Normal(0.0, (TS[1:] - TS[:-1]).sqrt()[:, None]).log_prob(dw).sum((-1, -2))
        torch.testing.assert_close(law.log_prob(dw), want)
        n = 4000
        z = law.sample((n,)) / law.scale
        assert bool(((z**2).mean(0) - 1).abs().max() < 4.5 * (2 / n) ** 0.5)

    def test_expand_and_broadcast(self):
        law = PathIncrements(SDE(lambda t, x: -x, 1.0), ZERO, TS).expand([4])
        dw = law.sample((3,))
        assert dw.shape == (3, 4, 5, 2)
        assert law.log_prob(dw).shape == (3, 4)
        assert law.log_prob(dw[0, 0]).shape == (4,)
        assert bool(law.support.check(dw).all())


class TestErrors:
    def test_density_form_refused_where_there_is_none(self):
        with pytest.raises(SingularDiffusionError, match="noise_space=None"):
            sample_path("x", SDE(lambda t, x: -x, 1.0, TwoStates()), ZERO, TS, noise_space=False)

    def test_bad_grid_is_told_by_the_path(self):
        with pytest.raises(TimeGridError):
            sample_path("x", SDE(lambda t, x: -x, 1.0), ZERO, TS.flip(0))

    def test_other_sites_are_not_reparametrised(self):
        model = poutine.reparam(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), {"x": NoiseReparam()})
        with pytest.raises(InvalidInputError, match="site 'x' of Normal"):
            model()

    def test_observed_paths_are_not_reparametrised(self):
        path = DiffusionPath(SDE(lambda t, x: -x, 1.0), ZERO, TS)
        x = path.sample()
        model = poutine.reparam(lambda: pyro.sample("x", path, obs=x), {"x": NoiseReparam()})
        with pytest.raises(InvalidInputError, match="observed path"):
            model()


class TestStartOf:
    def test_random_state_is_left_alone(self):
        law = DiffusionPath(SDE(lambda t, x: -x, 1.0), dist.Cauchy(ZERO, 1.0).to_event(1), TS)
        state = torch.get_rng_state()
        start = start_of(law.initial)
        assert torch.equal(torch.get_rng_state(), state)
        assert bool(torch.isfinite(start).all())

    def test_a_law_without_mean_starts_anywhere(self):
        base = dist.Normal(ZERO, 1.0).to_event(1)
        squeezed = dist.TransformedDistribution(base, [torch.distributions.transforms.TanhTransform()])
        path = DiffusionPath(SDE(lambda t, x: -x, 1.0), squeezed, TS)
        assert path.log_prob(path.sample((3,))).shape == (3,)


@pytest.mark.parametrize("noise_space", [None, True])
def test_times_in_any_form_give_the_same_path(noise_space):
    def draw(ts):
        pyro.set_rng_seed(0)
        return sample_path("x", SDE(lambda t, x: -x, 0.5), ZERO, ts, noise_space=noise_space)

    check_forms(draw, TS)
    grid = Panel.from_arrays([[0.0, 1.0], [0.5, 2.0]], [[1.0, 2.0], [3.0, 4.0]]).grid(dt=0.25)
    assert torch.equal(draw(grid), draw(grid.ts))
    assert grid.read(draw(grid)).shape == (2, 2, 2)


def test_increments_given_once_drive_a_path_under_each_draw_of_the_parameters():
    ts = torch.linspace(0, 1, 6)

    def model():
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.3))
        start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        return sample_path("x", SDE(lambda t, x: -rate[..., None] * x, 0.5), start, ts, noise_space=True)

    nodes = poutine.trace(model).get_trace().nodes
    known = poutine.condition(model, {n: nodes[n]["value"] for n in ("x_0", "x_dw")})
    # As many draws as steps.
    rates = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.7])
    together = Predictive(known, posterior_samples={"rate": rates}, parallel=True, return_sites=["x"])()["x"]
    alone = [poutine.condition(known, {"rate": rate})() for rate in rates]
    torch.testing.assert_close(together, torch.stack(alone))
