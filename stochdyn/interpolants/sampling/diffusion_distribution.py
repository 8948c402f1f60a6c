"""A learned score as a Pyro distribution: a prior, guide or likelihood in any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.interpolants.fields.conditions import as_condition
from stochdyn.interpolants.sampling.distribution import FlowDistribution

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.reverse import ReverseDiffusion

__all__ = ["DiffusionDistribution"]


class DiffusionDistribution(FlowDistribution):
    """The law of the probability-flow ODE of a learned score, at the start time of its process, with event ``(d,)``.

    Args:
        model: The generative model.
        num_steps: The number of steps of the grid, for draws and densities alike.
        condition: One label ``()`` or one context vector ``(c,)``; with leading axes a batch of laws.

    Raises:
        InvalidInputError: If ``num_steps`` isn't a positive integer.

    Reference:
        Song et al., "Score-based generative modeling through SDEs", 2021, section 4.3.
    """

    _carried = ("model", "num_steps", "law", "condition_axes")

    def __init__(
        self,
        model: ReverseDiffusion,
        num_steps: int = 50,
        condition: Any = None,
        validate_args: bool | None = None,
    ) -> None:
        check_positive_int(num_steps, "num_steps")
        self.model, self.num_steps, self.law = model, num_steps, model.prior
        given = None if condition is None else as_condition(condition, model.example)
        axes = 0 if given is None or not given.is_floating_point() else 1
        super().__init__(torch.Size([model.dim]), given, axes, validate_args=validate_args)

    def _carry(self, noise: Tensor, condition: Tensor | None) -> Tensor:
        return self.model.flow(noise, self.num_steps, condition)

    def _density(self, flat: Tensor, condition: Tensor | None) -> Tensor:
        return self.model.log_prob(flat, num_steps=self.num_steps, condition=condition)
