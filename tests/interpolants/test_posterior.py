"""A trained prior in use: posterior draws given linear observations, and noise as the random site of a Pyro model."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from stochdyn import errors
from stochdyn.interpolants import (
    GaussianMixture,
    GaussianMixtureInterpolant,
    Interpolant,
    InterpolantRegression,
)
from tests.interpolants.truths import F64

MEAN = torch.tensor([[1.0, -0.5]], dtype=F64)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=F64)
LAW = GaussianMixture(torch.ones(1, dtype=F64), MEAN, COVARIANCE)


def model(path: str):  # type: ignore[no-untyped-def]
    it = Interpolant(path)
    truth = GaussianMixtureInterpolant(it, None, LAW)
    names = ("velocity",) if it.kind == "one-sided" else ("velocity", "noise_prediction")
    objective = InterpolantRegression(it, **{n: getattr(truth, n) for n in names})
    objective.starts.observe(torch.zeros(1, 2, dtype=F64), given=False)
    return objective.generator()


@pytest.mark.parametrize("path", ["linear", "one-sided-linear", "vp"])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_posterior_draws_are_exact_for_gaussian_data(path: str, epsilon: float) -> None:
    a, y, s = torch.tensor([[1.0, 1.0]], dtype=F64), [1.5], 0.5
    gain = COVARIANCE @ a.mT / (a @ COVARIANCE @ a.mT + s**2)
    mean = MEAN[0] + (gain * (1.5 - a @ MEAN[0])).squeeze(-1)
    covariance = COVARIANCE - gain @ a @ COVARIANCE
    x = model(path).sample_posterior(y, a, s, 4000, epsilon, 60, generator=0)
    error = (covariance.diagonal() / 4000).sqrt()
    assert bool(((x.mean(0) - mean).abs() < 5 * error + 0.01).all())
    assert float((torch.cov(x.mT) - covariance).abs().max()) < 0.07
    # a missing value says nothing
    both = model(path).sample_posterior(
        [1.5, float("nan")], torch.cat([a, a]), s, 4000, epsilon, 60, generator=0
    )
    torch.testing.assert_close(both, x)


def test_noise_as_the_site_lets_nuts_use_a_trained_prior() -> None:
    pyro.set_rng_seed(0)
    prior = model("one-sided-linear").distribution(num_steps=6, method="heun")
    y = torch.tensor([0.6, 0.4], dtype=F64)

    def program() -> None:
        x = prior.noise_site("x")
        assert x.shape == (2,)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    chain = MCMC(NUTS(program, max_tree_depth=4), num_samples=60, warmup_steps=40, disable_progbar=True)
    chain.run()
    x = torch.stack([prior._carry(z[None], None)[0] for z in chain.get_samples()["x_noise"]])
    precision = torch.linalg.inv(COVARIANCE) + 4 * torch.eye(2, dtype=F64)
    exact = torch.linalg.solve(precision, torch.linalg.inv(COVARIANCE) @ MEAN[0] + 4 * y)
    assert float((x.mean(0) - exact).abs().max()) < 0.3


def test_a_batch_of_conditions_is_a_batch_of_laws() -> None:
    """The data's mean is the condition: every law of a plate has its own."""
    it = Interpolant("one-sided-linear")

    def velocity(t: torch.Tensor, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return condition - (1 - t) * (x - t * condition) / (1 - t).square().clamp_min(1e-12)

    objective = InterpolantRegression(
        it, data_prediction=lambda t, x, c: 0 * x + c + (x - t * c) * t / (t**2 + (1 - t) ** 2)
    )
    objective.starts.observe(torch.zeros(1, 1, dtype=F64), given=False)
    context = torch.tensor([[-5.0], [0.0], [5.0]], dtype=F64)
    law = objective.generator().distribution(num_steps=20, condition=context)
    assert law.batch_shape == (3,)
    with pyro.plate("series", 3):
        x = pyro.sample("x", law)
    assert float((x - context).abs().max()) < 5
    value = torch.tensor([[-4.0], [0.5], [5.0]], dtype=F64)
    exact = torch.distributions.Normal(context, 1.0).log_prob(value)[:, 0]
    torch.testing.assert_close(law.log_prob(value), exact, atol=1e-4, rtol=0)
    assert law.expand((4, 3)).log_prob(value).shape == (4, 3)
    assert law.expand((4, 3)).sample().shape == (4, 3, 1)


def test_bad_input() -> None:
    prior = model("linear")
    with pytest.raises(errors.ShapeError, match="one row of the operator"):
        prior.sample_posterior([1.0, 2.0], torch.ones(1, 2))
    with pytest.raises(errors.EmptyDataError, match="no observed value"):
        prior.sample_posterior([float("nan")] * 2)
    with pytest.raises(errors.InvalidInputError, match="obs_scale"):
        prior.sample_posterior([1.0, 1.0], obs_scale=0.0)
    base = torch.distributions.MultivariateNormal(MEAN[0], COVARIANCE)
    other = InterpolantRegression(Interpolant(), velocity=lambda t, x: x, base=base).generator()
    with pytest.raises(errors.UnavailableError, match="standard normal"):
        other.sample_posterior([1.0, 1.0])
