"""Optimal weights of the Markov approximation of fractional Brownian motion."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from stochdyn._caching import cached
from stochdyn._checks import (
    as_tensor,
    check_choice,
    check_hurst,
    check_positive,
    check_positive_int,
    check_real,
)
from stochdyn.errors import ApproximationWarning, InvalidInputError
from stochdyn.fractional.noise.moments import (
    Kind,
    cross_moments,
    entire_2,
    gram_matrix,
    unit_cross,
    variance_constant,
)

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

_CONDITION_LIMIT = 1e13


def geometric_speeds(num_states: int, slowest: float, fastest: float) -> Tensor:
    """Return speeds spaced evenly on a log scale (their geometric mean for one).

    Args:
        num_states: The number of speeds.
        slowest: The smallest speed, 1 / time.
        fastest: The largest speed, 1 / time.

    Returns:
        float64 tensor ``(num_states,)``, increasing.

    Raises:
        InvalidInputError: If a speed or their number isn't positive.

    Example:
        >>> [round(s, 6) for s in geometric_speeds(3, 0.1, 10.0).tolist()]
        [0.1, 1.0, 10.0]
    """
    check_positive_int(num_states, "num_states")
    check_real(slowest, "slowest", above=0.0)
    check_real(fastest, "fastest", above=0.0)
    if num_states == 1:
        return torch.tensor([math.sqrt(slowest * fastest)], dtype=torch.float64)
    ratio = np.log(fastest / slowest) / (num_states - 1)
    return torch.as_tensor(slowest * np.exp(ratio * np.arange(num_states)), dtype=torch.float64)


class WeightSolver:
    r"""What the optimal weights owe to the speeds alone; calling it adds the Hurst index.

    The weights minimise the squared path error :math:`\int_0^TE(B^H-\hat B)^2dt=w^\top Aw-2b^\top w+c`, hence
    :math:`Aw=b`. ``A`` is factorised once, at T = 1, after scaling by its diagonal. For type I the states are
    first replaced by the slowest one and differences from it, whose Gram matrix is free of the cancellation
    that ruins ``A`` when :math:`\gamma T\ll1`. When the scaled matrix has a condition number above 1e13 its
    smallest eigenvalues are dropped and :attr:`truncated` says how many.

    Args:
        speeds: K mean-reversion speeds, increasing, 1 / time.
        horizon: T.
        kind: The type of the noise: ``"I"`` (stationary increments) or ``"II"`` (a fresh start).
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
        # E[phi_i phi_j] and E[phi_i W] integrated over [0, 1], by the entire function (x^2/2 - x + 1 - e^-x) / x^3.
        chi = entire_2(x)
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
        """Return weights ``(*batch, K)`` and path errors ``(*batch)`` for float64 ``hurst (*batch)``."""
        device = hurst.device
        half, gram, basis = (t.to(device) for t in (self.half, self.gram, self.basis))
        b = self.moments(hurst)
        # A v = b through the factor of the inverse.
        v = (b @ half) @ half.T
        with torch.no_grad():
            error = _relative_error(v, b, gram, hurst)
        # for T other than 1: B^H scales as T^H and the states as T^(1/2)
        return (v @ basis.T) * torch.exp((hurst - 0.5) * math.log(self.horizon))[..., None], error

    def moments(self, hurst: Tensor) -> Tensor:
        """Cross moments of unit fBM with the states in the solver's basis, ``(*batch, K)``, at T = 1."""
        x = self.x.to(hurst.device)
        if self.kind == "II":
            return unit_cross(x, hurst, "II")
        moments = unit_cross(x, hurst, "I", minus_zero=True)
        first = unit_cross(x[:1], hurst, "I")
        return torch.cat([first, moments[..., 1:] - moments[..., :1]], dim=-1)

    def error_of(self, weights: Tensor, hurst: Tensor) -> Tensor:
        """Return the relative path errors ``(*batch)`` of any weights ``(*batch, K)`` for T = 1."""
        v = weights
        if self.kind == "I":
            v = torch.cat([weights.sum(-1, keepdim=True), weights[..., 1:]], dim=-1)
        return _relative_error(v, self.moments(hurst), self.gram.to(hurst.device), hurst)


def _relative_error(v: Tensor, b: Tensor, gram: Tensor, hurst: Tensor) -> Tensor:
    """Root of w'Aw - 2b'w + c over c, at T = 1."""
    c = 1 / (2 * hurst + 1)
    quadratic = ((v @ gram - 2 * b) * v).sum(-1) + c
    return (quadratic / c).clamp_min(0.0).sqrt()


@cached(64)
def weight_solver(speeds: tuple[float, ...], horizon: float, kind: Kind) -> WeightSolver:
    """Return the (cached) :class:`WeightSolver` of a grid of speeds, validated."""
    check_choice(kind, ("I", "II"), "kind")
    check_positive(horizon, "horizon")
    if len(speeds) == 0 or any(not math.isfinite(s) or s < 0 for s in speeds):
        raise InvalidInputError(
            "speeds must be finite, at least one of them, and not negative", got=list(speeds)
        )
    if any(b <= a for a, b in pairwise(speeds)):
        raise InvalidInputError("speeds must increase strictly", got=list(speeds), hint="sort them")
    solver = WeightSolver(speeds, horizon, kind)
    if solver.truncated:
        warnings.warn(
            f"the speeds are nearly dependent on [0, {horizon:g}]: {solver.truncated} of {len(speeds)} "
            "directions were dropped; use fewer states or a wider range of speeds",
            ApproximationWarning,
            stacklevel=6,
        )
    return solver


def optimal_weights(
    hurst: Tensor | float, speeds: Tensor, horizon: float, kind: Kind = "II"
) -> tuple[Tensor, Tensor]:
    r"""Return the weights of the best approximation of unit fBM by memory states, and its error.

    .. math::
        \hat B=\sum_kw_k[Y_k-Y_k(0)],\quad Aw=b,\quad \varepsilon=\sqrt{(w^\top Aw-2b^\top w+c)/c},\quad
        c=\int_0^TE[B^H(t)^2]\,dt=\frac{T^{2H+1}}{2H+1}.

    Args:
        hurst: Hurst index in (0, 1), shape ``(*batch)``; gradients flow to the weights.
        speeds: The increasing speeds ``(K,)``, in 1 / time.
        horizon: The length T of the time on which the path error is minimised.
        kind: The type of the noise: ``"I"`` (stationary increments) or ``"II"`` (a fresh start).

    Returns:
        ``weights (*batch, K)`` and ``relative_error (*batch)``, the relative L2 path error; both float64.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).
        InvalidInputError: If the speeds are not increasing and non-negative.

    Example:
        >>> w, error = optimal_weights(0.7, geometric_speeds(5, 0.05, 20.0), 1.0)
        >>> round(float(error), 6)
        0.011581

    Reference:
        R. Daems, M. Opper, G. Crevecoeur and T. Birdal, ICLR 2024, section 3.
    """
    check_hurst(hurst)
    check_positive(horizon, "horizon")
    speeds = as_tensor(speeds, "speeds", 1, "(K,)")
    h = torch.as_tensor(hurst, dtype=torch.float64)
    return weight_solver(tuple(speeds.detach().to(torch.float64).tolist()), float(horizon), kind)(h)
