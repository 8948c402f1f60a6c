"""Snapshots keep what they were given, and refuse what no bridge can be built on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import Snapshots


def _cloud(n: int, d: int = 2) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n))


def test_sizes_weights_and_spacing_may_differ() -> None:
    snaps = Snapshots(
        [0.0, 0.5, 3.0], [_cloud(3), _cloud(5), _cloud(4)], [np.ones(3), np.arange(5.0), 2 * torch.ones(4)]
    )
    assert snaps.sizes == (3, 5, 4)
    assert snaps.durations.tolist() == [0.5, 2.5]
    assert snaps.masses.tolist() == [3.0, 10.0, 8.0]
    for snap in snaps:
        assert torch.isclose(snap.weights.sum(), torch.tensor(1.0))
    torch.testing.assert_close(snaps.weights[1], torch.arange(5.0) / 10)


def test_moments_are_those_of_the_weighted_law() -> None:
    snap = Snapshots([0.0, 1.0], [torch.tensor([[0.0], [2.0]])] * 2, [torch.tensor([3.0, 1.0])] * 2)[1]
    assert snap.mean.item() == pytest.approx(0.5)
    assert snap.covariance.item() == pytest.approx(0.75)


def test_a_tensor_of_equal_snapshots_is_taken() -> None:
    snaps = Snapshots(torch.tensor([0.0, 1.0]), torch.zeros(2, 7, 3))
    assert snaps.sizes == (7, 7)
    assert snaps.dim == 3
    assert snaps.times.dtype == torch.float64


def test_numpy_arrays_keep_their_precision_and_integers_get_the_default() -> None:
    assert Snapshots([0, 1], [np.zeros((2, 1)), np.ones((2, 1))]).dtype == torch.float64
    assert Snapshots([0, 1], [np.zeros((2, 1), int), np.ones((2, 1), int)]).dtype == torch.float32


def test_holding_out_and_selecting_keep_masses() -> None:
    snaps = Snapshots([0.0, 1.0, 2.0], [_cloud(3)] * 3, [torch.full((3,), float(i + 1)) for i in range(3)])
    train, held = snaps.hold_out(-2)
    assert train.times.tolist() == [0.0, 2.0]
    assert [h.time for h in held] == [1.0]
    torch.testing.assert_close(train.masses, torch.tensor([3.0, 9.0]))


def test_bootstrap_replicates_have_the_multinomial_law_of_weights() -> None:
    own = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    sample = torch.arange(3.0, dtype=torch.float64)[:, None]
    snaps = Snapshots([0.0, 1.0], [sample, sample], [own, own])
    generator = torch.Generator().manual_seed(1)
    means = torch.stack([snaps.resample(generator)[0].mean for _ in range(2000)]).squeeze()
    spread = float(snaps[0].covariance) / 3
    assert abs(float(means.mean()) - 1.6) < 4.5 * (spread / 2000) ** 0.5
    assert float(means.var()) == pytest.approx(spread, rel=0.15)


def test_subsamples_are_distinct_particles() -> None:
    snaps = Snapshots([0.0, 1.0], [torch.arange(10.0)[:, None], torch.arange(4.0)[:, None]])
    small = snaps.subsample(6, torch.Generator().manual_seed(0))
    assert small.sizes == (6, 4)
    assert len(set(small.samples[0].flatten().tolist())) == 6


def test_standardised_snapshots_have_unit_moments() -> None:
    snaps, mean, scale = Snapshots([0.0, 1.0], [3 + 2 * _cloud(50), _cloud(20)]).standardised()
    weights = torch.cat(snaps.weights) / 2
    everything = torch.cat(snaps.samples)
    torch.testing.assert_close(weights @ everything, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights @ everything.square(), torch.ones(2), atol=1e-5, rtol=0)
    assert mean.shape == scale.shape == (2,)


@pytest.mark.parametrize(
    ("times", "samples", "weights", "error"),
    [
        ([0.0], [_cloud(3)], None, sd.errors.TimeGridError),
        ([], [], None, sd.errors.EmptyDataError),
        ([0.0, 1.0], [_cloud(3), torch.zeros(0, 2)], None, sd.errors.EmptyDataError),
        ([0.0, 0.0], [_cloud(3), _cloud(3)], None, sd.errors.TimeGridError),
        ([1.0, 0.0], [_cloud(3), _cloud(3)], None, sd.errors.TimeGridError),
        ([0.0, float("nan")], [_cloud(3), _cloud(3)], None, sd.errors.NonFiniteError),
        ([0.0, 1.0], [_cloud(3)], None, sd.errors.ShapeError),
        ([0.0, 1.0], [_cloud(3), _cloud(3, 3)], None, sd.errors.ShapeError),
        ([0.0, 1.0], [_cloud(3), torch.zeros(3)], None, sd.errors.ShapeError),
        ([0.0, 1.0], [_cloud(3), _cloud(3).double()], None, sd.errors.DtypeMismatchError),
        ([0.0, 1.0], [_cloud(3), torch.full((3, 2), float("nan"))], None, sd.errors.NonFiniteError),
        ([0.0, 1.0], [_cloud(3), _cloud(3)], [torch.ones(3)], sd.errors.ShapeError),
        ([0.0, 1.0], [_cloud(3), _cloud(3)], [torch.ones(3), torch.ones(2)], sd.errors.ShapeError),
        ([0.0, 1.0], [_cloud(3), _cloud(3)], [torch.ones(3), torch.zeros(3)], sd.errors.InvalidInputError),
        ([0.0, 1.0], [_cloud(3), _cloud(3)], [torch.ones(3), -torch.ones(3)], sd.errors.InvalidInputError),
    ],
)
def test_bad_snapshots_are_refused(times: list, samples: list, weights: list | None, error: type) -> None:
    with pytest.raises(error):
        Snapshots(times, samples, weights)


def test_the_first_bad_time_is_named() -> None:
    with pytest.raises(sd.errors.TimeGridError, match=r"times\[2\]=1 after times\[1\]=1"):
        Snapshots([0.0, 1.0, 1.0], [_cloud(3)] * 3)


def test_nothing_to_train_on_is_left() -> None:
    snaps = Snapshots([0.0, 1.0], [_cloud(3), _cloud(3)])
    with pytest.raises(sd.errors.TimeGridError):
        snaps.hold_out(0)
    with pytest.raises(sd.errors.InvalidInputError, match="no such snapshot"):
        snaps.hold_out(5)


def test_times_in_a_list_keep_all_their_digits():
    # Seconds counted in hours: single precision would move them.
    times = [k / 3600 for k in range(3)]
    assert Snapshots(times, [torch.zeros(2, 1)] * 3).times.tolist() == times
