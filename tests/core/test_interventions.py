"""Interventions on laws and on posterior draws, against what the equations say."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn import testing
from stochdyn.core import Intervention
from stochdyn.infer import AutoPathGuide, predict_path, sample_path
from tests.core.laws import F64, ExactMemory, within

TS = torch.linspace(0, 2, 21, dtype=F64)
COUPLED = torch.tensor([[-1.0, 0.5], [0.3, -0.8]], dtype=F64)


def coupled() -> sd.SDE:
    return sd.SDE(lambda t, x: x @ COUPLED.mT, torch.tensor([[0.5, 0.1], [0.0, 0.4]], dtype=F64))


def law(**options: Any) -> sd.DiffusionMeasure:
    return sd.DiffusionMeasure(torch.ones(2, dtype=F64), coupled(), **options)


def test_a_held_component_acts_on_the_others_and_nothing_on_it() -> None:
    """Mean and variance of the free component are those of its own linear equation, with the other one as a constant."""
    held = law().do(Intervention(1.0, {1: 2.0}))
    x = held.sample(TS, 4000, 0).x
    assert bool((x[:, 10:, 1] == 2.0).all())
    assert float(x[:, 9, 1].std()) > 0.1
    mean, variance = x[:, 10, 0].mean(), x[:, 10, 0].var()
    for _ in range(10):
        mean, variance = mean + 0.1 * (-mean + 1.0), 0.9**2 * variance + 0.1 * 0.26
    assert within(x[:, -1, 0].mean(), mean, x[:, -1, 0].std() / 4000**0.5)
    assert abs(float(x[:, -1, 0].var() / variance) - 1) < 5 * (2 / 4000) ** 0.5


def test_before_the_intervention_nothing_changes() -> None:
    plain, held = law().sample(TS, 3, 0).x, law().do(Intervention(5.0, {0: 1.0})).sample(TS, 3, 0).x
    assert torch.equal(plain, held)
    late = law().do(Intervention(1.0, {0: 0.0})).sample(TS, 3, 0).x
    torch.testing.assert_close(late[:, :10], law().sample(TS[:11], 3, 0).x[:, :10])


def test_another_drift_from_a_time_on() -> None:
    stopped = law().do(Intervention(1.05, drift=lambda t, x, own: torch.zeros_like(x)))
    x = stopped.sample(TS, 4000, 0).x
    gain = x[:, -1] - x[:, 11]
    covariance = 0.9 * torch.tensor([[0.26, 0.04], [0.04, 0.16]], dtype=F64)
    assert within(gain.mean(0), torch.zeros(2, dtype=F64), gain.std(0) / 4000**0.5)
    assert float((torch.cov(gain.mT) / covariance - 1).abs().max()) < 0.2
    t = torch.tensor([[0.5], [1.5]], dtype=F64)
    torch.testing.assert_close(
        stopped.drift(t, torch.ones(2, 2, dtype=F64)),
        torch.stack([COUPLED.sum(1), torch.zeros(2, dtype=F64)]),
    )


@pytest.mark.parametrize("time", [-1.0, 0.0, 0.05, 1.0, 2.0, 3.0])
def test_every_time_of_an_intervention_and_every_grid(time: float) -> None:
    """Held values stand from the time on, with and without a start and a step of the law's own."""
    for options in ({}, {"start_time": 0.0, "dt": 0.07}):
        held = law(**options).do(Intervention(time, {0: torch.tensor(3.0)}))
        for ts in (TS, TS[[0, 20]], TS[[3, 7, 20]]):
            path = held.sample(ts, (2, 3), 0)
            assert path.x.shape == (2, 3, len(ts), 2)
            assert torch.equal(path.x[..., 0] == 3.0, (ts >= time).expand(2, 3, -1))


def test_units_of_interventions() -> None:
    def answer(c: float) -> Tensor:
        start = c * torch.ones(2, dtype=F64)
        moved = sd.DiffusionMeasure(start, sd.SDE(lambda t, x: x @ COUPLED.mT / c, c**0.5 * 0.3))
        return moved.do(Intervention(c, {1: 2.0 * c})).sample(c * TS, 3, 0).x / c

    testing.check_units(answer)


# Posterior draws.


def model(y: Tensor, noise_space: bool | None = None) -> None:
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.3))
    sde = sd.SDE(lambda t, x: -rate[..., None] * x, 0.5)
    x = sample_path("x", sde, torch.ones(2, dtype=F64), TS, noise_space=noise_space)
    pyro.sample("y", dist.Normal(x[..., 5::5, :], 0.1).to_event(2), obs=y)


Y = torch.tensor([[0.8, 0.5], [0.6, 0.0], [0.9, -0.3], [0.2, 0.1]], dtype=F64)


@pytest.fixture(scope="module", params=[None, True])
def fitted(request: pytest.FixtureRequest) -> Any:
    pyro.set_rng_seed(0)
    noise_space = request.param

    def own() -> None:
        model(Y, noise_space)

    guide = AutoPathGuide(own, hidden=())
    guide()
    return own, guide


def draw(fitted: Any, ts: Tensor | None, do: Intervention | None = None) -> Tensor:
    return predict_path(fitted[0], fitted[1], "x", ts, num_draws=50, seed=1, do=do).x


def test_an_intervention_that_changes_nothing_gives_every_draw_back(fitted: Any) -> None:
    """The noise is that of the draw: with the drift it had, the path is the same to rounding, whatever its parameters."""
    plain = draw(fitted, None)
    same = draw(fitted, None, Intervention(0.7, drift=lambda t, x, own: own))
    torch.testing.assert_close(same, plain, rtol=1e-10, atol=1e-10)
    assert plain.std() > 0


def test_a_pull_from_a_time_on_moves_every_draw_by_its_linear_response(fitted: Any) -> None:
    """In a linear equation with constant noise the counterfactual differs from the draw by what a pulse does without noise."""
    from stochdyn.infer.counterfactual import intervened_draws

    with torch.random.fork_rng(), torch.no_grad():
        [drawn] = fitted[1].path_law("x")._draw(20)
    pushed = intervened_draws(drawn, Intervention(1.0, drift=lambda t, x, own: own + 0.7))
    rate = -drawn.sde.drift(torch.tensor(0.0), torch.ones_like(drawn.x[0]))
    n = 10
    response = 0.7 * (1 - (1 - 0.1 * rate) ** n) / rate
    torch.testing.assert_close(pushed.after.x[-1] - pushed.before.x[-1], response)
    assert torch.equal(pushed.at(TS)[:10], drawn.x[:10])


def test_what_is_held_stays_and_the_rest_keeps_its_noise(fitted: Any) -> None:
    plain, held = draw(fitted, None), draw(fitted, None, Intervention(1.0, {0: 5.0}))
    torch.testing.assert_close(held[:, :10], plain[:, :10])
    assert bool((held[:, 10:, 0] == 5.0).all())
    torch.testing.assert_close(held[..., 1], plain[..., 1])


def test_forecasts_and_times_between(fitted: Any) -> None:
    """From the middle of a step, beyond the end of the grid, and both."""
    ts = torch.tensor([0.52, 1.03, 1.07, 1.9, 2.4, 3.3], dtype=F64)
    for time in (1.05, 2.0, 2.55):
        held = draw(fitted, ts, Intervention(time, {1: -1.0}))
        assert torch.equal((held[..., 1] == -1.0).all(0), ts >= time)
        assert bool(torch.isfinite(held).all())


def test_a_posterior_takes_interventions() -> None:
    pyro.set_rng_seed(0)
    post = sd.infer.fit_posterior(model, Y, method="laplace", num_draws=50)
    later = post.forecast(torch.tensor([2.5, 3.0], dtype=F64), num_draws=20, do=Intervention(2.2, {0: 1.0}))
    assert bool((later.x[..., 0] == 1.0).all())
    assert post.predict(num_draws=20, do=Intervention(1.0, {0: 1.0})).x.shape == (20, 21, 2)


def test_grids_per_series() -> None:
    pyro.set_rng_seed(0)
    grids = torch.stack([TS, TS * 0.9])

    def series() -> None:
        with pyro.plate("series", 2):
            x = sample_path("x", sd.SDE(lambda t, x: -x, 0.5), torch.ones(1, dtype=F64), grids)
            pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=torch.ones(2, dtype=F64))

    guide = AutoPathGuide(series, hidden=())
    guide()
    held = predict_path(series, guide, "x", num_draws=7, seed=0, do=Intervention(0.9, {0: 4.0}))
    assert torch.equal((held.x[..., 0] == 4.0).all(0), grids >= 0.9)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: Intervention(1.0), sd.errors.InvalidInputError, "values or a drift"),
        (lambda: Intervention("soon", {0: 1.0}), sd.errors.InvalidInputError, "start_time"),  # type: ignore[arg-type]
        (lambda: Intervention(1.0, {"x": 1.0}), sd.errors.InvalidInputError, "values"),  # type: ignore[dict-item]
        (lambda: Intervention(1.0, drift=2.0), sd.errors.InvalidInputError, "drift"),  # type: ignore[arg-type]
        (lambda: law().do(Intervention(1.0, {2: 1.0})).sample(TS), sd.errors.ShapeError, "no such component"),
        (lambda: law().do("stop"), sd.errors.InvalidInputError, "intervention"),  # type: ignore[arg-type]
        (
            lambda: Intervention(1.0, {0: 1.0}).equation(
                sd.SDE(lambda t, x: x, 1.0, ExactMemory([1.0], [1.0]))
            ),
            sd.errors.InvalidInputError,
            "Brownian motion",
        ),
    ],
)
def test_bad_interventions_are_refused(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


def test_an_intervention_before_the_path_is_refused(fitted: Any) -> None:
    with pytest.raises(sd.errors.TimeGridError, match="before the path"):
        draw(fitted, None, Intervention(-1.0, {0: 1.0}))


def test_what_a_component_is_held_at_may_be_learnt() -> None:
    value = torch.nn.Parameter(torch.tensor(0.5))
    law = sd.DiffusionMeasure(torch.ones(2), sd.SDE(lambda t, x: x.flip(-1) - x, 0.3)).do(
        Intervention(0.5, {0: value})
    )
    assert any(p is value for p in law.parameters())
    twin = copy.deepcopy(law)
    ts = torch.linspace(0, 1, 5)
    law.sample(ts, 3, 0).x[:, -1, 1].sum().backward()
    # Two Euler steps of a quarter each: the held value enters by 1/4, and by 1/4 (1 - 1/4).
    assert float(value.grad) == pytest.approx(3 * (0.25 + 0.25 * 0.75))
    twin.load_state_dict({name: 2 * v for name, v in law.state_dict().items()})
    assert float(twin.sample(ts, (), 0).x[-1, 0].detach()) == 1.0
    assert float(law.sample(ts, (), 0).x[-1, 0].detach()) == 0.5
