"""fit_guide: stochastic variational inference in one call."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from stochdyn.errors import InvalidInputError, StochdynWarning
from stochdyn.infer import fit_guide


def model(y):
    rate = pyro.sample("rate", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("record", len(y)):
        pyro.sample("y", dist.Normal(rate, 1.0), obs=y)


Y = torch.tensor([1.0, 0.4, 0.7])


def test_the_posterior_of_a_conjugate_model_is_found():
    guide = AutoNormal(model)
    result = fit_guide(model, guide, (Y,), steps=600, lr=0.05, num_particles=16, progress=False)
    assert float(guide.median()["rate"].detach()) == pytest.approx(float(Y.sum()) / 4, abs=0.02)
    evidence = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(Y)
    assert -float(result.losses[-1]) == pytest.approx(float(evidence), abs=0.05)


def test_a_seed_repeats_the_run_and_leaves_the_random_state():
    pyro.clear_param_store()
    state = torch.get_rng_state()
    losses = []
    for _ in range(2):
        pyro.clear_param_store()
        losses.append(fit_guide(model, AutoNormal(model), (Y,), steps=5, seed=3, progress=False).losses)
    assert torch.equal(torch.as_tensor(losses[0]), torch.as_tensor(losses[1]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"), ({"num_particles": 0}, "num_particles")],
)
def test_bad_options_are_refused_by_name(options, name):
    with pytest.raises(InvalidInputError, match=name):
        fit_guide(model, AutoNormal(model), (Y,), **options)


@pytest.mark.parametrize("mixed", [True, False], ids=["mixes its draws", "fails on many draws"])
def test_a_model_of_one_draw_finds_the_posterior_of_its_own_model(mixed):
    """Eight draws would meet eight records, or nothing that they fit: neither is the model that was written."""
    y = torch.linspace(-1.0, 2.0, 2 if mixed else 3)

    def flat(y):
        rate = pyro.sample("rate", dist.Normal(torch.zeros(()), 1.0))
        loc = (
            rate[..., None, None].expand(*rate.shape, 1, len(y)) if mixed else rate.reshape(()).expand(len(y))
        )
        with pyro.plate("record", len(y)):
            pyro.sample("y", dist.Normal(loc.reshape(-1, len(y))[0] if rate.ndim == 0 else loc, 1.0), obs=y)

    guide = AutoNormal(flat)
    with pytest.warns(StochdynWarning, match="many draws at once"):
        fit_guide(flat, guide, (y,), steps=400, lr=0.05, progress=False)
    assert float(guide.median()["rate"].detach()) == pytest.approx(float(y.sum()) / (len(y) + 1), abs=0.05)
    assert float(guide.quantiles([0.84])["rate"][0].detach()) - float(guide.median()["rate"].detach()) == (
        pytest.approx((len(y) + 1) ** -0.5, rel=0.15)
    )
