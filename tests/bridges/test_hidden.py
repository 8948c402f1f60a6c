"""Mechanisms that are seen in part: against the linear law, and parameters that are found from one of two species."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.bridges import (
    HiddenStateBridge,
    LinearDrift,
    LotkaVolterra,
    Messages,
    PartialBridge,
    Snapshots,
    refine,
)

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
    with pytest.raises(sd.errors.UnavailableError, match="couplings"):
        fit.posterior(3)


def test_what_cannot_work_is_said_in_the_words_of_the_call() -> None:
    snaps = simulated(5)
    with pytest.raises(sd.errors.ShapeError, match="more components than the snapshots"):
        refine(snaps, LotkaVolterra(), 0.1)
    with pytest.raises(sd.errors.ShapeError, match="initial_mean"):
        refine(snaps, production, 0.1, method=Messages(initial_mean=[0.0], initial_cov=[[1.0]]))
    with pytest.raises(sd.errors.InvalidInputError, match="initial_cov must be positive definite"):
        Messages(initial_mean=[0.0, 1.0], initial_cov=[[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(sd.errors.InvalidInputError, match="need values to start from"):
        refine(snaps, lambda t, x, rate: -rate * x, 0.1)
