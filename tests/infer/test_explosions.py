"""Models whose paths may explode: a guide starts where everything is finite, or says what is wrong."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import stochdyn as sd

TS = torch.linspace(0, 4, 21, dtype=torch.float64)
SEEN = slice(4, None, 4)


def double_well(
    steps: float = 1.0, start: str = "fixed", scale: float = 0.3, noise_space: bool | None = None
) -> None:
    """A double well whose Euler steps explode from afar: |1 + 4 dt (1 - x^2)| > 1."""
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=TS.dtype), 0.2))
    sde = sd.SDE(lambda t, x: 4 * rate[..., None] * (x - x**3), scale)
    origin = torch.zeros(1, dtype=TS.dtype)
    initial = origin if start == "fixed" else dist.Normal(origin, 5.0).to_event(1)
    x = sd.infer.sample_path("x", sde, initial, TS / steps, noise_space=noise_space)
    pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.2).to_event(1), obs=torch.ones(5, dtype=TS.dtype))


def predators(noise_space: bool | None = None) -> None:
    """Predators and prey whose path without noise spirals outwards in Euler steps, below zero and away."""

    def drift(t: Tensor, x: Tensor) -> Tensor:
        prey, predator = x.unbind(-1)
        return torch.stack([prey * (2 - predator), predator * (prey - 2)], -1)

    sde = sd.SDE(drift, lambda t, x: 0.3 * x)
    x = sd.infer.sample_path("x", sde, torch.ones(2, dtype=TS.dtype), TS, noise_space=noise_space)
    pyro.sample("y", dist.Poisson(x[..., SEEN, 0]).to_event(1), obs=torch.ones(5, dtype=TS.dtype))


def bound(model: Any, guide: Any) -> float:
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    return float(elbo.loss(model, guide))


@pytest.mark.parametrize("noise_space", [None, True])
@pytest.mark.parametrize("feedback", ["fitted", "recomputed"])
def test_a_path_without_noise_that_explodes_is_no_obstacle(feedback: str, noise_space: bool | None) -> None:
    """The search begins at a path that noise holds at its start, where the likelihood is finite."""
    pyro.set_rng_seed(0)

    def model() -> None:
        predators(noise_space)

    guide = sd.infer.AutoPathGuide(model, hidden=(), feedback=feedback)
    assert abs(bound(model, guide)) < 20
    assert all(bool(torch.isfinite(p).all()) for p in guide.parameters())


def test_a_prior_that_explodes_at_times_is_no_obstacle() -> None:
    """From a wide start most draws of the prior explode, and nobody needs them: the data hold the posterior."""
    pyro.set_rng_seed(3)

    def model() -> None:
        sde = sd.SDE(lambda t, x: 4 * (x - x**3), 0.3)
        initial = dist.Normal(torch.zeros(1, dtype=TS.dtype), 5.0).to_event(1)
        x = sd.infer.sample_path("x", sde, initial, TS)
        pyro.sample("offset", dist.Normal(torch.zeros((), dtype=TS.dtype), 1.0))
        pyro.sample("y", dist.Normal(x[..., 0], 0.1).to_event(1), obs=torch.ones(21, dtype=TS.dtype))

    with pyro.validation_enabled(False):
        draws = [pyro.poutine.trace(model).get_trace().nodes["x"]["value"] for _ in range(8)]
    assert sum(not bool(torch.isfinite(x).all()) for x in draws) > 2
    assert abs(bound(model, sd.infer.AutoPathGuide(model, hidden=()))) < 60


@pytest.mark.parametrize("noise_space", [None, True])
@pytest.mark.parametrize("options", [{}, {"feedback": "recomputed"}, {"start": "prior"}])
def test_draws_that_explode_are_an_error_with_a_remedy(options: Any, noise_space: bool | None) -> None:
    pyro.set_rng_seed(0)

    def model() -> None:
        double_well(start="wide", scale=3.0, noise_space=noise_space)

    guide = sd.infer.AutoPathGuide(model, hidden=(), **options)
    with pytest.raises(sd.errors.NonFiniteError, match="explode"):
        bound(model, guide)


def test_finer_steps_are_the_remedy() -> None:
    pyro.set_rng_seed(0)

    def model() -> None:
        double_well(steps=8.0)

    assert abs(bound(model, sd.infer.AutoPathGuide(model, hidden=()))) < 60


def test_positive_states_in_logarithms_need_no_remedy() -> None:
    """The same predators and prey in coordinates in which they can't go below zero."""
    pyro.set_rng_seed(0)

    def drift(t: Tensor, x: Tensor) -> Tensor:
        prey, predator = x.unbind(-1)
        return torch.stack([prey * (2 - predator), predator * (prey - 2)], -1)

    sde = sd.SDE(drift, lambda t, x: 0.3 * x).transformed("log")

    def model() -> None:
        z = sd.infer.sample_path("z", sde, torch.zeros(2, dtype=TS.dtype), TS)
        pyro.sample("y", dist.Poisson(z[..., SEEN, 0].exp()).to_event(1), obs=torch.ones(5, dtype=TS.dtype))

    guide = sd.infer.AutoPathGuide(model, hidden=(), start="prior")
    assert abs(bound(model, guide)) < 60
