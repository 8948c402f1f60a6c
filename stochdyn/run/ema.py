"""Exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_real

__all__ = ["ParameterAverage"]


class ParameterAverage:
    r"""Exponential moving average of the trainable parameters, with a decay that warms up.

    .. math::
        \bar\theta_n = \beta_n\bar\theta_{n-1} + (1-\beta_n)\,\theta_n,\qquad
        \beta_n = \min\Bigl(\beta,\ \tfrac{1+n}{10+n}\Bigr),\qquad \bar\theta_0=\theta_0,

    so that a short run isn't held back by its starting point. Buffers are not averaged.

    Args:
        parameters: The tensors to follow, by name.
        decay: :math:`\beta` in ``(0, 1)``.

    Example:
        >>> p = nn.Parameter(torch.zeros(1))
        >>> average = ParameterAverage({"p": p}, decay=0.5)
        >>> p.data.fill_(1.0)
        tensor([1.])
        >>> average.update({"p": p})        # the first decay is 2/11
        >>> average.values["p"]
        tensor([0.8182])
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        check_real(decay, "ema", above=0.0, below=1.0)
        self.decay = decay
        self.count = 0
        self.values: dict[str, Tensor] = {n: p.detach().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], alive: Tensor | None = None) -> None:
        """Move towards ``parameters``; where the device-side flag ``alive`` is zero, stay."""
        self.count += 1
        weight = 1.0 - min(self.decay, (1 + self.count) / (10 + self.count))
        averages = list(self.values.values())
        targets = [parameters[n].detach() for n in self.values]
        if alive is None:
            torch._foreach_lerp_(averages, targets, weight)
        else:
            for average, target in zip(averages, targets, strict=True):
                average.lerp_(target, (alive * weight).to(average.real.dtype))

    def state_dict(self) -> dict[str, object]:
        """Return the averages and the number of updates."""
        return {"count": self.count, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.count = state["count"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])
