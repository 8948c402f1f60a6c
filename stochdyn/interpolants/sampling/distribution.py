"""A trained interpolant as a Pyro distribution: a prior, guide or likelihood in any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn._checks import check_event_size, check_positive_int
from stochdyn.infer.law_distribution import LawDistribution

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.generator import InterpolantGenerator

__all__ = ["InterpolantDistribution"]


class InterpolantDistribution(LawDistribution):
    """The law of a model's probability flow, with event ``(d,)``.

    Draws are differentiable in the networks' parameters, and so are densities.

    Args:
        model: the generator.
        steps: of the flow's grid.
        method: of the flow; see :meth:`stochdyn.interpolants.InterpolantGenerator.push`.
        condition: one label, or one context vector ``(c,)``.

    Raises:
        UnavailableError: if the density of the starts isn't known.
    """

    _carried = ("model", "steps", "method", "condition", "law")
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        model: InterpolantGenerator,
        steps: int = 50,
        method: str = "rk4",
        condition: Any = None,
        validate_args: bool | None = None,
    ) -> None:
        check_positive_int(steps, "steps")
        self.model, self.steps, self.method, self.condition = model, steps, method, condition
        self.law = model.starts.law()
        super().__init__(torch.Size(), torch.Size(self.law.event_shape), validate_args=validate_args)

    def _condition(self, n: int) -> Any:
        if self.condition is None:
            return None
        value = torch.as_tensor(self.condition)
        return value.expand(n, *value.shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``(*sample, *batch, d)``."""
        from stochdyn.interpolants.sampling.samplers import integrate_ode

        shape = self._extended_shape(torch.Size(sample_shape))
        count = shape[:-1].numel()
        x0 = self.law.rsample((count,)) if self.law.has_rsample else self.law.sample((count,))
        flow = self.model._velocity(self._condition(count), 1.0)
        x1 = integrate_ode(flow, x0, self.model._grid(self.steps, x0), self.method)
        return x1.reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value (..., d)``, with exact divergence."""
        check_event_size(value, self.event_shape[0], "value")
        if self._validate_args:
            self._validate_sample(value)
        flat = value.reshape(-1, value.shape[-1])
        result = self.model.log_prob(
            flat, True, self.steps, self.method, condition=self._condition(len(flat))
        )
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return result.reshape(value.shape[:-1]).expand(shape)
