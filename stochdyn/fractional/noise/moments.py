"""Moments of the memory states and of fractional Brownian motion, differentiable in the Hurst index."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stochdyn._caching import cached
from stochdyn._checks import as_tensor, check_choice, check_hurst, check_positive

__all__ = ["Kind", "cross_moments", "entire_1", "entire_2", "gram_matrix", "unit_cross", "variance_constant"]

Kind = Literal["I", "II"]

_SERIES_TERMS = 140  # enough for x <= 40: the terms x^n/n! have left float64 by then
_SERIES_LIMIT = 40.0  # beyond it 1 - P(a, x) < 1e-17: the incomplete gammas equal 1
_CANCELLATION_LIMIT = 3.0  # type I: below, sinh x - x form; above, e^x Q(a, x) by Laguerre quadrature
_LAGUERRE_NODES = 48


def variance_constant(hurst: Tensor | float, kind: Kind = "II") -> Tensor:
    r"""Return the variance at time 1 of fBM with kernel :math:`(t-s)^{H-1/2}/\Gamma(H+1/2)`.

    .. math::
        V_{\mathrm I} = \frac{1}{\Gamma(2H+1)\sin \pi H},\qquad
        V_{\mathrm{II}} = \frac{1}{2H\,\Gamma(H+1/2)^2}.

    Args:
        hurst: Hurst index in (0, 1), any shape.
        kind: The type of the noise: ``"I"`` (Mandelbrot-Van Ness) or ``"II"`` (Riemann-Liouville).

    Returns:
        float64 tensor of the shape of ``hurst``, differentiable.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).

    Example:
        >>> round(float(variance_constant(0.7, "I")), 4), round(float(variance_constant(0.7, "II")), 4)
        (0.9951, 0.8473)

    Reference:
        B. Mandelbrot and J. Van Ness, SIAM Review 10(4), 1968.
    """
    check_choice(kind, ("I", "II"), "kind")
    check_hurst(hurst)
    h = torch.as_tensor(hurst, dtype=torch.float64)
    if kind == "I":
        return torch.exp(-torch.lgamma(2 * h + 1)) / torch.sin(math.pi * h)
    return torch.exp(-2 * torch.lgamma(h + 0.5)) / (2 * h)


def _taylor(x: Tensor, first: int, stride: int, terms: int) -> Tensor:
    """Sum over n < terms of x^n / (first + stride n)!."""
    total = torch.zeros_like(x)
    for n in reversed(range(terms)):
        total = total * x + 1.0 / float(math.factorial(first + stride * n))
    return total


def entire_1(x: Tensor) -> Tensor:
    """(e^-x - 1 + x) / x^2, entire; 1/2 at 0."""
    small = x < 0.5
    xs = torch.where(small, x, torch.zeros_like(x))
    xl = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, _taylor(-xs, 2, 1, 16), (torch.expm1(-xl) + xl) / xl**2)


def entire_2(x: Tensor) -> Tensor:
    """(x^2/2 - x + 1 - e^-x) / x^3, entire; 1/6 at 0."""
    small = x < 1.0
    xs = torch.where(small, x, torch.zeros_like(x))
    xl = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, _taylor(-xs, 3, 1, 20), (xl**2 / 2 - xl - torch.expm1(-xl)) / xl**3)


def gram_matrix(speeds: Tensor, horizon: float = 1.0, kind: Kind = "II") -> Tensor:
    r"""Return the Gram matrix of the memory states on ``[0, horizon]``, counted from their start.

    .. math::
        A_{ij} &= \int_0^TE[(Y_i(t)-Y_i(0))(Y_j(t)-Y_j(0))]\,dt,\\
        A^{\mathrm{II}}_{ij} &= \frac{T+(e^{-(\gamma_i+\gamma_j)T}-1)/(\gamma_i+\gamma_j)}
            {\gamma_i+\gamma_j},\\
        A^{\mathrm{I}}_{ij} &= \frac{2T+(e^{-\gamma_iT}-1)/\gamma_i+(e^{-\gamma_jT}-1)/\gamma_j}
            {\gamma_i+\gamma_j}.

    Args:
        speeds: The mean-reversion speeds ``(K,)``, in 1 / time; 0 stands for Brownian motion itself.
        horizon: T.
        kind: The type of the noise: ``"I"`` (stationary start) or ``"II"`` (start at 0).

    Returns:
        float64 ``(K, K)``.

    Example:
        >>> gram_matrix(torch.tensor([0.0]), 2.0).tolist()  # the integral of t over [0, 2]
        [[2.0]]

    Reference:
        R. Daems, M. Opper, G. Crevecoeur and T. Birdal, Variational inference for SDEs driven by fractional
        noise, ICLR 2024.
    """
    check_choice(kind, ("I", "II"), "kind")
    check_positive(horizon, "horizon")
    speeds = as_tensor(speeds, "speeds", 1, "(K,)")
    # In units of the horizon, A scales as T^2.
    x = speeds.to(torch.float64) * horizon
    total = x[:, None] + x[None, :]
    if kind == "II":
        return horizon**2 * entire_1(total)
    numerator = (x * entire_1(x))[:, None] + (x * entire_1(x))[None, :]
    both_zero = total == 0
    ratio = numerator / torch.where(both_zero, torch.ones_like(total), total)
    return horizon**2 * torch.where(both_zero, torch.full_like(total, 0.5), ratio)


def _series(x: Tensor, a: Tensor, first: int, power: bool) -> Tensor:
    """Sum over n >= first of c_n x^n / Gamma(a+2+n), c_n = 1 if ``power`` else (n+1) e^-x."""
    n = torch.arange(1, _SERIES_TERMS, dtype=torch.float64, device=x.device)
    numerator = x[..., None] if power else x[..., None] * (n + 1) / n
    terms = torch.cumprod(numerator / (a[..., None] + 1 + n), dim=-1)
    head = terms.sum(-1) + (1.0 if first == 0 else 0.0)
    scale = torch.exp(-torch.lgamma(a + 2)) if power else torch.exp(-torch.lgamma(a + 2) - x)
    return head * scale


def _cross_type2(x: Tensor, a: Tensor) -> Tensor:
    """1/Gamma(a) int_0^1 (1-u) u^(a-1) e^(-xu) du = e^-x 1F1(2; a+2; x) / Gamma(a+2)."""
    large = x > _SERIES_LIMIT
    low = _series(torch.where(large, torch.ones_like(x), x), a, 0, power=False)
    xl = torch.where(large, x, torch.ones_like(x))
    # For large x the incomplete gamma functions are one to rounding: x^-a - a x^(-a-1).
    return torch.where(large, torch.exp(-a * torch.log(xl)) * (1 - a / xl), low)


@cached(1)
def _laguerre() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.laguerre.laggauss(_LAGUERRE_NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _scaled_upper_gamma(x: Tensor, a: Tensor) -> Tensor:
    """e^x Q(a, x) = 1/Gamma(a) int_0^inf (x+v)^(a-1) e^-v dv for x >= 3."""
    nodes, weights = (t.to(x.device) for t in _laguerre())
    integrand = torch.exp((a[..., None] - 1) * torch.log(x[..., None] + nodes))
    return (integrand * weights).sum(-1) * torch.exp(-torch.lgamma(a))


def _cross_type1(x: Tensor, a: Tensor, minus_zero: bool) -> Tensor:
    """Type I moment at T = 1, for x > 0; less its value 1/Gamma(a+2) at x = 0 where ``minus_zero``."""
    large = x > _CANCELLATION_LIMIT
    xs = torch.where(large, torch.ones_like(x), x)
    # Both forms come from b^I with T = 1; e^x Q(a, x) cancels against the rest for small x, so a series is summed there.
    # sum_n x^n/Gamma(a+n+2) - 2 x^(-a-1) (sinh x - x), free of cancellation as x -> 0
    low = _series(xs, a, 1 if minus_zero else 0, power=True)
    low = low - 2 * torch.exp((2 - a) * torch.log(xs)) * _taylor(xs**2, 3, 2, 14)
    xl = torch.where(large, x, torch.full_like(x, 4.0))
    power = torch.exp(-a * torch.log(xl))
    high = 2 * power - torch.exp(-torch.lgamma(a + 1)) / xl
    high = high + (torch.exp(-xl) - _scaled_upper_gamma(xl, a)) * power / xl
    if minus_zero:
        high = high - torch.exp(-torch.lgamma(a + 2))
    return torch.where(large, high, low)


def unit_cross(x: Tensor, hurst: Tensor, kind: Kind, minus_zero: bool = False) -> Tensor:
    """Cross moments of unit fBM with the memory states at T = 1, ``(*hurst, K)``."""
    a = (hurst + 0.5)[..., None]
    x, a = torch.broadcast_tensors(x, a)
    if kind == "II":
        moments = _cross_type2(x, a)
    else:
        zero = x == 0
        moments = _cross_type1(torch.where(zero, torch.ones_like(x), x), a, minus_zero)
        at_zero = torch.zeros_like(a) if minus_zero else torch.exp(-torch.lgamma(a + 2))
        moments = torch.where(zero, at_zero, moments)
    return moments * variance_constant(hurst, kind).rsqrt()[..., None]


def cross_moments(
    speeds: Tensor, hurst: Tensor | float, horizon: float = 1.0, kind: Kind = "II", unit: bool = True
) -> Tensor:
    r"""Return :math:`b_k=\int_0^T E[B^H(t)\,\tilde Y_k(t)]\,dt`, differentiable in the Hurst index.

    With :math:`a=H+1/2` and the regularised incomplete gamma functions P and Q,

    .. math::
        b^{\mathrm{II}}_k &= T\gamma_k^{-a}P(a,\gamma_kT) - a\gamma_k^{-a-1}P(a+1,\gamma_kT),\\
        b^{\mathrm{I}}_k &= 2T\gamma_k^{-a} - \frac{T^a}{\gamma_k\Gamma(a+1)}
            + [e^{-\gamma_kT}-e^{\gamma_kT}Q(a,\gamma_kT)]\gamma_k^{-a-1},

    both divided by the square root of :func:`variance_constant` if ``unit``. Evaluated by series of positive
    terms for small :math:`\gamma T` and by Laguerre quadrature or in closed form for large, so that value and
    derivative hold to about 1e-12 for every :math:`\gamma T`.

    Args:
        speeds: The mean-reversion speeds ``(K,)``, in 1 / time.
        hurst: Hurst index in (0, 1), shape ``(*batch)``.
        horizon: T.
        kind: The type of the noise: ``"I"`` (stationary increments) or ``"II"`` (a fresh start).
        unit: Whether the target is fractional Brownian motion of unit variance at time 1 (else its kernel has the factor 1/Gamma(a)).

    Returns:
        float64 ``(*batch, K)``.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).

    Example:
        >>> b = cross_moments(torch.tensor([0.05, 20.0]), 0.3, unit=False)
        >>> [round(v, 6) for v in b.tolist()]
        [0.588063, 0.087387]
    """
    check_choice(kind, ("I", "II"), "kind")
    check_hurst(hurst)
    check_positive(horizon, "horizon")
    speeds = as_tensor(speeds, "speeds", 1, "(K,)")
    x = speeds.to(torch.float64) * horizon
    h = torch.as_tensor(hurst, dtype=torch.float64, device=x.device)
    b = unit_cross(x, h, kind) * torch.exp((h + 1.5) * math.log(horizon))[..., None]
    return b if unit else b * variance_constant(h, kind).sqrt()[..., None]
