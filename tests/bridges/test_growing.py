"""Populations that grow, against branches whose shares are known and against the bridge without growth."""

from __future__ import annotations

import math

import pytest
import torch

from stochdyn.bridges import DensityTrend, GrowingBridge, SchrodingerBridge, Snapshots, leave_one_out
from stochdyn.errors import (
    ApproximationWarning,
    InvalidInputError,
    ShapeError,
    TimeGridError,
    UnavailableError,
)

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


def still(counts):
    """Two branches at rest, with so many cells on the left and on the right."""
    g = torch.Generator().manual_seed(0)
    clouds = [
        torch.cat(
            (torch.randn(a, 1, generator=g, dtype=F64) - 20, torch.randn(b, 1, generator=g, dtype=F64) + 20)
        )
        * 0.2
        for a, b in counts
    ]
    return Snapshots([0.0, 2.0], clouds)


def test_rates_per_cell_are_taken_as_they_are():
    # the right branch triples against the left one within two units of time, and both stand still
    snaps = still([(60, 60), (30, 90)])
    rates = torch.cat((torch.zeros(60), torch.full((60,), 0.5 * math.log(3.0)))).double()
    law = GrowingBridge(snaps, [rates], diffusion=0.5).solve()
    ends = torch.tensor([[-4.0], [4.0]], dtype=F64)
    for t in (0.2, 1.0, 1.8):
        found = law.growth_rate(t, ends)
        assert float(found[1] - found[0]) == pytest.approx(0.5 * math.log(3.0), abs=1e-3)
        assert law.velocity(t, ends).abs().max() < 1.0  # nobody crosses the eight units between the branches
        weight = law.marginal(t)
        right = float(weight.weights @ (weight.means[:, 0] > 0).double())
        odds = 3.0 ** (t / 2)
        assert right == pytest.approx(odds / (1 + odds), abs=2e-3)
    plan = law.bridge.plans[0].plan()
    assert float(plan[:60, 30:].sum()) < 1e-3
    drawn = (law.sample([0.0, 1.0, 2.0], 4000, 0).x[..., 0] > 0).double().mean(0)
    wanted = torch.tensor([0.5, math.sqrt(3) / (1 + math.sqrt(3)), 0.75], dtype=F64)
    assert bool(((drawn - wanted).abs() < 5 * 0.5 / 4000**0.5).all())


def test_rates_are_a_prior_where_marginals_are_relaxed():
    snaps = still([(60, 60), (30, 90)])
    half = torch.cat((torch.zeros(60), torch.full((60,), 0.25 * math.log(3.0)))).double()
    ends = torch.tensor([[-4.0], [4.0]], dtype=F64)
    gaps = []
    for rates in (torch.zeros(60 * 2, dtype=F64), half):
        law = GrowingBridge(snaps, [rates], diffusion=0.5, relaxation=20.0).solve()
        found = law.growth_rate(1.0, ends)
        gaps.append(float(found[1] - found[0]))
        assert law.marginal(2.0).mean[0] == pytest.approx(float(snaps[1].mean[0]))
    # nobody can move that far, so the coupling corrects a prior that says too little
    assert gaps == pytest.approx([0.5 * math.log(3.0)] * 2, abs=0.03)


def test_counts_are_growth_of_the_whole():
    snaps = still([(30, 30), (30, 30)])
    counted = Snapshots(snaps.times, snaps.samples, [torch.full((60,), c / 60) for c in (100.0, 800.0)])
    law = GrowingBridge(counted, [torch.zeros(60)], diffusion=0.5).solve()
    assert law.growth_rate(1.0, snaps.samples[0]).mean() == pytest.approx(math.log(8) / 2, abs=1e-6)


@pytest.mark.parametrize("relaxation", [None, 20.0])
@pytest.mark.parametrize("factor", [None, 4.0])
def test_rates_per_cell_are_absolute_and_counts_shift_them_evenly(relaxation, factor) -> None:
    # nobody crosses; the right branch triples in two units of time, the left one stands still, and counts say how much more there is
    snaps = still([(60, 60), (30, 90)])
    rates = torch.cat((torch.zeros(60), torch.full((60,), 0.5 * math.log(3.0)))).double()
    beyond = 0.0
    if factor is not None:
        weights = [torch.full((120,), c / 120, dtype=F64) for c in (100.0, 100.0 * 2.0 * factor)]
        snaps, beyond = Snapshots(snaps.times, snaps.samples, weights), 0.5 * math.log(factor)
    law = GrowingBridge(snaps, [rates], diffusion=0.5, relaxation=relaxation).solve()
    ends = torch.tensor([[-4.0], [4.0]], dtype=F64)
    wanted = torch.tensor([beyond, beyond + 0.5 * math.log(3.0)], dtype=F64)
    # the middle of the interval; where marginals are relaxed the whole grows evenly in time, which the rates alone don't
    for t in (0.2, 1.0, 1.8) if relaxation is None else (1.0,):
        torch.testing.assert_close(law.growth_rate(t, ends), wanted, atol=0.02, rtol=0.0)
    drawn = law.bootstrap_growth(1.0, ends, 60, 0).mean(0)
    assert float((drawn - wanted).abs().max()) < 0.1


def test_bad_rates():
    snaps = still([(3, 3), (3, 3)])
    with pytest.raises(ShapeError, match="one rate per cell"):
        GrowingBridge(snaps, [torch.zeros(4)])
    with pytest.raises(ShapeError, match="one array of rates per snapshot"):
        GrowingBridge(snaps, [torch.zeros(6)] * 3)
    with pytest.raises(InvalidInputError, match="growth"):
        GrowingBridge(snaps, "much")
    with pytest.raises(InvalidInputError, match="trend"):
        GrowingBridge(snaps, [torch.zeros(6)], DensityTrend(snaps))


@pytest.mark.parametrize("growth", [0.0, 0.5, None, "rates"])
def test_lineages_of_a_growing_population(growth) -> None:
    snaps = still([(30, 30), (20, 40)])
    rates = [torch.cat((torch.zeros(30), torch.full((30,), 0.5)))]
    law = GrowingBridge(snaps, rates if growth == "rates" else growth, diffusion=0.5).solve()
    whole = law.coupling(0, 1)
    assert float(whole.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(whole, law.bridge.coupling(0, 1))
    matrix = law.transition_matrix(0, 1)
    torch.testing.assert_close(matrix.sum(1), torch.ones(60, dtype=F64))
    torch.testing.assert_close(law.descendants([0, 1], 0, 1), matrix[:2].mean(0))
    classes, fates = law.fates(["left"] * 20 + ["right"] * 40)
    assert classes == ["left", "right"]
    torch.testing.assert_close(fates[:, 0], matrix[:, :20].sum(1))
    if (
        growth == "rates" or growth is None
    ):  # the branches stand still; growth makes what their shares change by
        assert float(fates[:30, 0].min()) > 0.99
    else:
        moved = SchrodingerBridge(snaps, diffusion=0.5).solve()
        if growth == 0.0:
            torch.testing.assert_close(whole, moved.coupling(0, 1))
    assert law.ancestors([0], 0, 1).sum() == pytest.approx(1.0)


def test_redrawn_growth_scatters_as_the_shares_of_the_branches_do():
    # nobody crosses, so the difference of the rates is that of the log odds of two binomials over two units of time
    snaps = still([(30, 30), (15, 45)])
    law = GrowingBridge(snaps, diffusion=0.5).solve()
    ends = torch.tensor([[-4.0], [4.0]], dtype=F64)
    draws = law.bootstrap_growth(1.0, ends, 150, generator=0)
    assert draws.shape == (150, 2)
    gaps = draws[:, 1] - draws[:, 0]
    exact = math.sqrt(1 / (60 * 0.25) + 1 / (60 * 0.1875)) / 2
    # the standard deviation of 150 draws is known to 6 %, and that of log odds of 60 cells is a few per cent above its first order
    assert float(gaps.std()) == pytest.approx(exact, rel=0.25)
    found = law.growth_rate(1.0, ends)
    assert float(gaps.mean()) == pytest.approx(float(found[1] - found[0]), abs=5 * exact / 150**0.5)
    assert torch.equal(law.bootstrap_growth(1.0, ends, 3, 0), law.bootstrap_growth(1.0, ends, 3, 0))


def test_errors_of_counts_are_in_the_growth_of_the_whole():
    snaps = still([(10, 10), (10, 10)])
    law = GrowingBridge(snaps, [torch.zeros(20)], diffusion=0.5).solve()
    exact = law.bootstrap_growth(1.0, snaps.samples[0], 5, 0)
    assert exact.mean(1) == pytest.approx([0.0] * 5, abs=0.1)
    whole = law.bootstrap_growth(1.0, torch.tensor([[-4.0]], dtype=F64), 100, 0, count_error=0.1)
    # log of the ratio of two counts, over two units of time; 100 draws know it to 7 %
    assert float(whole.std()) == pytest.approx(0.1 * math.sqrt(2) / 2, rel=0.25)


def test_redrawn_growth_needs_a_solution_and_keeps_the_share():
    snaps = still([(6, 6), (3, 9)])
    with pytest.raises(UnavailableError, match="solved"):
        GrowingBridge(snaps, diffusion=0.5).bootstrap_growth(1.0, snaps.samples[0])
    law = GrowingBridge(snaps, 0.0, diffusion=3.0).solve()
    assert not law.bootstrap_growth(1.0, snaps.samples[0], 2, 0).any()  # no share of growth, no growth
    with pytest.raises(InvalidInputError, match="count_error"):
        law.bootstrap_growth(1.0, snaps.samples[0], count_error=-1.0)
