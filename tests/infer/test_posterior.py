"""Posterior laws of paths: their density is that of what they draw, in both forms."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

from stochdyn.core import SDE, increment_scale
from stochdyn.core.gaussian import LinearFeedback
from stochdyn.infer import DiffusionPath, PathIncrements
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.linearise import Quadratic, linear_posterior, linear_steps
from stochdyn.infer.posterior import IncrementPosterior, PathPosterior
from stochdyn.infer.start import StartPosterior
from tests.infer.exact import F64, TwoStates, linear_path

TS = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.7], dtype=F64)
N = 4
START = torch.tensor([0.5, -1.0], dtype=F64)
A = torch.tensor([[-0.7, 0.3], [-0.2, -1.0]], dtype=F64)
G = torch.tensor([[0.6, 0.2], [0.0, 0.4]], dtype=F64)
LINEAR = SDE(lambda t, x: x @ A.T, G)
CURVED = SDE(lambda t, x: x - x**3, lambda t, x: 0.5 + 0.2 * torch.cos(x))
ESTIMATORS = ("stl", "rate", "density")


def gains(sde, size=2, spread=0.3):
    scale = increment_scale(sde, TS, 2, F64)
    factor = torch.tril(torch.randn(N, 2, 2, dtype=F64) * spread, -1)
    factor = factor + torch.diag_embed(1 + spread * torch.rand(N, 2, dtype=F64))
    return Feedback(
        LinearFeedback(
            torch.randn(N, 2, dtype=F64) * spread,
            torch.randn(N, 2, size, dtype=F64) * spread,
            factor,
            torch.zeros(N, size, dtype=F64),
        ),
        scale,
    )


def path_posterior(sde, estimator="stl", spread=0.3, start=None):
    initial = START if start is None else dist.MultivariateNormal(start.loc, scale_tril=start.scale_tril)
    return PathPosterior(DiffusionPath(sde, initial, TS), gains(sde, spread=spread), estimator, start)


def increment_posterior(sde, estimator="stl", spread=0.3):
    size = 2 + 2 * sde.noise.num_states
    return IncrementPosterior(PathIncrements(sde, START, TS), gains(sde, size, spread), estimator)


def laws():
    memory = SDE(lambda t, x: x @ A.T, G, TwoStates())
    start = StartPosterior(START, torch.linalg.cholesky(torch.eye(2, dtype=F64) + 0.2))
    return {
        "path": path_posterior(LINEAR),
        "curved path": path_posterior(CURVED),
        "path from a random start": path_posterior(CURVED, start=start),
        "increments": increment_posterior(CURVED),
        "increments with memory": increment_posterior(memory),
    }


@pytest.mark.parametrize("name", laws(), ids=str)
class TestEveryLaw:
    def test_density_of_a_draw_is_that_of_the_value(self, name):
        law = laws()[name]
        x = law.rsample((5,))
        torch.testing.assert_close(law.log_prob(x), law.log_prob(x.clone()), rtol=1e-9, atol=1e-9)
        assert law.log_prob(x).shape == (5,)

    def test_shapes(self, name):
        law = laws()[name]
        events = law.event_shape
        wide = law.expand([3])
        x = wide.rsample((5,))
        assert x.shape == (5, 3, *events)
        assert wide.log_prob(x).shape == (5, 3)
        assert len(torch.unique(x[..., -1, 0])) == 15

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_every_estimator_reports_the_density(self, name, estimator):
        law = laws()[name]
        law.estimator = estimator
        x = law.rsample((5,))
        parts = law.score_parts(x)
        assert torch.equal(parts.log_prob, law.log_prob(x))
        assert parts.score_function == 0
        if estimator != "rate":
            torch.testing.assert_close(parts.entropy_term, parts.log_prob)
        else:
            # The rate has the same mean alone.
            n = 4000
            x = law.rsample((n,))
            parts = law.score_parts(x)
            gap = (parts.entropy_term - parts.log_prob).detach()
            assert float(gap.std()) > 0.1
            assert abs(float(gap.mean())) < 4.5 * float(gap.std()) / n**0.5


def test_without_feedback_it_is_the_prior():
    path = path_posterior(CURVED, spread=0.0)
    x = path.rsample((5,))
    torch.testing.assert_close(path.log_prob(x), path.prior.log_prob(x))
    increments = increment_posterior(CURVED, spread=0.0)
    e = increments.rsample((5,))
    prior = PathIncrements(CURVED, START, TS)
    torch.testing.assert_close(increments.log_prob(e), prior.log_prob(e))


def test_linear_feedback_on_a_linear_equation_is_a_dense_gaussian():
    law = path_posterior(LINEAR)
    g, scale = law.feedback.law, law.feedback.scale
    # x' = x + A x dt + G D (k + K x + L u), D the standard deviations of the increments
    mean, rows = START, torch.zeros(2, 2 * N, dtype=F64)
    means, factors = [], []
    for n in range(N):
        dt = TS[n + 1] - TS[n]
        lift = G * scale[n]
        closed = torch.eye(2, dtype=F64) + A * dt + lift @ g.gain[n]
        mean = closed @ mean + lift @ g.offset[n]
        rows = closed @ rows
        rows[:, 2 * n : 2 * n + 2] += lift @ g.factor[n]
        means.append(mean)
        factors.append(rows)
    flat = torch.stack(factors).flatten(0, 1)
    dense = MultivariateNormal(torch.stack(means).flatten(), flat @ flat.T)
    x = law.rsample((5,))
    torch.testing.assert_close(law.log_prob(x), dense.log_prob(x[:, 1:].flatten(1)))
    n = 4000
    x = law.rsample((n,))[:, 1:].flatten(1)
    sd = dense.stddev
    assert bool(((x.mean(0) - dense.mean).abs() <= 4.5 * sd / n**0.5).all())
    assert bool(((x.var(0) - sd**2).abs() <= 4.5 * sd**2 * (2 / n) ** 0.5).all())


def test_support_is_that_of_the_path():
    law = path_posterior(LINEAR)
    assert bool(law.support.check(law.rsample((3,))).all())


def test_sticking_the_landing_has_no_noise_at_the_posterior():
    """Feedback that is the exact posterior, with free parameters: every single gradient vanishes."""
    scale = increment_scale(LINEAR, TS, 2, F64)
    zero = torch.zeros(N, 2, dtype=F64)
    steps = linear_steps(LINEAR, TS, zero, zero, scale)
    y = torch.randn(N + 1, 2, dtype=F64)
    data = Quadratic(torch.eye(2, dtype=F64).expand(N + 1, 2, 2) / 0.01, y / 0.01)
    exact = linear_posterior(steps, data).law
    leaves = [v.clone().requires_grad_() for v in (exact.offset, exact.gain, exact.factor)]
    feedback = Feedback(LinearFeedback(*leaves, zero), scale)
    prior = DiffusionPath(LINEAR, START, TS)
    sizes = {}
    for estimator in ESTIMATORS:
        law = PathPosterior(prior, feedback, estimator, None)
        x = law.rsample((50,))
        joint = prior.log_prob(x) + dist.Normal(x, 0.1).to_event(2).log_prob(y)
        gradients = torch.autograd.grad((joint - law.score_parts(x).entropy_term).mean(), leaves)
        sizes[estimator] = max(float(g.abs().max()) for g in gradients)
        # The bound itself is the evidence, for every draw.
        bound = joint - law.log_prob(x)
        path = linear_path(A, G, TS, START)
        mean = path.mean.flatten()
        flat = path.factor.flatten(0, 1)
        evidence = MultivariateNormal(mean, flat @ flat.T + 0.01 * torch.eye(10, dtype=F64)).log_prob(
            y.flatten()
        )
        torch.testing.assert_close(bound, evidence.expand(50), rtol=1e-8, atol=1e-8)
    assert sizes["stl"] < 1e-8
    assert min(sizes["rate"], sizes["density"]) > 0.01
