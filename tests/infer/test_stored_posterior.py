"""A fitted posterior, a guide and a sampler that have run are the same after they were saved."""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import stochdyn as sd
from stochdyn.errors import UnavailableError

TS, Y = torch.linspace(0, 1, 6), torch.tensor([0.8, 0.7, 0.5, 0.5, 0.4])


@sd.run.storable
def model(ts: Tensor, y: Tensor) -> None:
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    sde = sd.SDE(lambda t, x: -rate[..., None] * x, 0.5)
    x = sd.infer.sample_path("x", sde, torch.ones(1), ts)
    pyro.sample("y", dist.Normal(x[..., 1:, 0], 0.1).to_event(1), obs=y)


@pytest.mark.parametrize("method", ["laplace", "nuts"])
def test_a_posterior_predicts_as_before(tmp_path: Path, method: str) -> None:
    chosen = sd.infer.NUTSMethod(warmup=5) if method == "nuts" else method
    posterior = sd.infer.fit_posterior(model, TS, Y, method=chosen, num_draws=120, progress=False)
    posterior.save(tmp_path)
    again = sd.load(tmp_path)
    assert torch.equal(again.predict().x, posterior.predict().x)
    later = torch.tensor([1.2, 1.5])
    assert torch.equal(again.forecast(later).x, posterior.forecast(later).x)
    assert repr(again) == repr(posterior)
    for group in ("posterior", "log_likelihood", "observed_data", "constant_data", "sample_stats"):
        assert again.idata[group].identical(posterior.idata[group])


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, sd.infer.AutoPathGuide])
def test_a_guide_draws_as_before(tmp_path: Path, kind: type) -> None:
    guide = kind(model)
    guide(TS, Y)
    sd.save(guide, tmp_path)
    again = sd.load(tmp_path)
    draws = []
    for own in (guide, again):
        pyro.set_rng_seed(0)
        draws.append(own(TS, Y))
    assert draws[0].keys() == draws[1].keys()
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])


def test_a_model_without_a_name_is_named(tmp_path: Path) -> None:
    def inner(ts: Tensor, y: Tensor) -> None:
        model(ts, y)

    posterior = sd.infer.fit_posterior(inner, TS, Y, method="laplace", num_draws=120, progress=False)
    with pytest.raises(
        UnavailableError, match=r"Posterior\.model can't be saved; got the function .*inner.*storable"
    ):
        posterior.save(tmp_path)
