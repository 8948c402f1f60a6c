"""Calibration of latent Ornstein-Uhlenbeck models: the truth ranks uniformly among posterior draws."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS

from stochdyn.core import SDE
from stochdyn.diagnostics import MCMCSampler, sbc
from stochdyn.infer import AutoPathGuide, khat, sample_path
from tests.infer.exact import F64

TS = torch.linspace(0, 1, 6, dtype=F64)
SEEN = torch.tensor([2, 5])
ONE = torch.ones(1, dtype=F64)
BLANK = torch.zeros(2, dtype=F64)


def latent_ou(y):
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    x = sample_path("x", SDE(lambda t, x: -rate[..., None] * x, 0.7), ONE, TS)
    pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.3).to_event(1), obs=y)


def known_ou(y):
    start = dist.Normal(0 * ONE, 0.5).to_event(1)
    x = sample_path("x", SDE(lambda t, x: -x, 0.7), start, TS)
    pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.3).to_event(1), obs=y)


def drawn_by(narrow):
    """Return a sampler that draws from a guide, with the spread of the increments scaled."""

    def draw(model, args, kwargs, num_draws):
        with pyro.get_param_store().scope(), torch.no_grad():
            guide = AutoPathGuide(model, hidden=())
            guide(*args, **kwargs)
            guide.sites.site_0.log_diagonal += torch.tensor(narrow).log()
            guide.sites.site_0.start_log_diagonal += torch.tensor(narrow).log()
            with pyro.plate("draws", num_draws):
                return {"x": guide(*args, **kwargs)["x"]}

    return draw


def test_linearised_guide_of_a_linear_model_is_calibrated():
    result = sbc(known_ou, drawn_by(1.0), (BLANK,), num_simulations=50, num_draws=19, parameters=["x"])
    # two quantities, each uniform by a test of level 0.001
    assert result.pvalue() > 0.001


def test_narrow_guide_is_found_out():
    result = sbc(known_ou, drawn_by(0.3), (BLANK,), num_simulations=50, num_draws=19, parameters=["x"])
    assert result.pvalue() < 1e-4
    y = torch.tensor([0.5, -0.2], dtype=F64)
    guide = AutoPathGuide(known_ou, hidden=())
    assert khat(known_ou, guide, (y,), num_draws=2000) < 0.5
    with torch.no_grad():
        guide.sites.site_0.log_diagonal += torch.tensor(0.3).log()
    assert khat(known_ou, guide, (y,), num_draws=2000) > 0.7


@pytest.mark.slow
def test_nuts_on_a_latent_path_and_its_rate_is_calibrated():
    sampler = MCMCSampler(NUTS, warmup=80, thinning=4, options={"max_tree_depth": 5})
    result = sbc(latent_ou, sampler, (BLANK,), num_simulations=60, num_draws=19, parameters=["rate", "x"])
    assert result.pvalue() > 0.001
