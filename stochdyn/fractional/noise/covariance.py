"""The covariance of weighted memory states, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.fractional.noise._quadrature import relative_exponential_mean
from stochdyn.fractional.noise.moments import Kind, entire_1

__all__ = ["markov_covariance"]


def markov_covariance(t: Tensor, w: Tensor, g: Tensor, kind: Kind) -> Tensor:
    """Return E[B(s) B(t)] of ``sum_k w_k [Y_k(t) - Y_k(0)]``, ``(*batch, T, T)``.

    Shapes: ``t (T,)`` times since the start, ``w (*batch, K)``, ``g (K,)`` speeds; all float64.
    """
    w, g = w.to(t.device), g.to(t.device)
    if kind == "I":
        return _stationary_increment_covariance(t, w, g)
    total = g[:, None] + g[None, :]
    low, gap = torch.minimum(t[:, None], t[None, :]), (t[:, None] - t[None, :]).abs()
    out = torch.zeros((), dtype=t.dtype, device=t.device)
    for j in range(len(g)):
        # E[Y_j(t) Y_k(s)] = e^{-g_j (t - s)} (1 - e^{-(g_j + g_k) s}) / (g_j + g_k) for s < t
        mixed = low[..., None] * relative_exponential_mean(total[j] * low[..., None])
        out = out + torch.einsum("stk,...k->...st", mixed, w * w[..., j, None]) * torch.exp(-g[j] * gap)
    return out


def _stationary_increment_covariance(t: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """Type I: v(s) + v(t) - v(|t-s|) with half the variogram v."""
    f = _half_variogram(t, w, g)
    gap = (t[:, None] - t[None, :]).abs()
    return f[..., :, None] + f[..., None, :] - _half_variogram(gap.flatten(), w, g).unflatten(-1, gap.shape)


def _half_variogram(lag: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """Half the variance of the noise over lags ``(N,)``, ``(*batch, N)``, without cancellation at either end of the speeds.

    With psi_k = Y_k(t) - Y_k(0), E[psi_i psi_j] = (2 - e^{-g_i t} - e^{-g_j t}) / (g_i + g_j). Slow states may have huge
    weights of opposite signs, so these are first written as psi_k = W(t) + phi_k(t), and the weights of W added up.
    """
    slow = g * lag.max() <= 1
    ws, gs, wf, gf = w[..., slow], g[slow], w[..., ~slow], g[~slow]
    out = lag.new_zeros(())
    if len(gs):
        total = gs[:, None] + gs[None, :]
        volatility = ws.sum(-1)
        shared = gs[:, None] * gs[None, :] / torch.where(total == 0, torch.ones_like(total), total)
        # Var = V^2 t + 2 V Cov(W, phi) + Var(phi) with V the sum of the weights, each in terms of t^2 (e^-gt - 1 + gt) / (gt)^2.
        coefficient = ws * (ws @ shared) - volatility[..., None] * ws * gs
        memory = lag[:, None] ** 2 * entire_1(gs * lag[:, None])
        out = 0.5 * (volatility**2)[..., None] * lag + coefficient @ memory.T
    if len(gf):
        # Fast states hold no huge weights: the sum over pairs as it stands.
        left = -torch.expm1(-gf * lag[:, None])
        among = wf * (wf @ (1 / (gf[:, None] + gf[None, :])))
        out = out + among @ left.T
        if len(gs):
            across = 1 / (gs[:, None] + gf[None, :])
            slow_left = -torch.expm1(-gs * lag[:, None])
            # sum over pairs of w_s w_f [(1 - e^{-g_s t}) + (1 - e^{-g_f t})] / (g_s + g_f)
            out = out + (ws * (wf @ across.T)) @ slow_left.T + (wf * (ws @ across)) @ left.T
    return out
