"""Sites of observations: missing values count nowhere, and a linear path is integrated out exactly."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive

from stochdyn import LinearGaussianMeasure, to_inference_data
from stochdyn.core import SDE
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError
from stochdyn.infer import AutoPathGuide, LinearObservations, observe, sample_path
from tests.infer.exact import F64

NAN = math.nan
TS = torch.linspace(0, 1, 6, dtype=F64)


def path_model(y, form):
    x = sample_path("x", SDE(lambda t, x: -x, 0.5), torch.ones(1, dtype=F64), TS)
    observe("y", dist.Normal(x[..., 1:, 0], 0.3).to_event(1), form(y))


@pytest.mark.parametrize(
    "form", [list, np.asarray, lambda y: torch.tensor(y, dtype=F64)], ids=["list", "numpy", "torch"]
)
def test_missing_values_leave_bound_and_container_as_if_they_were_not_there(form):
    y = [0.5, NAN, 0.1, 0.2, NAN]

    def without(y):
        x = sample_path("x", SDE(lambda t, x: -x, 0.5), torch.ones(1, dtype=F64), TS)
        pyro.sample(
            "y",
            dist.Normal(x[..., [1, 3, 4], 0], 0.3).to_event(1),
            obs=torch.tensor([0.5, 0.1, 0.2], dtype=F64),
        )

    found = []
    for model, args in ((path_model, (y, form)), (without, (y,))):
        guide = AutoPathGuide(model, hidden=(), feedback="recomputed")
        idata = to_inference_data(model, guide, args, num_draws=5, split_events=True)
        found.append(idata.sample_stats["log_weight"].values)
        if model is path_model:
            assert np.isnan(idata.observed_data["y"].values[[1, 4]]).all()
    np.testing.assert_allclose(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("law", "values"),
    [
        (dist.Poisson(torch.full((3,), 2.0)).to_event(1), [1.0, NAN, 4.0]),
        (dist.LogNormal(torch.zeros(3), 1.0).to_event(1), [NAN, 2.0, 1.0]),
        (dist.Bernoulli(torch.full((3,), 0.3)).to_event(1), [NAN, NAN, NAN]),
        (
            dist.MultivariateNormal(torch.zeros(3, 2), torch.eye(2)).to_event(1),
            [[0.1, 0.2], [NAN, NAN], [0.0, 1.0]],
        ),
    ],
)
def test_laws_of_any_support(law, values):
    values = torch.tensor(values)
    trace = pyro.poutine.trace(lambda: observe("y", law, values)).get_trace()
    trace.compute_log_prob()
    want = torch.zeros(())
    for i in range(3):
        if not bool(values[i].isnan().any()):
            want = want + law.base_dist.log_prob(values[i].expand(values.shape))[i]
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], want)


def test_plates_masks_and_whole_data():
    y = torch.tensor([[0.1, NAN], [0.3, 0.4]])

    def model(mask=None):
        with pyro.plate("series", 2):
            observe("y", dist.Normal(torch.zeros(2, 2), 1.0).to_event(1), y, mask)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    normal = dist.Normal(0.0, 1.0)
    want = torch.stack([normal.log_prob(y[0, 0]), normal.log_prob(y[1]).sum()])
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], want)
    trace = pyro.poutine.trace(model).get_trace(torch.tensor([True, False]))
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], normal.log_prob(y[:, 0]))


def test_what_does_not_fit_is_told_by_its_name():
    with pytest.raises(ShapeError, match="values"):
        observe("y", dist.Normal(torch.zeros(3), 1.0).to_event(1), torch.zeros(4))
    with pytest.raises(ShapeError, match="values"):
        observe("y", dist.Normal(torch.zeros(3), 1.0).to_event(1), torch.zeros(1))
    with pytest.raises(InvalidInputError, match="in part"):
        observe("y", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), [0.1, NAN])
    with pytest.raises(InvalidInputError, match="values"):
        observe("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), "data")


TIMES = torch.tensor([0.3, 0.5, 1.2], dtype=F64)


def ou(rate):
    return LinearGaussianMeasure.ornstein_uhlenbeck(
        rate=rate, diffusion=0.8, initial_mean=torch.ones(1, dtype=F64)
    )


class TestLinearObservations:
    def test_density_is_that_of_the_dense_gaussian(self):
        law = ou(1.3)
        y = torch.tensor([[0.2], [0.5], [-0.1]], dtype=F64)
        cov = law.joint_covariance(TIMES) + 0.01 * torch.eye(3, dtype=F64)
        dense = torch.distributions.MultivariateNormal(law.mean(TIMES)[:, 0], cov)
        got = LinearObservations(law, TIMES, 0.1)
        torch.testing.assert_close(got.log_prob(y), dense.log_prob(y[:, 0]))
        holes = y.clone()
        holes[1] = NAN
        two = torch.distributions.MultivariateNormal(dense.mean[[0, 2]], cov[[0, 2]][:, [0, 2]])
        torch.testing.assert_close(got.log_prob(holes), two.log_prob(y[[0, 2], 0]))
        x = got.expand([2]).sample((4000,))
        assert x.shape == (4000, 2, 3, 1)
        error = 5 * dense.variance.sqrt() / 8000**0.5
        assert bool(((x[..., 0].mean((0, 1)) - dense.mean).abs() < error).all())
        spread = x[..., 0].flatten(0, 1).T.cov()
        torch.testing.assert_close(spread, cov, rtol=0.15, atol=0.02)

    def test_batches_of_parameters_and_emissions(self):
        rate = torch.tensor([0.5, 1.5], dtype=F64)
        law = LinearGaussianMeasure(
            -rate[:, None, None], torch.zeros(1, dtype=F64), 0.8, torch.ones(1, dtype=F64)
        )
        got = LinearObservations(law, TIMES, 0.1, emission=torch.tensor([[1.0], [2.0]], dtype=F64))
        assert (got.batch_shape, got.event_shape) == ((2,), (3, 2))
        assert got.log_prob(torch.zeros(3, 2, dtype=F64)).shape == (2,)
        assert got.sample((5,)).shape == (5, 2, 3, 2)

    def test_nuts_moves_through_the_parameters_alone(self):
        y = torch.tensor([[0.7], [0.5], [0.2]], dtype=F64)

        def model():
            rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
            law = LinearGaussianMeasure(
                -rate[..., None, None], torch.zeros(1, dtype=F64), 0.8, torch.ones(1, dtype=F64)
            )
            pyro.sample("y", LinearObservations(law, TIMES, 0.1), obs=y)

        pyro.set_rng_seed(0)
        mcmc = MCMC(NUTS(model), num_samples=10, warmup_steps=10, disable_progbar=True)
        mcmc.run()
        assert set(mcmc.get_samples()) == {"rate"}
        replicas = Predictive(pyro.poutine.uncondition(model), mcmc.get_samples())()
        assert replicas["y"].shape == (10, 3, 1)

    def test_wrong_arguments_are_told(self):
        law = ou(1.0)
        with pytest.raises(InvalidInputError, match="law"):
            LinearObservations("law", TIMES, 0.1)
        with pytest.raises(InvalidInputError, match="obs_scale"):
            LinearObservations(law, TIMES, -1.0)
        with pytest.raises(TimeGridError, match="times"):
            LinearObservations(law, TIMES.flip(0), 0.1)
        with pytest.raises(ShapeError, match="data"):
            LinearObservations(law, TIMES, 0.1).log_prob(torch.zeros(2, 1, dtype=F64))


def test_series_with_times_of_their_own_have_the_evidence_that_they_have_alone():
    times = torch.tensor([[0.1, 0.5, 2.0], [0.3, 0.4, 0.9]], dtype=F64)
    y = torch.tensor([[[0.3], [NAN], [0.1]], [[0.2], [0.5], [-0.4]]], dtype=F64)
    # Four draws of the parameters for each of the two series.
    rate = torch.linspace(0.5, 2.0, 8, dtype=F64).reshape(4, 2)

    def law(rate):
        one = torch.ones(1, 1, dtype=F64)
        return LinearGaussianMeasure(-rate[..., None, None], rate[..., None], one, torch.ones(1, dtype=F64))

    whole = LinearObservations(law(rate), times, 0.2)
    assert whole.batch_shape == (4, 2)
    for k in range(2):
        alone = LinearObservations(law(rate[:, k]), times[k], 0.2).log_prob(y[k])
        torch.testing.assert_close(whole.log_prob(y)[:, k], alone)
    assert whole.rsample().shape == (4, 2, 3, 1)
