"""Linearisation is exact for linear models; the posterior is the law of the increments given the data."""

from __future__ import annotations

import pytest
import torch

from stochdyn.core import SDE, GaussianChain, step_everywhere
from stochdyn.core.gaussian import LinearSteps
from stochdyn.infer.linearise import Quadratic, linear_posterior, linear_steps
from tests.infer.exact import F64, TwoStates

TS = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.7, 1.0], dtype=F64)
N = 5
SCALE = (TS[1:] - TS[:-1]).sqrt()[:, None]


@pytest.mark.parametrize("noise", [None, TwoStates()], ids=["none", "memory"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_linear_steps_are_the_jacobians_of_the_step(noise, batch):
    def drift(t, x):
        return torch.stack([torch.sin(x[..., 1] + t[..., 0]), -(x[..., 0] ** 2)], -1)

    def strength(t, x):
        return 0.5 + 0.2 * torch.cos(x)

    sde = SDE(drift, strength, noise)
    size = 2 if noise is None else 6
    z = torch.randn(N, *batch, size, dtype=F64)
    e = torch.randn(N, *batch, 2, dtype=F64)
    steps = linear_steps(sde, TS, z, e, SCALE.expand(N, 2))
    a, b, c = steps.transition, steps.load, steps.offset
    after = step_everywhere(sde, TS, z, e)
    by_state, by_noise = torch.func.jacrev(lambda z, e: step_everywhere(sde, TS, z, e), (0, 1))(z, e)
    flat = batch[0] if batch else 1
    shaped = by_state.reshape(N, flat, size, N, flat, size)
    noisy = by_noise.reshape(N, flat, size, N, flat, 2)
    for n in range(N):
        for i in range(flat):
            torch.testing.assert_close(a.reshape(N, flat, size, size)[n, i], shaped[n, i, :, n, i])
            want = noisy[n, i, :, n, i] * SCALE[n]
            torch.testing.assert_close(b.reshape(N, flat, size, 2)[n, i], want)
    step = (a @ z[..., None] + b @ (e / SCALE.reshape(N, *(1,) * len(batch), 1))[..., None])[..., 0] + c
    torch.testing.assert_close(step, after)


def chain(batch=(), size=2, count=1):
    a = torch.randn(N, *batch, size, size, dtype=F64) * 0.6
    b = torch.randn(N, *batch, size, count, dtype=F64)
    c = torch.randn(N, *batch, size, dtype=F64)
    return a, b, c


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("size", "dim", "count"), [(1, 1, 1), (3, 2, 1), (3, 2, 2)])
def test_feedback_reproduces_the_smoother(batch, size, dim, count):
    a, b, c = chain(batch, size, count)
    y, sd = torch.randn(N + 1, *batch, dim, dtype=F64), 0.4
    seen = (torch.arange(N + 1) % 2 == 1).to(F64).reshape(-1, *(1,) * len(batch), 1)
    precision = torch.diag_embed((seen / sd**2).expand(N + 1, *batch, dim))
    data = Quadratic(precision, seen * y / sd**2)
    posterior = linear_posterior(LinearSteps(a, b, c), data).law
    start = torch.randn(*batch, size, dtype=F64)
    # Follow the feedback law forwards: means and covariances of the states under it.
    mean, cov = start, torch.zeros(*batch, size, size, dtype=F64)
    emission = torch.eye(size, dtype=F64)[:dim]
    zero = torch.zeros(*batch, size, size, dtype=F64)
    smooth = GaussianChain(start, zero, a, c, b @ b.mT).smooth(
        y, emission, torch.eye(dim, dtype=F64) * sd**2, (seen[..., 0] > 0).expand(N + 1, *batch)
    )
    for n in range(N):
        closed = a[n] + b[n] @ posterior.gain[n]
        kick = b[n] @ posterior.factor[n]
        mean = (closed @ mean[..., None] + b[n] @ posterior.offset[n][..., None])[..., 0] + c[n]
        cov = closed @ cov @ closed.mT + kick @ kick.mT
        torch.testing.assert_close(mean, smooth.mean[n + 1])
        torch.testing.assert_close(cov, smooth.cov[n + 1], rtol=1e-7, atol=1e-9)


def test_likelihood_of_the_start_is_that_of_all_data():
    a, b, c = chain((), 2, 1)
    y, sd = torch.randn(N + 1, 1, dtype=F64), 0.4
    precision = torch.zeros(N + 1, 1, 1, dtype=F64) + 1 / sd**2
    posterior = linear_posterior(LinearSteps(a, b, c), Quadratic(precision, y / sd**2))
    emission, noise = torch.eye(2, dtype=F64)[:1], torch.eye(1, dtype=F64) * sd**2

    def evidence(z0):
        return (
            GaussianChain(z0, torch.zeros(2, 2, dtype=F64), a, c, b @ b.mT)
            .filter(y, emission, noise)
            .log_evidence
        )

    z0 = torch.randn(2, dtype=F64)
    slope = torch.func.grad(evidence)(z0)
    curvature = torch.func.hessian(evidence)(z0)
    torch.testing.assert_close(-posterior.start_precision, curvature)
    torch.testing.assert_close(posterior.start_linear - posterior.start_precision @ z0, slope)


def test_no_data_leaves_the_prior():
    a, b, c = chain((), 2, 2)
    none = Quadratic(torch.zeros(N + 1, 2, 2, dtype=F64), torch.zeros(N + 1, 2, dtype=F64))
    posterior = linear_posterior(LinearSteps(a, b, c), none).law
    assert not bool(posterior.offset.any())
    assert not bool(posterior.gain.any())
    torch.testing.assert_close(posterior.factor, torch.eye(2, dtype=F64).expand(N, 2, 2))
