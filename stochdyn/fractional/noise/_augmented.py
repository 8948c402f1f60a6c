r"""Closed forms of the linear system :math:`dX=-\theta X\,dt+\sigma\,d\hat B` with its memory states Y.

The states are scaled by :math:`\sqrt{2\gamma_k}` where :math:`\gamma_k>0`, to stationary variance 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochdyn.fractional.noise._quadrature import graded_nodes, levels_for, relative_exponential_mean

# Numbers that a block of the quadrature holds at once.
_MOST = 2**24

__all__ = ["divided_exponential", "euler_step", "exact_step", "impulse_response", "stationary_covariance"]


def divided_exponential(theta: Tensor, gamma: Tensor, r: Tensor) -> Tensor:
    r"""Return :math:`(e^{-\theta r}-e^{-\gamma r})/(\gamma-\theta)`, also where the two rates agree."""
    low, high = torch.minimum(theta, gamma), torch.maximum(theta, gamma)
    return torch.exp(-low * r) * r * relative_exponential_mean((high - low) * r)


def impulse_response(r: Tensor, theta: Tensor, gamma: Tensor, w: Tensor) -> Tensor:
    r"""Return the response of X at lag ``r`` to the Brownian motion, for unit scale.

    .. math::
        h(r)=\sum_kw_k\left[e^{-\theta r}-\gamma_k\frac{e^{-\theta r}-e^{-\gamma_kr}}{\gamma_k-\theta}\right].

    Shapes: ``r`` and ``theta (*B)`` broadcast to the result, ``gamma (K,)``, ``w (*B, K)``.
    """
    memory = (w * gamma * divided_exponential(theta[..., None], gamma, r[..., None])).sum(-1)
    return w.sum(-1) * torch.exp(-theta * r) - memory


def _state_scale(gamma: Tensor) -> Tensor:
    return torch.where(gamma > 0, (2 * gamma).sqrt(), torch.ones_like(gamma))


def _responses(r: Tensor, theta: Tensor, scale: Tensor, gamma: Tensor, w: Tensor) -> Tensor:
    """Responses of X and of the scaled states to the Brownian motion at lags ``r (..., J, 1 * batch)``."""
    x = scale * impulse_response(r, theta, gamma, w)
    y = torch.exp(-gamma * r[..., None]) * _state_scale(gamma)
    return torch.cat([x[..., None], y.expand(*x.shape, gamma.shape[0])], dim=-1)


def exact_step(dt: Tensor, theta: Tensor, scale: Tensor, gamma: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return transition matrices and noise covariances, ``(U, *B, K+1, K+1)`` each, of steps ``dt (U,)``.

    The noise covariance is :math:`\int_0^{\Delta}f(s)f(s)^\top ds` with f the impulse responses of all
    states, by a quadrature with positive weights: positive semi-definite by construction, and resonance does
    no harm.
    Shapes: ``theta`` and ``scale`` ``(*B)``, ``gamma (K,)``, ``w (*B, K)``.
    """
    batch = w.shape[:-1]
    lag = dt.reshape(-1, *([1] * len(batch)))
    ones = torch.ones_like(theta)
    to_x = -scale[..., None] * w * gamma * divided_exponential(theta[..., None], gamma, lag[..., None])
    transition = _blocks(
        torch.exp(-theta * lag), to_x / _state_scale(gamma), torch.exp(-gamma * lag[..., None])
    )
    rates = torch.maximum(theta.detach().max(), gamma.max())
    u, weight = (t.to(dt) for t in graded_nodes(levels_for(float(rates * dt.detach().max()))))
    root = weight.sqrt().reshape(-1, *([1] * len(batch)), 1)
    # Few steps at a time: the responses at all nodes are the largest tensor here.
    most = max(1, _MOST // (u.shape[0] * ones.numel() * (gamma.shape[0] + 1)))
    covs = []
    for part in dt.split(most):
        nodes = (part[:, None] * u).reshape(-1, u.shape[0], *([1] * len(batch)))
        f = _responses(nodes * ones, theta, scale, gamma, w) * root
        covs.append(torch.einsum("uj...a,uj...b->u...ab", f, f))
    return transition, torch.cat(covs) * lag[..., None, None]


def euler_step(
    dt: Tensor, theta: Tensor, scale: Tensor, gamma: Tensor, gain: Tensor, recall: Tensor, load: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same for the Euler scheme: explicit drift of X, exact steps of the states.

    Shapes: as in :func:`exact_step`; ``gain (U, *B, R)``, ``recall (U, *B, K)`` and ``load (U, R, K)`` are
    those of the noise's steps.
    """
    batch = recall.shape[1:-1]
    lag = dt.reshape(-1, *([1] * len(batch)))
    state_scale = _state_scale(gamma)
    to_x = scale[..., None] * recall / state_scale
    transition = _blocks(1 - theta * lag, to_x, torch.exp(-gamma * lag[..., None]))
    states = (load * state_scale).reshape(load.shape[0], *([1] * len(batch)), *load.shape[1:])
    f = torch.cat([(scale[..., None] * gain)[..., None], states.expand(*gain.shape, gamma.shape[0])], dim=-1)
    f = f * lag[..., None, None].sqrt()
    return transition, f.mT @ f


def _blocks(stay: Tensor, to_x: Tensor, decay: Tensor) -> Tensor:
    """Assemble ``[[stay, to_x], [0, diag(decay)]]``."""
    top = torch.cat([stay.expand(to_x.shape[:-1])[..., None], to_x], dim=-1)[..., None, :]
    diagonal = torch.diag_embed(decay.expand(to_x.shape))
    return torch.cat([top, torch.cat([to_x.new_zeros(*to_x.shape, 1), diagonal], dim=-1)], dim=-2)


def stationary_covariance(theta: Tensor, scale: Tensor, gamma: Tensor, w: Tensor) -> Tensor:
    """Return the stationary covariance of X and the scaled states, ``(*B, K+1, K+1)``; speeds positive."""
    slowest = torch.minimum(theta.detach().min(), gamma.min())
    fastest = torch.maximum(theta.detach().max(), gamma.max())
    length = 40.0 / slowest
    u, weight = (t.to(gamma) for t in graded_nodes(levels_for(float(fastest * length))))
    batch = w.shape[:-1]
    nodes = (length * u).reshape(-1, *([1] * len(batch)))
    f = _responses(nodes * torch.ones_like(theta), theta, scale, gamma, w)
    f = f * (weight * length).reshape(-1, *([1] * len(batch))).sqrt()[..., None]
    return torch.einsum("j...a,j...b->...ab", f, f)


def prior_state_covariance(gamma: Tensor) -> Tensor:
    """Return the stationary correlations of the scaled states, ``(K, K)``; a state of speed 0 starts at 0."""
    total = gamma[:, None] + gamma[None, :]
    inside = 2 * (gamma[:, None] * gamma[None, :]).sqrt() / torch.where(total > 0, total, math.inf)
    return inside
