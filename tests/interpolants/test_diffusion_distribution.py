"""A learned score as a Pyro distribution: density and draws of one law, shapes, plates and inference."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants import DiffusionDistribution, PotentialNetwork, ScoreMatching
from tests.interpolants.laws import F64, gaussian, processes


def law(steps: int = 100) -> tuple[DiffusionDistribution, torch.distributions.Normal]:
    """An exact model of a Gaussian, and its marginals at the start time."""
    process = processes()["ou"]
    truth = gaussian(process)
    phi = PotentialNetwork(process, 2, 4, 1, truth.means[0], 0.2).double()
    t = torch.tensor(process.start, dtype=F64)
    std = (process.scale(t) ** 2 * 0.2 + process.variance(t)).sqrt()
    normal = torch.distributions.Normal(process.location(t, truth.means[0]), std)
    return ScoreMatching(process, phi).generator().distribution(steps), normal


def test_density_and_draws_are_those_of_the_truth() -> None:
    made, normal = law()
    x = normal.sample((4, 3))
    torch.testing.assert_close(made.log_prob(x), normal.log_prob(x).sum(-1), rtol=0, atol=1e-3)
    torch.manual_seed(0)
    draws = made.sample((5000,))
    assert ((draws.mean(0) - normal.mean).abs() < 5 * normal.stddev / 5000**0.5).all()
    assert ((draws.var(0) / normal.variance - 1).abs() < 5 * (2 / 5000) ** 0.5).all()


def test_shapes_and_gradients() -> None:
    made, _ = law(5)
    assert made.event_shape == (2,)
    wide = made.expand((3,))
    assert wide.sample((4,)).shape == (4, 3, 2)
    assert wide.log_prob(torch.zeros(2, dtype=F64)).shape == (3,)
    network = made.model.source.network
    made.rsample((6,)).sum().backward()
    assert network.layers[-1].weight.grad.abs().sum() > 0


def test_as_a_prior_it_is_conjugate_to_noise() -> None:
    """A Gaussian prior and Gaussian noise: the log joint of the Pyro model is flat at the known posterior mean."""
    made, normal = law(30)
    y = torch.tensor([0.5, 0.5], dtype=F64)

    def model() -> None:
        x = pyro.sample("x", made)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    at = ((normal.mean / normal.variance + 4 * y) / (1 / normal.variance + 4)).requires_grad_()
    trace = poutine.trace(poutine.condition(model, {"x": at})).get_trace()
    (slope,) = torch.autograd.grad(trace.log_prob_sum(), at)
    assert slope.abs().max() < 1e-2 * (4 * (at - y)).abs().max()


def test_bad_input() -> None:
    made, _ = law(5)
    with pytest.raises(ShapeError):
        made.log_prob(torch.zeros(3, dtype=F64))
    with pytest.raises(InvalidInputError, match="steps"):
        made.model.distribution(0)
