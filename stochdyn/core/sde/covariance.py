"""The divergence of a state-dependent noise covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._checks import check_type
from stochdyn.core.forward.divergences import check_computed, jacobian_contraction, pull_back
from stochdyn.core.sde.coefficients import Coefficient, Diagonal, Scalar

__all__ = ["covariance_divergence"]


def covariance_divergence(
    coefficient: Coefficient, x: Tensor, probe: Tensor | None = None, create_graph: bool = True
) -> Tensor:
    r"""Divergence of the noise covariance, which carries the noise-induced drift.

    .. math:: (\nabla\cdot D)_i = \sum_j\partial_j D_{ij},\qquad D = GG^\top

    Args:
        coefficient: The diffusion, computed from ``x``.
        x: The points ``(..., d)``, with ``requires_grad``.
        probe: The vectors ``(..., d)`` of unit covariance; if given, the unbiased estimate
            :math:`(\partial_\epsilon D)\,\epsilon` from one directional derivative takes the place of ``d`` of them.
        create_graph: Whether the result is to be differentiated.

    Returns:
        ``(..., d)``; zero where the coefficient doesn't depend on ``x``.

    Example:
        >>> x = torch.tensor([[3.0]], requires_grad=True)
        >>> covariance_divergence(Diagonal(x), x).detach()
        tensor([[6.]])
    """
    check_type(coefficient, Coefficient, "coefficient")
    check_computed(coefficient.value, x, "coefficient")
    d = x.shape[-1]
    if isinstance(coefficient, Scalar):
        return pull_back(coefficient.value.square(), x, create_graph=create_graph)
    if isinstance(coefficient, Diagonal):
        values = coefficient.value.square().expand_as(x)
    else:
        values = coefficient.covariance(d).expand(*x.shape, d)
    if probe is None:
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        directions = eye.reshape(d, *(1,) * (x.ndim - 1), d).expand(d, *x.shape)
        slopes = jacobian_contraction(values, x, directions, create_graph)
        if isinstance(coefficient, Diagonal):
            return torch.stack([slopes[i, ..., i] for i in range(d)], -1)
        return torch.stack([slopes[j, ..., j] for j in range(d)]).sum(0)
    slope = jacobian_contraction(values, x, probe[None], create_graph)[0]
    if isinstance(coefficient, Diagonal):
        return slope * probe
    return (slope @ probe.unsqueeze(-1)).squeeze(-1)
