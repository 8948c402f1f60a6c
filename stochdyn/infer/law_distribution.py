"""The one base of laws as Pyro distributions: how copies of a law are made for the series of a plate."""

from __future__ import annotations

from typing import Any, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch.distributions import constraints

__all__ = ["LawDistribution"]


class LawDistribution(TorchDistribution):
    """A law as a Pyro distribution, expanded by name.

    A subclass lists the attributes that every copy shares in ``_carried``, and those tensors that have the batch axes of
    the law in ``_batched``; :meth:`expand` is then right for plates and vectorised particles.

    Use it for a law of your own whose density isn't put together from torch's distributions.

    Example:
        >>> import pyro.distributions as dist
        >>> class Coin(LawDistribution):
        ...     support = dist.constraints.boolean
        ...     _batched = ("probability",)
        ...     def __init__(self, probability):
        ...         self.probability = probability
        ...         super().__init__(probability.shape)
        ...     def sample(self, sample_shape=()):
        ...         p = self.probability.expand(self._extended_shape(torch.Size(sample_shape)))
        ...         return torch.bernoulli(p)
        >>> Coin(torch.tensor(0.5)).expand([3]).sample((2,)).shape
        torch.Size([2, 3])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's protocol)
    _carried: tuple[str, ...] = ()
    _batched: tuple[str, ...] = ()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """Return the same law with larger batch axes: independent copies."""
        new = self._get_checked_instance(type(self), _instance)
        shape = torch.Size(batch_shape)
        for name in self._carried:
            setattr(new, name, getattr(self, name))
        for name in self._batched:
            setattr(new, name, getattr(self, name).expand(shape))
        self._fill(new, shape)
        TorchDistribution.__init__(new, shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _fill(self, new: Self, batch_shape: torch.Size) -> None:
        """Set what a copy needs besides the listed attributes."""
