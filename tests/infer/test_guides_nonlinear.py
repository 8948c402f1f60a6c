"""AutoPathGuide on models without closed form, held against the exact evidence of a fine grid of states."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from stochdyn.core import SDE
from stochdyn.infer import AutoPathGuide, khat, sample_path
from tests.infer.exact import F64
from tests.infer.test_guides_exact import bounds

TS = torch.linspace(0, 3, 31, dtype=F64)
SEEN = torch.arange(3, 31, 3)
Y = torch.tensor([0.9, 1.1, 1.0, 0.8, 0.2, -0.9, -1.0, -1.2, -0.8, -1.0], dtype=F64)
COUNTS = torch.tensor([1.0, 2.0, 5.0, 9.0, 3.0, 1.0, 0.0, 0.0, 2.0, 4.0], dtype=F64)

CASES = {
    # name: drift, strength, likelihood, data, largest gap of the bound at the start and after training
    "counts": (lambda x: -0.8 * x, torch.ones_like, lambda x: dist.Poisson((1 + x).exp()), COUNTS, 0.2, 0.08),
    "signs": (
        lambda x: -0.8 * x,
        torch.ones_like,
        lambda x: dist.Bernoulli(logits=3 * x),
        (Y > 0).to(F64),
        0.3,
        0.1,
    ),
    "varying strength": (
        lambda x: -0.8 * x,
        lambda x: 0.4 + 0.3 * torch.sigmoid(3 * x),
        lambda x: dist.Normal(x, 0.2),
        Y,
        0.1,
        0.05,
    ),
    "double well": (
        lambda x: 2 * (x - x**3),
        lambda x: torch.full_like(x, 0.7),
        lambda x: dist.Normal(x, 0.3),
        Y,
        1.5,
        0.3,
    ),
    "outliers": (
        lambda x: -0.8 * x,
        torch.ones_like,
        lambda x: dist.StudentT(3.0, x, 0.2),
        2 * Y,
        2.0,
        0.6,
    ),
}


def build(case):
    drift, strength, likelihood, data, *_ = CASES[case]

    def model():
        sde = SDE(lambda t, x: drift(x), lambda t, x: strength(x))
        x = sample_path("x", sde, torch.zeros(1, dtype=F64), TS)
        pyro.sample("y", likelihood(x[..., SEEN, 0]).to_event(1), obs=data)

    return model


def evidence(case, size=801, reach=5.0):
    """Return the exact evidence of the Euler scheme, by a filter on a grid of states."""
    drift, strength, likelihood, data, *_ = CASES[case]
    grid = torch.linspace(-reach, reach, size, dtype=F64)
    width = (grid[1] - grid[0]).log()
    dt = float(TS[1] - TS[0])
    moves = torch.distributions.Normal(grid + drift(grid) * dt, strength(grid) * dt**0.5).log_prob(
        grid[:, None]
    )
    zero = torch.zeros(1, dtype=F64)
    first = torch.distributions.Normal(zero + drift(zero) * dt, strength(zero) * dt**0.5)
    weight = first.log_prob(grid)
    scores = likelihood(grid[:, None].expand(-1, len(SEEN))).log_prob(data)
    for n in range(1, len(TS)):
        if n > 1:
            weight = (moves + weight + width).logsumexp(-1)
        if n % 3 == 0:
            weight = weight + scores[:, n // 3 - 1]
    return float((weight + width).logsumexp(0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bound_starts_near_the_evidence(case):
    at_start = CASES[case][-2]
    model = build(case)
    got = bounds(model, AutoPathGuide(model, hidden=()), particles=2000)
    gap = evidence(case) - float(got.mean())
    assert -4.5 * float(got.std()) / 2000**0.5 < gap < at_start


SLOW = [pytest.param(c, marks=() if c == "counts" else pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("case", SLOW)
def test_training_brings_the_bound_nearer_to_the_evidence(case):
    exact, trained = evidence(case), CASES[case][-1]
    model = build(case)
    guide = AutoPathGuide(model, hidden=(8,))
    first = bounds(model, guide, particles=2000)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    steps = 60 if case == "counts" else 150
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.1 ** (1 / steps)}), elbo)
    for _ in range(steps):
        svi.step()
    last = bounds(model, guide, particles=2000)
    error = 4.5 * float(last.std()) / 2000**0.5
    gap = exact - float(last.mean())
    assert -error < gap < trained
    assert float(last.mean()) > float(first.mean())
    # The weights are exact, so their average estimates the evidence itself.
    weights = (last - exact).exp()
    assert abs(float(weights.mean()) - 1) < 4.5 * float(weights.std()) / 2000**0.5


@pytest.mark.parametrize("case", ["counts", "varying strength"])
def test_linearised_guide_has_good_weights(case):
    model = build(case)
    assert khat(model, AutoPathGuide(model, hidden=()), num_draws=2000) < 0.5


def test_a_wrong_guide_has_bad_weights():
    model = build("counts")
    guide = AutoPathGuide(model, hidden=())
    guide()
    with torch.no_grad():
        guide.sites.site_0.log_diagonal -= math.log(3.0)  # a third of the spread
    assert khat(model, guide, num_draws=2000) > 0.7
