"""Posterior paths and forecasts: one law, whichever times are asked for, whoever drew the parameters."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from stochdyn import Diagonal, DiffusionMeasure, to_inference_data
from stochdyn.core import SDE, Intervention, Scalar
from stochdyn.errors import InvalidInputError, StochdynWarning, TimeGridError, UnknownSiteError
from stochdyn.fractional import MarkovNoise
from stochdyn.infer import AutoPathGuide, PosteriorPath, predict_path, sample_path
from tests.infer.exact import F64

TS = torch.linspace(0, 1, 6, dtype=F64)
DT = 0.2


def model(y, noise_space=None, start=None):
    start = torch.ones(1, dtype=F64) if start is None else start
    x = sample_path("x", SDE(lambda t, x: -x, 0.5), start, TS, noise_space=noise_space)
    pyro.sample("y", dist.Normal(x[..., -1, 0], 0.3), obs=y)


Y = torch.tensor(0.2, dtype=F64)


def fitted(program=model, args=(Y,), **options):
    guide = AutoPathGuide(program, hidden=(), **options)
    guide(*args)
    return guide


def exact_moments(times):
    """Return the posterior mean and variance of the Euler scheme at grid times after the observation."""
    m, v = torch.ones((), dtype=F64), torch.zeros((), dtype=F64)
    for _ in range(5):
        m, v = m * (1 - DT), v * (1 - DT) ** 2 + 0.25 * DT
    gain = v / (v + 0.09)
    m, v = m + gain * (Y - m), v * (1 - gain)
    found = {}
    for k in range(6, 16):
        m, v = m * (1 - DT), v * (1 - DT) ** 2 + 0.25 * DT
        found[k] = (m, v)
    return [found[round(t / DT)] for t in times]


@pytest.mark.parametrize("noise_space", [None, True])
@pytest.mark.parametrize("asked", [[2.0], [1.2, 2.0], [0.5, 1.9, 2.0, 3.0], [1.01, 1.99, 2.0, 2.01]], ids=str)
def test_the_law_of_a_time_does_not_depend_on_what_else_is_asked_for(asked, noise_space):
    def program(y):
        model(y, noise_space)

    draws = predict_path(
        program, fitted(program), "x", torch.tensor(asked, dtype=F64), args=(Y,), num_draws=8000, seed=0
    )
    x = draws.x[:, asked.index(2.0), 0]
    ((mean, variance),) = exact_moments([2.0])
    assert abs(float(x.mean() - mean)) < 5 * float((variance / 8000).sqrt())
    assert abs(float(x.var() / variance - 1)) < 5 * (2 / 8000) ** 0.5


def test_between_forecast_points_paths_are_bridges():
    draws = predict_path(
        model, fitted(), "x", torch.tensor([1.2, 1.3, 1.4], dtype=F64), args=(Y,), num_draws=8000, seed=0
    )
    x = draws.x[..., 0]
    gap = x[:, 1] - 0.5 * (x[:, 0] + x[:, 2])
    assert abs(float(gap.mean())) < 5 * float(gap.std()) / 8000**0.5
    assert float(gap.var()) == pytest.approx(0.25 * 0.05, rel=5 * (2 / 8000) ** 0.5)


def test_the_fitted_grid_is_returned_as_it_is():
    draws = predict_path(model, fitted(), "x", args=(Y,), num_draws=5, seed=1)
    assert torch.equal(draws.ts, TS)
    assert draws.num_fitted == 6
    again = predict_path(model, fitted(), "x", TS, args=(Y,), num_draws=5, seed=1)
    torch.testing.assert_close(draws.x, again.x)
    assert torch.equal(draws.mean, draws.x.mean(0))
    assert draws.quantile(0.5).shape == (6, 1)
    assert "tensor" not in repr(draws)


def test_the_control_of_the_prior_steers_the_forecast():
    sde = SDE(lambda t, x: -x, 0.5).controlled(lambda t, z: 3.0 + 0 * z[..., :1])

    def program():
        x = sample_path("x", sde, torch.zeros(1, dtype=F64), TS, noise_space=True)
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.3), obs=Y)

    draws = predict_path(program, fitted(program, ()), "x", [1.0, 9.0], num_draws=4000, seed=0)
    # dX = -(X - 1.5) dt + dW / 2
    assert float(draws.x[:, 1].mean()) == pytest.approx(1.5, abs=5 * 0.36 / 4000**0.5)


def test_the_solver_of_the_site_makes_the_forecast():
    sde = SDE(lambda t, x: 0 * x, lambda t, x: Diagonal(x))
    ts = torch.linspace(0, 1, 3, dtype=F64)

    def program():
        x = sample_path("x", sde, torch.ones(1, dtype=F64), ts, method="milstein", noise_space=True)
        pyro.sample("y", dist.Normal(x[..., -1, 0], 50.0), obs=Y)

    guide = fitted(program, (), start="prior")
    draws = predict_path(program, guide, "x", torch.arange(0, 6, dtype=F64) / 2, num_draws=2000, seed=0)
    assert bool((draws.x > 0).all())  # a Milstein step x (1/4 + (1 + dW)^2 / 2) is positive
    assert draws.x.shape == (2000, 6, 1)


@pytest.mark.parametrize("noise_space", [None, True])
def test_a_sampler_serves_as_well_as_a_guide(noise_space):
    def program(y):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.3))
        x = sample_path(
            "x",
            SDE(lambda t, x: -rate[..., None] * x, 0.5),
            torch.ones(1, dtype=F64),
            TS,
            noise_space=noise_space,
        )
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.3), obs=y)

    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(program), num_samples=30, warmup_steps=20, disable_progbar=True)
    mcmc.run(Y)
    for source in (mcmc, mcmc.get_samples()):
        draws = predict_path(program, source, "x", [0.0, 0.5, 1.0, 2.0], args=(Y,), num_draws=20, seed=0)
        assert draws.x.shape == (20, 4, 1)
        assert bool((draws.x[:, 0] == 1).all())
    path = to_inference_data(program, mcmc, args=(Y,)).posterior["x"].values.reshape(30, 6)
    whole = predict_path(program, mcmc, "x", args=(Y,), num_draws=30, seed=0)
    torch.testing.assert_close(whole.x[..., 0], torch.as_tensor(path))
    assert predict_path(program, mcmc, "x", args=(Y,), num_draws=50, seed=0).x.shape == (50, 6, 1)


def test_every_series_may_have_times_of_its_own():
    grid = torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.0, 1.0, 2.0, 3.0], [5.0, 5.1, 6.0, 7.0]], dtype=F64)
    rate = torch.tensor([10.0, 1.0, 1.0], dtype=F64)
    y = torch.tensor([0.3, 0.3, 0.2], dtype=F64)

    def program():
        with pyro.plate("series", 3):
            sde = SDE(lambda t, x: -rate[..., None] * x, Scalar(0.5 * rate.sqrt()))
            x = sample_path("x", sde, torch.ones(1, dtype=F64), grid)
            pyro.sample("y", dist.Normal(x[..., -1, 0], 0.3), obs=y)

    for options in ({}, {"feedback": "recomputed"}):
        guide = fitted(program, (), **options)
        draws = predict_path(program, guide, "x", num_draws=6, seed=0)
        assert draws.x.shape == (6, 3, 4, 1)
        later = torch.cat([grid, grid[:, -1:] + (grid[:, 1:2] - grid[:, :1])], -1)
        more = predict_path(program, guide, "x", later, num_draws=4000, seed=0)
        assert more.num_fitted == 4
        # The first two series are one process in two units of time.
        a, b = more.x[:, 0, :, 0], more.x[:, 1, :, 0]
        weights = torch.as_tensor(
            to_inference_data(program, guide, num_draws=50).sample_stats["log_weight"].values
        )
        assert float(weights.std()) < 1e-6
        error = 5 * ((a.var(0) + b.var(0)) / 4000).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() <= error + 1e-12).all())


def test_noise_says_how_long_a_path_it_was_made_for():
    noise = MarkovNoise(0.7, 4, 1.5, 0.2)

    def program():
        x = sample_path("x", SDE(lambda t, x: -x, 0.5, noise), torch.ones(1, dtype=F64), TS)
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.3), obs=Y)

    guide = fitted(program, ())
    assert predict_path(program, guide, "x", [0.5, 1.4], num_draws=3).x.shape == (3, 2, 1)
    with pytest.raises(TimeGridError):
        predict_path(program, guide, "x", [0.5, 2.4], num_draws=3)


def test_wrong_questions_are_told():
    guide = fitted()
    with pytest.raises(UnknownSiteError, match="'z'"):
        predict_path(model, guide, "z", args=(Y,))
    with pytest.raises(UnknownSiteError, match="isn't a path"):
        predict_path(model, guide, "y", args=(Y,))
    with pytest.raises(TimeGridError, match="before the fitted grid"):
        predict_path(model, guide, "x", [-1.0, 0.0], args=(Y,))
    with pytest.raises(InvalidInputError, match="num_draws"):
        predict_path(model, guide, "x", args=(Y,), num_draws=0)
    with pytest.raises(InvalidInputError, match="seed"):
        predict_path(model, guide, "x", args=(Y,), seed="now")
    with pytest.raises(InvalidInputError, match="source"):
        predict_path(model, "guide", "x", args=(Y,))
    with pytest.raises(InvalidInputError, match="run"):
        predict_path(model, MCMC(NUTS(model), num_samples=2), "x", args=(Y,))


def test_the_law_weighs_paths_of_the_prior():
    law = PosteriorPath(model, fitted(), "x", (Y,))
    prior = DiffusionMeasure(torch.ones(1, dtype=F64), SDE(lambda t, x: -x, 0.5))
    path = prior.sample(TS, 5, 0)
    # The guide is the exact posterior: its density ratio is the likelihood over the evidence.
    likelihood = dist.Normal(path.x[:, -1, 0], 0.3).log_prob(Y)
    gap = law.log_rn(path, prior) - likelihood
    torch.testing.assert_close(gap, gap[:1].expand(5), rtol=0, atol=1e-8)


def test_a_model_that_is_not_written_for_many_draws_is_drawn_one_by_one():
    ts, y = torch.linspace(0, 1, 6), torch.tensor([0.3, 0.2, 0.1, 0.4, 0.5])

    def model(y, axes):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.3))
        rate = rate[..., None] if axes else rate
        x = sample_path("x", SDE(lambda t, x: -rate * x, 0.5), torch.ones(1), ts)
        pyro.sample("y", dist.Normal(x[..., 1:, 0] if axes else x[1:, 0], 0.2).to_event(1), obs=y)

    generator = torch.Generator().manual_seed(0)
    draws = {"rate": torch.rand(60, generator=generator) + 0.5}
    draws["x"] = 1 + 0.1 * torch.randn(60, 6, 1, generator=generator)
    draws["x"][:, 0] = 1.0
    times = torch.tensor([0.2, 1.0, 1.4])
    many = predict_path(model, draws, "x", times, args=(y, True), num_draws=60, seed=0)
    with pytest.warns(StochdynWarning, match="one by one"):
        single = predict_path(model, draws, "x", times, args=(y, False), num_draws=60, seed=0)
    assert torch.equal(single.x[:, :2], many.x[:, :2])
    error = (single.x[:, 2] - many.x[:, 2]).mean() / (0.5 * (2 * 0.4 / 60) ** 0.5)
    assert abs(error) < 4.5
    held = Intervention(0.5, {0: 0.0})
    with pytest.warns(StochdynWarning, match="one by one"):
        after = predict_path(model, draws, "x", times, args=(y, False), num_draws=60, seed=0, do=held)
    assert torch.equal(after.x[:, 1:], torch.zeros(60, 2, 1))
