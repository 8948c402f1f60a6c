"""Looking into a model: the law of a site, and the likelihood of a path as a quadratic."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from stochdyn.core import SDE
from stochdyn.errors import UnknownSiteError
from stochdyn.infer import sample_path
from stochdyn.infer.model_call import ModelCall
from tests.infer.exact import F64

TS = torch.linspace(0, 1, 5, dtype=F64)
SDE1 = SDE(lambda t, x: -x, 0.5)
START = torch.zeros(2, dtype=F64)


def quadratic(model, path, site="x", args=(), values=None):
    return ModelCall(model, args, {}).likelihood(site, "x", {site, "x"}, values or {}, path)


def path(batch=()):
    return torch.randn(5, *batch, 2, dtype=F64)


def test_gaussian_observations_give_precision_and_linear_term():
    y = torch.randn(5, dtype=F64)

    def model():
        x = sample_path("x", SDE1, START, TS)
        pyro.sample("y", dist.Normal(x[..., 0] - 2 * x[..., 1], 0.5).to_event(1), obs=y)

    x = path()
    got = quadratic(model, x)
    emission = torch.tensor([1.0, -2.0], dtype=F64)
    torch.testing.assert_close(got.precision, (emission[:, None] * emission / 0.25).expand(5, 2, 2))
    torch.testing.assert_close(got.linear, y[:, None] * emission / 0.25)
    # A quadratic is its own expansion, wherever it is taken.
    other = quadratic(model, path())
    torch.testing.assert_close(other.linear, got.linear)


def test_masks_scales_and_plates_count():
    y = torch.randn(5, 3, dtype=F64)
    seen = torch.rand(5, 3) > 0.4

    def model(scale):
        with pyro.plate("series", 3):
            x = sample_path("x", SDE1, START, TS)
            with poutine.mask(mask=seen[2]), poutine.scale(scale=scale):
                pyro.sample("z", dist.Normal(x[..., 2, 1], 2.0), obs=y[2])
            steps = dist.Normal(x[..., 0], 0.5).mask(seen.mT).to_event(1)
            pyro.sample("y", steps, obs=y.mT)

    got = quadratic(model, path((3,)), args=(3.0,))
    want = torch.zeros(5, 3, 2, 2, dtype=F64)
    want[..., 0, 0] = seen / 0.25
    want[2, :, 1, 1] = 3.0 * seen[2] / 4.0
    torch.testing.assert_close(got.precision, want)
    torch.testing.assert_close(got.linear[..., 0], seen * y / 0.25)


@pytest.mark.parametrize("size", [2, 6])
def test_scale_of_a_subsampled_plate_cancels(size):
    def model():
        with pyro.plate("series", 6, subsample_size=size) as index:
            x = sample_path("x", SDE1, START, TS)
            pyro.sample("y", dist.Normal(x[..., -1, 0], 0.5), obs=torch.zeros(6, dtype=F64)[index])

    got = quadratic(model, path((size,)))
    torch.testing.assert_close(got.precision[-1, :, 0, 0], torch.full((size,), 4.0, dtype=F64))


def test_poisson_counts_are_expanded_to_second_order():
    counts = torch.tensor([0.0, 3.0, 1.0, 0.0, 7.0], dtype=F64)

    def model():
        x = sample_path("x", SDE1, START, TS)
        pyro.sample("n", dist.Poisson((1 + x[..., 0]).exp()).to_event(1), obs=counts)

    x = path()
    got = quadratic(model, x)
    rate = (1 + x[:, 0]).exp()
    torch.testing.assert_close(got.precision[:, 0, 0], rate)
    torch.testing.assert_close(got.linear[:, 0], counts - rate + rate * x[:, 0])
    assert float(got.precision[:, 1].abs().max()) == 0.0


def test_likelihood_that_bends_upwards_gives_no_precision():
    def model():
        x = sample_path("x", SDE1, START, TS)
        pyro.factor("f", (x[..., 0] ** 2 - x[..., 1] ** 2).sum(-1))

    got = quadratic(model, path())
    torch.testing.assert_close(got.precision, torch.diag(torch.tensor([0.0, 2.0], dtype=F64)).expand(5, 2, 2))


@pytest.mark.parametrize("noise_space", [None, True])
def test_the_prior_of_the_path_is_left_out(noise_space):
    start = dist.Normal(START, 1.0).to_event(1)

    def model():
        sample_path("x", SDE1, start, TS, noise_space=noise_space)

    site = "x_dw" if noise_space else "x"
    got = ModelCall(model, (), {}).likelihood(site, "x", {site, "x", "x_0"}, {}, path())
    assert float(got.precision.abs().max()) == float(got.linear.abs().max()) == 0.0


def test_other_latent_sites_take_the_values_at_hand():
    def model():
        sd = pyro.sample("sd", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
        x = sample_path("x", SDE1, START, TS)
        pyro.sample("y", dist.Normal(x[..., -1, 0], sd), obs=torch.zeros((), dtype=F64))

    got = quadratic(model, path(), values={"sd": torch.tensor(0.1, dtype=F64)})
    torch.testing.assert_close(got.precision[-1, 0, 0], torch.tensor(100.0, dtype=F64))


class TestSiteDistribution:
    @staticmethod
    def model(rate_scale=1.0):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), rate_scale))
        with pyro.plate("series", 3):
            x = sample_path("x", SDE(lambda t, x: -rate[..., None] * x, 0.5), START, TS)
            pyro.sample("y", dist.Normal(x[..., -1, 0], 1.0))

    def test_law_of_a_site_given_those_before(self):
        rate = torch.tensor(2.0, dtype=F64)
        fn = ModelCall(self.model, (), {"rate_scale": 2.0}).site("x", {"rate": rate})["fn"]
        assert fn.batch_shape == (3,)
        x = torch.ones(2, dtype=F64)
        torch.testing.assert_close(fn.sde.drift(TS[0], x), -2 * x)

    def test_nothing_is_left_in_an_outer_trace(self):
        with poutine.trace() as trace:
            call = ModelCall(self.model, (), {})
            call.site("y", {})
            call.likelihood("x", "x", {"x"}, {}, path((3,)))
        assert not trace.trace.nodes

    def test_unknown_site_is_told(self):
        with pytest.raises(UnknownSiteError, match="'z'"):
            ModelCall(self.model, (), {}).site("z", {})
