"""Couplings: permutations against enumeration, plans at small regularisation, conditions, and batches made ahead."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn import errors
from stochdyn.interpolants import (
    CoupledBatches,
    EntropicCoupling,
    ExactCoupling,
    FieldNetwork,
    IndependentCoupling,
    Interpolant,
    InterpolantRegression,
)
from stochdyn.interpolants.training import as_coupling, coupling_cost


def eight_gaussians_and_moons(n: int = 256, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (n,), generator=g) * (math.pi / 4)
    x0 = 5 * torch.stack([angle.cos(), angle.sin()], -1) + 0.56 * torch.randn(n, 2, generator=g)
    angle, upper = math.pi * torch.rand(n, generator=g), torch.rand(n, generator=g) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return x0, 3 * (torch.stack([x, y], -1) + 0.2 * torch.randn(n, 2, generator=g)) - 1


@pytest.mark.parametrize("dim", [1, 2])
def test_the_exact_coupling_is_the_cheapest_permutation(dim: int) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        x0, x1 = torch.randn(6, dim, generator=g), torch.randn(6, dim, generator=g)
        cost = coupling_cost(x0, x1)
        best = min(sum(float(cost[i, p[i]]) for i in range(6)) for p in itertools.permutations(range(6)))
        partner = ExactCoupling().pair(x0, x1)
        assert sorted(partner.tolist()) == list(range(6))
        assert float(cost[torch.arange(6), partner].sum()) == pytest.approx(best, rel=1e-5)


def test_every_point_is_used_once() -> None:
    x0, x1 = eight_gaussians_and_moons()
    partner = ExactCoupling().pair(x0, x1)
    assert len(partner.unique()) == 256
    squared = float((x0 - x1[partner]).square().sum(-1).mean())
    assert squared == pytest.approx(sd.diagnostics.emd(x0, x1) ** 2, rel=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.2, 1.0])
def test_entropic_plans_keep_their_marginals_at_any_strength(sigma: float) -> None:
    """Where a plain Sinkhorn iteration underflows, the plan still is one."""
    x0, x1 = eight_gaussians_and_moons()
    coupling = EntropicCoupling(2 * sigma**2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = coupling.plan(x0, x1)
        partner = coupling.pair(x0, x1, generator=torch.Generator().manual_seed(0))
    coupling_matrix = plan.plan().double()
    for axis in (0, 1):
        assert float((coupling_matrix.sum(axis) - 1 / 256).abs().sum()) < 1e-3
    # all sources are used, and nearly the mean of the targets is kept
    assert len(partner) == 256
    assert len(partner.unique()) > 130
    error = (x1[partner] - x1.mean(0)).std(0) / 16
    assert bool(((x1[partner].mean(0) - x1.mean(0)).abs() < 4 * error).all())


def test_drawn_partners_follow_the_rows_of_the_plan() -> None:
    x0, x1 = eight_gaussians_and_moons(40)
    coupling = EntropicCoupling(20.0)
    rows = 40 * coupling.plan(x0, x1).plan()
    g = torch.Generator().manual_seed(3)
    counts = torch.zeros(40, 40)
    n = 400
    for _ in range(n):
        counts[torch.arange(40), coupling.pair(x0, x1, generator=g)] += 1
    spread = (n * rows * (1 - rows)).clamp(min=1e-3).sqrt()
    assert float(((counts - n * rows).abs() / (spread + 1)).max()) < 5


def test_warm_starts_find_the_same_plan() -> None:
    warm, cold = (
        EntropicCoupling(2.0, tolerance=1e-5),
        EntropicCoupling(2.0, tolerance=1e-5, warm_start=False),
    )
    for seed in range(3):
        x0, x1 = (x.double() for x in eight_gaussians_and_moons(seed=seed))
        a, b = warm.plan(x0, x1), cold.plan(x0, x1)
        assert float((a.plan() - b.plan()).abs().sum()) < 1e-3
        assert a.converged


def test_a_plan_out_of_reach_is_replaced_and_said() -> None:
    x0, x1 = eight_gaussians_and_moons(64)
    with pytest.warns(errors.ConvergenceWarning, match="exact permutation is used"):
        partner = EntropicCoupling(1e-4, tolerance=1e-9, max_iterations=20).pair(x0, x1)
    assert torch.equal(partner, ExactCoupling().pair(x0, x1))


def test_conditions_are_kept_apart_exactly_or_in_measure() -> None:
    g = torch.Generator().manual_seed(2)
    x0, x1 = torch.randn(60, 2, generator=g), torch.randn(60, 2, generator=g) + 1
    labels = torch.randint(3, (60,), generator=g)
    apart = ExactCoupling(math.inf).pair(x0, x1, labels)
    assert torch.equal(labels[apart], labels)
    for k in range(3):
        mine = labels == k
        own = ExactCoupling().pair(x0[mine], x1[mine])
        assert torch.equal(x1[mine][own], x1[apart][mine])
    shares = [
        float((labels[ExactCoupling(w).pair(x0, x1, labels)] == labels).double().mean())
        for w in (0.0, 1.0, 100.0)
    ]
    assert shares[0] < shares[1] < shares[2] == 1.0
    context = torch.randn(60, 1, generator=g)
    distance = [
        float((context[ExactCoupling(w).pair(x0, x1, context)] - context).square().mean())
        for w in (0.0, 1.0, 100.0)
    ]
    assert distance[0] > distance[1] > distance[2]


def test_one_plan_serves_several_steps_and_survives_a_restart() -> None:
    x0, x1 = eight_gaussians_and_moons(32)
    it = Interpolant("linear", "zero")
    objective = InterpolantRegression(it, velocity=FieldNetwork(2), coupling="ot", reuse=3)
    pairs = [objective.pairs((x0 + k, x1))[0] for k in range(5)]
    assert torch.equal(pairs[0], x0)
    assert torch.equal(pairs[1], x0)
    assert torch.equal(pairs[2], x0)
    assert torch.equal(pairs[3], x0 + 3)
    other = InterpolantRegression(it, velocity=FieldNetwork(2), coupling="ot", reuse=3)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.pairs((x0 + 9, x1))[0], x0 + 3)
    assert torch.equal(other.pairs((x0 + 9, x1))[0], x0 + 9)


def test_batches_made_ahead_depend_on_the_seed_alone() -> None:
    x0, x1 = eight_gaussians_and_moons(300)
    labels = torch.arange(300)
    runs = []
    for workers, ahead in ((1, 1), (3, 4)):
        batches = CoupledBatches(
            x0, x1, ExactCoupling(0.0), 16, labels, slices=2, ahead=ahead, workers=workers, seed=5
        )
        runs.append(list(itertools.islice(batches, 6)))
    for first, second in zip(*runs, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
    for batch in runs[0]:
        assert torch.equal(x1[batch[2]], batch[1])
    # one plan was made for two batches together
    both = [torch.cat([a, b]) for a, b in zip(runs[0][0], runs[0][1], strict=True)]
    squared = float((both[0] - both[1]).square().sum(-1).mean())
    assert squared == pytest.approx(sd.diagnostics.emd(both[0], both[1]) ** 2, rel=1e-5)


def test_batches_made_ahead_train_and_resume() -> None:
    x0, x1 = eight_gaussians_and_moons(100)
    objective = InterpolantRegression(Interpolant("linear", "zero"), velocity=FieldNetwork(2, 8, 1))
    result = sd.fit(objective, CoupledBatches(x0, x1, batch_size=32), steps=5, progress=False)
    assert bool(torch.isfinite(result.losses).all())


def test_bad_input() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(errors.InvalidInputError, match=r"'independent' \| 'ot'"):
        as_coupling("optimal", 1.0)
    with pytest.raises(errors.InvalidInputError, match="reg must be greater than 0"):
        EntropicCoupling(0.0)
    with pytest.raises(errors.InvalidInputError, match="needs reg"):
        EntropicCoupling().plan(x, x)
    with pytest.raises(errors.InvalidInputError, match="condition_weight must be at least 0"):
        ExactCoupling(-1.0)
    with pytest.raises(errors.NonFiniteError, match="x0"):
        ExactCoupling().pair(x * math.nan, x)
    with pytest.raises(errors.ShapeError, match="one condition per point"):
        ExactCoupling(1.0).pair(x, x, torch.zeros(3))
    with pytest.raises(errors.InvalidInputError, match="contexts can't be kept apart"):
        ExactCoupling(math.inf).pair(x, x, torch.zeros(4, 1))
    with pytest.raises(errors.EmptyDataError):
        CoupledBatches(x[:0], x)
    with pytest.raises(errors.ShapeError, match="one condition per end"):
        CoupledBatches(x, x, condition=torch.zeros(3))
    with pytest.raises(errors.InvalidInputError, match="slices"):
        CoupledBatches(x, x, slices=0)
    assert isinstance(as_coupling("independent", 1.0), IndependentCoupling)
    entropic = as_coupling("entropic", 0.5)
    assert isinstance(entropic, EntropicCoupling)
    assert entropic.reg == 0.5
