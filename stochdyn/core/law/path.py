"""Sampled paths: what every kind has, and the one with increments; Monte Carlo estimates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stochdyn.core.law.measure import PathMeasure

__all__ = ["Estimate", "Path", "PathSample"]


@runtime_checkable
class Path(Protocol):
    """What a law draws: states at the times of a grid, and the law that drew them.

    A kind of path carries besides what drove it: a :class:`PathSample` its increments, a jump path its jumps.
    """

    @property
    def ts(self) -> Tensor:
        """The times, ``(T,)``."""

    @property
    def x(self) -> Tensor:
        """The states at these times, ``(*sample, *batch, T, d)``."""

    @property
    def law(self) -> PathMeasure | None:
        """The law that drew the path, or None for a path of unknown origin."""

    @property
    def shape(self) -> torch.Size:
        """Sample and batch shape."""

    def detach(self) -> Path:
        """Return the same path cut off from the graph."""


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
