"""The drift of the forward equation, each network evaluated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.interpolants.fields.networks import Fields
from stochdyn.interpolants.sampling.noise_level import Epsilon

__all__ = ["ForwardDrift"]


class ForwardDrift(nn.Module):
    r"""The drift :math:`b+\varepsilon s`, each network evaluated once.

    Args:
        fields: the networks.
        epsilon: strength of the noise.
        condition: passed on to the networks.
        guidance: strength of classifier-free guidance.
    """

    def __init__(
        self, fields: Fields, epsilon: Epsilon, condition: Any = None, guidance: float = 1.0
    ) -> None:
        super().__init__()
        self.fields, self.epsilon, self.condition, self.guidance = fields, epsilon, condition, guidance

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)``."""
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if self.epsilon.vanishes:
            return self.fields("velocity", time, x, self.condition, self.guidance)
        weights = {"velocity": 1.0, "score": self.epsilon(time)}
        return self.fields.combine(weights, time, x, self.condition, self.guidance)
