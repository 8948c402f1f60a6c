"""Drifts of equations that run backwards in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stochdyn._transforms import as_leaf, recording
from stochdyn.core.sde.control import Field
from stochdyn.core.sde.covariance import covariance_divergence

if TYPE_CHECKING:
    from stochdyn.core.sde.equation import SDE

__all__ = ["BackwardDrift", "ReverseDrift", "spatial_divergence"]


class ReverseDrift(nn.Module):
    """The drift of the time-reversed law: see :meth:`stochdyn.SDE.reverse`."""

    def __init__(self, sde: SDE, score: Field, horizon: float, parity: Tensor | None) -> None:
        super().__init__()
        self.sde = sde
        self.score = score
        self.horizon = horizon
        self.register_buffer("parity", parity)
        self.parity: Tensor | None

    def forward(self, tau: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` at ``x (..., d)`` and the time on the reversed clock."""
        t = self.horizon - tau
        signs = None if self.parity is None else self.parity.to(x)
        x = x if signs is None else x * signs
        g = self.sde.diffusion(t, x)
        # -f + div(G G^T) + G G^T score, at the reflected state.
        covariance = g.covariance(x.shape[-1]).to(x.dtype)
        back = (covariance @ self.score(t, x).unsqueeze(-1)).squeeze(-1) - self.sde.slope(t, x)
        back = back + spatial_divergence(self.sde, t, x) if self.sde.state_dependent else back
        return back if signs is None else back * signs


class BackwardDrift(nn.Module):
    """The drift of the same dynamics under the reversed protocol: see :meth:`stochdyn.SDE.backward`."""

    def __init__(self, sde: SDE, horizon: float) -> None:
        super().__init__()
        self.sde = sde
        self.horizon = horizon

    def forward(self, tau: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` at ``x (..., d)`` and the time on the reversed clock."""
        return self.sde.slope(self.horizon - tau, x)


def spatial_divergence(sde: SDE, t: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`(\nabla\cdot GG^\top)_i=\sum_j\partial_j(GG^\top)_{ij}`, ``(..., d)``."""
    keep = torch.is_grad_enabled()
    with recording():
        point = x if x.requires_grad else as_leaf(x)
        return covariance_divergence(sde.diffusion(t, point), point, create_graph=keep).to(x.dtype)
