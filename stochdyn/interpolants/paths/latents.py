"""Schedules of the latent: zero at both ends of [0, 1] and positive between."""

from __future__ import annotations

import math
from abc import ABC

import torch
from torch import Tensor

from stochdyn._checks import (
    check_positive,
    of_times,
)
from stochdyn.interpolants.paths.schedules import Schedule

__all__ = ["BrownianLatent", "HalfPower", "ParabolicLatent", "SigmoidLatent", "SineSquaredLatent"]


class _Latent(Schedule, ABC):
    """A schedule of the latent, ``scale`` times a shape."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        check_positive(scale, "scale")
        self.scale = float(scale)


class BrownianLatent(_Latent):
    r""":math:`\gamma=\sigma\sqrt{t(1-t)}`, the standard deviation of a Brownian bridge.

    The latent to begin with: the only one under which entropic couplings give the Schrödinger bridge, and the paper's best for flows.
    Its derivative is infinite at the ends, :math:`\tfrac12(\gamma^2)\dot{}=\gamma\dot\gamma\to\pm\sigma^2/2` is not.

    Args:
        scale: The diffusion :math:`\sigma` of the Brownian motion, in units of the data.

    Example:
        >>> BrownianLatent(2.0).square_derivative(torch.tensor([0.0, 1.0]))
        tensor([ 4., -4.])
    """

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        return self.scale * (t * (1 - t)).sqrt()

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        return 0.5 * self.scale * (1 - 2 * t) / (t * (1 - t)).sqrt()

    @of_times
    def square(self, t: Tensor) -> Tensor:
        """Return the square of the value."""
        return self.scale**2 * t * (1 - t)

    @of_times
    def square_derivative(self, t: Tensor) -> Tensor:
        """Return the derivative of the square, which is finite where that of the value isn't."""
        return self.scale**2 * (1 - 2 * t)


class ParabolicLatent(_Latent):
    r""":math:`\gamma=\sigma\,t(1-t)`.

    Its derivative is finite, so a velocity learns without both signs of the latent; take it where that is too dear.

    Args:
        scale: The factor :math:`\sigma`, in units of the data.
    """

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        return self.scale * t * (1 - t)

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        return self.scale * (1 - 2 * t)


class SineSquaredLatent(_Latent):
    r""":math:`\gamma=\sigma\sin^2(\pi t)`.

    It starts and ends with no slope, and is the whole of an encoder-decoder path at time 1/2.

    Args:
        scale: The factor :math:`\sigma`, in units of the data.
    """

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        # the smaller of t and 1 - t keeps the zero at t = 1 exact
        return self.scale * torch.sin(math.pi * torch.minimum(t, 1 - t)).square()

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        return self.scale * math.pi * torch.sin(2 * math.pi * t)


class SigmoidLatent(_Latent):
    r"""A plateau between two sigmoid flanks: the same smoothing for most of the time.

    .. math:: \gamma=\sigma\,[\varsigma(f(t-\tfrac12)+1)-\varsigma(f(t-\tfrac12)-1)-\varsigma(-\tfrac f2+1)+\varsigma(-\tfrac f2-1)]

    Args:
        scale: The factor :math:`\sigma`, in units of the data.
        steepness: The steepness f of the rise and fall.
    """

    def __init__(self, scale: float = 1.0, steepness: float = 10.0) -> None:
        super().__init__(scale)
        check_positive(steepness, "steepness")
        self.steepness = float(steepness)

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        # symmetric about one half; the smaller of t and 1 - t makes both ends exact zeros
        u = self.steepness * (torch.minimum(t, 1 - t) - 0.5)
        edge = torch.full_like(t, -0.5 * self.steepness)
        # the two differences are formed alike, so that their rounding errors cancel at the ends
        rise = torch.sigmoid(u + 1) - torch.sigmoid(edge + 1)
        return self.scale * (rise - (torch.sigmoid(u - 1) - torch.sigmoid(edge - 1)))

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        u = self.steepness * (t - 0.5)
        p, q = torch.sigmoid(u + 1), torch.sigmoid(u - 1)
        return self.scale * self.steepness * (p * (1 - p) - q * (1 - q))


class HalfPower(_Latent):
    r""":math:`\gamma=\sigma(1-t)\sqrt t`: the latent of a process that leaves a point, :math:`\sigma(1-t)W_t`.

    Args:
        scale: The factor :math:`\sigma`, in units of the data.
    """

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        return self.scale * (1 - t) * t.sqrt()

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        return self.scale * (0.5 - 1.5 * t) / t.sqrt()

    @of_times
    def square_derivative(self, t: Tensor) -> Tensor:
        """Return the derivative of the square, which is finite where that of the value isn't."""
        return self.scale**2 * (1 - t) * (1 - 3 * t)
