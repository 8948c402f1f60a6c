"""A variational state as a Pyro distribution over outcome strings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.core.forward.outcomes import all_configurations
from stochdyn.errors import ShapeError
from stochdyn.infer.law_distribution import LawDistribution

if TYPE_CHECKING:
    from stochdyn.povm.ansatz.base import Ansatz

__all__ = ["OutcomeDistribution"]


class OutcomeDistribution(LawDistribution):
    """The law of one measurement record: a string of integer outcomes, event ``(N,)``.

    ``log_prob`` is differentiable in the parameters of the ansatz, so a record can enter a Pyro model as an observed
    site, and the ansatz can be fitted to records. Small systems can be enumerated.

    Args:
        ansatz: The variational state whose outcomes are distributed.

    Example:
        >>> from stochdyn.povm import FullTable
        >>> law = OutcomeDistribution(FullTable(3))
        >>> law.event_shape, law.sample((5,)).shape
        (torch.Size([3]), torch.Size([5, 3]))
    """

    _carried = ("ansatz",)
    has_enumerate_support = True

    def __init__(self, ansatz: Ansatz, validate_args: bool | None = None) -> None:
        self.ansatz = ansatz
        super().__init__(torch.Size(), torch.Size((ansatz.num_sites,)), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Integers below the number of outcomes, on every site."""
        return constraints.independent(constraints.integer_interval(0, self.ansatz.num_outcomes - 1), 1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw records ``(*sample, *batch, N)`` from torch's global generator."""
        shape = self._extended_shape(torch.Size(sample_shape))
        n = int(torch.Size(shape[:-1]).numel())
        if n == 0:
            return torch.empty(shape, dtype=torch.long, device=self.ansatz.device)
        return self.ansatz.sample(n)[0].reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probabilities ``(*sample, *batch)`` of records.

        Raises:
            ShapeError: If there isn't one outcome for each site.
        """
        if value.ndim == 0 or value.shape[-1] != self.ansatz.num_sites:
            raise ShapeError(
                "a record has one outcome for each site",
                got=tuple(value.shape),
                expected=f"(..., {self.ansatz.num_sites})",
            )
        if self._validate_args:
            self._validate_sample(value)
        flat = self.ansatz.log_prob(value.long().reshape(-1, self.ansatz.num_sites))
        return flat.reshape(value.shape[:-1]).expand(
            torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        )

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all records ``(K**N, *batch, N)``; of a small system."""
        self.ansatz.check_listable()
        every = all_configurations(self.ansatz.num_sites, self.ansatz.num_outcomes, self.ansatz.device)
        shaped = every.reshape(-1, *(1,) * len(self.batch_shape), self.ansatz.num_sites)
        return shaped.expand(-1, *self.batch_shape, -1) if expand else shaped
