"""Without a step of the user's, sites and filters take steps that resolve the equation between the times of data."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.core import AffineField
from stochdyn.errors import ApproximationWarning, InvalidInputError
from stochdyn.infer import LinearObservations, NonlinearObservations, ParticleObservations, particle_filter
from tests.core.laws import ExactMemory

F64 = torch.float64
ONE = torch.ones(1, dtype=F64)
TIMES = torch.arange(1, 13, dtype=F64) * 0.5


def swing(t: Tensor, x: Tensor) -> Tensor:
    return torch.stack([x[..., 1], -x[..., 0].sin()], -1)


MODELS: dict[str, tuple[sd.SDE, Tensor]] = {
    "relaxation": (sd.SDE(lambda t, x: -2 * x, 0.5), ONE),
    "two wells": (sd.SDE(lambda t, x: x - x**3, 0.5), ONE),
    "noise in proportion": (sd.SDE(lambda t, x: 0.3 * x, lambda t, x: 0.3 * x), ONE),
    "noise on the velocity alone": (
        sd.SDE(swing, torch.tensor([[0.0], [0.5]], dtype=F64)),
        torch.tensor([1.0, 0.0], dtype=F64),
    ),
}


def site(sde: sd.SDE, start: Any, times: Any = TIMES, **options: Any) -> NonlinearObservations:
    return NonlinearObservations(sde, start, times, lambda x: x[..., :1], 0.1, **options)


@pytest.mark.parametrize("name", MODELS)
def test_shorter_steps_move_the_evidence_by_no_more_than_is_said(name: str) -> None:
    """By 0.1 nats where the data come from the model: so is the standard deviation of what halving the steps changes.

    Mean squares of 64 data sets stay below twice the bound but for one time in a million.
    """
    sde, start = MODELS[name]
    chosen = site(sde, start)
    torch.manual_seed(0)
    y = chosen.sample((64,))
    halved = NonlinearObservations(sde, start, TIMES, lambda x: x[..., :1], 0.1, dt=math.inf)
    grid = chosen.seen.stops
    object.__setattr__(halved.seen, "stops", grid.divided([2] * (grid.ts.shape[-1] - 1)))
    whole = site(sde, start, dt=math.inf)
    change = chosen.log_prob(y) - halved.log_prob(y)
    assert float(change.square().mean().sqrt()) < 0.1 * 2**0.5
    assert float((whole.log_prob(y) - chosen.log_prob(y)).abs().mean()) > 0.5


def test_a_linear_equation_has_the_evidence_of_continuous_time() -> None:
    a = torch.tensor([[-1.0, 2.0], [-2.0, -0.5]], dtype=F64)
    law = sd.LinearGaussianMeasure(
        a, torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), torch.ones(2, dtype=F64)
    )
    torch.manual_seed(0)
    emission = torch.eye(2, dtype=F64)[:1]
    exact = LinearObservations(law, TIMES, 0.1, emission)
    y = exact.sample((64,))
    found = site(sd.SDE(lambda t, x: x @ a.mT, 1.0), torch.ones(2, dtype=F64)).log_prob(y)
    # twice as far from the limit as from half the steps
    assert float((found - exact.log_prob(y)).square().mean().sqrt()) < 0.2 * 2**0.5


def test_what_needs_no_steps_takes_none() -> None:
    still = site(sd.SDE(lambda t, x: 0 * x, 0.5), ONE)
    slow = site(sd.SDE(lambda t, x: -1e-3 * x, 0.5), ONE)
    assert still.seen.stops.counts == slow.seen.stops.counts == (1,) * 12


def test_a_pulse_between_two_times_is_seen() -> None:
    pulse = sd.SDE(lambda t, x: 3 * ((t > 0.4) & (t < 0.5)) + 0 * x, 0.1)
    mean = site(pulse, ONE, [1.0]).filter(torch.full((1, 1), math.nan, dtype=F64)).mean
    assert abs(float(mean) - 1.3) < 0.1


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_steps_know_no_units(unit: float) -> None:
    def counts(length: float, clock: float) -> tuple[int, ...]:
        sde = sd.SDE(lambda t, x: (x - x**3 / length**2) / clock, 0.5 * length / clock**0.5)
        return site(sde, ONE * length, TIMES * clock).seen.stops.counts

    known = counts(1.0, 1.0)
    assert max(known) > 4
    for found in (counts(unit, 1.0), counts(1.0, unit)):
        assert all(abs(a - b) <= 1 for a, b in zip(found, known, strict=True))


def filters(sde: sd.SDE, start: Tensor, times: Tensor, y: Tensor, method: str) -> Tensor:
    likelihood = sd.infer.StateLikelihood(lambda x: dist.Normal(x, 0.3).to_event(1), y)
    return particle_filter(sde, start, times, likelihood, 500, method=method, generator=0).log_evidence


def test_particles_take_the_steps_that_kalman_filters_take() -> None:
    sde, start = MODELS["two wells"]
    particles = ParticleObservations(sde, start, TIMES, lambda x: dist.Normal(x, 0.3).to_event(1))
    assert torch.equal(particles.seen.stops.ts, site(sde, start).seen.stops.ts)
    linear = sd.SDE(lambda t, x: -2 * x, 0.5)
    law = sd.LinearGaussianMeasure.ornstein_uhlenbeck(rate=2.0, diffusion=0.5, initial_mean=ONE)
    exact = LinearObservations(law, TIMES, 0.3)
    torch.manual_seed(1)
    y = exact.sample()
    # guided particles are exact for a linear equation, so that steps alone are off
    assert abs(float(filters(linear, ONE, TIMES, y, "guided") - exact.log_prob(y))) < 0.4
    grid = NonlinearObservations(linear, ONE, TIMES, lambda x: x, 0.3)
    torch.testing.assert_close(filters(linear, ONE, TIMES, y, "guided"), grid.log_prob(y))


@pytest.mark.parametrize("method", ["bootstrap", "guided"])
def test_series_of_their_own_times_take_as_many_steps_as_each_other(method: str) -> None:
    times = torch.tensor([[0.1, 0.5, 2.0], [0.3, 0.4, 0.9]], dtype=F64)
    y = torch.tensor([[[0.3], [0.2], [0.1]], [[0.2], [0.5], [-0.4]]], dtype=F64)
    sde = sd.SDE(lambda t, x: -(x**3), 0.5)
    whole = filters(sde, ONE, times, y, method)
    fine = site(sde, ONE, times)
    assert whole.shape == fine.batch_shape == (2,)
    assert bool((fine.seen.stops.ts.diff() > 0).all())


def test_noise_with_memory_takes_such_steps_too() -> None:
    sde = sd.SDE(lambda t, x: -2 * x, 0.7, ExactMemory([1.0, 4.0], [0.5, 0.3]))
    sde.requires_grad_(False)
    chosen, fine = site(sde, ONE, TIMES[:6]), site(sde, ONE, TIMES[:6], dt=0.01)
    torch.manual_seed(0)
    y = fine.sample((16,))
    assert float((chosen.log_prob(y) - fine.log_prob(y)).square().mean().sqrt()) < 0.2 * 2**0.5
    assert sum(chosen.seen.stops.counts) < 6 * 40


class Pull(AffineField):
    """A drift that says that it is affine."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.parts = a, b

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.parts


def pull() -> tuple[Pull, sd.LinearGaussianMeasure]:
    """Return a drift that says that it is affine, of two batch members, and its exact law."""
    a = torch.tensor([[[-1.0, 2.0], [-3.0, -0.5]], [[-0.3, 0.0], [1.0, -2.0]]], dtype=F64)
    b, g = torch.tensor([0.7, -0.2], dtype=F64), 0.6 * torch.eye(2, dtype=F64)
    return Pull(a, b), sd.LinearGaussianMeasure(a, b, g, torch.ones(2, dtype=F64))


OWN_TIMES = torch.tensor([[0.1, 0.5, 3.0], [0.3, 2.0, 2.1]], dtype=F64)


@pytest.mark.parametrize("times", [TIMES[:5], OWN_TIMES[0], OWN_TIMES], ids=["regular", "irregular", "own"])
def test_a_drift_that_says_that_it_is_affine_takes_exact_steps(times: Tensor) -> None:
    drift, law = pull()
    sde, start = sd.SDE(drift, 0.6), torch.ones(2, dtype=F64)
    exact = LinearObservations(law, times, 0.3)
    torch.manual_seed(0)
    y = exact.sample()
    found = NonlinearObservations(sde, start, times, lambda x: x, 0.3)
    assert found.seen.stops.counts == (1,) * times.shape[-1]
    torch.testing.assert_close(found.log_prob(y), exact.log_prob(y), rtol=1e-9, atol=0)
    assert float((site(sde, start, times, dt=1.0).log_prob(y[..., :1]) - exact.log_prob(y)).abs().min()) > 0.1
    guided = filters(sde, start, times, y, "guided")
    torch.testing.assert_close(guided, exact.log_prob(y), rtol=1e-9, atol=0)


def test_an_affine_drift_whose_form_has_no_exact_steps_takes_others() -> None:
    drift, _ = pull()
    start = torch.ones(2, dtype=F64)
    coupled = Pull(drift.parts[0][0], drift.parts[1])
    one = sd.SDE(coupled, torch.tensor([[0.0], [0.5]], dtype=F64))
    assert max(site(one, start).seen.stops.counts) > 1
    trace = pyro.poutine.trace(lambda: sd.infer.sample_path("x", one, start, OWN_TIMES)).get_trace()
    assert trace.nodes["x_dw"]["fn"].method.name == "euler"


def test_an_equation_that_no_steps_resolve_is_told() -> None:
    wild = sd.SDE(lambda t, x: -1e6 * (x - t.sin()), 0.5)
    with pytest.warns(ApproximationWarning, match="Give dt"):
        assert max(site(wild, ONE).seen.stops.counts) == 128


def test_parameters_keep_their_gradients() -> None:
    def evidence(rate: Tensor) -> Tensor:
        return site(sd.SDE(lambda t, x: -rate * x**3, 0.5), ONE, TIMES[:4]).log_prob(ONE.expand(4, 1) / 2)

    sd.testing.check_gradients(evidence, torch.tensor(1.2, dtype=F64))


@pytest.mark.parametrize("value", [None, "data", torch.zeros(12, 1, dtype=torch.complex128)])
def test_data_and_starts_of_another_kind_are_told_by_name(value: Any) -> None:
    sde, start = MODELS["two wells"]
    particles = ParticleObservations(sde, start, TIMES, lambda x: dist.Normal(x, 0.3).to_event(1), dt=0.5)
    for law in (particles, site(sde, start, dt=0.5)):
        with pytest.raises(InvalidInputError, match="value"):
            law.log_prob(value)
    for wrong in (start.half(), start[:0]):
        with pytest.raises(InvalidInputError, match="initial"):
            site(sde, wrong)
