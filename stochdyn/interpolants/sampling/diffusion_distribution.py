"""A learned score as a Pyro distribution: a prior, guide or likelihood in any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn._checks import check_event_size, check_positive_int
from stochdyn.infer.law_distribution import LawDistribution
from stochdyn.interpolants.sampling.samplers import integrate_ode

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.reverse import ReverseDiffusion

__all__ = ["DiffusionDistribution"]


class DiffusionDistribution(LawDistribution):
    """The law of the probability-flow ODE of a learned score, at the start time of its process, with event ``(d,)``.

    Draws are differentiable in the parameters of the score, and so are densities.

    Args:
        model: the generative model.
        steps: of the grid, for draws and densities alike.

    Raises:
        InvalidInputError: if ``steps`` isn't a positive integer.

    Reference:
        Song et al., "Score-based generative modeling through SDEs", 2021, section 4.3.
    """

    _carried = ("model", "steps")
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, model: ReverseDiffusion, steps: int = 50, validate_args: bool | None = None) -> None:
        check_positive_int(steps, "steps")
        self.model, self.steps = model, steps
        super().__init__(torch.Size(), torch.Size([model.dim]), validate_args=validate_args)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``(*sample, *batch, d)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        x = self.model.start(shape[:-1].numel())
        times = self.model.process.grid(self.steps).to(x.device)
        return integrate_ode(self.model.velocity, x, times, "rk4").reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value (..., d)``, with exact divergence."""
        check_event_size(value, self.event_shape[0], "value")
        if self._validate_args:
            self._validate_sample(value)
        result = self.model.log_prob(value.reshape(-1, value.shape[-1]), steps=self.steps)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return result.reshape(value.shape[:-1]).expand(shape)
