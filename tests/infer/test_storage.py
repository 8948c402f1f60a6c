"""Guides in one session, copied, stored and loaded: each has parameters of its own and keeps them."""

from __future__ import annotations

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from stochdyn.core import SDE
from stochdyn.infer import AutoPathGuide, AutoSkewedNormal, sample_path
from tests.infer.exact import F64

TS = torch.linspace(0, 1, 11, dtype=F64)
Y = torch.full((10,), 1.3, dtype=F64)


def model(y):
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    x = sample_path("x", SDE(lambda t, x: -rate[..., None] * x, 1.0), torch.zeros(1, dtype=F64), TS)
    pyro.sample("y", dist.Normal(x[..., 1:, 0].exp(), 0.2).to_event(1), obs=y)


def small(y):
    pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    pyro.factor("y", y.sum() * 0)


MAKERS = {
    "free": lambda: AutoPathGuide(model, hidden=(), start="prior"),
    "network": lambda: AutoPathGuide(model, hidden=(4,)),
    "recomputed": lambda: AutoPathGuide(model, hidden=(), feedback="recomputed"),
    "amortised": lambda: AutoPathGuide(model, hidden=(4,), amortised=True, context=3),
}


def train(guide, steps=60, lr=0.05):
    pyro.set_rng_seed(0)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo)
    return [svi.step(Y) for _ in range(steps)]


def draws(guide):
    pyro.set_rng_seed(1)
    with torch.no_grad(), pyro.plate("draws", 3):
        return guide(Y)["x"]


@pytest.mark.parametrize("kind", MAKERS, ids=str)
def test_a_second_guide_of_a_session_learns_as_the_first_did(kind):
    losses = []
    for _ in range(3):
        pyro.set_rng_seed(3)
        losses.append(train(MAKERS[kind](), 12))
    assert losses[0] == losses[1] == losses[2]


def test_two_guides_that_take_turns_do_not_disturb_each_other():
    pyro.set_rng_seed(3)
    alone = train(MAKERS["free"](), 8)
    pyro.set_rng_seed(3)
    guide, other = MAKERS["free"](), MAKERS["network"]()
    train(other, 1)
    got = train(guide, 8)
    train(other, 2)
    assert got == alone


@pytest.mark.parametrize("kind", MAKERS, ids=str)
def test_a_copy_predicts_alike_and_learns_for_itself(kind):
    guide = MAKERS[kind]()
    train(guide, 3)
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    twin = copy.deepcopy(guide)
    assert torch.equal(draws(twin), draws(guide))
    train(twin, 3)
    for name, value in guide.named_parameters():
        assert torch.equal(value, before[name])
    changed = [not torch.equal(p, before[n]) for n, p in twin.named_parameters()]
    assert any(changed)
    assert torch.isfinite(torch.tensor(train(guide, 2))).all()


@pytest.mark.parametrize("kind", MAKERS, ids=str)
def test_pickled_and_loaded(kind):
    guide = AutoPathGuide(model, **{"hidden": (), **{"recomputed": {"feedback": "recomputed"}}.get(kind, {})})
    train(guide, 3)
    again = pickle.loads(pickle.dumps(guide))
    assert torch.equal(draws(again), draws(guide))


@pytest.mark.parametrize("called", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize("kind", MAKERS, ids=str)
def test_a_state_dict_may_come_before_the_first_call(kind, called):
    guide = MAKERS[kind]()
    train(guide, 5)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = MAKERS[kind]()
    if called:
        fresh(Y)
    fresh.load_state_dict(torch.load(file))
    fresh(Y)  # the first call sets a guide up, with random numbers of its own
    assert torch.equal(draws(fresh), draws(guide))
    for (_, a), (_, b) in zip(guide.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b


def test_a_second_skewed_guide_starts_afresh():
    first = AutoSkewedNormal(small)
    first(Y)
    with torch.no_grad():
        first.loc += 5.0
    first(Y)
    second = AutoSkewedNormal(small)
    second(Y)
    assert abs(float(second.loc.detach())) < 2
    twin = copy.deepcopy(first)
    with torch.no_grad():
        twin.loc += 1.0
    twin(Y)
    assert float(first.loc.detach()) == pytest.approx(float(twin.loc.detach()) - 1.0)


def test_starting_at_the_mode_leaves_other_guides_alone():
    from pyro.infer.autoguide import AutoLaplaceApproximation

    mine = AutoLaplaceApproximation(small)
    mine(Y)
    with torch.no_grad():
        mine.loc += 3.0
    before = float(mine.loc.detach())
    AutoSkewedNormal(small).start_at_mode(Y, steps=5)
    mine(Y)
    assert float(mine.loc.detach()) == before


@pytest.mark.parametrize("unit", [1e-9, 1e9])
@pytest.mark.parametrize("kind", ["network", "recomputed", "amortised"])
def test_lengths_in_other_units_change_no_weight(kind, unit):
    options = {
        "network": {"hidden": (4,)},
        "recomputed": {"hidden": (), "feedback": "recomputed"},
        "amortised": {"hidden": (4,), "amortised": True, "context": 3},
    }[kind]
    found = []
    for scale in (1.0, unit):

        def scaled(scale=scale):
            start = torch.zeros(1, dtype=F64)
            x = sample_path("x", SDE(lambda t, x: -x, 0.5 * scale), start, TS)
            pyro.sample("y", dist.Normal(x[..., 2::2, 0], 0.3 * scale).to_event(1), obs=scale * Y[:5])

        pyro.set_rng_seed(0)
        guide = AutoPathGuide(scaled, **options)
        guide()
        with torch.no_grad():  # away from the start of training, where the network says nothing
            generator = torch.Generator().manual_seed(0)
            for parameter in guide.parameters():
                if kind != "network" or parameter.shape[-1] == 4:
                    parameter += 0.1 * torch.randn(
                        parameter.shape, generator=generator, dtype=parameter.dtype
                    )
        pyro.set_rng_seed(1)
        trace = pyro.poutine.trace(guide).get_trace()
        model = pyro.poutine.trace(pyro.poutine.replay(scaled, trace)).get_trace()
        found.append(
            float((model.log_prob_sum() - trace.log_prob_sum()).detach())
            + 5 * float(torch.tensor(scale, dtype=F64).log())
        )
    assert found[1] == pytest.approx(found[0], abs=1e-6)
