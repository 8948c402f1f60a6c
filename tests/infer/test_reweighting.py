"""Draws taken by their weights are the posterior's, and a law learns from its weights what it has cut off."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from stochdyn.infer import AutoHierarchicalNormal
from stochdyn.infer.reweighting import draw_weighted, learn_from_weights
from tests.infer.exact import F64


def model():
    pyro.sample("x", dist.Gamma(torch.tensor(3.0, dtype=F64), 1.0))


def guide_off_by_a_third():
    guide = AutoHierarchicalNormal(model, init_scale=0.35)
    guide()
    with torch.no_grad():
        guide.laws.group_0.loc.fill_(0.6)
    return guide


def test_draws_by_weight_have_the_moments_of_the_posterior():
    pyro.set_rng_seed(0)
    guide = AutoHierarchicalNormal(model, init_scale=0.8)
    taken = draw_weighted(model, guide, (), {}, 4000, 8000)
    x = taken.values["x"]
    assert taken.khat < 0.7
    assert x.shape == (4000,)
    # Mean 3 and variance 3 of the gamma law, within five errors of as many draws as the weights are worth.
    assert abs(float(x.mean()) - 3.0) < 5 * (3.0 / taken.ess) ** 0.5
    assert abs(float(x.var()) - 3.0) < 5 * (6.0 * 3.0 / taken.ess) ** 0.5 * 3.0**0.5
    assert abs(taken.log_evidence) < 0.1


def test_a_law_that_is_too_narrow_learns_its_tails():
    pyro.set_rng_seed(0)
    guide = guide_off_by_a_third()
    before = draw_weighted(model, guide, (), {}, 100, 2000)
    learn_from_weights(model, guide, guide, (), {})
    after = draw_weighted(model, guide, (), {}, 100, 2000)
    assert after.khat < before.khat
    assert after.ess > before.ess
