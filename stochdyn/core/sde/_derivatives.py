"""Derivatives of a state-dependent diffusion along itself: what Milstein, Heun and time reversal need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochdyn._transforms import as_leaf, as_ordinary, recording
from stochdyn.core.forward.divergences import jacobian_contraction
from stochdyn.core.sde.coefficients import Diagonal, Scalar
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError

__all__ = ["ItoDrift", "check_additive", "check_commutative", "self_advection", "strength_along"]


def _noise(sde: SDE, t: Tensor, x: Tensor, dz: Tensor) -> Tensor:
    return sde.diffusion(t, x).apply(dz).expand_as(x)


def strength_along(sde: SDE, t: Tensor, x: Tensor, dz: Tensor, direction: Tensor) -> Tensor:
    """Return the derivative of ``G(t, x) dz (..., d)`` in ``x`` along ``direction (..., d)``."""
    keep = torch.is_grad_enabled()
    with recording():
        # Two reverse passes: forward mode costs ten times as much for small steps.
        point = x if x.requires_grad else as_leaf(x)
        noise = _noise(sde, as_ordinary(t), point, as_ordinary(dz))
        return jacobian_contraction(noise, point, as_ordinary(direction).unsqueeze(0), keep)[0]


def self_advection(sde: SDE, t: Tensor, x: Tensor, channels: int, commutes: bool = True) -> Tensor:
    r"""Return :math:`\sum_k (\partial G_k) G_k`, the Itô-Stratonovich correction without its factor 1/2.

    One derivative does for diagonal noise that commutes; ``commutes=False`` takes one for each channel.
    """
    g = sde.diffusion(t, x)
    if commutes and isinstance(g, Scalar | Diagonal):
        # Commuting diagonal noise has g_i depending on x_i alone: one derivative along g serves all channels.
        # x-component i: g_i dg_i/dx_i.
        ones = torch.ones_like(x)
        return strength_along(sde, t, x, ones, g.apply(ones))
    total = torch.zeros_like(x)
    for column in _channels(x, channels):
        total = total + strength_along(sde, t, x, column, g.apply(column).expand_as(x))
    return total


class ItoDrift(nn.Module):
    r"""The drift of the Itô equation of a process that was given in Stratonovich's sense, :math:`b+\tfrac12\sum_k(\partial G_k)G_k`."""

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        self.sde = sde

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        channels = self.sde.noise_dim(t, x)
        value: Tensor = self.sde.drift(t, x) + 0.5 * self_advection(
            self.sde, t, x, channels, commutes=x.shape[-1] == 1
        )
        return value


def check_additive(sde: SDE, t: Tensor, x0: Tensor, method: str, span: Tensor) -> None:
    """Raise unless the diffusion doesn't depend on the state, at the start and where the noise of a time ``span`` takes it."""
    with torch.no_grad():
        g = sde.diffusion(t, x0)
        at = g.matrix(x0.shape[-1])
        shift = span.sqrt().to(x0.dtype) * g.apply(x0.new_ones(*x0.shape[:-1], at.shape[-1]))
        for x in (x0 + shift, 1.5 * x0 - 0.3 * shift):
            moved = sde.diffusion(t, x).matrix(x0.shape[-1])
            # Every component of every state in its own unit.
            if bool(((moved - at).abs() > 1e-6 * at.abs().amax(-1, keepdim=True)).any()):
                raise InvalidInputError(
                    f"method {method!r} needs noise that doesn't depend on the state",
                    hint="use method='milstein', or coordinates in which it doesn't (sde.transformed)",
                )


def check_commutative(sde: SDE, t: Tensor, x0: Tensor, channels: int, method: str, span: Tensor) -> None:
    """Raise unless (dG_k) G_l = (dG_l) G_k for all channels, at the start and where the noise of a time ``span`` takes it."""
    with torch.no_grad():
        fraction = torch.linspace(0.1, 0.3, x0.shape[-1], dtype=x0.dtype, device=x0.device)
        ones = x0.new_ones(*x0.shape[:-1], channels)
        shift = fraction * span.sqrt().to(x0.dtype) * sde.diffusion(t, x0).apply(ones)
        for x in (x0, x0 + shift, x0 * (1 + fraction)):
            g = sde.diffusion(t, x)
            columns = _channels(x, channels)
            along = [g.apply(c).expand_as(x) for c in columns]
            for k in range(channels):
                for other in range(k):
                    forward = strength_along(sde, t, x, columns[k], along[other])
                    backward = strength_along(sde, t, x, columns[other], along[k])
                    # A state outside the domain of the diffusion (a square root, say) tells nothing.
                    gap = (forward - backward).abs().nan_to_num(0.0)
                    size = forward.abs().nan_to_num(0.0) + backward.abs().nan_to_num(0.0)
                    if bool((gap > 1e-4 * size).any()):
                        raise InvalidInputError(
                            f"method {method!r} needs commutative noise",
                            got=f"channels {other} and {k} that don't commute",
                            hint="use method='euler'",
                        )


def _channels(x: Tensor, channels: int) -> list[Tensor]:
    """Return the unit vectors of the noise channels, each ``(..., m)`` with the batch axes of ``x``."""
    unit = torch.eye(channels, dtype=x.dtype, device=x.device)
    return [unit[k].expand(*x.shape[:-1], channels) for k in range(channels)]
