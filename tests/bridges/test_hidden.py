"""Mechanisms that are seen in part: against the linear law, and parameters that are found from one of two species."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.bridges import (
    HiddenStateBridge,
    LinearDrift,
    LinearFamily,
    LinearResponse,
    LotkaVolterra,
    Messages,
    PartialBridge,
    Snapshots,
    refine,
)
from stochdyn.core.gaussian import LinearGaussianMeasure

F64 = torch.float64
MATRIX = torch.tensor([[-0.5, 1.0], [-0.8, -0.2]], dtype=F64)
MEAN, COV = torch.tensor([0.3, 0.2], dtype=F64), torch.tensor([[0.4, 0.1], [0.1, 0.3]], dtype=F64)


def quantiles(n: int, mean: float, std: float) -> Tensor:
    q = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)
    return (mean + std * q / q.square().mean().sqrt())[:, None]


@pytest.mark.parametrize("nonlinear", [False, True])
def test_under_a_linear_reference_it_is_the_partial_bridge(nonlinear: bool) -> None:
    snaps = Snapshots([0.0, 0.8, 1.6], [quantiles(30, m, 0.5) for m in (0.3, 0.6, 0.1)])
    exact = PartialBridge(snaps, MATRIX, 0.6, MEAN, COV, num_hidden=20)
    family = LinearDrift(2, shift=False).double()
    with torch.no_grad():
        family.weight.copy_(MATRIX)
    reference = (lambda t, x: x @ MATRIX.mT) if nonlinear else family
    law = HiddenStateBridge(snaps, reference, 0.6, MEAN, COV, num_hidden=20)
    assert law.marginal_errors.max() <= 2e-4
    for t in (0.0, 0.5, 0.8, 1.6):
        one, other = (own.marginal(t).sample(3000, 1) for own in (law, exact))
        error = 5 * (one.var(0) + other.var(0)).div(3000).sqrt()
        assert bool(((one.mean(0) - other.mean(0)).abs() < error + 0.06).all())
        assert bool(((one.std(0) / other.std(0)).log().abs() < 0.2).all())


def production(t: Tensor, x: Tensor, loss: float = 1.0) -> Tensor:
    """A hidden species makes the one that is seen, and is used up with saturation."""
    seen, hidden = x.unbind(-1)
    return torch.stack((hidden - 0.5 * seen, -loss * hidden / (1 + hidden.square())), -1)


def simulated(n: int = 25) -> Snapshots:
    g, clouds, dt = torch.Generator().manual_seed(0), [], 0.02
    for time in (0.0, 1.0, 2.0, 3.0):
        x = torch.tensor([0.2, 2.0], dtype=F64) + 0.1 * torch.randn(n, 2, generator=g, dtype=F64)
        for _ in range(round(time / dt)):
            noise = torch.randn(x.shape, generator=g, dtype=F64)
            x = x + dt * production(torch.tensor(0.0), x, 1.6) + 0.1 * math.sqrt(dt) * noise
        clouds.append(x[:, :1])
    return Snapshots([0.0, 1.0, 2.0, 3.0], clouds)


def test_a_parameter_of_a_hidden_species_is_found(tmp_path) -> None:
    start = {"initial_mean": [0.2, 2.0], "initial_cov": torch.diag(torch.tensor([0.01, 0.02]))}
    options = {"diffusion": 0.1, "method": Messages(**start, num_hidden=8), "checkpoint": tmp_path}
    refine(simulated(), production, max_iterations=2, **options)
    fit = refine(simulated(), production, max_iterations=8, resume=True, **options)
    assert len(fit.history) > 2
    assert float(fit.parameters["loss"]) == pytest.approx(1.6, abs=0.25)
    assert fit.measure.sample([0.5, 1.5], 4).x.shape == (4, 2, 2)
    assert fit.history.objective[-1] < fit.history.objective[0]
    ahead = sd.bridges.forecast(fit, torch.tensor([3.0, 3.5], dtype=F64), 6, 0)
    assert ahead.x.shape == (6, 2, 2)  # hidden components go on too
    assert fit.reference.sample(torch.tensor([0.0, 0.5]), 3, 0).x.shape == (3, 2, 2)
    with pytest.raises(sd.errors.InvalidInputError, match="no such snapshot"):
        fit.states_at(4)


class Cascade(LinearFamily):
    """A hidden species decays and makes the one that is seen: two unknown rates, linear in the state."""

    def __init__(self) -> None:
        super().__init__(2, ("production", "decay"))
        with torch.no_grad():
            self.theta.copy_(torch.tensor([1.5, 0.8]))

    def features(self, t: Tensor, x: Tensor) -> Tensor:
        zero = torch.zeros_like(x[..., 1])
        return torch.stack((torch.stack((x[..., 1], zero), -1), torch.stack((zero, -x[..., 1]), -1)), -2)

    def offset(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.stack((-0.5 * x[..., 0], torch.zeros_like(x[..., 0])), -1)

    def affine(self) -> tuple[Tensor, Tensor]:
        production, decay = self.theta.unbind()
        loss, zero = torch.full_like(decay, -0.5), torch.zeros_like(decay)
        return torch.stack(
            (torch.stack((loss, production)), torch.stack((zero, -decay)))
        ), self.theta.new_zeros(2)


CASCADE_TIMES = [0.0, 0.7, 1.5, 2.5, 4.0]
CASCADE_START = torch.tensor([0.2, 3.0], dtype=F64), torch.diag(torch.tensor([0.05, 0.05], dtype=F64))


def cascade_fit(seed: int) -> sd.bridges.Refinement:
    """A fit to quantiles of the exact law with rates (1, 0.4)."""
    matrix = torch.tensor([[-0.5, 1.0], [0.0, -0.4]], dtype=F64)
    law = LinearGaussianMeasure(matrix, torch.zeros(2, dtype=F64), 0.2, *CASCADE_START)
    ts = torch.tensor(CASCADE_TIMES, dtype=F64)
    means, stds = law.mean(ts)[:, 0].tolist(), law.covariance(ts)[:, 0, 0].sqrt().tolist()
    snaps = Snapshots(CASCADE_TIMES, [quantiles(30, m, s) for m, s in zip(means, stds, strict=True)])
    method = Messages(initial_mean=CASCADE_START[0], initial_cov=CASCADE_START[1], num_hidden=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.errors.ApproximationWarning)
        return refine(snaps, Cascade(), 0.2, max_iterations=12, seed=seed, method=method)


@pytest.fixture(scope="module")
def cascade() -> sd.bridges.Refinement:
    return cascade_fit(0)


def test_rates_of_hidden_components_are_found_in_a_few_steps(cascade) -> None:
    """Iterations alone shrink their slowest error by one less the share of its information that is kept, from 1.5 to 1."""
    response = LinearResponse(cascade)
    assert cascade.history.stopped.startswith("the parameters")
    assert 0.05 < float(response.information_kept[0]) < 0.5
    assert len(cascade.history) < math.log(0.02) / math.log(1 - float(response.information_kept[0]))
    spread = torch.linalg.inv(30 * response.observed).diagonal().sqrt()
    assert bool(((cascade.family.theta.detach() - torch.tensor([1.0, 0.4])).abs() < 3 * spread).all())
    assert bool((spread < torch.tensor([0.05, 0.04])).all())


@pytest.mark.slow
def test_several_parameters_of_hidden_components_are_those_of_the_exact_law() -> None:
    """Snapshots have the exact law of rates (1, 0.4), so little but draws moves the answer: five runs say by how much."""
    fits = [cascade_fit(seed) for seed in range(5)]
    found = torch.stack([fit.family.theta.detach() for fit in fits])
    error = found.std(0) / math.sqrt(5)
    # beside the draws' error, thirty quantiles stand for a continuous law: half a standard deviation of their cohort is allowed
    spread = torch.linalg.inv(30 * LinearResponse(fits[0]).observed).diagonal().sqrt()
    assert bool(((found.mean(0) - torch.tensor([1.0, 0.4])).abs() < 4 * error + 0.5 * spread).all())


def test_posteriors_of_hidden_mechanisms_scatter_as_weights_do(cascade) -> None:
    fit = cascade
    response = LinearResponse(fit)
    same = response([w[None] for w in fit.snapshots.weights])[0]
    assert torch.allclose(same, response.converged, atol=1e-3)  # the answer to weights that did not change
    idata = fit.posterior(60)
    draws = torch.stack(
        [torch.as_tensor(idata.posterior[k].values.copy())[0] for k in ("production", "decay")]
    )
    cohort = torch.linalg.inv(30 * response.observed).diagonal().sqrt()
    # fresh particles at every snapshot scatter more than one cohort would, by no more than a few times
    assert bool((draws.std(1) > 0.7 * cohort).all())
    assert bool((draws.std(1) < 4 * cohort).all())
    share, direction, spread = response.weakest()
    assert share == pytest.approx(float(response.information_kept[0]))
    assert float(direction.abs().max()) == 1.0
    assert spread == pytest.approx(float((30 * direction @ response.observed @ direction) ** -0.5))


def swinging(t: Tensor, x: Tensor, friction: float = 0.2, stiffness: float = 2.5) -> Tensor:
    position, velocity = x.unbind(-1)
    return torch.stack((velocity, -friction * velocity - stiffness * position), -1)


def test_friction_and_force_are_learnt_from_positions_only() -> None:
    """Tolerances are four standard deviations of the posterior."""
    g, clouds, dt = torch.Generator().manual_seed(0), [], 0.01
    times = [0.0, 0.5, 1.0, 1.6]
    for time in times:
        x = torch.tensor([2.0, 0.0], dtype=F64) + torch.randn(20, 2, generator=g, dtype=F64) * 0.2
        for _ in range(round(time / dt)):
            noise = torch.randn(20, generator=g, dtype=F64) * 0.4 * math.sqrt(dt)
            x = x + dt * swinging(torch.tensor(0.0), x, 0.4, 3.0)
            x[:, 1] += noise
        clouds.append(x[:, :1])
    start = {"initial_mean": [2.0, 0.0], "initial_cov": torch.eye(2) * 0.04}
    noise = torch.tensor([[0.0], [0.4]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.errors.ApproximationWarning)
        fit = refine(
            Snapshots(times, clouds),
            swinging,
            noise,
            max_iterations=8,
            method=Messages(**start, num_hidden=6),
        )
        idata = fit.posterior(40)
    for name, truth in (("friction", 0.4), ("stiffness", 3.0)):
        spread = float(idata.posterior[name].std())
        assert 0 < spread < 0.3
        assert float(fit.parameters[name]) == pytest.approx(truth, abs=4 * spread)

    def drifting(t: Tensor, x: Tensor, speed: float = 1.0) -> Tensor:
        return torch.stack((speed * x[..., 1], -x[..., 0]), -1)

    with pytest.raises(sd.errors.InvalidInputError, match="without noise of their own"):
        refine(Snapshots(times, clouds), drifting, noise, method=Messages(**start))
    with pytest.raises(sd.errors.DiffusionError, match="reach every component"):
        HiddenStateBridge(
            Snapshots(times, clouds), lambda t, x: -x, noise, start["initial_mean"], start["initial_cov"]
        )


def test_what_cannot_work_is_said_in_the_words_of_the_call() -> None:
    snaps = simulated(5)
    with pytest.raises(sd.errors.ShapeError, match="more components than the snapshots"):
        refine(snaps, LotkaVolterra(), 0.1)
    with pytest.raises(sd.errors.ShapeError, match="initial_mean"):
        refine(snaps, production, 0.1, method=Messages(initial_mean=[0.0], initial_cov=[[1.0]]))
    with pytest.raises(
        sd.errors.InvalidInputError, match="initial_cov must be symmetric and positive definite"
    ):
        Messages(initial_mean=[0.0, 1.0], initial_cov=[[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(sd.errors.InvalidInputError, match="need values to start from"):
        refine(snaps, lambda t, x, rate: -rate * x, 0.1)
