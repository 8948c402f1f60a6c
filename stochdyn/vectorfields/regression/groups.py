"""One engine for fields that were observed at different places and share their hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from stochdyn.vectorfields.regression.engines import Engine, PlainEngine
from stochdyn.vectorfields.regression.observations import Groups, Observations
from stochdyn.vectorfields.regression.sites import Sites

__all__ = ["GroupedEngine"]


class GroupedEngine(Engine):
    """Independent Gaussian processes with common hyper-parameters, one engine for each group of fields.

    The evidence is the sum of the groups'; given the hyper-parameters their posteriors are independent.

    Args:
        groups: What was observed of each group.
        make: A function that makes the engine of one group; the kernel is common to all.
    """

    def __init__(self, groups: Groups, make: Callable[[Observations], PlainEngine]) -> None:
        super().__init__(groups.parts)
        self.members = nn.ModuleList([make(part) for part in groups.parts])
        first = self._parts[0]
        first.log_amplitude, first.log_noise = self.log_amplitude, self.log_noise
        first.usual_noise = self.usual_noise
        for other in self._parts[1:]:
            other.share(first)
        self.counts = [len(fields) for fields in groups.fields]
        self.order = torch.argsort(torch.cat(groups.fields))

    @property
    def _parts(self) -> Sequence[PlainEngine]:
        return cast(Sequence[PlainEngine], self.members)

    @property
    def num_sites(self) -> int:
        """Number of sites, counted once for each group of fields."""
        return sum(part.num_sites for part in self._parts)

    def _gather(self, values: list[Tensor], axis: int) -> Tensor:
        """Put what the groups returned into the order of the fields."""
        return torch.cat(values, axis).index_select(axis, self.order.to(values[0].device))

    def evidence(self) -> Tensor:
        """Return the sum of the groups' log marginal likelihoods."""
        return torch.stack([part.evidence() for part in self._parts]).sum()

    def optimise(self, steps: int, learn_noise: bool) -> None:
        """Maximise the sum of the groups' evidence and the priors over the common hyper-parameters."""
        self._parts[0].search(self._parts, steps, learn_noise)

    def condition(self) -> None:
        """Compute the posterior of every group."""
        for part in self._parts:
            part.condition()

    def mean(self, sites: Sites) -> Tensor:
        """Return the posterior means of all fields, ``(B, q, m)``."""
        return self._gather([part.mean(sites) for part in self._parts], 0)

    def covariance(self, sites: Sites) -> Tensor:
        """Return the posterior covariances of every field, ``(B, q, m, m)``."""
        found = [part.covariance(sites) for part in self._parts]
        return self._gather([c.expand(n, *c.shape) for c, n in zip(found, self.counts, strict=True)], 0)

    def mean_variance(self) -> Tensor:
        """Return the kernel's own variance of a component, averaged over the sites of the first group."""
        return self._parts[0].mean_variance()

    def missing_variance(self, sites: Sites) -> Tensor:
        """Return what reading fields off the nodes leaves out of the common prior, ``(q,)``."""
        return self._parts[0].missing_variance(sites)

    def sample(self, n: int, sites: Sites, generator: torch.Generator | None) -> Tensor:
        """Draw from the posteriors of the groups one after the other, ``(n, B, q, m)``."""
        return self._gather([part.sample(n, sites, generator) for part in self._parts], 1)
