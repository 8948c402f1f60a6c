"""How the density of a population changes with time, as a smooth function of the cell and a polynomial of the time."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    check_event_size,
    check_points,
    check_positive,
    check_positive_int,
    check_real,
)
from stochdyn._transforms import recorded
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.errors import ConvergenceWarning, InvalidInputError, TimeGridError, UnavailableError

__all__ = ["DensityTrend"]

_MEDIAN_POINTS = 1000


class DensityTrend:
    r"""Ratios of the densities of a population at any two times, from snapshots.

    .. math:: \log\frac{p_t(x)}{p_s(x)}=\sum_{k=1}^{K}\big(c_k(t)-c_k(s)\big)\,f_k(x)+\mathrm{const}

    with orthogonal polynomials :math:`c_k` of the time and functions :math:`f_k` of the state from the space of a Gaussian kernel. It is the
    logistic regression that tells from a particle which snapshot it came from, a convex problem: no density is estimated, only ratios.
    Between snapshots it interpolates in the light of *all* of them, not of two neighbours only.

    Args:
        snapshots: The snapshots whose densities are compared.
        degree: The degree ``K`` of the polynomials; at most one less than the number of snapshots.
        length: The length scale of the kernel, in units of the state; the median distance between particles if None.
        ridge: The inverse variance of the prior of each function's values, in nats; larger is smoother.
        num_features: The number of random frequencies that stand for the kernel.
        seed: The seed of the frequencies.

    Raises:
        InvalidInputError: If the degree isn't below the number of snapshots, or a number isn't positive.

    Example:
        >>> clouds = [torch.linspace(-2, 2, 41)[:, None] + m for m in (0.0, 0.5, 1.0)]
        >>> trend = DensityTrend(Snapshots([0.0, 1.0, 2.0], clouds), degree=1).fit()
        >>> value = trend.log_ratio(torch.tensor([[-1.0], [2.0]]), 2.0, 0.0)
        >>> bool(value[1] > value[0])
        True

    Reference: Bickel, Brückner & Scheffer (2009), Discriminative learning under covariate shift, JMLR 10; Rahimi & Recht (2007),
    Random features for large-scale kernel machines.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        degree: int | None = None,
        length: float | None = None,
        ridge: float = 0.1,
        num_features: int = 100,
        seed: int = 0,
    ) -> None:
        if not isinstance(snapshots, Snapshots):
            raise InvalidInputError("snapshots must be Snapshots", got=type(snapshots).__name__)
        if degree is None:
            degree = min(2, len(snapshots) - 1)
        check_positive_int(degree, "degree")
        if degree >= len(snapshots):
            raise InvalidInputError(
                "the polynomial needs more snapshots", got=f"degree {degree} with {len(snapshots)} snapshots"
            )
        check_positive(ridge, "ridge")
        check_positive_int(num_features, "num_features")
        if length is None:
            length = _median_distance(snapshots)
        check_positive(length, "length")
        self.snapshots, self.degree, self.length, self.ridge = snapshots, degree, float(length), ridge
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(snapshots.dim, num_features, generator=generator, dtype=torch.float64)
        self._frequencies = draws.to(snapshots.device) / self.length
        # QR of the powers of the times: orthonormal polynomials over the snapshots, of which the first is constant
        powers = self._powers(snapshots.times)
        self._basis, self._triangle = torch.linalg.qr(powers)
        self.weight: Tensor | None = None
        self.intercept = torch.zeros(len(snapshots), dtype=torch.float64, device=snapshots.device)

    def to(self, device: torch.device | str) -> DensityTrend:
        """Return the trend on another device; it is computed in double precision everywhere.

        Args:
            device: The device.
        """
        there = copy.copy(self)
        there.snapshots = self.snapshots.to(device=device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(there, name, value.to(device))
        return there

    def like(self, snapshots: Snapshots) -> DensityTrend:
        """Return an unfitted trend with the same functions and options, of other snapshots at the same times.

        Args:
            snapshots: The snapshots whose densities are compared.
        """
        there = copy.copy(self)
        there.snapshots, there.weight = snapshots, None
        return there

    @recorded
    def fit(self, max_iterations: int = 500) -> DensityTrend:
        """Maximise the penalised likelihood of the particles' times; returns this object.

        Args:
            max_iterations: The largest number of iterations of L-BFGS.
        """
        import warnings

        snaps = self.snapshots
        features = self._features(torch.cat(snaps.samples))
        label = torch.repeat_interleave(
            torch.arange(len(snaps), device=snaps.device), torch.tensor(snaps.sizes, device=snaps.device)
        )
        # particles of weight zero aren't there
        count = torch.cat([w.double() * (w > 0).sum() for w in snaps.weights])
        weight = features.new_zeros(features.shape[1], self.degree).requires_grad_()
        intercept = self.intercept.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [weight, intercept], max_iter=max_iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            # multinomial logistic regression: log p(snapshot | x) = sum_k c_k(t) f_k(x) + const, with a Gaussian prior on the weights
            logits = features @ weight @ self._basis[:, 1:].mT + intercept
            fit = torch.nn.functional.cross_entropy(logits, label, reduction="none")
            return (count * fit).sum() + 0.5 * self.ridge * weight.square().sum()

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = loss()
            value.backward()
            return value

        optimiser.step(closure)
        closure()
        slope = float(weight.grad.abs().max()) if weight.grad is not None else math.inf
        if not slope < 1e-3 * len(features):
            warnings.warn(
                f"The regression on time stopped at a slope of {slope:.1e}. Allow more max_iterations",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.weight, self.intercept = weight.detach(), intercept.detach()
        return self

    @torch.no_grad()
    def log_ratio(self, x: Tensor, t: float, s: float) -> Tensor:
        """Return the log of the density at ``t`` over that at ``s``, up to a constant.

        Args:
            x: The states at which densities are compared, ``(*batch, d)``.
            t: The time of the numerator, within the span of the snapshots.
            s: The time of the denominator, within the span of the snapshots.

        Returns:
            ``(*batch,)`` in nats.

        Raises:
            TimeGridError: If a time lies outside the span, where polynomials can't be trusted.
        """
        x = as_tensor(x, "x", like=self.snapshots.samples[0], finite=False)
        check_points(x, "x", "(*batch, d)")
        check_event_size(x, self.snapshots.dim, "x")
        check_real(t, "t")
        check_real(s, "s")
        gap = self._coefficients(t) - self._coefficients(s)
        return (self._features(x) @ (self._fitted() @ gap)).to(x)

    @torch.no_grad()
    def rate(self, x: Tensor, t: float) -> Tensor:
        """Return the time derivative of the log density at ``x (*batch, d)``, up to a constant, ``(*batch,)`` in nats per unit of time."""
        x = as_tensor(x, "x", like=self.snapshots.samples[0], finite=False)
        check_points(x, "x", "(*batch, d)")
        check_event_size(x, self.snapshots.dim, "x")
        check_real(t, "t")
        reach = 1e-4 * float(self.snapshots.durations.sum())
        first, last = float(self.snapshots.times[0]), float(self.snapshots.times[-1])
        low, high = max(t - reach, first), min(t + reach, last)
        return self.log_ratio(x, high, low) / (high - low)

    def _fitted(self) -> Tensor:
        if self.weight is None:
            raise UnavailableError("the trend isn't fitted yet", hint="call fit() first")
        return self.weight

    def _powers(self, times: Tensor) -> Tensor:
        first, last = self.snapshots.times[0], self.snapshots.times[-1]
        scaled = 2 * (times - first) / (last - first) - 1
        return torch.stack([scaled**k for k in range(self.degree + 1)], -1)

    def _coefficients(self, t: float) -> Tensor:
        """The polynomials but the constant at ``t``, ``(K,)``, orthonormal over the snapshots."""
        times = self.snapshots.times
        slack = 1e-9 * float(times[-1] - times[0])
        if not float(times[0]) - slack <= t <= float(times[-1]) + slack:
            raise TimeGridError(
                "the trend holds between the snapshots only",
                got=t,
                expected=f"{float(times[0]):g} to {float(times[-1]):g}",
            )
        powers = self._powers(times.new_tensor([t]))
        return torch.linalg.solve_triangular(self._triangle, powers, upper=True, left=False)[0, 1:]

    def _features(self, x: Tensor) -> Tensor:
        # random Fourier features of the Gaussian kernel (Rahimi & Recht 2007)
        phase = x.double() @ self._frequencies
        return torch.cat((phase.cos(), phase.sin()), -1) / math.sqrt(self._frequencies.shape[1])


def _median_distance(snapshots: Snapshots) -> float:
    share = max(2, _MEDIAN_POINTS // len(snapshots))
    points = snapshots.subsample(share, torch.Generator(snapshots.device).manual_seed(0)).samples
    distances = torch.pdist(torch.cat(points).double())
    median = float(distances.median()) if len(distances) else 0.0
    return median if median > 0 else 1.0
