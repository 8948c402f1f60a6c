"""Ratios of densities against those of known populations."""

from __future__ import annotations

import pytest
import torch

from stochdyn.bridges import DensityTrend, Snapshots
from stochdyn.errors import InvalidInputError, TimeGridError, UnavailableError

F64 = torch.float64


def quantiles(n, mean):
    """Equally likely points of N(mean, 1)."""
    return (torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n) + mean)[:, None]


def moving(means, times, n=400):
    return Snapshots(times, [quantiles(n, m) for m in means])


def test_the_ratio_of_moving_gaussians_is_linear_in_the_state():
    # log N(x; m, 1) - log N(x; 0, 1) = m x - m^2/2: a known slope; ridge and features bias it a little
    trend = DensityTrend(moving((0.0, 0.4, 0.8), (0.0, 1.0, 2.0)), degree=1, ridge=1e-3).fit()
    x = torch.tensor([[-0.6], [1.4]], dtype=F64)
    for t, s in ((2.0, 0.0), (1.5, 0.5)):
        value = trend.log_ratio(x, t, s)
        assert abs(float(value[1] - value[0]) / 2 - 0.4 * (t - s)) < 0.03


def test_between_snapshots_the_whole_course_counts():
    # shares of a branch 0.2, 0.5, 0.5, ?, 0.2: log odds on a parabola, which the neighbours alone don't tell
    odds = [-((t - 2.0) ** 2) / 2 + 1 for t in (0.0, 1.0, 3.0, 4.0)]
    points = torch.cat((quantiles(50, -6.0), quantiles(50, 6.0)))
    weights = [torch.tensor([1.0, float(torch.tensor(o).exp())]).repeat_interleave(50) for o in odds]
    snaps = Snapshots([0.0, 1.0, 3.0, 4.0], [points] * 4, weights)
    trend = DensityTrend(snaps, degree=2, ridge=1e-3).fit()
    ends = torch.tensor([[-6.0], [6.0]], dtype=F64)
    low, high = trend.log_ratio(ends, 2.0, 1.0)
    assert abs(float(high - low) - 0.5) < 0.03  # 1 at t=2 less 0.5 at t=1; a straight line gives 0


def test_there_and_back_is_nothing_and_rates_add_up():
    trend = DensityTrend(moving((0.0, 0.5, 0.6, 1.0), (0.0, 1.0, 2.0, 3.0), 100)).fit()
    x = torch.linspace(-1, 2, 7, dtype=F64)[:, None]
    assert torch.allclose(trend.log_ratio(x, 1.3, 0.4), -trend.log_ratio(x, 0.4, 1.3), atol=1e-12)
    grid = torch.linspace(0, 3, 61, dtype=F64)
    middle = 0.5 * (grid[1:] + grid[:-1])
    total = sum(trend.rate(x, float(t)) * 0.05 for t in middle)
    assert torch.allclose(total, trend.log_ratio(x, 3.0, 0.0), atol=1e-5)


def test_weights_stand_for_repeated_particles():
    snaps = moving((0.0, 1.0), (0.0, 1.0), 60)
    twice = Snapshots(snaps.times, [torch.cat((c, c[:30])) for c in snaps.samples])
    weighted = Snapshots(snaps.times, snaps.samples, [torch.tensor([2.0] * 30 + [1.0] * 30)] * 2)
    x = torch.tensor([[-1.0], [1.0]], dtype=F64)
    # the same likelihood but for its total of 90 or 60 particles, made up for by the ridge
    one = DensityTrend(twice, length=2.0, ridge=0.3).fit().log_ratio(x, 1.0, 0.0)
    other = DensityTrend(weighted, length=2.0, ridge=0.2).fit().log_ratio(x, 1.0, 0.0)
    assert torch.allclose(one, other, atol=1e-4)


def test_bad_input():
    snaps = moving((0.0, 1.0), (0.0, 1.0), 20)
    with pytest.raises(InvalidInputError, match="more snapshots"):
        DensityTrend(snaps, degree=2)
    with pytest.raises(InvalidInputError, match="ridge"):
        DensityTrend(snaps, ridge=0.0)
    with pytest.raises(InvalidInputError, match="Snapshots"):
        DensityTrend([torch.zeros(2, 1)])
    with pytest.raises(UnavailableError, match="fit"):
        DensityTrend(snaps).log_ratio(snaps.samples[0], 1.0, 0.0)
    with pytest.raises(TimeGridError, match="between the snapshots"):
        DensityTrend(snaps).fit().log_ratio(snaps.samples[0], 1.5, 0.0)


def test_particles_of_weight_zero_are_not_there() -> None:
    g = torch.Generator().manual_seed(0)
    clouds = [torch.randn(n, 2, generator=g, dtype=torch.float64) + k for k, n in enumerate((20, 30))]
    more = [torch.cat([x, torch.full((7, 2), 50.0, dtype=torch.float64)]) for x in clouds]
    weights = [torch.cat([torch.ones(len(x)), torch.zeros(7)]).double() for x in clouds]
    x = clouds[0][:5]
    alone = DensityTrend(Snapshots([0.0, 1.0], clouds)).fit().rate(x, 0.5)
    torch.testing.assert_close(
        DensityTrend(Snapshots([0.0, 1.0], more, weights)).fit().rate(x, 0.5), alone, rtol=1e-4, atol=1e-5
    )
