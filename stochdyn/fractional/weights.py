"""Optimal weights of the Markov approximation of fractional Brownian motion, differentiable in the Hurst index."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_hurst, check_positive
from stochdyn.errors import ApproximationWarning, InvalidInputError

__all__ = [
    "Kind",
    "WeightSolver",
    "cross_moments",
    "geometric_speeds",
    "gram_matrix",
    "optimal_weights",
    "variance_constant",
    "weight_solver",
]

Kind = Literal["I", "II"]

_SERIES_TERMS = 140  # enough for x <= 40: the terms x^n/n! have left float64 by then
_SERIES_LIMIT = 40.0  # beyond it 1 - P(a, x) < 1e-17: the incomplete gammas equal 1
_CANCELLATION_LIMIT = 3.0  # type I: below, sinh x - x form; above, e^x Q(a, x) by Laguerre quadrature
_LAGUERRE_NODES = 48
_CONDITION_LIMIT = 1e13


def variance_constant(hurst: Tensor | float, kind: Kind = "II") -> Tensor:
    r"""Return the variance at time 1 of fractional Brownian motion with kernel :math:`(t-s)^{H-1/2}/\Gamma(H+1/2)`.

    .. math::
        V_{\mathrm I} = \frac{1}{\Gamma(2H+1)\sin \pi H},\qquad
        V_{\mathrm{II}} = \frac{1}{2H\,\Gamma(H+1/2)^2}.

    Args:
        hurst: Hurst index in (0, 1), any shape.
        kind: ``"I"`` (Mandelbrot-Van Ness) or ``"II"`` (Riemann-Liouville).

    Returns:
        float64 tensor of the shape of ``hurst``, differentiable.

    Raises:
        HurstRangeError: if ``hurst`` lies outside (0, 1).

    Example:
        >>> round(float(variance_constant(0.7, "I")), 4), round(float(variance_constant(0.7, "II")), 4)
        (0.9951, 0.8473)

    Reference:
        B. Mandelbrot and J. Van Ness, SIAM Review 10(4), 1968.
    """
    check_choice(kind, ("I", "II"), "kind")
    check_hurst(hurst)
    h = torch.as_tensor(hurst).to(torch.float64)
    if kind == "I":
        return torch.exp(-torch.lgamma(2 * h + 1)) / torch.sin(math.pi * h)
    return torch.exp(-2 * torch.lgamma(h + 0.5)) / (2 * h)


def geometric_speeds(num_states: int, slowest: float, fastest: float) -> Tensor:
    """Return ``num_states`` mean-reversion speeds spaced evenly on a log scale (the geometric mean for one).

    Args:
        num_states: how many.
        slowest: smallest speed, 1 / time.
        fastest: largest speed, 1 / time.

    Returns:
        float64 tensor ``(num_states,)``, increasing.

    Example:
        >>> geometric_speeds(3, 0.1, 10.0).tolist()
        [0.1, 1.0, 10.0]
    """
    if num_states == 1:
        return torch.tensor([math.sqrt(slowest * fastest)], dtype=torch.float64)
    ratio = np.log(fastest / slowest) / (num_states - 1)
    return torch.as_tensor(slowest * np.exp(ratio * np.arange(num_states)), dtype=torch.float64)


def _taylor(x: Tensor, first: int, stride: int, terms: int) -> Tensor:
    """Sum over n < terms of x^n / (first + stride n)!."""
    total = torch.zeros_like(x)
    for n in reversed(range(terms)):
        total = total * x + 1.0 / float(math.factorial(first + stride * n))
    return total


def _phi(x: Tensor) -> Tensor:
    """(e^-x - 1 + x) / x^2, entire; 1/2 at 0."""
    small = x < 0.5
    xs = torch.where(small, x, torch.zeros_like(x))
    xl = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, _taylor(-xs, 2, 1, 16), (torch.expm1(-xl) + xl) / xl**2)


def _chi(x: Tensor) -> Tensor:
    """(x^2/2 - x + 1 - e^-x) / x^3, entire; 1/6 at 0."""
    small = x < 1.0
    xs = torch.where(small, x, torch.zeros_like(x))
    xl = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, _taylor(-xs, 3, 1, 20), (xl**2 / 2 - xl - torch.expm1(-xl)) / xl**3)


def gram_matrix(speeds: Tensor, horizon: float = 1.0, kind: Kind = "II") -> Tensor:
    r"""Return :math:`A_{ij}=\int_0^T E[\tilde Y_i\tilde Y_j]\,dt` of the memory states :math:`\tilde Y=Y(t)-Y(0)`.

    .. math::
        A^{\mathrm{II}}_{ij} = \frac{T+(e^{-(\gamma_i+\gamma_j)T}-1)/(\gamma_i+\gamma_j)}{\gamma_i+\gamma_j},\qquad
        A^{\mathrm{I}}_{ij} = \frac{2T+(e^{-\gamma_iT}-1)/\gamma_i+(e^{-\gamma_jT}-1)/\gamma_j}{\gamma_i+\gamma_j}.

    Args:
        speeds: ``(K,)`` mean-reversion speeds, 1 / time; 0 stands for Brownian motion itself.
        horizon: T.
        kind: ``"I"`` (stationary start) or ``"II"`` (start at 0).

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
    x = speeds.to(torch.float64) * horizon
    total = x[:, None] + x[None, :]
    if kind == "II":
        return horizon**2 * _phi(total)
    numerator = (x * _phi(x))[:, None] + (x * _phi(x))[None, :]
    both_zero = total == 0
    ratio = numerator / torch.where(both_zero, torch.ones_like(total), total)
    return horizon**2 * torch.where(both_zero, torch.full_like(total, 0.5), ratio)


def _series(x: Tensor, a: Tensor, first: int, power: bool) -> Tensor:
    """Sum over n >= first of c_n x^n / Gamma(a + 2 + n); c_n = 1 if ``power`` else (n+1) e^-x. Positive terms."""
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
    return torch.where(large, torch.exp(-a * torch.log(xl)) * (1 - a / xl), low)


@lru_cache(maxsize=1)
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


def _unit_cross(x: Tensor, hurst: Tensor, kind: Kind, minus_zero: bool = False) -> Tensor:
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
        speeds: ``(K,)``, 1 / time.
        hurst: Hurst index in (0, 1), shape ``(*batch)``.
        horizon: T.
        kind: ``"I"`` or ``"II"``.
        unit: for fractional Brownian motion of unit variance at time 1 (else with kernel constant 1/Gamma(a)).

    Returns:
        float64 ``(*batch, K)``.

    Raises:
        HurstRangeError: if ``hurst`` lies outside (0, 1).

    Example:
        >>> b = cross_moments(torch.tensor([0.05, 20.0]), 0.3, unit=False)
        >>> [round(v, 6) for v in b.tolist()]
        [0.588063, 0.087387]
    """
    check_choice(kind, ("I", "II"), "kind")
    check_hurst(hurst)
    check_positive(horizon, "horizon")
    x = speeds.to(torch.float64) * horizon
    h = torch.as_tensor(hurst).to(device=x.device, dtype=torch.float64)
    b = _unit_cross(x, h, kind) * torch.exp((h + 1.5) * math.log(horizon))[..., None]
    return b if unit else b * variance_constant(h, kind).sqrt()[..., None]


class WeightSolver:
    r"""Everything about the optimal weights that depends on the speeds alone; calling it adds the Hurst index.

    The weights minimise the squared path error :math:`\int_0^TE(B^H-\hat B)^2dt=w^\top Aw-2b^\top w+c`, hence
    :math:`Aw=b`. ``A`` is factorised once, at T = 1, after scaling by its diagonal. For type I the states are
    first replaced by the slowest one and differences from it, whose Gram matrix is free of the cancellation
    that ruins ``A`` when :math:`\gamma T\ll1`. When the scaled matrix has a condition number above 1e13 its
    smallest eigenvalues are dropped and :attr:`truncated` says how many.

    Args:
        speeds: K mean-reversion speeds, increasing, 1 / time.
        horizon: T.
        kind: ``"I"`` or ``"II"``.
    """

    def __init__(self, speeds: tuple[float, ...], horizon: float, kind: Kind) -> None:
        self.kind: Kind = kind
        self.horizon = horizon
        self.x = torch.tensor(speeds, dtype=torch.float64) * horizon
        k = self.x.shape[0]
        self.basis = torch.eye(k, dtype=torch.float64)
        if kind == "I":
            self.basis[0, 1:] = -1.0
            self.gram = self._difference_gram(self.x)
        else:
            self.gram = gram_matrix(self.x, 1.0, kind)
        scale = self.gram.diagonal().rsqrt()
        scaled = scale[:, None] * self.gram * scale[None, :]
        values, vectors = torch.linalg.eigh(scaled)
        keep = values > values[-1] / _CONDITION_LIMIT
        self.truncated = int((~keep).sum())
        self.condition = float(values[-1] / values[0].clamp_min(1e-300))
        if self.truncated == 0:
            lower = torch.linalg.cholesky(scaled)
            root = torch.linalg.solve_triangular(lower, torch.eye(k, dtype=torch.float64), upper=False).T
        else:
            root = vectors[:, keep] * values[keep].rsqrt()
        # the inverse of the Gram matrix is half @ half.T
        self.half = scale[:, None] * root

    @staticmethod
    def _difference_gram(x: Tensor) -> Tensor:
        """Gram matrix, type I, of Y_1 and Y_k - Y_1 through phi_k = Y_k - Y_k(0) - W, T = 1."""
        chi = _chi(x)
        total = x[:, None] + x[None, :]
        phi = x[:, None] * x[None, :] / torch.where(total == 0, torch.ones_like(total), total)
        phi = phi * (chi[:, None] + chi[None, :])
        phi_w = -x * chi
        gram = phi - phi[:1, :] - phi[:, :1] + phi[0, 0]
        gram[0, 0] = 0.5 + 2 * phi_w[0] + phi[0, 0]
        mixed = phi_w[1:] - phi_w[0] + phi[1:, 0] - phi[0, 0]
        gram[0, 1:], gram[1:, 0] = mixed, mixed
        return gram

    def __call__(self, hurst: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights ``(*batch, K)`` and relative path errors ``(*batch)`` for float64 ``hurst (*batch)``."""
        device = hurst.device
        x, half, gram, basis = (t.to(device) for t in (self.x, self.half, self.gram, self.basis))
        if self.kind == "I":
            moments = _unit_cross(x, hurst, "I", minus_zero=True)
            first = _unit_cross(x[:1], hurst, "I")
            b = torch.cat([first, moments[..., 1:] - moments[..., :1]], dim=-1)
        else:
            b = _unit_cross(x, hurst, "II")
        v = (b @ half) @ half.T
        with torch.no_grad():
            c = 1 / (2 * hurst + 1)
            quadratic = ((v @ gram - 2 * b) * v).sum(-1) + c
            error = (quadratic / c).clamp_min(0.0).sqrt()
        # for T other than 1: B^H scales as T^H and the states as T^(1/2)
        return (v @ basis.T) * torch.exp((hurst - 0.5) * math.log(self.horizon))[..., None], error


@lru_cache(maxsize=64)
def weight_solver(speeds: tuple[float, ...], horizon: float, kind: Kind) -> WeightSolver:
    """Return the (cached) :class:`WeightSolver` of a grid of speeds, validated."""
    check_choice(kind, ("I", "II"), "kind")
    check_positive(horizon, "horizon")
    if len(speeds) == 0 or any(not math.isfinite(s) or s < 0 for s in speeds):
        raise InvalidInputError(
            "speeds must be finite, at least one of them, and not negative", got=list(speeds)
        )
    if any(b <= a for a, b in zip(speeds[:-1], speeds[1:], strict=True)):
        raise InvalidInputError("speeds must increase strictly", got=list(speeds), hint="sort them")
    solver = WeightSolver(speeds, horizon, kind)
    if solver.truncated:
        warnings.warn(
            f"the speeds are nearly dependent on [0, {horizon:g}]: {solver.truncated} of {len(speeds)} directions "
            "were dropped; use fewer states or a wider range of speeds",
            ApproximationWarning,
            stacklevel=3,
        )
    return solver


def optimal_weights(
    hurst: Tensor | float, speeds: Tensor, horizon: float, kind: Kind = "II"
) -> tuple[Tensor, Tensor]:
    r"""Return the weights of the best approximation :math:`\hat B=\sum_kw_k(Y_k-Y_k(0))` of unit fBM, and its error.

    .. math::
        Aw=b,\qquad \varepsilon=\sqrt{(w^\top Aw-2b^\top w+c)/c},\qquad c=\int_0^TE[B^H(t)^2]dt=\frac{T^{2H+1}}{2H+1}.

    Args:
        hurst: Hurst index in (0, 1), shape ``(*batch)``; gradients flow to the weights.
        speeds: ``(K,)`` speeds, increasing, 1 / time.
        horizon: T, the length of time on which the path error is minimised.
        kind: ``"I"`` or ``"II"``.

    Returns:
        ``weights (*batch, K)`` and ``relative_error (*batch)``, the relative L2 path error; both float64.

    Raises:
        HurstRangeError: if ``hurst`` lies outside (0, 1).
        InvalidInputError: if the speeds are not increasing and non-negative.

    Example:
        >>> w, error = optimal_weights(0.7, geometric_speeds(5, 0.05, 20.0), 1.0)
        >>> round(float(error), 6)
        0.011581

    Reference:
        R. Daems, M. Opper, G. Crevecoeur and T. Birdal, ICLR 2024, section 3.
    """
    check_hurst(hurst)
    h = torch.as_tensor(hurst).to(torch.float64)
    return weight_solver(tuple(speeds.detach().to(torch.float64).tolist()), float(horizon), kind)(h)
