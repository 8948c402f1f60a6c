"""A posterior in one call: the right width, paths and forecasts, a word where it is poor."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from stochdyn.core import SDE, Scalar
from stochdyn.errors import ConvergenceWarning, InvalidInputError, UnknownSiteError
from stochdyn.infer import GuideMethod, LaplaceMethod, NUTSMethod, fit_posterior, sample_path
from tests.infer.exact import F64, linear_path

TS = torch.linspace(0, 2, 21, dtype=F64)
Y = torch.tensor([0.9, 0.8, 0.4, 0.6, 0.1, -0.2, -0.1, -0.5, -0.3, -0.2], dtype=F64)
ONE = torch.ones(1, dtype=F64)


def model(y):
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 0.7))
    x = sample_path("x", SDE(lambda t, x: -x, Scalar(scale)), ONE, TS)
    pyro.sample("y", dist.Normal(x[..., 2::2, 0], 0.15).to_event(1), obs=y)


def exact_joint():
    """Return mean and standard deviation of log scale by quadrature."""
    unit = linear_path(-ONE[:, None], ONE[:, None], TS, ONE)
    mean, cov = unit.observed(torch.arange(2, 21, 2))
    grid = torch.linspace(-3, 2, 101, dtype=F64)
    logs = torch.stack(
        [
            dist.MultivariateNormal(mean, u.exp() ** 2 * cov + 0.0225 * torch.eye(10, dtype=F64)).log_prob(Y)
            for u in grid
        ]
    ) + dist.Normal(0.0, 0.7).log_prob(grid)
    return grid, logs


def exact_scale():
    grid, logs = exact_joint()
    weight = torch.softmax(logs, 0)
    centre = float(weight @ grid)
    return centre, float(weight @ (grid - centre) ** 2) ** 0.5


@pytest.mark.parametrize("method", ["guide", "laplace", GuideMethod(steps=60)], ids=str)
def test_parameters_come_out_with_their_width(method):
    post = fit_posterior(model, Y, method=method, num_draws=2000, progress=False)
    draws = torch.as_tensor(post.idata.posterior["scale"].values).flatten().log()
    centre, spread = exact_scale()
    assert abs(float(draws.mean()) - centre) < 0.25 * spread
    assert 0.8 < float(draws.std()) / spread < 1.2
    assert post.khat < 0.7
    assert post.idata.attrs["khat"] == post.khat
    assert "khat" in repr(post)


def test_paths_and_forecasts_come_from_the_same_object():
    post = fit_posterior(model, Y, method=LaplaceMethod(), num_draws=200, progress=False)
    assert post.paths == ("x",)
    assert post.predict().x.shape == (1000, 21, 1)
    ahead = post.forecast([2.5, 3.0], num_draws=50)
    assert ahead.x.shape == (50, 2, 1)
    assert ahead.num_fitted == 0
    with pytest.raises(InvalidInputError, match="forecast"):
        post.forecast([1.0, 3.0])
    assert post.law().marginal(1.0).mean.shape == (1,)


def test_evidence_without_a_search_by_weights_is_that_of_quadrature():
    post = fit_posterior(model, Y, method="laplace", num_draws=1000, progress=False)
    grid, logs = exact_joint()
    exact = float(torch.logsumexp(logs, 0) + (grid[1] - grid[0]).log())
    # The relative variance of a mean of n weights with effective number m is about (n / m - 1) / n.
    assert abs(post.log_evidence - exact) < 5 * ((1000 / post.ess - 1) / 1000) ** 0.5 + 1e-3
    assert post.idata.attrs["log_evidence"] == post.log_evidence


def test_a_seed_repeats_it_and_leaves_the_random_state():
    state = torch.get_rng_state()
    posts = [
        fit_posterior(model, Y, method=GuideMethod(steps=5), num_draws=90, seed=4, progress=False)
        for _ in range(2)
    ]
    a, b = (p.idata.posterior["scale"].values for p in posts)
    assert (a == b).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sampler_and_a_model_without_paths():
    def plain(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("y", dist.Normal(mean[..., None], 0.5).expand([*mean.shape, 10]).to_event(1), obs=y)

    for method in ("guide", NUTSMethod(warmup=30)):
        post = fit_posterior(plain, Y, method=method, num_draws=200, progress=False)
        want = float(Y.sum()) / 0.25 / (1 + 40)
        assert abs(float(post.idata.posterior["mean"].mean()) - want) < 0.1
        assert math.isnan(post.khat) == isinstance(method, NUTSMethod)
        with pytest.raises(UnknownSiteError):
            post.predict()


def test_a_path_alone_needs_no_parameters():
    def alone(y):
        x = sample_path("x", SDE(lambda t, x: -x, 0.5), ONE, TS)
        pyro.sample("y", dist.Normal(x[..., 2::2, 0], 0.15).to_event(1), obs=y)

    post = fit_posterior(alone, Y, num_draws=100, progress=False)
    # The path is linear and Gaussian, so all weights are the evidence.
    assert post.ess > 199.9
    assert post.khat == 0.0


@pytest.mark.parametrize(
    ("options", "name"),
    [({"method": "magic"}, "method"), ({"method": 3}, "method"), ({"num_draws": 0}, "num_draws")],
)
def test_bad_options_are_refused_before_any_work(options, name):
    def never(y):
        raise AssertionError

    with pytest.raises(InvalidInputError, match=name):
        fit_posterior(never, Y, **options)
    with pytest.raises(InvalidInputError, match="steps"):
        GuideMethod(steps=0)


def test_a_picture_of_the_path():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    post = fit_posterior(model, Y, method="laplace", num_draws=100, progress=False)
    axes = post.plot(torch.linspace(0, 3, 16, dtype=F64))
    assert "x: median" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("with_paths", [True, False])
def test_guides_of_subsampled_plates_are_trained(with_paths):
    y = 3 + 0.2 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("series", 40, subsample_size=10) as index:
            if with_paths:
                ts = torch.linspace(0, 1, 4)
                x = sample_path("x", SDE(lambda t, x: 0 * x, 0.2), torch.zeros(1), ts)[..., 1:, 0]
            else:
                x = pyro.sample("x", dist.Normal(0.0, 0.1))[..., None]
                x = x.expand(*x.shape[:-1], 3)
            pyro.sample("y", dist.Normal(x + mu[..., None], 0.1).to_event(1), obs=y[index])

    with pytest.warns(ConvergenceWarning):
        post = fit_posterior(model, y, method=GuideMethod(steps=60, lr=0.1), num_draws=100, progress=False)
    # On its way from the prior's median, zero, to the data's mean, three.
    assert float(post.idata.posterior["mu"].values.mean()) > 0.5
