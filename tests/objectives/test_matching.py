"""SDE matching: the diffusion of given marginals, and the divergence from a prior without simulation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.core import integrate
from stochdyn.errors import InvalidInputError
from stochdyn.fractional import MarkovNoise
from stochdyn.objectives import marginal_drift, matching_rate

D = torch.float64


def _marginal(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([torch.sin(t), 1 - t], -1), torch.cat([0.5 + 0.3 * t, 0.4 + 0.1 * torch.cos(t)], -1)


def _simulate(sde: sd.SDE, steps: int = 100, count: int = 3000) -> tuple[Tensor, Tensor]:
    """Simulate the diffusion that marginal_drift describes; returns states at 1."""
    ts = torch.linspace(0, 1, steps + 1, dtype=D)

    def drift(t: Tensor, x: Tensor) -> Tensor:
        when = t.reshape(1, 1).expand(x.shape[0], 1)
        mean, scale = _marginal(when)
        return marginal_drift(sde, _marginal, when, (x - mean) / scale)[1]

    g = torch.Generator().manual_seed(0)
    mean, scale = _marginal(torch.zeros(count, 1, dtype=D))
    x0 = mean + scale * torch.randn(count, 2, generator=g, dtype=D)
    dw = math.sqrt(1 / steps) * torch.randn(steps, count, 2, generator=g, dtype=D)
    controlled = sd.SDE(drift, sde._coefficient if sde.state_dependent else 0.7)
    return integrate(controlled, x0, ts, dw).x[-1], ts


@pytest.mark.parametrize("varying", [False, True])
def test_the_diffusion_has_the_marginals(varying: bool) -> None:
    """Also for a strength that depends on the state, where the divergence of G G^T has its part."""
    strength = (lambda t, x: sd.Diagonal(0.5 + 0.2 * torch.tanh(x))) if varying else 0.7
    x, _ = _simulate(sd.SDE(lambda t, x: -x, strength))
    mean, scale = _marginal(torch.ones(1, 1, dtype=D))
    error = scale / math.sqrt(3000)
    # the Euler scheme of 100 steps adds its own error
    assert bool(((x.mean(0) - mean).abs() < 4.5 * error + 0.015).all())
    assert bool(((x.std(0) - scale).abs() < 4.5 * error / math.sqrt(2) + 0.015).all())


def test_the_rate_is_the_divergence_of_gaussian_laws() -> None:
    """Against the closed form for two Ornstein-Uhlenbeck processes."""
    rate, other, strength = 1.5, 0.5, 0.8

    def marginal(t: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.exp(-rate * t)
        return mean, (
            0.1 * torch.exp(-2 * rate * t) + strength**2 / (2 * rate) * (1 - torch.exp(-2 * rate * t))
        ).sqrt()

    prior = sd.SDE(lambda t, x: -other * x, strength)
    count = 50000
    g = torch.Generator().manual_seed(0)
    t = (torch.arange(count, dtype=D)[:, None] + 0.5) / count
    rates = matching_rate(prior, marginal, t, torch.randn(count, 1, generator=g, dtype=D))
    mean, scale = marginal(t)
    exact = float((0.5 * ((rate - other) / strength) ** 2 * (mean**2 + scale**2)).mean())
    assert abs(float(rates.mean()) - exact) < 4.5 * float(rates.std()) / math.sqrt(count)


def test_the_true_marginals_of_the_prior_have_no_divergence() -> None:
    prior = sd.SDE(lambda t, x: -x, torch.tensor([1.0, 2.0], dtype=D))

    def marginal(t: Tensor) -> tuple[Tensor, Tensor]:
        variance = torch.tensor([0.5, 2.0], dtype=D) * (1 - torch.exp(-2 * t)) + 0.3 * torch.exp(-2 * t)
        return torch.exp(-t).expand(*t.shape[:-1], 2), variance.sqrt()

    t = torch.rand(50, 1, generator=torch.Generator().manual_seed(0), dtype=D)
    assert float(matching_rate(prior, marginal, t, torch.randn(50, 2).to(D)).max()) < 1e-20


def test_noise_with_memory_is_refused() -> None:
    sde = sd.SDE(lambda t, x: -x, 1.0, MarkovNoise(0.7))
    with pytest.raises(InvalidInputError, match="memory"):
        matching_rate(sde, _marginal, torch.rand(3, 1), torch.randn(3, 2))


def test_matrix_diffusion() -> None:
    matrix = torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=D)
    prior = sd.SDE(lambda t, x: -x, matrix)
    t = torch.full((3, 1), 0.3, dtype=D)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    x, drift = marginal_drift(prior, _marginal, t, noise)
    gap = torch.linalg.solve(matrix, (drift + x).T).T
    torch.testing.assert_close(matching_rate(prior, _marginal, t, noise), 0.5 * gap.square().sum(-1))
