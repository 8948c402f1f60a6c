"""Measurement records: what was measured when, their law given a Lindbladian's parameters, and inference from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn._checks import check_positive_int, check_time_grid
from stochdyn.core.forward.outcomes import decode, encode
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.infer.law_distribution import LawDistribution
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.master.propagation import propagate

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["MeasurementRecords", "RecordLaw", "simulate_records"]


@dataclass(frozen=True)
class MeasurementRecords:
    """Outcomes of measurements of all sites, each on a fresh run of the experiment.

    Attributes:
        times: ``(T,)`` when measurements were made, float64.
        time_index: ``(R,)`` which of these times each record is from.
        outcomes: ``(R, N)`` integers.
        num_outcomes: ``K`` of a site.
    """

    times: Tensor
    time_index: Tensor
    outcomes: Tensor
    num_outcomes: int = 4

    @staticmethod
    def of(
        times: Tensor | Sequence[float], outcomes: Sequence[Tensor] | Tensor, num_outcomes: int = 4
    ) -> MeasurementRecords:
        """Return records from the outcomes at each time.

        Args:
            times: ``(T,)``, increasing.
            outcomes: ``(T, n, N)``, or ``T`` tensors ``(n_t, N)`` if their numbers differ.
            num_outcomes: ``K`` of a site.

        Raises:
            TimeGridError: if times don't increase.
            ShapeError: if there isn't one set of outcomes a time, or sites differ.
            InvalidInputError: if outcomes aren't integers in range.
        """
        grid = torch.as_tensor(times, dtype=torch.float64)
        check_time_grid(grid, "times", min_points=1)
        parts = [torch.as_tensor(part) for part in outcomes]
        if len(parts) != len(grid):
            raise ShapeError("outcomes are given time by time", got=len(parts), expected=len(grid))
        if any(part.ndim != 2 or part.shape[1] != parts[0].shape[1] for part in parts):
            raise ShapeError("the outcomes at a time are (n, N)", got=[tuple(part.shape) for part in parts])
        joined = torch.cat(parts)
        if joined.is_floating_point():
            raise InvalidInputError("outcomes must be integers", got=joined.dtype)
        if joined.numel() and not 0 <= int(joined.min()) <= int(joined.max()) < num_outcomes:
            raise InvalidInputError(
                "outcomes are numbered from zero", got=int(joined.max()), expected=f"0 to {num_outcomes - 1}"
            )
        index = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
        return MeasurementRecords(grid, index, joined.long(), num_outcomes)

    def __len__(self) -> int:
        return self.outcomes.shape[0]

    @property
    def num_sites(self) -> int:
        """``N``."""
        return self.outcomes.shape[1]

    def counts(self) -> Tensor:
        """Return how often each outcome string came at each time, ``(T, K**N)``; for small ``N``."""
        size = self.num_outcomes**self.num_sites
        cell = self.time_index * size + encode(self.outcomes, self.num_outcomes)
        return torch.bincount(cell, minlength=len(self.times) * size).reshape(len(self.times), size)


class RecordLaw(LawDistribution):
    r"""The law of independent measurement records at several times, as a Pyro distribution.

    Batch ``(*batch, R)``, one a record; event ``(N,)``.

    .. math:: \log p(a_r) = \log p_{t_r}(a_r)

    Args:
        probabilities: ``(T, K**N)`` of all outcomes at all times, such as a :class:`Propagator` gives; or ``(*batch, 1,
            T, K**N)``, with an axis of size one for the plate of records.
        time_index: ``(R,)`` time of each record.
        num_sites: ``N``.
        num_outcomes: ``K``.
        validate_args: as in torch.

    Raises:
        ShapeError: if the probabilities have the wrong shape.

    Example:
        >>> from stochdyn.povm import Tetrahedral
        >>> p = torch.stack([Tetrahedral().probabilities(s) for s in ("up", "mixed")])
        >>> law = RecordLaw(p, torch.tensor([0, 0, 1]), num_sites=1)
        >>> law.batch_shape, law.log_prob(torch.tensor([[0], [1], [2]])).exp()
        (torch.Size([3]), tensor([0.3943, 0.1057, 0.2500], dtype=torch.float64))
    """

    _carried = ("num_sites", "num_outcomes", "time_index")

    def __init__(
        self,
        probabilities: Tensor,
        time_index: Tensor,
        num_sites: int,
        num_outcomes: int = 4,
        validate_args: bool | None = None,
    ) -> None:
        check_positive_int(num_sites, "num_sites")
        p = probabilities
        if p.ndim < 2 or p.shape[-1] != num_outcomes**num_sites or (p.ndim > 2 and p.shape[-3] != 1):
            raise ShapeError(
                "the probabilities must be (T, K**N) or (*batch, 1, T, K**N)",
                got=tuple(p.shape),
                expected=f"{num_outcomes**num_sites} outcomes",
            )
        self.num_sites, self.num_outcomes, self.time_index = num_sites, num_outcomes, time_index
        # rounding may leave an impossible outcome a little below zero
        self.log_probabilities = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        if p.ndim == 2:
            self.log_probabilities = self.log_probabilities[None]
        batch = torch.Size((*p.shape[:-3], time_index.shape[0]))
        super().__init__(batch, torch.Size((num_sites,)), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Integers below the number of outcomes, on every site."""
        return constraints.independent(constraints.integer_interval(0, self.num_outcomes - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """Return the law with a larger batch shape; the axis of records stays as it is."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape[-1:] != self.batch_shape[-1:]:
            raise ShapeError(
                "the axis of records can't be expanded", got=batch_shape, expected=self.batch_shape
            )
        return super().expand(batch_shape, _instance)

    def _fill(self, new: Self, batch_shape: torch.Size) -> None:
        tail = self.log_probabilities.shape[-3:]
        new.log_probabilities = self.log_probabilities.expand(*batch_shape[:-1], *tail)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw records ``(*sample, *batch, N)`` from torch's global generator."""
        shape = self._extended_shape(torch.Size(sample_shape))
        logits = self.log_probabilities[..., 0, self.time_index, :]
        code = torch.distributions.Categorical(logits=logits, validate_args=False).sample(sample_shape)
        return decode(code, self.num_sites, self.num_outcomes).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log probabilities ``(*sample, *batch)``."""
        if self._validate_args:
            self._validate_sample(value)
        code = encode(value, self.num_outcomes)
        table = self.log_probabilities[..., 0, :, :].flatten(-2)
        cell = self.time_index * self.log_probabilities.shape[-1] + code
        if cell.ndim == 1:
            return table[..., cell]
        shape = torch.broadcast_shapes(cell.shape[:-1], table.shape[:-1])
        return table.expand(*shape, -1).gather(-1, cell.expand(*shape, -1))


def simulate_records(
    model: Lindbladian,
    povm: Frame | SiteFrames,
    state: Any,
    times: Tensor | Sequence[float],
    num_records: int,
    *,
    generator: torch.Generator | None = None,
) -> MeasurementRecords:
    """Return simulated records, each from a fresh run of the system up to its time.

    Args:
        model: with its parameters bound; small, since all probabilities are propagated exactly.
        povm: the frame of all sites, or one a site.
        state: at time 0, as for :func:`~stochdyn.povm.exact.evolve`.
        times: increasing, from zero on.
        num_records: at each time.
        generator: of the outcomes.

    Raises:
        TimeGridError, SystemSizeError: as for :func:`~stochdyn.povm.exact.propagate`.

    Example:
        >>> from stochdyn.povm import Tetrahedral, systems
        >>> records = simulate_records(systems.ising(2), Tetrahedral(), "up", [0.5, 1.0], 100)
        >>> len(records), records.counts().shape
        (200, torch.Size([2, 16]))
    """
    check_positive_int(num_records, "num_records")
    grid = torch.as_tensor(times, dtype=torch.float64)
    check_time_grid(grid, "times", min_points=1)
    if float(grid[0]) < 0:
        raise InvalidInputError("times start at zero, where the state is given", got=float(grid[0]))
    late = float(grid[0]) > 0
    padded = torch.cat([grid.new_zeros(1), grid]) if late else grid
    p = propagate(model, povm, state, padded)[int(late) :].clamp(min=0.0)
    drawn = torch.multinomial(p, num_records, True, generator=generator)
    outcomes = decode(drawn, model.num_sites, povm.num_outcomes)
    return MeasurementRecords.of(grid, outcomes, povm.num_outcomes)


def check_priors(model: Lindbladian, priors: Mapping[str, Any]) -> None:
    """Raise unless there is one prior for each parameter of the model.

    Raises:
        InvalidInputError: if names are missing or unknown, or there are none.
    """
    if not model.parameters:
        raise InvalidInputError(
            "the model has no parameters", hint="name a coefficient: Lindbladian(2, [('g', 'X', 'all')], ...)"
        )
    if set(priors) != set(model.parameters):
        raise InvalidInputError(
            "there must be one prior for each parameter",
            got=sorted(priors),
            expected=sorted(model.parameters),
        )
