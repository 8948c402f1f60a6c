"""The skewed guide: its transform, its start at the mode, and weights that a normal guide doesn't reach."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.optim import ClippedAdam

from stochdyn.infer import AutoSkewedNormal, khat
from stochdyn.infer.skewed import SinhArcsinh

F64 = torch.float64


def test_the_transform_inverts_and_knows_its_slope() -> None:
    x = torch.linspace(-4, 4, 41, dtype=F64, requires_grad=True)
    transform = SinhArcsinh(torch.tensor(0.3, dtype=F64), 0.2)
    y = transform(x)
    torch.testing.assert_close(transform.inv(y), x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), slope.log())
    y = y.detach()
    assert abs(float(y[20])) < 1e-14
    assert abs(float(slope[20]) - 1) < 1e-12
    assert float(y[-1]) > -float(y[0]), "skewed to the right"


def gaussian() -> None:
    precision = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=F64)
    mean = torch.tensor([1.0, -2.0], dtype=F64)
    pyro.sample("x", dist.MultivariateNormal(mean, precision_matrix=precision))


def test_it_starts_at_the_mode_as_wide_as_the_posterior() -> None:
    guide = AutoSkewedNormal(gaussian).start_at_mode(steps=1500)
    torch.testing.assert_close(guide.loc.detach(), torch.tensor([1.0, -2.0], dtype=F64), atol=1e-3, rtol=0)
    factor = (guide.scale[:, None] * guide.scale_tril).detach()
    covariance = torch.linalg.inv(torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=F64))
    torch.testing.assert_close(factor @ factor.T, covariance, atol=1e-8, rtol=0)


def test_a_mode_that_is_none_keeps_the_width() -> None:
    def flat() -> None:
        pyro.sample("x", dist.Uniform(torch.tensor(0.0, dtype=F64), 1.0).mask(False))

    guide = AutoSkewedNormal(flat, init_scale=0.3).start_at_mode(steps=5)
    assert guide.scale.shape == (1,)
    assert bool(torch.isfinite(guide.scale).all())


def skewed() -> None:
    """A gamma law of shape three on the unconstrained scale: the logarithm's left tail is longer."""
    pyro.sample("x", dist.Gamma(torch.tensor(3.0, dtype=F64), 1.0))


def test_skewness_mends_the_weights() -> None:
    def fit(guide) -> float:
        optim = ClippedAdam({"lr": 0.02, "lrd": 0.05 ** (1 / 300)})
        svi = SVI(skewed, guide, optim, Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=0))
        for _ in range(300):
            svi.step()
        return khat(skewed, guide, num_draws=4000)

    normal = fit(AutoMultivariateNormal(skewed, init_scale=0.5))
    pyro.clear_param_store()
    mended = fit(AutoSkewedNormal(skewed).start_at_mode())
    assert mended < 0.3
    assert normal > 0.6
