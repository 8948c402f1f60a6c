"""The units of the data of a latent SDE: what is learnt counts observations in their own standard deviations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.fractional.latent.series import Series

__all__ = ["DataUnits", "InDataUnits"]


class DataUnits(nn.Module):
    """Mean and standard deviation of each component of the data, taken from the first series that are seen and stored with the model.

    Args:
        obs_dim: The number p of components of an observation.
    """

    center: Tensor
    scale: Tensor
    ready: Tensor

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(obs_dim))
        self.register_buffer("scale", torch.ones(obs_dim))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        # spares a look at the device in every step
        self._known = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = False

    @torch.no_grad()
    def observe(self, series: Series) -> None:
        """Take the units from these series, unless they are known."""
        if not self._known and not bool(self.ready):
            count = series.mask.double().sum((0, 1)).clamp_min(1.0)
            center = series.values.double().where(series.mask, 0.0).sum((0, 1)) / count
            gap = (series.values.double() - center).where(series.mask, 0.0)
            scale = (gap.square().sum((0, 1)) / count).sqrt()
            size = center.abs()
            # what never moves but for rounding has the size of its values as its unit
            moves = scale > 16 * torch.finfo(series.values.dtype).eps * size
            self.center.copy_(center)
            self.scale.copy_(torch.where(moves, scale, torch.where(size > 0, size, torch.ones_like(size))))
            self.ready.fill_(True)
        self._known = True

    def standardised(self, series: Series) -> Series:
        """Return the series in these units, from their mean on; what is missing stays zero."""
        values = ((series.values - self.center) / self.scale).where(series.mask, 0.0)
        return Series(series.times, values, series.mask)


class InDataUnits(nn.Module):
    r"""A function of the state whose values are counted in units of the data, :math:`f(x)=c+u\,N(x)`.

    Args:
        net: The function N.
        units: The units, which change with the first data.
    """

    def __init__(self, net: Callable[[Tensor], Tensor], units: DataUnits) -> None:
        super().__init__()
        self.net, self.units = net, units

    def forward(self, x: Tensor) -> Tensor:
        """Return values ``(..., p)`` at states ``(..., d)``."""
        return self.units.center + self.units.scale * self.net(x)
