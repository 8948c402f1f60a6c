"""Videos of handwritten digits that bounce about in a frame, at random or like balls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stochdyn._caching import cached
from stochdyn._checks import as_generator, check_bool, check_choice, check_positive_int
from stochdyn.errors import InvalidInputError

__all__ = ["moving_digits"]

#: Of scikit-learn's 1797 digits, the last 300 are kept for testing.
_TEST_DIGITS = 300


def moving_digits(
    num_videos: int,
    num_frames: int = 25,
    size: int = 64,
    *,
    num_digits: int = 2,
    digit_size: int | None = None,
    max_speed: int | None = None,
    deterministic: bool = False,
    split: str = "train",
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Simulate videos of digits that move in straight lines and bounce off the walls of the frame.

    A digit at the integer position :math:`p` with velocity :math:`v` moves to :math:`p+v`. Where it would leave
    the frame in a direction, it stops at the wall; then in the *stochastic* version both components of its
    velocity are drawn anew, uniformly from the integers up to ``max_speed``, the one at the wall pointing inwards, and in the
    *deterministic* version that component changes its sign. Where digits overlap, their intensities add up to at most 1.

    Args:
        num_videos: The number of videos, ``n``.
        num_frames: The number of frames per video.
        size: The height and width in pixels.
        num_digits: The number of digits in each video.
        digit_size: The height and width of a digit; ``7 size / 16`` if None (28 of 64 pixels).
        max_speed: The largest step per frame, in pixels; ``size / 16`` if None.
        deterministic: Whether digits bounce like balls.
        split: Which handwritten digits: ``"train"`` or ``"test"`` (the last 300 of the data set).
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        ``(n, num_frames, 1, size, size)`` uint8, 0 to 255.

    Raises:
        InvalidInputError: For sizes that aren't positive integers, digits larger than the frame, or an
            unknown split.

    Example:
        >>> videos = moving_digits(3, num_frames=5, size=32, generator=0)
        >>> videos.shape, videos.dtype
        (torch.Size([3, 5, 1, 32, 32]), torch.uint8)

    Reference:
        Dynamics after the stochastic moving MNIST of E. Denton and R. Fergus, Stochastic video generation with
        a learned prior, ICML 2018. Digits: E. Alpaydin and C. Kaynak, Optical recognition of handwritten
        digits, UCI 1998, as shipped by scikit-learn (8 x 8 pixels, enlarged here).
    """
    for name, value in (("num_videos", num_videos), ("num_frames", num_frames), ("num_digits", num_digits)):
        check_positive_int(value, name)
    check_positive_int(size, "size", 8)
    check_choice(split, ("train", "test"), "split")
    check_bool(deterministic, "deterministic")
    source = as_generator(generator)
    digit_size = 7 * size // 16 if digit_size is None else digit_size
    max_speed = max(1, size // 16) if max_speed is None else max_speed
    check_positive_int(digit_size, "digit_size")
    check_positive_int(max_speed, "max_speed")
    free = size - digit_size
    if free < 1:
        raise InvalidInputError(
            "the digits don't fit the frame", got=f"digit_size={digit_size}", expected=f"less than {size}"
        )
    glyphs = _glyphs(digit_size, split)
    count = num_videos * num_digits
    chosen = torch.randint(len(glyphs), (count,), generator=source)
    tracks = _tracks(count, num_frames, free, max_speed, deterministic, source)
    # One assignment writes every digit of every frame; digits of a video overlap, so each has a layer of its own.
    layers = torch.zeros(count, num_frames, size, size, dtype=torch.uint8)
    rows = tracks[..., 0, None, None] + torch.arange(digit_size)[:, None]
    columns = tracks[..., 1, None, None] + torch.arange(digit_size)
    which, when = torch.arange(count)[:, None, None, None], torch.arange(num_frames)[:, None, None]
    layers[which, when, rows, columns] = glyphs[chosen][:, None]
    videos = layers.reshape(num_videos, num_digits, num_frames, size, size).sum(1, dtype=torch.int16)
    return videos.clamp_(max=255).to(torch.uint8).unsqueeze(2)


def _tracks(
    count: int,
    num_frames: int,
    free: int,
    max_speed: int,
    deterministic: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the positions ``(count, num_frames, 2)`` of all digits, each in ``[0, free]``."""
    position = torch.randint(free + 1, (count, 2), generator=generator)
    velocity = torch.randint(-max_speed, max_speed + 1, (count, 2), generator=generator)
    inward = torch.randint(1, max_speed + 1, (num_frames, count, 2), generator=generator)
    any_way = torch.randint(-max_speed, max_speed + 1, (num_frames, count, 2), generator=generator)
    track = []
    for n in range(num_frames):
        track.append(position)
        ahead = position + velocity
        low, high = ahead < 0, ahead > free
        position = ahead.clamp(0, free)
        if deterministic:
            velocity = torch.where(low | high, -velocity, velocity)
        else:
            fresh = torch.where(low, inward[n], torch.where(high, -inward[n], any_way[n]))
            velocity = torch.where((low | high).any(-1, keepdim=True), fresh, velocity)
    return torch.stack(track, 1)


@cached(4)
def _glyphs(digit_size: int, split: str) -> Tensor:
    """Return the enlarged digits ``(n, digit_size, digit_size)``, uint8."""
    from sklearn.datasets import load_digits

    images = torch.as_tensor(load_digits().images, dtype=torch.float32) / 16.0
    chosen = images[:-_TEST_DIGITS] if split == "train" else images[-_TEST_DIGITS:]
    large = F.interpolate(chosen[:, None], size=(digit_size, digit_size), mode="bicubic", align_corners=False)
    return (large[:, 0].clamp(0, 1) * 255).round().to(torch.uint8)
