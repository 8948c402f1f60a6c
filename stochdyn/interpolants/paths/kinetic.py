"""Kinetic-optimal schedules: the Gaussian paths whose velocity has the least energy for given data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_event_size,
    check_ndim,
    check_nonempty,
    check_positive_int,
    of_times,
)
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.paths.interpolant import Interpolant
from stochdyn.interpolants.paths.schedules import CustomSchedule

__all__ = ["KineticOptimal", "explained_share"]


def explained_share(
    data: Tensor,
    ratios: Tensor,
    *,
    num_noises: int = 2000,
    reference: int = 4000,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Share of the data's variance that is explained once noise is added, at given signal-to-noise ratios.

    .. math:: \lambda(s)=\frac{E\,|E[x_1\mid s\,x_1+z]|^2}{E|x_1|^2},\qquad z\sim N(0,I)

    for data centred and scaled to unit mean square, with the conditional mean taken over a subset of the data. A point's
    own share in that mean is left out, so that strong signals aren't taken for explained.

    Args:
        data: The points of the data, ``(n, d)``.
        ratios: The ratios s of signal to noise, ``(m,)``, not negative.
        num_noises: The number of noised points per ratio.
        reference: The data points that the conditional mean is taken over.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        ``(m,)`` between 0 and 1, from :math:`1 - E|x_1-\hat x_1|^2/E|x_1|^2`.

    Raises:
        ShapeError, EmptyDataError, NonFiniteError: If the data aren't ``(n, d)``, are empty or aren't finite.
        InvalidInputError: If a ratio is negative, or there are fewer than two points.

    Example:
        >>> gauss = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
        >>> share = explained_share(gauss, torch.tensor([1.0]), generator=torch.Generator().manual_seed(1))
        >>> bool((share - 0.5).abs() < 0.05)
        True

    Reference:
        Shaul et al., "On kinetic optimal probability paths for generative models", 2023, equation 15.
    """
    data = as_tensor(data, "data", 2, "(n, d)")
    check_nonempty(data, "data")
    ratios = as_tensor(ratios, "ratios", 1, "(m,)")
    check_nonempty(ratios, "ratios")
    check_positive_int(num_noises, "num_noises")
    check_positive_int(reference, "reference", 2)
    source = as_generator(generator, data.device)
    if data.shape[0] < 2 or bool((ratios < 0).any()):
        raise InvalidInputError("give at least two points, and ratios that aren't negative", got=len(data))
    x = data - data.mean(0)
    size = x.square().mean().sqrt()
    if not bool(size > 0):
        raise InvalidInputError("data must not all be one point", got=f"{len(data)} equal points")
    x = x / size
    n = x.shape[0]
    order = torch.randperm(n, generator=source)[: min(reference, n)]
    known = x[order]
    pick = torch.randint(known.shape[0], (num_noises,), generator=source)
    start = known[pick]
    z = torch.randn(start.shape, dtype=x.dtype, device=x.device, generator=source)
    squared = known.square().sum(-1)
    shares = []
    for s in ratios.tolist():
        noisy = s * start + z
        # lambda(s) = 1 - E |x - E[x | s x + z]|^2, the conditional mean over the other points so that it is honest
        logits = s * noisy @ known.t() - 0.5 * s * s * squared
        logits[torch.arange(num_noises), pick] = -torch.inf
        error = start - logits.softmax(-1) @ known
        shares.append(1 - error.square().mean())
    return torch.stack(shares).clamp(0, 1)


class KineticOptimal:
    r"""The path :math:`x_t=\alpha_tz+\beta_tx_1` from noise to data of least kinetic energy.

    In polar form :math:`(\beta,\alpha)=r(\sin\theta,\cos\theta)` the energy is
    :math:`\int(\dot r^2+r^2\dot\theta^2\gamma(\theta))\,dt` with
    :math:`\gamma(\theta)=1-(1-\lambda(\tan\theta))/\cos^2\theta`. Its minimum is

    .. math::
        r=\sqrt{1-bt+bt^2},\qquad \dot\theta=\frac{\sqrt{(b-b^2/4)/\gamma(\theta)}}{1-bt+bt^2},
        \qquad b=4\sin^2\tfrac G2,\quad G=\int_0^{\pi/2}\!\!\sqrt\gamma\,d\theta.

    Data of many effective dimensions have :math:`\lambda\approx1`, for which this is the straight path
    ``alpha = 1 - t``, ``beta = t``. Data should be centred, with unit mean square.

    Args:
        angles: The angles, ``(m,)``, increasing from 0 to ``pi / 2``.
        shares: The explained shares :math:`\lambda(\tan\theta)` at the angles, ``(m,)``, as :func:`explained_share` returns them.

    Raises:
        ShapeError: If angles and shares differ in shape.
        InvalidInputError: If the angles don't increase from 0 to ``pi / 2``, or a share is outside [0, 1].

    Example:
        >>> angles = torch.linspace(0, torch.pi / 2, 33)
        >>> straight = KineticOptimal(angles, torch.ones(33))
        >>> t = torch.tensor([0.25, 0.5])
        >>> bool((straight.beta(t) - t).abs().max() < 1e-3)
        True

    Reference:
        Shaul et al., "On kinetic optimal probability paths for generative models", 2023, theorem 1.
    """

    def __init__(self, angles: Tensor, shares: Tensor) -> None:
        angles, shares = (as_tensor(v, n) for n, v in (("angles", angles), ("shares", shares)))
        if angles.ndim != 1 or angles.shape != shares.shape:
            raise ShapeError(
                "angles and shares have one axis of the same length", got=f"{angles.shape}, {shares.shape}"
            )
        spans = abs(angles[0].item()) < 1e-6 and abs(angles[-1].item() - math.pi / 2) < 1e-6
        if not spans or bool((angles.diff() <= 0).any()):
            raise InvalidInputError("angles must increase from 0 to pi / 2", got=angles.tolist())
        if bool(((shares < 0) | (shares > 1)).any()):
            raise InvalidInputError("shares must lie in [0, 1]", got=shares.tolist())
        fine = torch.linspace(0, math.pi / 2, 4097, dtype=torch.float64)
        share = _interpolate(fine, angles.double(), shares.double())
        # The best linear estimate explains sin^2, and nothing explains less: gamma is not negative, but for noise in lambda.
        gamma = 1 - (1 - share) / fine.cos().square().clamp(min=1e-12)
        gamma = gamma.clamp(1e-6, 1.0)
        root = gamma.sqrt()
        # G = int sqrt(gamma) d theta, b = 4 sin^2(G / 2), and time from the integral of theta-dot:
        # t = 1/2 + tan(g(theta) - G / 2) / (2 tan(G / 2))
        travelled = torch.cat([root.new_zeros(1), (0.5 * (root[1:] + root[:-1]) * fine.diff()).cumsum(0)])
        total = travelled[-1]
        self.curvature = float(4 * (0.5 * total).sin().square())
        self._angle, self._root = fine, root
        self._time = 0.5 + (travelled - 0.5 * total).tan() / (2 * (0.5 * total).tan())
        self._time[0], self._time[-1] = 0.0, 1.0

    @classmethod
    def from_data(
        cls, data: Tensor, num_angles: int = 65, generator: torch.Generator | int | None = None
    ) -> KineticOptimal:
        """Return the schedule of given data ``(n, d)``; see :func:`explained_share`."""
        check_positive_int(num_angles, "num_angles", 3)
        check_ndim(data, 2, "data", "(n, d)")
        check_event_size(data, data.shape[-1], "data")
        angles = torch.linspace(0, math.pi / 2, num_angles, dtype=torch.float64)
        shares = explained_share(data, angles[:-1].tan().to(data), generator=generator).double().cpu()
        return cls(angles, torch.cat([shares, shares.new_ones(1)]))

    def _polar(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return radius, its derivative, angle and its derivative."""
        at = t.double().clamp(0, 1)
        b = self.curvature
        # r^2 = 1 - b t + b t^2 and theta-dot = sqrt((b - b^2 / 4) / gamma) / r^2
        squared = 1 - b * at + b * at.square()
        r = squared.sqrt()
        angle = _interpolate(at, self._time, self._angle)
        root = _interpolate(angle, self._angle, self._root)
        speed = math.sqrt(max(b - b * b / 4, 0.0)) / (root * squared)
        return r, b * (at - 0.5) / r, angle, speed

    @of_times
    def alpha(self, t: Tensor) -> Tensor:
        """Return the weight of the noise."""
        r, _, angle, _ = self._polar(t)
        return (r * angle.cos()).to(t.dtype)

    @of_times
    def beta(self, t: Tensor) -> Tensor:
        """Return the weight of the data."""
        r, _, angle, _ = self._polar(t)
        return (r * angle.sin()).to(t.dtype)

    @of_times
    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return the derivative of :meth:`alpha`."""
        r, slope, angle, speed = self._polar(t)
        return (slope * angle.cos() - r * angle.sin() * speed).to(t.dtype)

    @of_times
    def beta_dot(self, t: Tensor) -> Tensor:
        """Return the derivative of :meth:`beta`."""
        r, slope, angle, speed = self._polar(t)
        return (slope * angle.sin() + r * angle.cos() * speed).to(t.dtype)

    def interpolant(self) -> Interpolant:
        """Return the one-sided interpolant along this path."""
        alpha = CustomSchedule(self.alpha, self.alpha_dot)
        return Interpolant((alpha, CustomSchedule(self.beta, self.beta_dot)), one_sided=True)

    def energy(self) -> float:
        r"""Return the kinetic energy a dimension, :math:`\int(\dot r^2+r^2\dot\theta^2\gamma)\,dt`."""
        t = torch.linspace(0, 1, 4001, dtype=torch.float64)
        r, slope, angle, speed = self._polar(t)
        root = _interpolate(angle, self._angle, self._root)
        return float(torch.trapezoid(slope.square() + (r * speed * root).square(), t))


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear interpolation at ``x`` of any shape."""
    i = torch.searchsorted(knots, x.contiguous(), right=True).clamp(1, knots.shape[0] - 1)
    left, right = knots[i - 1], knots[i]
    share = ((x - left) / (right - left)).clamp(0, 1)
    return values[i - 1] + share * (values[i] - values[i - 1])
