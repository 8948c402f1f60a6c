"""Modules and Pyro models as families."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import stochdyn as sd
from stochdyn.bridges import LinearDrift, ModuleDrift, PyroDrift, as_family

NOW = torch.zeros(())


def model():
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    with pyro.plate("component", 2):
        mean = pyro.sample("mean", dist.Normal(1.0, 2.0))
    return lambda t, x: rate * (mean - x)


class Decay(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, t, x):
        return -self.rate * x


def test_values_drift_and_prior():
    family = PyroDrift(model, 2, init={"rate": torch.tensor(2.0), "mean": torch.tensor([0.0, 1.0])})
    assert torch.allclose(family(NOW, torch.ones(3, 2)), torch.tensor([-2.0, 0.0]).expand(3, 2), atol=1e-6)
    expected = dist.LogNormal(0.0, 0.5).log_prob(torch.tensor(2.0))
    expected = expected + dist.Normal(1.0, 2.0).log_prob(torch.tensor([0.0, 1.0])).sum()
    assert torch.allclose(family.log_prior(), expected, atol=1e-5)
    assert set(family.named_values()) == {"rate", "mean"}
    (family(NOW, torch.zeros(1, 2)).sum() + family.log_prior()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in family.parameters())


def test_constraints_hold_however_far_a_step_goes():
    family = PyroDrift(model, 2)
    with torch.no_grad():
        family.unconstrained["rate"].fill_(-30.0)
    assert family.named_values()["rate"] > 0


def test_linearisation_through_the_model():
    family = PyroDrift(model, 2)
    x = torch.randn(4, 2)
    value, jacobian = family.linearise(NOW, x)
    rate = family.named_values()["rate"]
    assert torch.allclose(jacobian, -rate * torch.eye(2).expand(4, 2, 2), atol=1e-6)
    assert torch.allclose(value, family(NOW, x))


def test_building_leaves_the_random_state_and_the_caller_s_trace_alone():
    state = torch.get_rng_state()
    family = PyroDrift(model, 2)
    assert torch.equal(torch.get_rng_state(), state)
    trace = pyro.poutine.trace(lambda: family(NOW, torch.ones(1, 2))).get_trace()
    assert not [n for n, node in trace.nodes.items() if node["type"] == "sample"]


def test_reset_draws_from_the_prior():
    family = PyroDrift(model, 2)
    rates = []
    for seed in range(200):
        family.reset(torch.Generator().manual_seed(seed))
        rates.append(family.named_values()["rate"].log())
    draws = torch.stack(rates)
    assert abs(draws.mean().item()) < 5 * 0.5 / 200**0.5
    assert abs(draws.std().item() / 0.5 - 1) < 5 * (0.5 / 200) ** 0.5


def test_what_becomes_which_family():
    assert isinstance(as_family(Decay(), 2), ModuleDrift)
    assert isinstance(as_family(model, 2), PyroDrift)
    family = LinearDrift(2)
    assert as_family(family, 2) is family
    assert as_family(Decay(), 3).named_values()["rate"] == 0.5


@pytest.mark.parametrize(
    ("drift", "error", "words"),
    [
        (LinearDrift(3), sd.errors.ShapeError, "dimension"),
        (lambda t, x: x, sd.errors.InvalidInputError, "family"),
        (3.0, sd.errors.InvalidInputError, "family"),
        (lambda: lambda t, x: x, sd.errors.InvalidInputError, "latent"),
    ],
)
def test_bad_input(drift, error, words):
    with pytest.raises(error, match=words):
        as_family(drift, 2)


def test_a_drift_of_the_wrong_shape():
    class Wrong(nn.Module):
        def forward(self, t, x):
            return x.sum(-1)

    with pytest.raises(sd.errors.ShapeError, match="wrong shape"):
        ModuleDrift(Wrong(), 2)

    def wrong():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        return lambda t, x: a * x[..., :1]

    with pytest.raises(sd.errors.ShapeError, match="wrong shape"):
        PyroDrift(wrong, 2)
    with pytest.raises(sd.errors.UnknownSiteError, match="nothing"):
        PyroDrift(model, 2, init={"nothing": torch.zeros(())})
