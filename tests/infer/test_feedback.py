"""Feedback laws: their density is that of the increments they shape; their rate is its mean log-ratio."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from stochdyn.core import SDE, StateNetwork, integrate, time_column
from stochdyn.core.gaussian import LinearFeedback
from stochdyn.core.sde.solvers import full_state
from stochdyn.infer.feedback import Feedback
from tests.infer.exact import F64, TwoStates

TS = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.7], dtype=F64)
N = 4


def gains(batch, count, size):
    factor = torch.randn(N, *batch, count, count, dtype=F64) * 0.3
    factor = torch.tril(factor, -1) + torch.diag_embed(torch.rand(N, *batch, count, dtype=F64) + 0.5)
    return LinearFeedback(
        torch.randn(N, *batch, count, dtype=F64),
        torch.randn(N, *batch, count, size, dtype=F64) * 0.3,
        factor,
        torch.randn(N, *batch, size, dtype=F64),
    )


def network(size, count, context=0):
    return StateNetwork(size, count, (5,), context=context).double()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("batch", "sample"), [((), ()), ((2,), ()), ((), (5,)), ((2,), (5,)), ((2,), (5, 4))]
)
@pytest.mark.parametrize("net", [False, True])
def test_density_is_that_of_each_steps_gaussian(count, batch, sample, net):
    size = 2
    scale = torch.rand(N, count, dtype=F64) + 0.2
    g = gains(batch, count, size)
    context = torch.randn(N, *batch, 3, dtype=F64) if net else None
    width = torch.rand(size, dtype=F64) + 0.5
    feedback = Feedback(g, scale, network(size, count, 3) if net else None, width, context)
    e = torch.randn(N, *sample, *batch, count, dtype=F64)
    z = torch.randn(N, *sample, *batch, size, dtype=F64)
    want, rate = 0.0, 0.0
    for n in range(N):
        deviation = z[n] - g.centre[n]
        mean = g.offset[n] + (g.gain[n] @ deviation[..., None])[..., 0]
        if net:
            mean = mean + feedback.network(TS[n], deviation / width, context[n])
        tril = g.factor[n] * scale[n][:, None]
        law = MultivariateNormal(mean * scale[n], scale_tril=tril)
        prior = MultivariateNormal(torch.zeros(count, dtype=F64), torch.diag(scale[n] ** 2))
        want = want + law.log_prob(e[n])
        rate = rate + kl_divergence(law, prior)
    t = time_column(TS[:-1], z)
    torch.testing.assert_close(feedback.log_prob(e, z, t), want)
    torch.testing.assert_close(feedback.divergence_rate(z, t), rate)


@pytest.mark.parametrize("noise", [None, TwoStates()], ids=["none", "memory"])
def test_loop_and_all_steps_at_once_agree(noise):
    batch, sample = (2,), (5,)
    sde = SDE(lambda t, x: -x, torch.eye(2, dtype=F64) * 0.5, noise)
    size = 2 + (0 if noise is None else 4)
    scale = (TS[1:] - TS[:-1]).sqrt()[:, None].expand(N, 2)
    g = gains(batch, 2, size)
    feedback = Feedback(g, scale, network(size, 2))
    standard = torch.randn(N, *sample, *batch, 2, dtype=F64)
    column = scale[:, None, None]
    run = integrate(
        sde.with_control(feedback), torch.zeros(*sample, *batch, 2, dtype=F64), TS, standard * column
    )
    z = full_state(run.x, run.memory)
    mean = feedback.mean(time_column(TS[:-1], z[:-1]), z[:-1])
    spread = torch.einsum("nbij,nsbj->nsbi", g.factor, standard)
    again = integrate(sde, torch.zeros(*sample, *batch, 2, dtype=F64), TS, (mean + spread) * column)
    torch.testing.assert_close(full_state(again.x, again.memory), z)


def test_every_increment_is_shaped_not_only_the_brownian_ones():
    scale = torch.ones(N, 3, dtype=F64)
    g = gains((), 3, 1)
    shaped = Feedback(g, scale).shape_increment(0, TS[0], 0.1, g.centre[0], torch.zeros(3, dtype=F64), 1)
    torch.testing.assert_close(shaped, g.offset[0])
