"""Fractional Gaussian noise as a Pyro distribution: density, samples, shapes, and use in models."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive
from scipy.stats import kstest
from torch.distributions import MultivariateNormal

from stochdyn.errors import HurstRangeError, InvalidInputError, ShapeError
from stochdyn.fractional import FractionalGaussianNoise, HurstLikelihood, fbm_covariance, sample_fgn

F64 = torch.float64


def test_density_is_that_of_the_increments_of_fbm() -> None:
    n, hurst, step = 12, 0.3, 0.5
    cov = fbm_covariance(torch.arange(n + 1, dtype=F64) * step, hurst)
    cov = 4 * (cov[1:, 1:] - cov[:-1, 1:] - cov[1:, :-1] + cov[:-1, :-1])
    y = torch.randn(3, n, dtype=F64)
    exact = MultivariateNormal(torch.full((n,), 0.7, dtype=F64), cov).log_prob(y)
    law = FractionalGaussianNoise(hurst, 0.7, 2.0, n, step)
    assert torch.allclose(law.log_prob(y), exact, atol=1e-9)
    assert torch.allclose(law.covariance_matrix, cov, atol=1e-10)
    assert torch.allclose(law.variance.double(), cov.diagonal(), rtol=1e-6)


def test_density_of_samples_has_the_right_law() -> None:
    """-2 log p + const is chi-square with n degrees of freedom: Kolmogorov-Smirnov, p above 1e-4."""
    torch.manual_seed(3)
    law = FractionalGaussianNoise(torch.tensor(0.85, dtype=F64), 5.0, 3.0, 20)
    y = law.sample((2000,))
    peak = law.log_prob(law.mean)
    assert kstest((2 * (peak - law.log_prob(y))).numpy(), "chi2", args=(20,)).pvalue > 1e-4


def test_table_and_cholesky_agree_and_other_values_ignore_the_table() -> None:
    y = sample_fgn(0.6, 80, generator=torch.Generator().manual_seed(0))
    table = HurstLikelihood(y)
    hurst = torch.tensor([0.2, 0.7], dtype=F64, requires_grad=True)
    fast = FractionalGaussianNoise(hurst, 0.1, 1.2, 80, likelihood=table)
    slow = FractionalGaussianNoise(hurst, 0.1, 1.2, 80)
    assert torch.allclose(fast.log_prob(y), slow.log_prob(y), atol=1e-7)
    (a,), (b,) = (torch.autograd.grad(law.log_prob(y).sum(), hurst) for law in (fast, slow))
    assert torch.allclose(a, b, rtol=1e-6)
    other = y.roll(1)
    assert torch.equal(fast.log_prob(other), slow.log_prob(other))


def test_batches_expansion_and_gradients() -> None:
    hurst = torch.tensor([0.2, 0.5, 0.8], dtype=F64, requires_grad=True)
    law = FractionalGaussianNoise(hurst, torch.zeros(2, 1, dtype=F64), 1.0, 6)
    assert law.batch_shape == (2, 3)
    assert law.event_shape == (6,)
    assert law.rsample((4,)).shape == (4, 2, 3, 6)
    wide = law.expand((5, 2, 3))
    assert wide.batch_shape == (5, 2, 3)
    y = torch.randn(6, dtype=F64)
    assert torch.allclose(wide.log_prob(y)[3], law.log_prob(y))
    assert wide.mean.shape == (5, 2, 3, 6)
    (grad,) = torch.autograd.grad(law.rsample().sum(), hurst)
    assert bool(torch.isfinite(grad).all())
    assert torch.autograd.gradcheck(lambda h: FractionalGaussianNoise(h, 0.3, 1.5, 6).log_prob(y), hurst)


def test_precision_follows_the_arguments() -> None:
    single = FractionalGaussianNoise(0.7, torch.tensor(0.0), torch.tensor(1.0), 5)
    assert single.sample().dtype == torch.float32
    double = FractionalGaussianNoise(0.7, torch.tensor(0.0, dtype=F64), 1.0, 5)
    assert double.sample().dtype == F64


def model(y: torch.Tensor) -> None:
    hurst = pyro.sample("hurst", dist.Uniform(torch.tensor(0.01, dtype=F64), 0.99))
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0))
    pyro.sample("y", FractionalGaussianNoise(hurst, torch.zeros((), dtype=F64), scale, y.shape[-1]), obs=y)


def test_in_a_model_with_nuts_and_predictive() -> None:
    """The posterior mean by NUTS against the same by quadrature."""
    n = 15
    y = sample_fgn(0.75, n, generator=torch.Generator().manual_seed(1))
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run(y)
    draws = mcmc.get_samples()["hurst"]
    h = torch.linspace(0.011, 0.989, 200, dtype=F64)[:, None]
    log_scale = torch.linspace(-2, 2, 120, dtype=F64)
    log_p = FractionalGaussianNoise(h, 0.0, log_scale.exp(), n).log_prob(y) - 0.5 * log_scale**2
    weight = torch.softmax(log_p.flatten(), 0).reshape(log_p.shape)
    mean = float((weight * h).sum())
    spread = float((weight * (h - mean) ** 2).sum()) ** 0.5
    assert (
        abs(float(draws.mean()) - mean) < 5 * spread / (len(draws) / 3) ** 0.5
    )  # a third of the draws count
    assert float(draws.std()) == pytest.approx(spread, rel=0.4)
    replicated = Predictive(model, {"hurst": draws[:7], "scale": mcmc.get_samples()["scale"][:7]})
    assert replicated(y)["y"].shape[-1] == n


def test_bad_arguments() -> None:
    with pytest.raises(HurstRangeError):
        FractionalGaussianNoise(1.0, 0.0, 1.0, 5)
    with pytest.raises(InvalidInputError, match="scale must be positive"):
        FractionalGaussianNoise(0.5, 0.0, -1.0, 5)
    with pytest.raises(InvalidInputError, match="num_steps must be an integer"):
        FractionalGaussianNoise(0.5, 0.0, 1.0, 0)
    with pytest.raises(ShapeError, match="value has the wrong size"):
        FractionalGaussianNoise(0.5, 0.0, 1.0, 5).log_prob(torch.zeros(4))
    table = HurstLikelihood(sample_fgn(0.5, 20, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InvalidInputError, match="table of another kind"):
        FractionalGaussianNoise(0.5, 0.0, 1.0, 21, likelihood=table)
