"""Forecasts from a point: exact drifts give the exact law, with either noise; training; bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn import errors
from stochdyn.interpolants import FieldNetwork, Forecaster, ForecastRegression, PointSource
from tests.interpolants.truths import F64

MEAN, VARIANCE, SCALE = 1.5, 0.3, 0.7


class Exact(nn.Module):
    """The drift for a Gaussian successor, N(MEAN, VARIANCE) whatever the state."""

    def __init__(self, source: PointSource) -> None:
        super().__init__()
        self.source = source

    def forward(self, t: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        beta, rate = self.source._beta(t)
        variance = beta**2 * VARIANCE + SCALE**2 * (1 - t) ** 2 * t
        slope = beta * rate * VARIANCE - SCALE**2 * (1 - t) * t
        ratio = torch.where(variance > 0, slope / variance.clamp(min=1e-300), torch.zeros_like(variance))
        return rate * MEAN - x0 + ratio * (x - (1 - t) * x0 - beta * MEAN)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("noise", ["interpolant", "optimal"])
def test_forecasts_have_the_law_of_the_successor(power: int, noise: str) -> None:
    source, n = PointSource(SCALE, power), 20_000
    model = Forecaster(source, Exact(source))
    start = torch.tensor([[-1.0], [0.5]], dtype=F64)
    y = model.sample(start, n, 100, noise=noise, generator=torch.Generator().manual_seed(0))
    assert y.shape == (n, 2, 1)
    assert float((y.mean(0) - MEAN).abs().max()) < 5 * (VARIANCE / n) ** 0.5 + 0.002
    assert float((y.var(0) / VARIANCE - 1).abs().max()) < 5 * (2 / n) ** 0.5 + 0.01


@pytest.mark.parametrize("power", [1, 2])
def test_score_follows_from_the_drift(power: int) -> None:
    source = PointSource(SCALE, power)
    t, x, x0 = torch.tensor(0.4, dtype=F64), torch.randn(5, 1, dtype=F64), torch.full((5, 1), -1.0, dtype=F64)
    beta, _ = source._beta(t)
    variance = beta**2 * VARIANCE + SCALE**2 * 0.36 * 0.4
    expected = -(x - 0.6 * x0 - beta * MEAN) / variance
    drift = Exact(source)(t, x, x0)
    torch.testing.assert_close(source.score(t, x, x0, drift), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("power", [1, 2])
def test_optimal_noise_minimises_the_amplified_error(power: int) -> None:
    """By a search over g of the squared error of the drift over g^2."""
    source, t = PointSource(SCALE, power), torch.tensor(0.3, dtype=F64)
    x, x0 = torch.zeros(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    slope = source.score(t, x, x0, torch.ones(1, 1, dtype=F64)) - source.score(
        t, x, x0, torch.zeros(1, 1, dtype=F64)
    )
    g2 = torch.linspace(0.001, 3.0, 30_000, dtype=F64)
    amplified = (1 + 0.5 * (g2 - SCALE**2 * 0.49) * float(slope)).square() / g2
    assert float(source.optimal_noise(t) ** 2) == pytest.approx(float(g2[amplified.argmin()]), rel=1e-3)


def test_paths_leave_the_point_and_reach_the_successor() -> None:
    source = PointSource(2.0, 1)
    x0, x1, z = torch.zeros(3, 2), torch.ones(3, 2), torch.randn(3, 2)
    assert torch.equal(source.sample(0.0, x0, x1, z), x0)
    assert torch.equal(source.sample(1.0, x0, x1, z), x1)
    t, h = torch.full((3, 1), 0.4, dtype=F64), 1e-6
    # the rate is that of the process at fixed Brownian motion, so W = sqrt(t) z stays put
    w = z.double() * t.sqrt()
    ahead = source.sample(t + h, x0.double(), x1.double(), w / (t + h).sqrt())
    behind = source.sample(t - h, x0.double(), x1.double(), w / (t - h).sqrt())
    rate = source.target(t, x0.double(), x1.double(), z.double())
    torch.testing.assert_close(rate, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-6)


def test_training_forecasts_a_noisy_map() -> None:
    torch.manual_seed(0)
    x0 = torch.rand(4000, 1) * 4 - 2
    x1 = 0.5 * x0 + torch.where(torch.rand(4000, 1) < 0.5, 1.0, -1.0) + 0.1 * torch.randn(4000, 1)
    objective = ForecastRegression(PointSource(1.0), FieldNetwork(1, 48, 2, condition_dim=1))
    sd.fit(objective, (x0, x1), steps=800, lr=5e-3, batch_size=256, progress=False)
    y = objective.forecaster().sample(torch.tensor([[1.0]]), 2000, 50)[:, 0, 0]
    assert float(y.mean()) == pytest.approx(0.5, abs=0.15)
    assert 0.35 < float((y > 0.5).double().mean()) < 0.65
    # two branches, with little between them
    assert float(((y - 0.5).abs() < 0.5).double().mean()) < 0.1


def test_bad_input() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(errors.InvalidInputError, match="power is unknown"):
        PointSource(1.0, 3)
    with pytest.raises(errors.InvalidInputError, match="scale must be greater than 0"):
        PointSource(0.0)
    with pytest.raises(errors.TimeGridError, match="got 2"):
        PointSource().sample(2.0, x, x)
    objective = ForecastRegression(PointSource(), FieldNetwork(2, condition_dim=2))
    with pytest.raises(errors.InvalidInputError, match="a batch is"):
        objective(x)
    with pytest.raises(errors.ShapeError, match="one condition per state"):
        objective((x, x, torch.zeros(2, 1)))
    with pytest.raises(errors.InvalidInputError, match="'optimal'"):
        objective.forecaster().sample(x, noise="none")
    with pytest.raises(errors.InvalidInputError, match="source has the wrong type"):
        ForecastRegression(None, FieldNetwork(2))  # type: ignore[arg-type]
