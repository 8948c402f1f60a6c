"""How well a model that runs freely reconstructs an attractor: distances of visited states and of power spectra."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_choice,
    check_event_size,
    check_nonempty,
    check_positive_int,
    check_real,
)
from stochdyn.core._distance import distance_between
from stochdyn.core.law.path import Estimate
from stochdyn.diagnostics.metrics import Values
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["Bins", "KernelMixture", "power_spectrum_distance", "state_space_divergence"]

# The count that every bin has before anything is seen, and the margin of the box in standard deviations.
_PRIOR_COUNT, _MARGIN = 1e-5, 0.1
_LARGEST = 2**62


class Occupation(ABC):
    """How the law of the states that a path visits is estimated. Subclasses are frozen dataclasses of options."""

    @abstractmethod
    def divergence(self, x: Tensor, y: Tensor) -> Estimate:
        """Return the divergence of ``x (n, d)`` from ``y (m, d)``, in nats.

        Args:
            x: The true states.
            y: The states that are compared with them.
        """


@dataclass(frozen=True)
class Bins(Occupation):
    """A histogram on the box that the true states fill.

    Use it up to about five components. The box reaches a tenth of a standard deviation beyond the true states on every side; all that lies
    outside counts as one more bin, and every bin starts with a count of 1e-5, so that the divergence is finite.

    Attributes:
        num_bins: The number of bins along each component.
    """

    num_bins: int = 30

    def __post_init__(self) -> None:
        check_positive_int(self.num_bins, "num_bins")

    def divergence(self, x: Tensor, y: Tensor) -> Estimate:
        """Return the divergence of ``x (n, d)`` from ``y (m, d)``, in nats; see :meth:`Occupation.divergence`."""
        total = self.num_bins ** x.shape[-1]
        if total > _LARGEST:
            raise InvalidInputError(
                "there are too many bins to be numbered",
                got=f"{self.num_bins} to the power of {x.shape[-1]}",
                hint="fewer bins, or method='mixture'",
            )
        margin = _MARGIN * x.std(0)
        low, high = x.amin(0) - margin, x.amax(0) + margin

        def place(z: Tensor) -> Tensor:
            """The number of the bin of each state, -1 outside the box."""
            share = (z - low) / (high - low)
            index = (share * self.num_bins).floor().clamp(-1, self.num_bins).long()
            inside = ((index >= 0) & (index < self.num_bins)).all(-1)
            number = torch.zeros_like(index[:, 0])
            for column in index.unbind(-1):
                number = number * self.num_bins + column
            return torch.where(inside, number, -torch.ones_like(number))

        where, index = torch.unique(torch.cat([place(x), place(y)]), return_inverse=True)
        counts = [
            torch.bincount(part, minlength=len(where)).double() for part in (index[: len(x)], index[len(x) :])
        ]
        # Bins that neither visits differ in their probability only by the two totals.
        p, q = (c + _PRIOR_COUNT for c in counts)
        empty = total + 1 - len(where)
        share_p, share_q = (len(z) + _PRIOR_COUNT * (total + 1) for z in (x, y))
        ratio = (p / q).log() + math.log(share_q / share_p)
        value = (p * ratio).sum() / share_p
        value = value + empty * _PRIOR_COUNT / share_p * math.log(share_q / share_p)
        return Estimate(value, torch.zeros_like(value))


@dataclass(frozen=True)
class KernelMixture(Occupation):
    """A Gaussian kernel on every state, all of one width: the divergence is a Monte Carlo mean over draws from the kernels.

    Use it where there are too many components for bins. Its kernels widen both laws, so it is smaller than a divergence in fine bins and
    isn't to be compared with one.

    Attributes:
        bandwidth: The standard deviation of the kernels, in standard deviations of each component of the true states.
        num_samples: The number of draws.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
    """

    bandwidth: float = 1.0
    num_samples: int = 1000
    generator: torch.Generator | int | None = 0

    def __post_init__(self) -> None:
        check_real(self.bandwidth, "bandwidth", above=0.0)
        check_positive_int(self.num_samples, "num_samples", 2)

    def divergence(self, x: Tensor, y: Tensor) -> Estimate:
        """Return the divergence of ``x (n, d)`` from ``y (m, d)``, in nats; see :meth:`Occupation.divergence`."""
        source = as_generator(self.generator)
        center, unit = x.mean(0), x.std(0)
        x, y = (x - center) / unit, (y - center) / unit
        picked = torch.randint(len(x), (self.num_samples,), generator=source)
        normal = torch.randn(self.num_samples, x.shape[-1], dtype=x.dtype, generator=source)
        z = x[picked] + self.bandwidth * normal

        def log_density(points: Tensor) -> Tensor:
            """The log density of all kernels at z, less a constant that is the same for both laws."""
            rows = []
            for part in z.split(max(1, 2**22 // len(points))):
                distance = distance_between(part, points)
                rows.append((-0.5 * (distance / self.bandwidth).square()).logsumexp(-1))
            return torch.cat(rows) - math.log(len(points))

        return Estimate.of(log_density(x) - log_density(y))


_METHODS: dict[str, type[Occupation]] = {"bins": Bins, "mixture": KernelMixture}


def state_space_divergence(x: Values, y: Values, method: Occupation | str = "bins") -> Estimate:
    r"""Return how far the states that a model visits are from those of the true system, whatever the order in which they come.

    .. math:: D_\mathrm{stsp}=\int p(x)\log\frac{p(x)}{q(x)}\,dx

    with p the law of the true states and q that of the model's. Two paths of a chaotic system part after a few Lyapunov times,
    but a model that has understood it goes on to visit the same states equally often. Paths of a finite length differ even where
    the laws agree: compare with the divergence between two paths of the true system, of the same lengths.

    Args:
        x: The true states ``(..., n, d)``; axes in front count paths.
        y: The states ``(..., m, d)`` that a model visits.
        method: How the two laws are estimated: :class:`Bins` or ``"bins"``, or :class:`KernelMixture` or ``"mixture"``.

    Returns:
        The divergence in nats, with the standard error of the draws of a mixture (zero for bins).

    Raises:
        EmptyDataError, NonFiniteError, ShapeError: If the states don't fit together.
        InvalidInputError: If a component of the true states is constant.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(5000, 2, generator=g), torch.randn(5000, 2, generator=g)
        >>> float(state_space_divergence(x, y)) < float(state_space_divergence(x, 2 * y))
        True

    Reference:
        F. Hess, Z. Monfared, M. Brenner and D. Durstewitz, Generalized teacher forcing for learning chaotic dynamics, ICML 2023, whose
        published program has 30 bins for fewer than six components, and kernels of variance one for more; it leaves out what falls
        outside the box.
    """
    if isinstance(method, str):
        check_choice(method, tuple(_METHODS), "method")
        method = _METHODS[method]()
    if not isinstance(method, Occupation):
        raise InvalidInputError(
            "method must say how states are counted", got=repr(method)[:60],
            expected="Bins(...) | KernelMixture(...) | 'bins' | 'mixture'",
        )  # fmt: skip
    a, b = (_paths(value, name).flatten(0, -2) for value, name in ((x, "x"), (y, "y")))
    check_event_size(b, a.shape[-1], "y")
    if not bool((a.amax(0) > a.amin(0)).all()):
        raise InvalidInputError("a component of x is constant", hint="leave it out of both")
    return method.divergence(a, b)


def power_spectrum_distance(x: Values, y: Values, bandwidth: float = 20.0) -> Tensor:
    r"""Return how far the power spectra of a model's paths are from those of the true system: the order in which states are visited.

    .. math::
        D_H=\frac1d\sum_{i=1}^d\sqrt{1-\sum_k\sqrt{p_i(\omega_k)\,q_i(\omega_k)}},

    the Hellinger distance between the smoothed spectra of each component, each with a sum of one. It is zero for equal spectra and
    one where no frequency is shared; a component that never moves has all its power at frequency zero. Periodograms are noisy, so
    compare with the distance between two paths of the true system, of the same lengths.

    Args:
        x: The true path, ``(n, d)``, at equal steps of time, or several, ``(..., n, d)``, whose spectra are averaged.
        y: A model's path or paths ``(..., n, d)``, as long as ``x`` and at the same steps.
        bandwidth: The standard deviation of the Gaussian weights that smooth the spectra, in frequencies of the periodogram, of which there
            are ``n // 2 + 1``; zero for none.

    Returns:
        A number from 0 to 1.

    Raises:
        EmptyDataError, NonFiniteError, ShapeError: If the paths don't fit together.
        InvalidInputError: If ``bandwidth`` is negative.

    Example:
        >>> t = 0.1 * torch.arange(1000.0)[:, None]
        >>> slow, fast = torch.sin(t), torch.sin(3 * t)
        >>> float(power_spectrum_distance(slow, slow.roll(50, 0), 2)) < 0.1 < float(power_spectrum_distance(slow, fast, 2))
        True

    Reference:
        F. Hess, Z. Monfared, M. Brenner and D. Durstewitz, Generalized teacher forcing for learning chaotic dynamics, ICML 2023, whose
        published program has a bandwidth of 20.
    """
    check_real(bandwidth, "bandwidth", minimum=0.0)
    a, b = _paths(x, "x"), _paths(y, "y")
    check_event_size(b, a.shape[-1], "y")
    if a.shape[-2] != b.shape[-2]:
        raise ShapeError(
            "x and y must be equally long, or their spectra have other frequencies",
            got=f"{a.shape[-2]} and {b.shape[-2]} times",
        )
    p, q = (_spectrum(value, float(bandwidth)) for value in (a, b))
    # The sum of squared differences, since 1 - sum sqrt(p q) loses half of the digits where the spectra agree.
    return (0.5 * (p.sqrt() - q.sqrt()).square().sum(0)).sqrt().clamp_max(1.0).mean()


def _paths(value: Values, name: str) -> Tensor:
    paths = as_tensor(value, name, tuple(range(2, 13)), "(..., n, d)").detach().double().cpu()
    check_nonempty(paths, name)
    if paths.shape[-2] < 2:
        raise ShapeError(f"{name} needs two times or more", got=tuple(paths.shape))
    return paths


def _spectrum(x: Tensor, bandwidth: float) -> Tensor:
    """Return smoothed power ``(n // 2 + 1, d)`` that sums to one for each component, of paths ``(..., n, d)``."""
    from scipy.ndimage import gaussian_filter1d

    x = x.reshape(-1, *x.shape[-2:])
    x = x - x.mean((0, 1))
    largest = x.abs().amax((0, 1))
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    power = np.square(np.abs(np.fft.rfft(x.numpy(), axis=1))).mean(0)
    # Power at zero frequency stands for a component that never moves.
    power[0] += power.sum(0) == 0
    if bandwidth > 0:
        power = gaussian_filter1d(power, bandwidth, axis=0)
    return torch.from_numpy(power / power.sum(0))
