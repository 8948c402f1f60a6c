"""Random starts: one Gaussian vector for the first point and the past of the noise."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from stochdyn.errors import NonFiniteError
from stochdyn.infer.laplace import _maximise
from stochdyn.infer.start import GaussianStart, StartPosterior, StartPrior, StickingStart, is_unconstrained
from tests.infer.exact import F64

MEAN = torch.tensor([0.5, -1.0], dtype=F64)
COV = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64)
FACTOR = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.4, 0.3]], dtype=F64)
X0 = torch.tensor([2.0, 3.0], dtype=F64)


def prior(law, past):
    return StartPrior.of(law, X0, FACTOR if past else None, 2, torch.Size())


def test_nothing_random_is_no_prior():
    assert prior(None, False) is None


@pytest.mark.parametrize(
    ("law", "past"),
    [
        (None, True),
        (dist.MultivariateNormal(MEAN, COV), False),
        (dist.MultivariateNormal(MEAN, COV), True),
        (dist.Normal(MEAN, 0.7).to_event(1), False),
        (dist.Normal(MEAN, 0.7).to_event(1), True),
    ],
)
def test_posterior_is_that_of_the_dense_gaussian(law, past):
    start = prior(law, past)
    size = 2 + 2 * 3
    root = torch.randn(size, size, dtype=F64)
    precision, linear = root @ root.T, torch.randn(size, dtype=F64)
    if not past:
        # Memory that starts at rest takes no part.
        precision, linear = precision[:2, :2], linear[:2]

    def log_joint(s):
        x0, memory = start.states(s)
        z = torch.cat([x0, memory.flatten()]) if past else x0
        state, normals = start.split(s)
        value = -0.5 * z @ precision @ z + linear @ z
        if state is not None:
            excess = state - law.mean
            cov = COV if isinstance(law, dist.MultivariateNormal) else torch.diag(law.variance)
            value = value - 0.5 * excess @ torch.linalg.inv(cov) @ excess
        if normals is not None:
            value = value - 0.5 * (normals**2).sum()
        return value

    mean, factor = start.posterior(precision, linear)
    curvature = torch.func.hessian(log_joint)(mean)
    assert float(torch.func.grad(log_joint)(mean).abs().max()) < 1e-9
    torch.testing.assert_close(torch.linalg.inv(factor @ factor.T), -curvature)


def test_memory_that_starts_at_rest_is_skipped():
    start = prior(dist.MultivariateNormal(MEAN, COV), False)
    root = torch.randn(8, 8, dtype=F64)
    whole, linear = root @ root.T, torch.randn(8, dtype=F64)
    torch.testing.assert_close(start.posterior(whole, linear), start.posterior(whole[:2, :2], linear[:2]))


def test_states_and_parts_of_a_start():
    start = prior(dist.MultivariateNormal(MEAN, COV), True)
    value = torch.randn(5, 6, dtype=F64)
    state, past = start.split(value)
    assert (start.state_dim, state.shape, past.shape) == (2, (5, 2), (5, 2, 2))
    x0, memory = start.states(value)
    assert torch.equal(x0, value[:, :2])
    torch.testing.assert_close(memory[:, 1], value[:, 4:] @ FACTOR)
    fixed = prior(None, True).states(value[:, 2:])
    assert torch.equal(fixed[0], X0)


@pytest.mark.parametrize(
    ("law", "precision"),
    [
        (dist.StudentT(torch.tensor(5.0, dtype=F64), MEAN, 1.0).to_event(1), 0.6),
        (dist.Cauchy(MEAN, 1.0).to_event(1), 1.0),
    ],
)
def test_precision_of_other_laws_is_by_second_moments(law, precision):
    start = prior(law, False)
    torch.testing.assert_close(start.precision, torch.eye(2, dtype=F64) * precision)
    assert bool(torch.isfinite(start.mean).all())


@pytest.mark.parametrize(
    ("law", "free"),
    [
        (dist.Normal(MEAN, 1.0).to_event(1), True),
        (dist.MultivariateNormal(MEAN, COV), True),
        (dist.Normal(MEAN, 1.0).expand([3, 2]).to_event(2), True),
        (dist.LogNormal(MEAN, 1.0).to_event(1), False),
        (dist.Beta(COV, COV).to_event(1), False),
    ],
)
def test_constrained_starts_are_told_from_free_ones(law, free):
    assert is_unconstrained(law) is free


def test_draws_follow_batch_and_sample_shapes():
    law = StartPosterior(MEAN, torch.linalg.cholesky(COV))
    assert law.draw(torch.Size((5,)), torch.Size((3,))).shape == (5, 3, 2)
    x = law.draw(torch.Size((4000,)), torch.Size())
    # two variances and one covariance at 4.5 standard errors
    error = ((COV**2 + COV.diagonal()[:, None] * COV.diagonal()) / 4000).sqrt()
    assert bool(((x - MEAN).T @ (x - MEAN) / 4000 - COV).abs().le(4.5 * error).all())


def test_sticking_start_reports_the_density_and_lets_go_of_its_parameters():
    loc = MEAN.clone().requires_grad_()
    tril = torch.linalg.cholesky(COV).requires_grad_()
    law = StickingStart(loc, scale_tril=tril).expand([3])
    plain = GaussianStart(loc, scale_tril=tril).expand([3])
    x = law.rsample()
    parts = law.score_parts(x)
    assert torch.equal(parts.log_prob, plain.log_prob(x))
    torch.testing.assert_close(parts.entropy_term, parts.log_prob)
    # The gap to the target vanishes at the optimum, and so does every single gradient.
    target = dist.MultivariateNormal(MEAN, COV).log_prob(x)
    gradients = torch.autograd.grad((target - parts.entropy_term).sum(), (loc, tril), retain_graph=True)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    noisy = torch.autograd.grad((target - plain.score_parts(x).entropy_term).sum(), (loc, tril))
    assert max(float(g.abs().max()) for g in noisy) > 0.1


@pytest.mark.parametrize("wall", ["error", "infinity"])
def test_a_search_stays_before_where_the_bound_ends(wall: str) -> None:
    """As where a rate overflows: a step too far is taken back, and doesn't end the fit."""
    beyond = 0

    def bound(u: Tensor) -> Tensor:
        nonlocal beyond
        if float(u.detach().sum()) > 1:
            beyond += 1
            if wall == "error":
                raise NonFiniteError("drift_matrix must be finite")
            return u.sum() * -torch.inf
        return (u - u.exp()).sum()

    found = _maximise(bound, torch.full((1,), -6.0, dtype=torch.float64), 100)
    assert beyond
    assert abs(float(found)) < 1e-3
