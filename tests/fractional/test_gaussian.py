"""The Gaussian posterior: exact on linear models, a true bound on others, and laws that P can continue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.core import integrate
from stochdyn.errors import InvalidInputError
from stochdyn.fractional import AffineDrift, FractionalOU, GaussianELBO, GaussianPosterior, MarkovNoise

D = torch.float64
TIMES = (12, 25, 50, 75, 100)
VALUES = (0.3, -0.1, 0.4, 0.8, 0.5)
pytestmark = pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")


def _noise(hurst: float | Tensor, kind: Any = "II", **options: Any) -> MarkovNoise:
    return MarkovNoise(hurst, 10 if kind == "I" else 6, 2.0, 0.02, kind=kind, **options)


def _data(steps: int = 100) -> sd.GaussianObservations:
    ts = torch.linspace(0, 2, steps + 1, dtype=D)
    index = torch.tensor(TIMES) * steps // 100
    return sd.GaussianObservations(ts, ts[index], torch.tensor(VALUES, dtype=D), 0.1)


def _prior(noise: Any, drift: Any = None, initial: Any = None, strength: float = 1.0) -> sd.DiffusionMeasure:
    start = torch.zeros(1, dtype=D) if initial is None else initial
    return sd.DiffusionMeasure(start, sd.SDE(drift or AffineDrift(-torch.eye(1, dtype=D)), strength, noise))


def _evidence(noise: MarkovNoise, start: Any = None) -> Tensor:
    law = FractionalOU(1.0, 0.0, 1.0, noise.hurst, noise=noise, initial=start, method="euler")
    ts = torch.linspace(0, 2, 101, dtype=D)
    y, mask = torch.zeros(101, dtype=D), torch.zeros(101, dtype=torch.bool)
    y[list(TIMES)], mask[list(TIMES)] = torch.tensor(VALUES, dtype=D), True
    return law.log_evidence(ts, y, 0.1, mask=mask)


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("hurst", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_linear_models_reach_the_kalman_evidence(kind: str, hurst: float) -> None:
    noise = _noise(hurst, kind)
    objective = GaussianELBO(GaussianPosterior(_prior(noise), _data().ts), _data())
    objective.posterior.linearise(objective.likelihood)
    exact = float(_evidence(noise))
    assert float(objective(None).terms["elbo"]) == pytest.approx(exact, abs=1e-8)
    log_evidence, weights = objective.evidence(50)
    assert float(log_evidence) == pytest.approx(exact, abs=1e-8)
    assert float(weights.std()) < 1e-8


def test_a_drift_that_only_happens_to_be_linear_gives_the_same() -> None:
    noise = _noise(0.3)
    posterior = GaussianPosterior(_prior(noise, lambda t, x: -x), _data().ts)
    posterior.linearise(_data())
    path, log_ratio = posterior.sample(20)
    torch.testing.assert_close(
        _data()(path) + log_ratio, _evidence(noise).expand(20), rtol=0, atol=1e-8, check_dtype=False
    )


@pytest.mark.slow
def test_training_from_the_prior_reaches_the_evidence() -> None:
    noise = _noise(0.7)
    objective = GaussianELBO(GaussianPosterior(_prior(noise), _data().ts), _data())
    exact = float(_evidence(noise))
    assert float(objective(None).terms["elbo"]) < exact - 5
    sd.fit(
        objective,
        steps=3000,
        lr=0.03,
        progress=False,
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.01 ** (1 / 3000)),
    )
    assert exact - 0.02 < float(objective(None).terms["elbo"]) <= exact + 1e-9


def test_moments_are_those_of_the_smoother() -> None:
    noise = _noise(0.3, "I")
    posterior = GaussianPosterior(_prior(noise), _data().ts)
    posterior.linearise(_data())
    ts = _data().ts
    fine = FractionalOU(1.0, 0.0, 1.0, 0.3, noise=noise, method="euler")
    y, mask = torch.zeros(101, dtype=D), torch.zeros(101, dtype=torch.bool)
    y[list(TIMES)], mask[list(TIMES)] = torch.tensor(VALUES, dtype=D), True
    exact = fine.posterior(ts, y, 0.1, mask=mask)
    torch.testing.assert_close(posterior.mean[:, 0], exact.mean[:, 0], rtol=0, atol=1e-8)
    torch.testing.assert_close(posterior.variance[:, 0], exact.variance[:, 0], rtol=0, atol=1e-8)


def test_a_gaussian_start_is_inferred() -> None:
    start = torch.distributions.MultivariateNormal(
        torch.tensor([0.5], dtype=D), torch.tensor([[0.3]], dtype=D)
    )
    noise = _noise(0.7, "I")
    objective = GaussianELBO(GaussianPosterior(_prior(noise, initial=start), _data().ts), _data())
    objective.posterior.linearise(objective.likelihood)
    exact = _evidence(noise, start=torch.distributions.Normal(torch.tensor(0.5, dtype=D), math.sqrt(0.3)))
    assert float(objective(None).terms["elbo"]) == pytest.approx(float(exact), abs=1e-8)


def test_each_channel_may_have_a_hurst_index_of_its_own() -> None:
    hurst = torch.tensor([0.3, 0.8], dtype=D)
    both = MarkovNoise(hurst, 6, 2.0, 0.02, per_channel=True)
    ts = _data().ts
    y = torch.tensor(VALUES, dtype=D)
    data = sd.GaussianObservations(ts, ts[list(TIMES)], torch.stack([y, -y], -1), 0.1)
    prior = sd.DiffusionMeasure(
        torch.zeros(2, dtype=D), sd.SDE(AffineDrift(-torch.eye(2, dtype=D)), 1.0, both)
    )
    objective = GaussianELBO(GaussianPosterior(prior, ts), data)
    objective.posterior.linearise(data)
    exact = sum(float(_evidence(_noise(float(h)))) for h in hurst)
    assert float(objective(None).terms["elbo"]) == pytest.approx(exact, abs=1e-8)


def _double_well(noise: Any) -> GaussianELBO:
    prior = _prior(noise, lambda t, x: 4 * x * (1 - x**2), strength=0.7)
    objective = GaussianELBO(GaussianPosterior(prior, _data().ts), _data(), num_particles=64)
    objective.posterior.linearise(objective.likelihood)
    return objective


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("hurst", [0.1, 0.4, 0.9])
def test_the_increments_of_a_draw_drive_it_under_the_true_equation(hurst: float, kind: str) -> None:
    objective = _double_well(_noise(hurst, kind))
    with torch.no_grad():
        path, _ = objective.posterior.sample(5, torch.Generator().manual_seed(0))
    e = torch.cat([path.dw, path.aux["residual"]], -1).movedim(-2, 0)
    sde = objective.posterior.prior.sde
    run = integrate(sde, path.x[:, 0], path.ts, e, path.aux["memory"][:, 0])
    torch.testing.assert_close(run.x.movedim(0, -2), path.x, rtol=0, atol=1e-9)
    assert run.memory is not None
    scale = float(path.aux["memory"].abs().max())
    torch.testing.assert_close(run.memory.movedim(0, -3), path.aux["memory"], rtol=0, atol=1e-9 * scale)


def test_log_weights_are_a_martingale() -> None:
    """E_Q[dP/dQ] = 1, for a law that isn't the optimum."""
    prior = _prior(_noise(0.4), lambda t, x: 0.3 * torch.sin(2 * x) - x)
    posterior = GaussianPosterior(prior, _data().ts)
    assert posterior.drift_matrix is not None
    assert posterior.drift_offset is not None
    with torch.no_grad():
        posterior.drift_matrix.fill_(-0.8)
        posterior.drift_offset.fill_(0.1)
        posterior.offset.fill_(0.02)
        _, log_ratio = posterior.sample(4000, torch.Generator().manual_seed(1))
    ratio = log_ratio.exp()
    error = float(ratio.std() / math.sqrt(4000))
    assert error < 0.1
    assert abs(float(ratio.mean()) - 1) < 4.5 * error


def test_the_divergence_of_a_nonlinear_model_is_the_mean_log_ratio() -> None:
    posterior = _double_well(_noise(0.4)).posterior
    with torch.no_grad():
        _, log_ratio = posterior.sample(4000, torch.Generator().manual_seed(2))
        estimate = posterior.divergence(4000, torch.Generator().manual_seed(3))
    error = float(log_ratio.std() / math.sqrt(4000))
    # the closed form takes most of the noise away, so its own error is smaller
    assert abs(float(estimate + log_ratio.mean())) < 5 * math.sqrt(2) * error


def test_a_nonlinear_bound_lies_under_the_evidence() -> None:
    """Brownian noise, where a grid of states gives the evidence."""
    objective = _double_well(MarkovNoise(0.5, speeds=[0.0], horizon=2.0))
    exact = _grid_evidence(lambda x: 4 * x * (1 - x**2), 0.7)
    with torch.no_grad():
        torch.manual_seed(0)
        log_evidence, weights = objective.evidence(20000)
    relative = torch.softmax(weights, 0)
    error = float((relative.square().sum() - 1 / 20000).sqrt())
    assert error < 0.1
    assert abs(float(log_evidence) - exact) < 4.5 * error
    assert float(weights.mean()) < exact + 4.5 * float(weights.std()) / math.sqrt(20000)


def _grid_evidence(drift: Any, strength: float) -> float:
    x = torch.linspace(-3, 3, 1201, dtype=D)
    width, dt = float(x[1] - x[0]), 0.02
    mean = x + drift(x) * dt
    kernel = (
        torch.distributions.Normal(mean[:, None], strength * math.sqrt(dt)).log_prob(x[None]).exp() * width
    )
    mass = (
        torch.distributions.Normal(torch.zeros((), dtype=D), strength * math.sqrt(dt)).log_prob(x).exp()
        * width
    )
    total = 0.0
    for n in range(1, 101):
        if n > 1:
            mass = mass @ kernel
        if n in TIMES:
            mass = (
                mass
                * torch.distributions.Normal(x, 0.1)
                .log_prob(torch.tensor(VALUES[TIMES.index(n)], dtype=D))
                .exp()
            )
            total += math.log(float(mass.sum()))
            mass = mass / mass.sum()
    return total


def test_the_bound_is_differentiable_in_the_hurst_index() -> None:
    ts = torch.linspace(0, 2, 11, dtype=D)
    data = sd.GaussianObservations(ts, ts[[4, 10]], torch.tensor([0.3, 0.5], dtype=D), 0.2)
    template = GaussianPosterior(_prior(_noise(0.4)), ts)
    template.linearise(data)

    def bound(hurst: Tensor) -> Tensor:
        posterior = GaussianPosterior(_prior(_noise(hurst)), ts)
        posterior.load_state_dict(template.state_dict())
        return GaussianELBO(posterior, data)(None).loss

    assert torch.autograd.gradcheck(bound, (torch.tensor(0.4, dtype=D, requires_grad=True),))


def test_a_learnt_prior_is_followed() -> None:
    noise = _noise(0.4, learn_hurst=True)
    objective = GaussianELBO(GaussianPosterior(_prior(noise), _data().ts), _data())
    objective.posterior.linearise(objective.likelihood)
    before = float(objective(None).loss.detach())
    objective(None).loss.backward()
    assert noise.hurst_logit is not None
    assert noise.hurst_logit.grad is not None
    with torch.no_grad():
        noise.hurst_logit.add_(0.5)
    assert float(objective(None).loss.detach()) != before


def test_a_batch_of_posteriors() -> None:
    noise = _noise(0.7)
    ts = _data().ts
    shifted = torch.stack([torch.tensor(VALUES, dtype=D), -torch.tensor(VALUES, dtype=D)])

    def likelihood(path: sd.PathSample, batch: Any = None) -> Tensor:
        return torch.distributions.Normal(path.x[..., list(TIMES), 0], 0.1).log_prob(shifted).sum(-1)

    objective = GaussianELBO(GaussianPosterior(_prior(noise), ts, (2,)), likelihood)
    objective.posterior.linearise(likelihood)
    log_evidence, _ = objective.evidence(10)
    torch.testing.assert_close(log_evidence, _evidence(noise).expand(2), rtol=0, atol=1e-8, check_dtype=False)


def test_what_cannot_be_gaussian_is_refused() -> None:
    ts, zero = _data().ts, torch.zeros(1, dtype=D)
    varying = sd.DiffusionMeasure(
        zero, sd.SDE(lambda t, x: -x, lambda t, x: sd.Diagonal(1 + x**2), _noise(0.7))
    )
    with pytest.raises(InvalidInputError, match="constant diffusion"):
        GaussianPosterior(varying, ts)
    laplace = torch.distributions.Independent(torch.distributions.Laplace(zero, torch.ones(1, dtype=D)), 1)
    with pytest.raises(InvalidInputError, match="Gaussian start"):
        GaussianPosterior(_prior(_noise(0.7), initial=laplace), ts)


def test_single_precision_is_followed() -> None:
    noise = MarkovNoise(0.3, 6, 2.0, 0.02)
    ts = torch.linspace(0, 2, 101)
    prior = sd.DiffusionMeasure(torch.zeros(1), sd.SDE(AffineDrift(-torch.eye(1)), 1.0, noise))
    data = sd.GaussianObservations(ts, ts[list(TIMES)], torch.tensor(VALUES), 0.1)
    objective = GaussianELBO(GaussianPosterior(prior, ts), data)
    objective.posterior.linearise(data)
    value = objective(None).terms["elbo"]
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(_evidence(_noise(0.3))), abs=2e-3)
