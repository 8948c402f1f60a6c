"""Jump processes in Pyro models: observations with the hidden path summed out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn._checks import as_tensor, check_type
from stochdyn.errors import UnavailableError
from stochdyn.infer.law_distribution import LawDistribution
from stochdyn.jumps.measure import JumpMeasure, log_evidence
from stochdyn.jumps.observations import Exact, GaussianLevels, Misclassified, Observation, PoissonLevels

__all__ = ["HiddenJumps"]


class HiddenJumps(LawDistribution):
    """Observations of a jump process whose path is hidden, as a Pyro distribution: the path is summed out exactly.

    The log density is differentiable in rates, initial law and observation, so stock SVI and NUTS learn all of them.

    Args:
        law: the law of the hidden state, of constant rates.
        times: ``(T,)`` times of the observations.
        observation: how the state is observed.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from stochdyn.jumps import Exact
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     law = JumpMeasure([0.5, 0.5], torch.stack([torch.stack([-rate, rate]), torch.stack([rate, -rate])]))
        ...     pyro.sample("y", HiddenJumps(law, [0.0, 1.0, 2.0], Exact(2)), obs=y)
        >>> trace = pyro.poutine.trace(model).get_trace(torch.tensor([0.0, 1.0, 1.0]))
        >>> trace.log_prob_sum().shape
        torch.Size([])
    """

    has_rsample = False
    _carried = ("law", "times", "observation")

    def __init__(
        self, law: JumpMeasure, times: object, observation: Observation, validate_args: Any = None
    ) -> None:
        check_type(law, JumpMeasure, "law")
        check_type(observation, Observation, "observation")
        self.law, self.observation = law, observation
        self.times = as_tensor(times, "times", 1, "(T,)", like=torch.empty((), dtype=torch.float64))
        super().__init__(torch.Size(), self.times.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Any real vector: what an observation may be is checked by the observation itself."""
        return constraints.real_vector

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the evidence of observations ``(*batch, T)``, NaN where missing."""
        return log_evidence(self.law, self.times, value, self.observation)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw hidden paths, and observations of them, ``(*sample, *batch, T)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        record = self.law.sample(self.times, tuple(shape))
        return _draw(self.observation, record.at(self.times)).to(self.law.initial.dtype)


def _draw(observation: Observation, states: Tensor) -> Tensor:
    """Draw observations of states."""
    if isinstance(observation, Exact):
        return states.double()
    if isinstance(observation, GaussianLevels):
        scale = observation.scale.expand_as(observation.levels)
        return torch.normal(observation.levels.detach()[states], scale.detach()[states])
    if isinstance(observation, PoissonLevels):
        return torch.poisson(observation.means.detach()[states])
    if isinstance(observation, Misclassified):
        flat = torch.multinomial(observation.matrix.detach()[states.reshape(-1)], 1)[:, 0]
        return flat.reshape(states.shape).double()
    raise UnavailableError(
        f"{type(observation).__name__} can't be drawn: it doesn't say what is seen of a state"
    )
