"""Digits move in straight lines, bounce as described, and never mix training and test."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from stochdyn.datasets import moving_digits
from stochdyn.datasets.digits import _glyphs, _tracks
from stochdyn.errors import InvalidInputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_seed_gives_the_same_videos() -> None:
    first, second = (moving_digits(3, 6, 32, generator=seeded(1)) for _ in range(2))
    assert first.shape == (3, 6, 1, 32, 32)
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert not torch.equal(first, moving_digits(3, 6, 32, generator=seeded(2)))


def test_every_frame_shows_the_digits_whole() -> None:
    # One digit never leaves the frame, so the light in it stays the same.
    videos = moving_digits(20, 30, 32, num_digits=1, generator=seeded()).to(torch.int64)
    light = videos.sum((-3, -2, -1))
    assert bool((light == light[:, :1]).all())
    assert bool((light > 0).all())


@pytest.mark.parametrize("deterministic", [False, True])
def test_velocity_changes_at_walls_only(deterministic: bool) -> None:
    room, speed = 18, 3
    track = _tracks(500, 60, room, speed, deterministic, seeded())
    assert int(track.min()) == 0
    assert int(track.max()) == room
    step = track.diff(dim=1)
    assert int(step.abs().max()) <= speed
    # Where neither component touches a wall at the end of a step, the next step is the same unless it is cut short.
    inside = ((track > 0) & (track < room)).all(-1)
    ahead = track[:, 1:-1] + step[:, :-1]
    free = inside[:, 1:-1] & ((ahead >= 0) & (ahead <= room)).all(-1)
    assert int(free.sum()) > 1000
    assert torch.equal(step[:, 1:][free], step[:, :-1][free])


def test_bounces_are_uniform_and_point_inwards() -> None:
    room, speed = 18, 3
    track = _tracks(4000, 40, room, speed, False, seeded())
    # A digit that was stopped at the left wall by a step of the first component, far from other walls.
    before, at, after = track[:, :-2], track[:, 1:-1], track[:, 2:]
    moved = at - before
    cut = (
        (at[..., 0] == 0)
        & (before[..., 0] > 0)
        & (before[..., 0] < speed)
        & (moved[..., 0] == -before[..., 0])
    )
    clear = (at[..., 1] > speed) & (at[..., 1] < room - speed)
    # Steps of exactly the distance reach the wall without crossing it and keep the velocity: the next position tells.
    bounced = cut & clear & (after[..., 0] > 0)
    inward = (after - at)[..., 0][bounced]
    sideways = (after - at)[..., 1][bounced]
    counts = torch.bincount(inward, minlength=speed + 1)[1:]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    counts = torch.bincount(sideways + speed, minlength=2 * speed + 1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_training_and_test_digits_are_different_ones() -> None:
    train, test = (_glyphs(8, split).flatten(1) for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    # Enlarged to the size they have, the digits are the data set's own, in its order.
    from sklearn.datasets import load_digits

    images = torch.as_tensor(load_digits().images).flatten(1) * 255 / 16
    assert float((torch.cat([train, test]).double() - images).abs().max()) <= 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_videos": 0},
        {"num_frames": 0},
        {"size": 4},
        {"digit_size": 32},
        {"split": "validation"},
        {"max_speed": 0},
    ],
)
def test_bad_input_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        moving_digits(**({"num_videos": 1, "num_frames": 3, "size": 32} | wrong))  # type: ignore[arg-type]
