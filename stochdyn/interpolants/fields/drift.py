"""The drift of the forward equation, each network evaluated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.interpolants.fields.networks import Fields

__all__ = ["ForwardDrift"]


class ForwardDrift(nn.Module):
    r"""The drift :math:`b+\varepsilon s`, each network evaluated once.

    Args:
        fields: The networks.
        epsilon: The strength of the noise, a number or a function of time.
        condition: The labels or contexts that are passed on to the networks; None for none.
        guidance: The strength of classifier-free guidance.
    """

    def __init__(
        self,
        fields: Fields,
        epsilon: float | Callable[[Tensor], Tensor],
        condition: Any = None,
        guidance: float = 1.0,
    ) -> None:
        super().__init__()
        self.fields, self.epsilon, self.condition, self.guidance = fields, epsilon, condition, guidance

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)``."""
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        strength = self.epsilon(time) if callable(self.epsilon) else self.epsilon
        if isinstance(strength, float) and strength == 0.0:
            return self.fields("velocity", time, x, self.condition, self.guidance)
        weights = {"velocity": 1.0, "score": strength}
        return self.fields.combine(weights, time, x, self.condition, self.guidance)
