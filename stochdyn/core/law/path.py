"""Sampled paths: what every kind has, and the one with increments; Monte Carlo estimates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_event_size
from stochdyn._transforms import version_of
from stochdyn.errors import InvalidInputError

if TYPE_CHECKING:
    from stochdyn.core.law.measure import PathMeasure
    from stochdyn.core.sde.equation import SDE

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
class Drawn:
    """How a path was drawn: the name of the integration method, and a stamp of the equation as it was then."""

    method: str
    stamp: tuple[int, ...]


def stamp_of(sde: SDE) -> tuple[int, ...]:
    """Return a number for every tensor of an equation without its control, which changes when the tensor is written to."""
    parts = (sde.drift, sde._coefficient, sde.noise)
    modules = [part for part in parts if isinstance(part, nn.Module)]
    tensors = [x for m in modules for x in (*m.parameters(), *m.buffers())]
    return tuple(map(version_of, tensors))


@dataclass(frozen=True)
class PathSample:
    """Paths on a grid, with what is needed to weigh them. Times and states may be data of any kind.

    Attributes:
        ts: The times ``(T,)``, or ``(*batch, T)`` where every series has its own.
        x: The states ``(*sample, *batch, T, d)``.
        dw: The increments ``(*sample, *batch, T-1, m)`` of the Brownian motion that drove the path under the law that
            generated it; ``m`` is zero for a law that draws the states without them.
        aux: Further tensors: for noise with memory ``"memory" (*sample, *batch, T, m, K)`` and, where a step needs more
            than one Gaussian number per channel, ``"residual" (*sample, *batch, T-1, m * (R-1))``; for a controlled law
            what its control was, ``"control"`` and ``"precision" (*sample, *batch, T-1, m)``.
        law: The law that generated the path, or None for a path of unknown origin.
    """

    ts: Tensor
    x: Tensor
    dw: Tensor = None  # type: ignore[assignment]
    aux: dict[str, Tensor] = field(default_factory=dict)
    law: PathMeasure | None = field(default=None, repr=False, compare=False)
    # Paths on the grid of the simulation, and the states and times here that were taken from them.
    _fine: tuple[PathSample, Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of_states(cls, ts: Tensor, x: Tensor, law: PathMeasure | None = None) -> PathSample:
        """Return paths ``x (*sample, *batch, T, d)`` at ``ts (T,)`` of which no increments are known."""
        return cls(ts, x, x.new_zeros(*x.shape[:-2], x.shape[-2] - 1, 0), law=law)

    @property
    def shape(self) -> torch.Size:
        """Sample and batch shape."""
        return self.x.shape[:-2]

    _drawn: Drawn | None = field(default=None, repr=False, compare=False)
    # Whether the clock of the paths runs against that of what was drawn or recorded.
    _backwards: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given: dict[str, Any] = vars(self)  # data of any kind
        for name in ("ts", "x"):
            if not isinstance(given[name], Tensor):
                object.__setattr__(self, name, as_tensor(given[name], name, finite=False))
        if given["dw"] is None:
            unknown = self.x.new_full(
                (*self.x.shape[:-2], max(self.x.shape[-2] - 1, 0), self.x.shape[-1]), torch.nan
            )
            object.__setattr__(self, "dw", unknown)
        elif not isinstance(given["dw"], Tensor):
            object.__setattr__(self, "dw", as_tensor(given["dw"], "dw", like=self.x, finite=False))

    @property
    def fine(self) -> PathSample | None:
        """The same paths on the finer grid on which they were simulated, or None where that is ``ts``.

        Densities are taken there. A copy with other states or times has none.
        """
        if self._fine is None or self._fine[1] is not self.x or self._fine[2] is not self.ts:
            return None
        return self._fine[0]

    def leading(self) -> Tensor:
        """Return the states with time leading, ``(T, *sample, *batch, d)``."""
        return self.x.movedim(-2, 0)

    def expanded(self, batch: torch.Size) -> PathSample:
        """Return the same path with the leading axes of a batch of laws that it is seen under."""
        batch = torch.broadcast_shapes(self.shape, batch)
        if batch == self.shape:
            return self
        lead = len(self.shape)

        def wide(value: Tensor) -> Tensor:
            return value.expand(*batch, *value.shape[lead:])

        aux = {name: wide(value) for name, value in self.aux.items()}
        return replace(self, x=wide(self.x), dw=wide(self.dw), aux=aux)

    def detach(self) -> PathSample:
        """Return the same path cut off from the graph."""
        aux = {k: v.detach() for k, v in self.aux.items()}
        x = self.x.detach()
        fine = None if self.fine is None else (self.fine.detach(), x, self.ts)
        return replace(self, x=x, dw=self.dw.detach(), aux=aux, _fine=fine)

    def reversed(self, parity: object = None) -> PathSample:
        r"""Return the paths backwards in time, :math:`\epsilon x_{T-t}`, on a clock that starts at zero.

        What drove them backwards isn't known: the result has no law, and NaN for increments.

        Args:
            parity: The signs ``(d,)``, -1 for components that change theirs with the direction of time, such as
                velocities; all +1 if None.
        """
        x = self.x.flip(-2)
        if parity is not None:
            x = x * as_parity(parity, x)
        ts = self.ts[..., -1:] - self.ts.flip(-1)
        return PathSample(ts, x, torch.full_like(self.dw, torch.nan), _backwards=not self._backwards)

    def at(self, index: Tensor) -> PathSample:
        """Return the paths at some of their times, with their increments summed; the whole ones are their :attr:`fine`.

        Args:
            index: The increasing positions ``(n,)`` on the grid, two or more.
        """
        # Sums of increments are differences of the driving process, added piece by piece lest large sums cancel.
        piece = torch.searchsorted(index, torch.arange(self.dw.shape[-2], device=index.device), right=True)
        inside = (piece > 0) & (piece < index.shape[0])
        count = index.shape[0] - 1
        place = torch.where(inside, piece - 1, count)
        total = self.dw.new_zeros(*self.dw.shape[:-2], count + 1, self.dw.shape[-1])
        dw = total.index_add(-2, place, self.dw)[..., :count, :]
        aux = {name: value[..., index, :, :] for name, value in self.aux.items() if name == "memory"}
        ts, x = self.ts[index], self.x[..., index, :]
        return PathSample(ts, x, dw, aux, self.law, (self, x, ts), self._drawn)


def as_parity(parity: object, like: Tensor) -> Tensor:
    """Return the signs ``(d,)`` of components under time reversal.

    Raises:
        InvalidInputError: If they aren't one sign +1 or -1 for every component.
    """
    signs = as_tensor(parity, "parity", 1, "(d,)", like=like).to(like)
    check_event_size(signs, like.shape[-1], "parity")
    if bool((signs.abs() != 1).any()):
        raise InvalidInputError("parity must be +1 or -1 for every component", got=signs.tolist())
    return signs


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate.

    Attributes:
        mean: The estimate.
        stderr: The standard error of the mean.
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
