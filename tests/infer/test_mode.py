"""The most probable path: the log joint density is flat there, whatever the equation and the likelihood."""

from __future__ import annotations

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch

from stochdyn.core import SDE, integrate
from stochdyn.errors import NonFiniteError
from stochdyn.fractional import MarkovNoise
from stochdyn.infer import AutoPathGuide, sample_path
from stochdyn.infer.mode import fit_linearised, linear_feedback
from stochdyn.infer.model_call import ModelCall
from stochdyn.infer.view import view_site
from tests.infer.exact import F64, TwoStates

TS = torch.linspace(0, 2, 21, dtype=F64)
SEEN = torch.arange(2, 21, 3)
Y = torch.tensor([0.9, 1.1, 6.0, 0.8, 0.2, -0.9, -1.0], dtype=F64)
LIKELIHOODS = {
    "gaussian": (lambda x: dist.Normal(x, 0.3), Y),
    "counts": (lambda x: dist.Poisson((1 + x).exp()), Y.abs().round()),
    "signs": (lambda x: dist.Bernoulli(logits=3 * x), (Y > 0).to(F64)),
    "outliers": (lambda x: dist.StudentT(3.0, x, 0.2), Y),
}
EQUATIONS = {
    "linear": SDE(lambda t, x: -0.7 * x, 0.8),
    "well": SDE(lambda t, x: 2 * (x - x**3), 0.8),
    "varying": SDE(lambda t, x: -0.7 * x, lambda t, x: 0.5 + 0.3 * torch.sigmoid(x)),
    "memory": SDE(lambda t, x: torch.sin(x), 0.8, TwoStates()),
}


def most_probable(sde, likelihood, batch=(), noise_space=True):
    law, y = LIKELIHOODS[likelihood]
    start = torch.linspace(-0.5, 0.5, 3, dtype=F64)[:, None] if batch else torch.zeros(1, dtype=F64)

    def log_likelihood(x):
        return law(x[..., SEEN, 0]).log_prob(y).sum(-1)

    def model():
        with pyro.plate("series", 3) if batch else nullcontext():
            x = sample_path("x", sde, start, TS, noise_space=noise_space)
            pyro.sample("y", law(x[..., SEEN, 0]).to_event(1), obs=y)

    site = "x_dw" if noise_space or sde.noise.num_states else "x"
    call = ModelCall(model, (), {})
    view = view_site(call.site(site, {})["fn"], "x")

    def quadratic(x):
        return call.likelihood(site, "x", {site, "x"}, {}, x)

    return view, fit_linearised(view, quadratic), log_likelihood


def log_joint(view, log_likelihood, e):
    x = integrate(view.fn.sde, view.x0, TS, e).x.movedim(0, -2)
    scale = view.scale.reshape(20, *(1,) * (e.ndim - 2), 1)
    return log_likelihood(x) - 0.5 * ((e / scale) ** 2).sum((0, -1))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("equation", EQUATIONS, ids=str)
def test_log_joint_is_flat_at_the_most_probable_path(equation, likelihood):
    view, best, log_likelihood = most_probable(EQUATIONS[equation], likelihood)
    e = best.increments.clone().requires_grad_()
    value = log_joint(view, log_likelihood, e)
    slope = torch.autograd.grad(value, e)[0] * view.scale
    # What a last Newton step would gain, in nats: the curvature in these units is about 1 or more.
    assert 0.5 * float((slope**2).sum()) < 0.01
    value = value.detach()
    for _ in range(5):
        other = best.increments + 0.1 * view.scale * torch.randn(20, 1, dtype=F64)
        assert float(log_joint(view, log_likelihood, other)) < float(value)
    assert float(value) >= float(log_joint(view, log_likelihood, torch.zeros(20, 1, dtype=F64)))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_series_don_t_disturb_each_other(likelihood):
    sde = EQUATIONS["well"]
    view, best, log_likelihood = most_probable(sde, likelihood, (3,))
    for i in range(3):
        e = best.increments[:, i].clone().requires_grad_()
        x = integrate(sde, view.x0[i], TS, e).x.movedim(0, -2)
        value = log_likelihood(x) - 0.5 * ((e / view.scale) ** 2).sum()
        slope = torch.autograd.grad(value, e)[0] * view.scale
        assert 0.5 * float((slope**2).sum()) < 0.01


@pytest.mark.parametrize("equation", ["linear", "well"])
def test_both_forms_have_one_law(equation):
    # With constant strength the two densities differ by a constant, so their most probable paths agree.
    noisy = most_probable(EQUATIONS[equation], "counts")[1]
    centred = most_probable(EQUATIONS[equation], "counts", noise_space=None)[1]
    torch.testing.assert_close(noisy.states, centred.states, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(noisy.posterior.law.gain, centred.posterior.law.gain, rtol=1e-5, atol=1e-6)


def test_feedback_follows_the_path_it_was_taken_around():
    view, best, _ = most_probable(EQUATIONS["well"], "counts")
    e, z = view.follow(linear_feedback(view, best.posterior, best.states))
    torch.testing.assert_close(z, best.states)
    torch.testing.assert_close(e, best.increments)


def test_a_path_that_explodes_is_told():
    """Noise with memory can't hold the path where it starts, as Brownian motion could, so there is nowhere to search from."""
    noise = MarkovNoise(0.7, 4, float(TS[-1] - TS[0]), float(TS[1] - TS[0]))

    def model():
        sde = SDE(lambda t, x: x**3 * 1e3, 0.8, noise)
        x = sample_path("x", sde, torch.full((1,), 9.0, dtype=F64), TS)
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=torch.zeros((), dtype=F64))

    with pytest.raises(NonFiniteError, match="can't be linearised"):
        AutoPathGuide(model)()
