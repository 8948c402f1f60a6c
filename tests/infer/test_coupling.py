"""Observations of several times at once: the feedback remembers what it needs, and the bound is the evidence."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from stochdyn import to_inference_data
from stochdyn.core import SDE, Scalar
from stochdyn.infer import AutoPathGuide, sample_path
from tests.infer.exact import F64, TwoStates, linear_path

TS = torch.linspace(0, 2, 21, dtype=F64)
N = 20
SD = 0.1


def averages():
    return torch.block_diag(*[torch.full((1, 5), 0.2)] * 4).to(F64)


def differences():
    m = torch.zeros(6, N, dtype=F64)
    for k in range(6):
        m[k, 3 * k], m[k, 3 * k + 2] = -1.0, 1.0
    return m


def overlapping():
    m = torch.zeros(4, N, dtype=F64)
    for k in range(4):
        m[k, 2 * k : 2 * k + 9] = torch.linspace(0.5, 1.5, 9, dtype=F64)
    return m


def mixed():
    m = averages()
    m[1] = 0.0
    m[1, 7] = 1.0  # one element sees one time alone
    return m


FUNCTIONALS = {"averages": averages, "differences": differences, "overlapping": overlapping, "mixed": mixed}


def evidence(functional, y, noise=None, start=None, also=None):
    """Return log p(y) for y = M x + noise, and values ``also`` at all times seen with a spread of their own."""
    a, g = torch.tensor([[-1.0]], dtype=F64), torch.tensor([[0.8]], dtype=F64)
    zero = torch.zeros(1, dtype=F64)
    law = linear_path(a, g, TS, zero, None if start is None else torch.tensor([[start]], dtype=F64), noise)
    factor = law.factor[1:, 0]
    rows, sds, values = functional @ factor, [SD] * len(functional), [y]
    if also is not None:
        rows, sds, values = torch.cat([rows, factor]), sds + [0.5] * N, [y, also]
    cov = rows @ rows.T + torch.diag(torch.tensor(sds, dtype=F64) ** 2)
    return dist.MultivariateNormal(torch.zeros(len(cov), dtype=F64), cov).log_prob(torch.cat(values))


def bounds(model, **options):
    guide = AutoPathGuide(model, hidden=(), **options)
    draws = to_inference_data(model, guide, num_draws=40)
    return torch.as_tensor(draws.sample_stats["log_weight"].values).flatten()


@pytest.mark.parametrize("feedback", ["recomputed", "fitted"])
@pytest.mark.parametrize("name", FUNCTIONALS, ids=str)
def test_the_bound_is_the_evidence_of_a_linear_model(name, feedback):
    functional = FUNCTIONALS[name]()
    y = torch.linspace(-0.5, 0.4, len(functional), dtype=F64)

    def model():
        x = sample_path("x", SDE(lambda t, x: -x, 0.8), torch.zeros(1, dtype=F64), TS)
        pyro.sample("y", dist.Normal(x[..., 1:, 0] @ functional.T, SD).to_event(1), obs=y)

    weights = bounds(model, feedback=feedback)
    exact = evidence(functional, y)
    torch.testing.assert_close(weights, exact.expand(40), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore::stochdyn.errors.StochdynWarning"
)  # a plate of windows takes one draw at a time
@pytest.mark.parametrize("case", ["memory", "random start", "noise space", "two sites", "masked", "plate"])
def test_whatever_else_the_model_has(case):
    functional = averages()
    y = torch.linspace(-0.5, 0.4, 4, dtype=F64)
    also = torch.linspace(0.2, -0.3, N, dtype=F64)
    noise = TwoStates() if case == "memory" else None
    zero = torch.zeros(1, dtype=F64)
    start = dist.Normal(zero, 0.7).to_event(1) if case == "random start" else zero
    seen = torch.tensor([True, False, True, True]) if case == "masked" else torch.ones(4, dtype=torch.bool)

    def model():
        space = True if case == "noise space" else None
        x = sample_path("x", SDE(lambda t, x: -x, 0.8, noise), start, TS, noise_space=space)
        m = x[..., 1:, 0] @ functional.T
        if case == "plate":
            with pyro.plate("windows", 4):
                pyro.sample("y", dist.Normal(m, SD), obs=y)
            return
        pyro.sample("y", dist.Normal(m, SD).mask(seen).to_event(1), obs=y)
        if case == "two sites":
            pyro.sample("z", dist.Normal(x[..., 1:, 0], 0.5).to_event(1), obs=also)

    exact = evidence(
        functional[seen],
        y[seen],
        noise,
        0.49 if case == "random start" else None,
        also if case == "two sites" else None,
    )
    weights = bounds(model, feedback="recomputed")
    torch.testing.assert_close(weights, exact.expand(40), rtol=0, atol=1e-6)


def test_series_of_a_plate_have_sums_of_their_own():
    functional = averages()
    y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)

    def model():
        with pyro.plate("series", 3):
            x = sample_path("x", SDE(lambda t, x: -x, 0.8), torch.zeros(1, dtype=F64), TS)
            pyro.sample("y", dist.Normal(x[..., 1:, 0] @ functional.T, SD).to_event(1), obs=y)

    exact = sum(evidence(functional, row) for row in y)
    torch.testing.assert_close(bounds(model, feedback="recomputed"), exact.expand(40), rtol=0, atol=1e-6)


def test_gradients_of_other_sites_pass_through_the_sums():
    functional = averages()
    y = torch.linspace(-0.5, 0.4, 4, dtype=F64)

    def model():
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
        sd = pyro.sample("sd", dist.LogNormal(torch.tensor(-2.0, dtype=F64), 0.5))
        sde = SDE(lambda t, x: -x, Scalar(scale))
        x = sample_path("x", sde, torch.zeros(1, dtype=F64), TS, noise_space=True)
        mean = x[..., 1:, 0] @ functional.T
        pyro.sample("y", dist.Normal(mean, sd[..., None]).to_event(1), obs=y)

    guide = AutoPathGuide(model, hidden=(), feedback="recomputed", rest=AutoMultivariateNormal)
    guide()
    site = f"_{guide.rest._pyro_name}_latent"

    def bound(u):
        with pyro.poutine.block():
            pyro.set_rng_seed(0)
            drawn = pyro.poutine.trace(pyro.poutine.condition(guide, {site: u})).get_trace()
            replayed = pyro.poutine.trace(pyro.poutine.replay(model, drawn)).get_trace()
            own = drawn.nodes[site]["fn"].log_prob(u)
            return replayed.log_prob_sum() - (drawn.log_prob_sum() - own)

    u = torch.tensor([0.1, -1.8], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(bound, (u,), rtol=1e-4, atol=1e-5, check_undefined_grad=False)
    unit = linear_path(
        torch.tensor([[-1.0]], dtype=F64), torch.ones(1, 1, dtype=F64), TS, torch.zeros(1, dtype=F64)
    ).factor[1:, 0]
    rows = functional @ unit

    def exact(u):
        cov = u[0].exp() ** 2 * rows @ rows.T + u[1].exp() ** 2 * torch.eye(4, dtype=F64)
        prior = dist.Normal(torch.tensor([0.0, -2.0], dtype=F64), torch.tensor([1.0, 0.5], dtype=F64))
        return dist.MultivariateNormal(torch.zeros(4, dtype=F64), cov).log_prob(y) + prior.log_prob(u).sum()

    torch.testing.assert_close(bound(u), exact(u), rtol=0, atol=1e-6)
    slope = torch.autograd.grad(exact(u), u)[0]
    torch.testing.assert_close(torch.autograd.grad(bound(u), u)[0], slope, rtol=1e-5, atol=1e-5)


def test_counts_of_a_whole_window_leave_good_weights():
    counts = torch.tensor([3.0, 9.0, 4.0, 1.0], dtype=F64)

    def model():
        x = sample_path("x", SDE(lambda t, x: -x, 0.8), torch.zeros(1, dtype=F64), TS)
        rate = x[..., 1:, 0].exp().unflatten(-1, (4, 5)).sum(-1)
        pyro.sample("n", dist.Poisson(rate).to_event(1), obs=counts)

    # The incidence is a sum of exponentials, so the expansion isn't exact; the weights say by how little.
    assert float(bounds(model, feedback="recomputed").std()) < 0.5
