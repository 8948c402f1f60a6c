"""A learned law as a Pyro distribution: a prior, guide or likelihood in any model."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, constraints

from stochdyn._checks import check_positive_int
from stochdyn.errors import ShapeError, UnavailableError
from stochdyn.infer.law_distribution import LawDistribution
from stochdyn.interpolants.fields.conditions import as_condition
from stochdyn.interpolants.sampling.carried import carry, stages_of
from stochdyn.interpolants.sampling.methods import FLOW_METHODS, Adaptive, FlowMethod, as_method

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.generator import InterpolantGenerator

__all__ = ["FlowDistribution", "InterpolantDistribution"]


class FlowDistribution(LawDistribution):
    """The law that a probability flow carries noise to. Draws and densities are differentiable in the networks' parameters.

    Args:
        event_shape: The shape of an event.
        condition: A tensor whose leading axes, but for the last ``condition_axes``, are the batch; or None.
        condition_axes: The number of axes of one condition.
    """

    has_rsample = True
    law: Distribution

    def __init__(
        self,
        event_shape: torch.Size,
        condition: Tensor | None = None,
        condition_axes: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        self.condition, self.condition_axes = condition, condition_axes
        batch = torch.Size() if condition is None else condition.shape[: condition.ndim - condition_axes]
        super().__init__(batch, event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """Real numbers of the shape of an event."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @abstractmethod
    def _carry(self, noise: Tensor, condition: Tensor | None) -> Tensor:
        """Carry noise ``(n, d)`` to ``(n, d)``."""

    @abstractmethod
    def _density(self, flat: Tensor, condition: Tensor | None) -> Tensor:
        """Return log densities ``(n,)`` at ``(n, d)``."""

    def _fill(self, new: Self, batch_shape: torch.Size) -> None:
        new.condition = self.condition
        if self.condition is not None:
            one = self.condition.shape[self.condition.ndim - self.condition_axes :]
            new.condition = self.condition.expand(*batch_shape, *one)

    def _rows(self, shape: torch.Size) -> Tensor | None:
        """Return one condition for each of the points of a shape."""
        if self.condition is None:
            return None
        one = self.condition.shape[self.condition.ndim - self.condition_axes :]
        return self.condition.expand(*shape, *one).reshape(-1, *one)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``(*sample, *batch, *event)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        lead = shape[: len(shape) - len(self.event_shape)]
        count = (lead.numel(),)
        noise = self.law.rsample(count) if self.law.has_rsample else self.law.sample(count)
        return self._carry(noise, self._rows(lead)).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value (..., *event)``, with exact divergence."""
        axes = len(self.event_shape)
        if tuple(value.shape[value.ndim - axes :]) != tuple(self.event_shape):
            raise ShapeError(
                "value has another event shape", got=tuple(value.shape), expected=tuple(self.event_shape)
            )
        if self._validate_args:
            self._validate_sample(value)
        lead = torch.broadcast_shapes(value.shape[: value.ndim - axes], self.batch_shape)
        if self.condition is None:
            # copies are alike: every value is evaluated once
            own = value.shape[: value.ndim - axes]
            return self._density(value.reshape(-1, self.event_shape.numel()), None).reshape(own).expand(lead)
        flat = value.expand(*lead, *self.event_shape).reshape(-1, self.event_shape.numel())
        return self._density(flat, self._rows(lead)).reshape(lead)

    def noise_site(self, name: str) -> Tensor:
        """Sample in a Pyro model with the noise as the random site, and the point as a deterministic one.

        The density of the point, which takes the divergence of the whole flow at every gradient, isn't needed then: this is how
        to run NUTS with a trained prior. The random site is called ``name + "_noise"``.

        Args:
            name: The name of the deterministic site.

        Returns:
            ``(*batch, *event)`` points.
        """
        noise = pyro.sample(f"{name}_noise", _for_pyro(self.law).expand(self.batch_shape))
        flat = noise.reshape(-1, noise.shape[-1])
        lead = noise.shape[:-1]
        x = self._carry(flat, self._rows(lead)).reshape(*lead, *self.event_shape)
        return pyro.deterministic(name, x, event_dim=len(self.event_shape))


def _for_pyro(law: Distribution) -> Any:
    """Return a law of torch's as one of Pyro's.

    Raises:
        UnavailableError: If it has no counterpart there.
    """
    if isinstance(law, TorchDistributionMixin):
        return law
    if isinstance(law, Independent) and isinstance(law.base_dist, Normal):
        return dist.Normal(law.base_dist.loc, law.base_dist.scale).to_event(law.reinterpreted_batch_ndims)
    if isinstance(law, MultivariateNormal):
        return dist.MultivariateNormal(law.loc, scale_tril=law.scale_tril)
    raise UnavailableError(
        "the law of the starts isn't one of Pyro's",
        got=type(law).__name__,
        hint="pass base=... from pyro.distributions",
    )


class InterpolantDistribution(FlowDistribution):
    """The law of a generator's probability flow.

    Args:
        model: The generator.
        num_steps: The number of steps of the flow's grid.
        method: How to take a step: one of the methods of :meth:`stochdyn.interpolants.InterpolantGenerator.push`.
        condition: One label ``()`` or one context vector ``(c,)``; with leading axes a batch of laws.
        guidance: The strength of classifier-free guidance.

    Raises:
        UnavailableError: If the density of the starts isn't known.
    """

    _carried = ("model", "num_steps", "guidance", "method", "law", "condition_axes", "_stages")

    def __init__(
        self,
        model: InterpolantGenerator,
        num_steps: int = 50,
        method: str | FlowMethod = "rk4",
        condition: Any = None,
        guidance: float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        check_positive_int(num_steps, "num_steps")
        self.model, self.num_steps, self.guidance = model, num_steps, guidance
        self.method = as_method(method, FLOW_METHODS, "flows")
        self.law = model.starts.law()
        self._stages: Tensor | None = None
        event = torch.Size(model.event_shape or self.law.event_shape)
        given = None if condition is None else as_condition(condition, self.law.sample())
        axes = 0 if given is None or not given.is_floating_point() else 1
        super().__init__(event, given, axes, validate_args=validate_args)

    def _carry(self, noise: Tensor, condition: Tensor | None) -> Tensor:
        model = self.model
        inside, learnt = model._inside("velocity"), "velocity" in model.fields.names
        grid = model._grid(self.num_steps, None, noise)
        known = self._stages
        if known is None or known.dtype != grid.dtype or known.device != grid.device:
            self._stages = known = (
                None if isinstance(self.method, Adaptive) else stages_of(grid, self.method, inside)
            )

        def velocity(t: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
            if learnt:
                return model.fields.guided("velocity", t.expand(*x.shape[:-1], 1), x, rows, self.guidance)
            return model.fields("velocity", t, x, rows, self.guidance)

        return carry(model.fields, velocity, noise, condition, grid, self.method, inside, known)

    def _density(self, flat: Tensor, condition: Tensor | None) -> Tensor:
        points = flat.reshape(-1, *self.event_shape)
        return self.model.log_prob(
            points, True, self.num_steps, self.method, condition=condition, guidance=self.guidance
        )
