"""Populations that grow, against branches whose shares are known and against the bridge without growth."""

from __future__ import annotations

import pytest
import torch

from stochdyn.bridges import DensityTrend, GrowingBridge, SchrodingerBridge, Snapshots, leave_one_out
from stochdyn.errors import ApproximationWarning, InvalidInputError, TimeGridError

F64 = torch.float64


def branches(shares, times):
    """Two branches far apart, at rest, of which the second has these shares."""
    g = torch.Generator().manual_seed(0)
    points = torch.cat([c + 0.5 * torch.randn(40, 2, generator=g, dtype=F64) for c in (-3.0, 3.0)])
    weights = [torch.tensor([1 - s, s], dtype=F64).repeat_interleave(40) for s in shares]
    return Snapshots(times, [points] * len(times), weights)


def logistic(times):
    return torch.sigmoid(torch.tensor(times, dtype=F64) - 1.5).tolist()


def share(law, n=4000):
    draws = law.sample(n, torch.Generator().manual_seed(1))
    middle = (draws.mean(-1).abs() < 1.5).double().mean()
    return float((draws.mean(-1) > 0).double().mean()), float(middle)


def test_without_growth_it_is_the_bridge():
    snaps = branches((0.2, 0.4, 0.7), (0.0, 1.0, 2.0))
    own = GrowingBridge(snaps, 0.0, diffusion=0.7).solve().marginal(1.4)
    other = SchrodingerBridge(snaps, None, 0.7).solve().marginal(1.4)
    assert torch.allclose(own.mean, other.mean, atol=1e-6)
    assert torch.allclose(own.covariance, other.covariance, atol=1e-6)


def test_a_branch_that_grows_swells_where_it_is():
    times = (0.0, 1.0, 3.0, 4.0)
    snaps = branches(logistic(times), times)
    trend = DensityTrend(snaps, degree=1, ridge=1e-3).fit()
    grown = GrowingBridge(snaps, 1.0, trend, diffusion=0.3).solve().marginal(2.0)
    right, middle = share(grown)
    # logistic growth: the log odds are linear in time, 0.5 at t=2; standard error of the draws 0.008
    assert abs(right - logistic((2.0,))[0]) < 0.03 + 0.02
    assert middle < 0.01
    moved = GrowingBridge(snaps, 0.0, diffusion=0.3).solve().marginal(2.0)
    assert (
        share(moved)[1] > 0.25
    )  # balanced transport carries half of the 0.44 over, and half-way is in the middle


def test_it_begins_and_ends_with_the_snapshots():
    snaps = branches((0.2, 0.7, 0.4), (0.0, 1.0, 2.0))
    law = GrowingBridge(snaps, 0.7, diffusion=0.5).solve()
    for t, near in ((1e-5, 0.0), (1 - 1e-5, 1.0), (1 + 1e-5, 1.0)):
        gap = law.marginal(t).mean - snaps[int(near)].mean
        assert gap.abs().max() < 1e-2
    assert torch.equal(law.marginal(1.0).weights, snaps.weights[1])


def test_the_rate_is_the_share_of_the_change_and_centred():
    times = (0.0, 1.0, 3.0, 4.0)
    snaps = branches(logistic(times), times)
    trend = DensityTrend(snaps, degree=1, ridge=1e-3).fit()
    ends = torch.tensor([[-3.0, -3.0], [3.0, 3.0]], dtype=F64)
    for kappa in (0.5, 1.0):
        rate = GrowingBridge(snaps, kappa, trend, diffusion=0.5).solve().growth_rate(2.0, ends)
        assert abs(float(rate[1] - rate[0]) - kappa) < 0.03 * kappa  # odds grow by one nat a unit of time


def test_leaving_snapshots_out_chooses_growth_where_branches_grow():
    times = (0.0, 1.0, 2.0, 3.0, 4.0)
    snaps = branches(logistic(times), times)
    methods = {
        f"{g:g}": lambda train, g=g: GrowingBridge(train, g, diffusion=0.3).solve() for g in (0.0, 0.5, 1.0)
    }
    held = leave_one_out(snaps, methods, metric="w1", num_samples=300)
    assert held.best == "1"


def test_a_weight_on_few_particles_is_said():
    snaps = branches((1e-4, 0.999, 1e-4), (0.0, 1.0, 2.0))
    trend = DensityTrend(snaps, ridge=1e-4).fit()
    # one particle stands for the whole second branch, which is nearly all there is in the middle
    points = snaps.samples[0][:41]
    law = GrowingBridge(Snapshots(snaps.times, [points] * 3), 1.0, trend, diffusion=3.0)
    with pytest.warns(ApproximationWarning, match="Growth leaves"):
        law.solve()


def test_bad_input():
    snaps = branches((0.2, 0.4), (0.0, 1.0))
    with pytest.raises(InvalidInputError, match="growth"):
        GrowingBridge(snaps, 1.5)
    with pytest.raises(InvalidInputError, match="trend"):
        GrowingBridge(snaps, 0.5, trend=3)
    with pytest.raises(InvalidInputError, match="snapshots"):
        GrowingBridge([torch.zeros(2, 1)])
    with pytest.raises(TimeGridError):
        GrowingBridge(snaps, diffusion=0.5).solve().marginal(1.5)
