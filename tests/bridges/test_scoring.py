"""Scores against distances known exactly, choice by held-out snapshots, and forecasts."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import (
    LinearDrift,
    SchrodingerBridge,
    Snapshot,
    Snapshots,
    forecast,
    leave_one_out,
    refine,
    sampling_floor,
    score,
)

F64 = torch.float64


def ou_snapshots(times, n=80, seed=0):
    """dX = (-0.8 X + 0.8) dt + 0.5 dW from N(3, 0.04), at equally likely points."""
    g = torch.Generator().manual_seed(seed)
    times = torch.tensor(times, dtype=F64)
    decay = torch.exp(-0.8 * times)
    std = (0.04 * decay**2 + 0.25 / 1.6 * (1 - decay**2)).sqrt()
    quantiles = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)
    return Snapshots(
        times,
        [
            (1 + 2 * d + s * quantiles)[torch.randperm(n, generator=g), None]
            for d, s in zip(decay, std, strict=True)
        ],
    )


def test_w1_and_w2_are_what_they_say():
    # a shift of the mean, with a known spread: W1 = E|.|, W2 = root of E|.|^2
    seen = Snapshot(0.0, torch.zeros(2, 1), torch.tensor([0.5, 0.5]))
    found = score(torch.tensor([[1.0], [3.0]]), seen)
    assert abs(found.w1 - 2.0) < 1e-6
    assert abs(found.w2 - math.sqrt(5.0)) < 1e-6


def test_weights_of_the_snapshot_count():
    seen = Snapshot(0.0, torch.tensor([[0.0], [1.0]]), torch.tensor([0.9, 0.1]))
    assert abs(score(torch.zeros(5, 1), seen).w1 - 0.1) < 1e-6


def test_a_gaussian_bridge_scores_as_a_sample_of_itself():
    one = torch.ones(1, 1, dtype=F64)
    law = sd.bridges.GaussianBridge(0 * one[0], one, one[0], one, 1.0, 1.0)

    seen = Snapshot(
        0.5,
        law.sample(torch.tensor([0.5], dtype=F64), 500, torch.Generator().manual_seed(3)).x[:, 0],
        torch.full((500,), 1 / 500, dtype=F64),
    )
    assert score(law, seen).w1 < 2.5 * sampling_floor(seen).w1


def test_the_floor_falls_as_the_root_of_the_size():
    g = torch.Generator().manual_seed(0)
    floors = []
    for n in (100, 1600):
        x = torch.randn(n, 1, dtype=F64, generator=g)
        floors.append(sampling_floor(Snapshot(0.0, x, torch.full((n,), 1 / n, dtype=F64)), num_samples=20).w1)
    assert 2.5 < floors[0] / floors[1] < 6.0


def test_held_out_snapshots_choose_the_family_that_made_them():
    snaps = ou_snapshots([0.0, 0.75, 1.5, 2.25, 3.0])
    held = leave_one_out(
        snaps,
        {
            "none": None,
            "linear": LinearDrift(1),
            "by hand": lambda train: refine(train, LinearDrift(1), diffusion=0.5),
        },
        diffusion=0.5,
    )
    assert held.best in ("linear", "by hand")
    assert held.mean("linear") < 0.7 * held.mean("none")
    assert abs(held.mean("linear") - held.mean("by hand")) < 1e-9
    assert [s.time for s in held.scores["none"]] == [0.75, 1.5, 2.25]
    table = held.table()
    assert "W1" in table
    assert "W2" in table
    assert "floor" in table


def test_forecasts_follow_the_refined_reference():
    fit = refine(ou_snapshots([0.0, 0.75, 1.5]), LinearDrift(1), diffusion=0.5)
    ts = torch.tensor([1.5, 2.5, 4.0], dtype=F64)
    n = 20000
    path = forecast(fit, ts, n, torch.Generator().manual_seed(0))
    a, b = fit.parameters["matrix"].item(), fit.parameters["shift"].item()
    start = fit.snapshots[2]
    for k, t in enumerate((1.5, 2.5, 4.0)):
        decay = math.exp(a * (t - 1.5))
        mean = decay * start.mean.item() + b * (decay - 1) / a
        var = decay**2 * start.covariance.item() + 0.25 * (decay**2 - 1) / (2 * a)
        x = path.x[:, k, 0]
        assert abs(x.mean().item() - mean) < 5 * math.sqrt(var / n) + 0.01
        assert abs(x.var().item() / var - 1) < 5 * math.sqrt(2 / n) + 0.03  # and the bias of Euler's scheme
    assert path.dw.shape == (n, 2, 1)
    assert abs(path.dw[:, 1].var().item() / 1.5 - 1) < 5 * math.sqrt(2 / n)
    alone = forecast(fit, torch.tensor([2.5], dtype=F64), 100)
    assert alone.x.shape == (100, 1, 1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: leave_one_out(s, {}), sd.errors.EmptyDataError, "methods"),
        (lambda s: leave_one_out(s, {"a": None}, indices=[0]), sd.errors.InvalidInputError, "between"),
        (lambda s: leave_one_out(s.select([0, 1]), {"a": None}), sd.errors.InvalidInputError, "between"),
        (lambda s: leave_one_out(s, {"a": None}, metric="emd"), sd.errors.InvalidInputError, "metric"),
        (
            lambda s: sampling_floor(Snapshot(0.0, torch.zeros(1, 1), torch.ones(1))),
            sd.errors.EmptyDataError,
            "halves",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(ou_snapshots([0.0, 1.0, 2.0], n=5))


def test_forecasts_into_the_past():
    fit = refine(ou_snapshots([0.0, 1.0, 2.0], n=10), LinearDrift(1), diffusion=0.5, max_iterations=1)
    with pytest.raises(sd.errors.TimeGridError, match="last snapshot"):
        forecast(fit, torch.tensor([1.0, 3.0]))


def test_holding_out_goes_on_where_it_stopped(tmp_path):
    clouds = Snapshots(
        [0.0, 1.0, 2.0, 3.0], [torch.linspace(-1, 1, 9)[:, None].double() + i for i in range(4)]
    )
    failing = {"on": True}

    def later(train):
        if failing["on"] and len(train) and float(train.times[1]) == 1.0:
            raise RuntimeError("stop here")
        return SchrodingerBridge(train, None, 0.3).solve()

    methods = {"none": None, "mine": later}
    whole = leave_one_out(
        clouds, {"none": None, "mine": lambda s: SchrodingerBridge(s, None, 0.3).solve()}, diffusion=0.3
    )
    with pytest.raises(RuntimeError, match="stop here") as stopped:
        leave_one_out(clouds, methods, diffusion=0.3, checkpoint=tmp_path)
    assert len(stopped.value.result.scores["none"]) == 2
    assert len(stopped.value.result.scores["mine"]) == 1
    with pytest.raises(sd.errors.ForeignCheckpointError, match="num_samples"):
        leave_one_out(clouds, methods, diffusion=0.3, num_samples=10, checkpoint=tmp_path, resume=True)
    failing["on"] = False
    with pytest.raises(sd.errors.ForeignCheckpointError, match="methods"):
        leave_one_out(clouds, {"none": None}, diffusion=0.3, checkpoint=tmp_path, resume=True)
    assert whole.best in methods
