"""A sampled path: its grid, its states and the increments that drove it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stochdyn.core.measure import PathMeasure

__all__ = ["Estimate", "PathSample"]


@dataclass(frozen=True)
class PathSample:
    """Paths on a grid, with what is needed to weigh them.

    Attributes:
        ts: ``(T,)`` times.
        x: ``(*sample, *batch, T, d)`` states.
        dw: ``(*sample, *batch, T-1, m)`` increments of the Brownian motion that drove the path under the law that generated it.
        aux: further tensors: for noise with memory ``"memory" (*sample, *batch, T, m, K)`` and, where a step needs more
            than one Gaussian number a channel, ``"residual" (*sample, *batch, T-1, m * (R-1))``; for a controlled law what its
            control was, ``"control"`` and ``"precision" (*sample, *batch, T-1, m)``.
        law: the law that generated the path, or None for a path of unknown origin.
    """

    ts: Tensor
    x: Tensor
    dw: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)
    law: PathMeasure | None = field(default=None, repr=False, compare=False)

    @property
    def shape(self) -> torch.Size:
        """Sample and batch shape."""
        return self.x.shape[:-2]

    def leading(self) -> Tensor:
        """Return the states with time leading, ``(T, *sample, *batch, d)``."""
        return self.x.movedim(-2, 0)

    def detach(self) -> PathSample:
        """Return the same path cut off from the graph."""
        aux = {k: v.detach() for k, v in self.aux.items()}
        return replace(self, x=self.x.detach(), dw=self.dw.detach(), aux=aux)


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate.

    Attributes:
        mean: the estimate.
        stderr: its standard error.
    """

    mean: Tensor
    stderr: Tensor

    @staticmethod
    def of(values: Tensor) -> Estimate:
        """Average independent ``values (n, ...)`` over the first axis."""
        return Estimate(values.mean(0), values.std(0) / values.shape[0] ** 0.5)

    def __float__(self) -> float:
        return float(self.mean.detach())

    def __str__(self) -> str:
        return f"{self.mean.tolist()} ± {self.stderr.tolist()}"
