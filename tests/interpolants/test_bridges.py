"""Schrödinger bridges: the entropic coupling against the Gaussian bridge, and the directions of the max-min game."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stochdyn import errors
from stochdyn.core import StateNetwork
from stochdyn.interpolants import (
    EntropicCoupling,
    Interpolant,
    InterpolantRegression,
    MaxMinBridge,
)
from tests.interpolants.truths import F64

MEAN0, VAR0, MEAN1, VAR1 = 0.0, 1.0, 2.0, 0.3


def bridge_drift(t: Tensor, x: Tensor, sigma: float) -> Tensor:
    """Drift of the bridge between two Gaussians on the line, with the reference sigma dW."""
    c = 0.5 * (math.sqrt(4 * VAR0 * VAR1 + sigma**4) - sigma**2)
    mean = (1 - t) * MEAN0 + t * MEAN1
    var = (1 - t) ** 2 * VAR0 + t**2 * VAR1 + t * (1 - t) * (2 * c + sigma**2)
    slope = 0.5 * (-2 * (1 - t) * VAR0 + 2 * t * VAR1 + (1 - 2 * t) * (2 * c + sigma**2)) - 0.5 * sigma**2
    return MEAN1 - MEAN0 + slope / var * (x - mean)


def samples(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x0 = MEAN0 + VAR0**0.5 * torch.randn(n, 1, dtype=dtype, generator=g)
    return x0, MEAN1 + VAR1**0.5 * torch.randn(n, 1, dtype=dtype, generator=g)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_entropic_pairs_have_the_covariance_of_the_bridge(sigma: float) -> None:
    x0, x1 = samples(2000, F64)
    plan = EntropicCoupling(2 * sigma**2).plan(x0, x1)
    partner_mean = plan.barycentric(x1)
    cross = float(((x0 - x0.mean()) * (partner_mean - x1.mean())).mean())
    exact = 0.5 * (math.sqrt(4 * float(x0.var() * x1.var()) + sigma**4) - sigma**2)
    assert cross == pytest.approx(exact, rel=0.02)


def test_drift_of_the_entropic_interpolant_is_that_of_the_bridge() -> None:
    """Linear regression of the target of b + (sigma^2 / 2) s at one time, with pairs from the plan."""
    sigma, t = 0.8, 0.4
    x0, x1 = samples(2000, F64)
    rows = EntropicCoupling(2 * sigma**2).plan(x0, x1).plan()
    it = Interpolant("linear", "brownian", sigma)
    g = torch.Generator().manual_seed(1)
    slopes = []
    for _ in range(20):
        y = x1[torch.multinomial(rows, 1, generator=g)[:, 0]]
        z = torch.randn(2000, 1, dtype=F64, generator=g)
        x = it.sample(t, x0, y, z)
        target = it.target("velocity", t, x0, y, z) + 0.5 * sigma**2 * it.target("score", t, x0, y, z)
        centred = x - x.mean()
        slopes.append((centred * target).mean() / centred.square().mean())
    found = torch.stack(slopes)
    exact = bridge_drift(torch.tensor(t), torch.tensor(1.0), sigma) - bridge_drift(
        torch.tensor(t), torch.tensor(0.0), sigma
    )
    assert abs(float(found.mean() - exact)) < 5 * float(found.std()) / 20**0.5 + 0.03


class Polynomial(nn.Module):
    """A drift that is affine in the state with coefficients polynomial in time: it holds the bridge closely."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(5))
        self.b = nn.Parameter(torch.zeros(5))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        powers = torch.cat([(2 * t - 1) ** k for k in range(5)], -1)
        return (powers @ self.a)[..., None] + (powers @ self.b)[..., None] * x


def bend(width: int = 64) -> StateNetwork:
    """A network of the bend of a path, ``(t, x0, x1)``, that starts as zero."""
    return StateNetwork(1, hidden=(width, width), context=1, zero_last=True)


def test_the_game_descends_in_the_drift_and_ascends_in_the_path() -> None:
    x0, x1 = samples(64)
    torch.manual_seed(0)
    correction = bend(8)
    with torch.no_grad():
        correction.net.layers[-1].weight.normal_(std=0.1)
    objective = MaxMinBridge(Polynomial(), correction, 0.5, rate=1.0)
    with torch.no_grad():
        objective.drift.a.fill_(0.3)  # type: ignore[union-attr]

    def loss() -> Tensor:
        torch.manual_seed(1)
        return objective((x0, x1)).loss

    before = loss()
    before.backward()
    for parameters, sign in ((list(objective.drift.parameters()), 1), (list(correction.parameters()), -1)):  # type: ignore[union-attr]
        with torch.no_grad():
            for p in parameters:
                p.sub_(1e-3 * p.grad)
            after = loss().detach()
            for p in parameters:
                p.add_(1e-3 * p.grad)
        assert sign * float(before.detach() - after) > 0


class Bend(nn.Module):
    """A bend that is affine in the ends, with coefficients polynomial in time."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(4, 3))

    def forward(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        p = torch.cat([(2 * t - 1) ** k for k in range(4)], -1) @ self.c
        return p[:, :1] + p[:, 1:2] * x0 + p[:, 2:] * x1


def distance_from_bridge(drift: nn.Module, sigma: float) -> float:
    """Root mean square distance of a drift from the bridge's, over the bridge."""
    t = torch.linspace(0.02, 0.98, 25)[:, None, None]
    x = torch.linspace(-4, 5, 91)[:, None].expand(25, 91, 1)
    c = 0.5 * (math.sqrt(4 * VAR0 * VAR1 + sigma**4) - sigma**2)
    var = (1 - t) ** 2 * VAR0 + t**2 * VAR1 + t * (1 - t) * (2 * c + sigma**2)
    mean = (1 - t) * MEAN0 + t * MEAN1
    weight = torch.softmax(-0.5 * (x - mean) ** 2 / var, 1)
    with torch.no_grad():
        gap = drift(t.expand_as(x), x) - bridge_drift(t, x, sigma)
    return float((weight * gap**2).sum(1).mean().sqrt())


def test_the_game_converges_to_the_bridge_from_independent_pairs() -> None:
    """The drift is 2.3 in the mean square; that of the straight path of independent pairs, learnt alike, is 0.19 off the bridge's."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(5)
    game = MaxMinBridge(Polynomial(), Bend(), 0.5, rate=0.3)

    def pairs() -> tuple[Tensor, Tensor]:
        e = torch.randn(2, 512, 1, generator=g)
        return MEAN0 + VAR0**0.5 * e[0], MEAN1 + VAR1**0.5 * e[1]

    optimizer = torch.optim.Adam(game.parameter_groups(0.05))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000, 5e-4)
    for _ in range(1000):
        optimizer.zero_grad()
        game(pairs()).loss.backward()
        optimizer.step()
        schedule.step()
    assert distance_from_bridge(game.drift, 1.0) < 0.09


def test_the_interpolant_of_the_game_can_be_used() -> None:
    objective = MaxMinBridge(Polynomial(), bend(8), 0.5)
    x0, x1 = samples(5)
    it = objective.interpolant()
    torch.testing.assert_close(it.sample(1.0, x0, x1).detach(), x1)
    assert InterpolantRegression(it, velocity=Polynomial())((x0, x1)).bound == "surrogate"


def test_bad_input() -> None:
    with pytest.raises(errors.InvalidInputError, match="epsilon must be greater than 0"):
        MaxMinBridge(Polynomial(), bend(), 0.0)
    with pytest.raises(errors.InvalidInputError, match="a batch is"):
        MaxMinBridge(Polynomial(), bend(), 0.5)(torch.zeros(3, 1))
    with pytest.raises(errors.InvalidInputError, match="must be callable"):
        MaxMinBridge(Polynomial(), None, 0.5)  # type: ignore[arg-type]
