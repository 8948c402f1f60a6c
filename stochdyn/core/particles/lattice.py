r"""Noise for particles that stand in an order: points that fill a square evenly instead of independent ones.

Particle :math:`i` of :math:`N` ordered ones comes from the tooth :math:`(i+u)/N` of the comb that resamples, and takes the quantile
:math:`v_i=\{i\alpha+s\}` of the noise, where :math:`u,s` are uniform and :math:`\alpha` is a random number that fractions approximate
badly, all drawn anew at each step: with one :math:`\alpha` for all steps, particles whose ranks last would share their noise. Every
:math:`v_i` is uniform and independent of the comb, so that means over particles are unbiased; pairs :math:`((i+u)/N,v_i)` fill the
square evenly, so that means over neighbours with all their noise have an error that falls faster than :math:`N^{-1/2}`.

Reference:
    P. L'Ecuyer, C. Lecot and B. Tuffin, A randomized quasi-Monte Carlo simulation method for Markov chains, 2008; M. Gerber and
    N. Chopin, Sequential quasi-Monte Carlo, 2015.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["even_normals", "even_shares", "plain_normals"]

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
# How many quotients of a continued fraction are drawn, and the largest of them.
_DEPTH, _LARGEST = 6, 3
# So many numbers are drawn at once: fewer calls for few particles, and little memory for many.
_BLOCK = 1 << 17


def even_normals(
    num_steps: int, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield standard normals ``shape``, with ordered particles on the first axis, for each of ``num_steps`` steps."""
    places = torch.arange(shape[0], dtype=torch.float64, device=like.device)
    places = places.reshape(-1, *(1,) * (len(shape) - 1))
    size = _block(num_steps, shape)
    for n in range(0, num_steps, size):
        lead = (min(size, num_steps - n), 1, *shape[1:])
        draws = torch.rand((_DEPTH + 1, *lead), dtype=torch.float64, device=like.device, generator=generator)
        share = torch.addcmul(draws[0], places, _slopes(draws[1:])).frac_()
        yield from torch.special.ndtri(_inside(share, like)).unbind(0)


def even_shares(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return uniform numbers ``shape`` in rising order, one in each of ``shape[0]`` equal parts of the unit interval."""
    places = torch.arange(shape[0], dtype=torch.float64, device=like.device)
    offset = torch.rand((1, *shape[1:]), dtype=torch.float64, device=like.device, generator=generator)
    return _inside((places.reshape(-1, *(1,) * (len(shape) - 1)) + offset) / shape[0], like)


def plain_normals(
    num_steps: int, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield independent standard normals ``shape`` for each of ``num_steps`` steps."""
    size = _block(num_steps, shape)
    for n in range(0, num_steps, size):
        lead = (min(size, num_steps - n), *shape)
        yield from torch.randn(lead, dtype=like.dtype, device=like.device, generator=generator).unbind(0)


def _block(num_steps: int, shape: tuple[int, ...]) -> int:
    return min(max(1, _BLOCK // max(1, math.prod(shape))), max(1, num_steps))


def _inside(share: Tensor, like: Tensor) -> Tensor:
    """Return shares in the precision of the states, off both ends."""
    edge = torch.finfo(like.dtype).eps / 2
    return share.to(like.dtype).clamp_(edge, 1.0 - edge)


def _slopes(draws: Tensor) -> Tensor:
    """Return numbers between 0 and 1 that fractions approximate badly: their continued fractions hold 1, 2 and 3, at last 1 alone."""
    slope = torch.full_like(draws[0], _GOLDEN)
    for quotient in (1.0 + _LARGEST * draws).floor_().unbind(0):
        slope = (quotient + slope).reciprocal_()
    return slope
