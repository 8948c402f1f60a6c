"""Bridge matching against Gaussian bridges in closed form; resuming; bad input."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import BridgeMatching, GaussianBridge, Snapshots
from stochdyn.core import bridge_drift
from stochdyn.testing import check_repetition, check_units

F64 = torch.float64


def gaussian_snapshots(dim, n=50000, seed=0, times=(0.0, 1.0)):
    g = torch.Generator().manual_seed(seed)
    clouds = []
    for k in range(len(times)):
        x = torch.randn(n, dim, generator=g)
        x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.mT).reshape(dim, dim))).mT
        clouds.append(x + 0.1 * (-1) ** (k + 1))  # moments are exact
    return Snapshots(list(times), clouds)


def test_the_coupling_of_dsbm_s_benchmark():
    match = BridgeMatching(gaussian_snapshots(5), 1.0, width=0, num_pairs=2048, refresh=40, num_steps=15)
    result = match.fit(800, progress=False)
    assert result.bound == "surrogate"
    x, y = match.couple(0, 50000, torch.Generator().manual_seed(1))
    cross = ((x - x.mean(0)) * (y - y.mean(0))).mean().item()
    assert abs(cross / ((math.sqrt(5) - 1) / 2) - 1) < 0.04
    assert abs(y.var(0).mean().item() - 1) < 0.04
    assert abs(y.mean().item() - 0.1) < 0.02


def test_an_ou_reference_and_unequal_intervals():
    snaps = gaussian_snapshots(1, times=(0.0, 0.5, 2.0))
    match = BridgeMatching(snaps, 0.8, rate=0.7, mean=0.3, width=0, num_pairs=2048, refresh=40, num_steps=15)
    match.fit(800, progress=False)
    one = torch.ones(1, 1, dtype=F64)
    for i, horizon in enumerate((0.5, 1.5)):
        sign = -0.1 if i == 0 else 0.1
        exact = GaussianBridge(
            sign * one[0], one, -sign * one[0], one, 0.8, horizon, -0.7 * one, 0.21 * one[0]
        )
        x, y = match.couple(i, 50000, torch.Generator().manual_seed(i))
        cross = ((x - x.mean(0)) * (y - y.mean(0))).mean().item()
        assert abs(cross / exact.cross_covariance.item() - 1) < 0.06
        grid = torch.linspace(-2, 2, 9)[:, None]
        t = snaps.times[i].item() + 0.5 * horizon
        gap = match.drift(t, grid) - exact.drift(0.5 * horizon, grid.double()).float()
        assert gap.abs().max() < 0.25


def test_trajectories_go_through_the_snapshots_in_order():
    snaps = Snapshots([0.0, 1.0, 2.0], [0.1 * torch.randn(500, 2) + k**2 for k in range(3)])
    match = BridgeMatching(snaps, 0.3, width=0, num_pairs=512, batch_size=128, refresh=20, num_steps=10)
    match.fit(200, progress=False)
    ts = torch.tensor([0.0, 0.5, 1.0, 1.7, 2.0])
    x = match.sample(ts, 400, torch.Generator().manual_seed(0)).x
    assert x.shape == (400, 5, 2)
    for t, centre in ((0, 0.0), (2, 1.0), (4, 4.0)):
        assert (x[:, t].mean(0) - centre).abs().max() < 0.15
    same = match.sample(ts, 400, torch.Generator().manual_seed(0)).x
    assert torch.equal(x, same)
    assert torch.equal(match.sample(ts[:2], 400, torch.Generator().manual_seed(0)).x[:, 0], x[:, 0])


def test_before_training_the_law_is_the_reference():
    snaps = Snapshots([0.0, 2.0], [torch.randn(10, 1), torch.randn(10, 1)])
    match = BridgeMatching(snaps, 0.5, rate=0.7, mean=0.3, num_pairs=16)
    x = torch.randn(5, 1)
    assert torch.allclose(match.regression.drift(0, 0, 0.5, x), 0.7 * (0.3 - x))
    with pytest.raises(sd.errors.UnavailableError, match="solve"):
        match.drift(1.0, x)


def test_the_target_has_the_drift_of_the_pinned_process_for_its_mean():
    # with a single pair the mixture is one bridge, and its drift is known
    snaps = Snapshots([0.0, 1.0], [torch.zeros(1, 1), torch.ones(1, 1)])
    match = BridgeMatching(snaps, 1.0, width=0, num_pairs=64, batch_size=64, refresh=10**6)
    match.fit(600, progress=False)
    for s in (0.1, 0.4, 0.7):
        x = torch.tensor([[s - 0.3], [s + 0.3]])
        exact = bridge_drift(torch.tensor(0.0), torch.tensor(1 - s), x, torch.ones(1))
        assert (match.drift(s, x) - exact).abs().max() < 0.25


def test_an_interrupted_run_continues_to_the_same_bits(tmp_path):
    def build():
        torch.manual_seed(0)
        snaps = Snapshots([0.0, 1.0], [torch.randn(50, 2), torch.randn(50, 2) + 1])
        return BridgeMatching(snaps, 1.0, width=8, num_pairs=64, batch_size=32, refresh=7, num_steps=4)

    options = {"scheduler": None, "progress": False}
    whole = build()
    whole.fit(30, **options)
    first = build()
    first.fit(15, checkpoint=tmp_path, ema=None, **options)
    # averages are of the run; without them the weights are the state
    again = build()
    again.fit(30, checkpoint=tmp_path, resume=True, ema=None, **options)
    straight = build()
    straight.fit(30, ema=None, **options)
    for a, b in zip(again.state_dict().values(), straight.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sinkhorn_start_is_nearer_to_the_bridge():
    snaps = gaussian_snapshots(1, n=2000)
    match = BridgeMatching(snaps, 1.0, num_pairs=2048, coupling="sinkhorn")
    torch.manual_seed(0)
    match.regression.renew(first=True)
    x, y = match.regression.pairs[0, 0, 0], match.regression.pairs[0, 1, 0]
    cross = ((x - x.mean(0)) * (y - y.mean(0))).mean().item()
    assert abs(cross - (math.sqrt(5) - 1) / 2) < 5 * 1.2 / 2048**0.5


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"diffusion": 0.0}, sd.errors.DiffusionError),
        ({"diffusion": 1.0, "coupling": "ot"}, sd.errors.InvalidInputError),
        ({"diffusion": 1.0, "num_pairs": 0}, sd.errors.InvalidInputError),
        ({"diffusion": 1.0, "width": -1}, sd.errors.InvalidInputError),
        ({"diffusion": 1.0, "rate": float("nan")}, sd.errors.NonFiniteError),
    ],
)
def test_bad_input(options, error):
    with pytest.raises(error):
        BridgeMatching(Snapshots([0.0, 1.0], [torch.zeros(2, 1), torch.ones(2, 1)]), **options)


def test_times_outside():
    match = BridgeMatching(
        Snapshots([0.0, 1.0], [torch.zeros(2, 1), torch.ones(2, 1)]), 1.0, num_pairs=4, width=0
    ).solve(1, progress=False)
    with pytest.raises(sd.errors.TimeGridError, match="inside"):
        match.sample(torch.tensor([0.0, 1.5]), 3)
    with pytest.raises(sd.errors.InvalidInputError, match="interval"):
        match.couple(1, 5)


def test_affine_drifts_go_on_where_they_stopped(tmp_path):
    """Without networks the renewals are the run: a checkpoint holds them, and the same bits come out."""

    def make():
        clouds = [torch.randn(40, 2, generator=torch.Generator().manual_seed(k)) + k for k in range(3)]
        return BridgeMatching(
            Snapshots([0.0, 1.0, 2.0], clouds),
            0.5,
            width=0,
            num_pairs=64,
            batch_size=32,
            refresh=10,
            num_steps=4,
        )

    whole = make().fit(60, progress=False)
    make().fit(30, checkpoint=tmp_path, progress=False)
    again = make()
    result = again.fit(60, checkpoint=tmp_path, resume=True, progress=False)
    assert torch.equal(result.losses, whole.losses)
    assert result.steps == whole.steps == 6
    assert torch.equal(again.regression.pairs, whole.objective.pairs)
    with pytest.raises(sd.errors.InvalidInputError, match="lr does nothing for affine"):
        make().fit(30, lr=0.1)


def test_a_seed_is_all_the_randomness_of_a_training():
    def answer():
        match = BridgeMatching(
            gaussian_snapshots(2, 40), 0.8, width=8, num_pairs=64, batch_size=16, refresh=5
        )
        return match.solve(steps=5, progress=False).drift(0.3, torch.zeros(1, 2))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    check_repetition(answer)
    assert torch.equal(before, torch.get_rng_state())


def test_training_has_no_unit_of_length_or_time():
    def answer(length, time):
        snaps = gaussian_snapshots(2, 40)
        snaps = Snapshots(snaps.times * time, [x.double() * length for x in snaps.samples])
        match = BridgeMatching(
            snaps, 0.8 * length / time**0.5, width=8, num_pairs=64, batch_size=16, refresh=5
        ).solve(steps=5, progress=False)
        return match.drift(0.3 * time, torch.full((1, 2), 0.2 * length, dtype=F64)) * time / length

    check_units(lambda factor: answer(factor, 1.0), factors=(1e-6, 1e6), rtol=1e-4)
    check_units(lambda factor: answer(1.0, factor), factors=(1e-6, 1e6), rtol=1e-4)
