"""Measurement records: what was measured when, their law given a Lindbladian's parameters, and inference from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn._checks import (
    as_generator,
    as_integers,
    check_nonempty,
    check_positive_int,
    check_type,
    values_are_checked,
)
from stochdyn.core.forward.outcomes import decode, encode
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.infer.law_distribution import LawDistribution
from stochdyn.povm.frames.frame import Measurement, Pauli6
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.master.arguments import as_times, check_model
from stochdyn.povm.master.density import check_bound
from stochdyn.povm.master.propagator import Propagator

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["MeasurementRecords", "Preparations", "RecordLaw", "simulate_records"]


@dataclass(frozen=True)
class MeasurementRecords:
    """Outcomes of measurements of all sites, each on a fresh run of the experiment.

    Attributes:
        times: The times ``(T,)`` of the measurements, float64.
        time_index: The number ``(R,)`` of the time that each record is from.
        outcomes: The outcomes ``(R, N)``, integers.
        num_outcomes: The number ``K`` of outcomes of a site.
        preparation: The number ``(R,)`` of the initial state that each record started from; zeros where there is one.
    """

    times: Tensor
    time_index: Tensor
    outcomes: Tensor
    num_outcomes: int = 4
    preparation: Tensor | None = None

    @staticmethod
    def of(
        times: Any, outcomes: Sequence[Any] | Tensor, num_outcomes: int = 4, preparation: Any = None
    ) -> MeasurementRecords:
        """Return records from the outcomes at each time.

        Args:
            times: The increasing times ``(T,)``.
            outcomes: The outcomes ``(T, n, N)``, or ``T`` arrays ``(n_t, N)`` if their numbers differ.
            num_outcomes: The number ``K`` of outcomes of a site.
            preparation: The number of the initial state of each record, in the same form without the last axis.

        Raises:
            TimeGridError: If times don't increase.
            ShapeError: If there isn't one set of outcomes for each time, or sites differ.
            InvalidInputError: If outcomes aren't integers in range.
        """
        grid = as_times(times, "times")
        check_positive_int(num_outcomes, "num_outcomes", 2)
        check_nonempty(outcomes, "outcomes")
        parts = [as_integers(part, "outcomes") for part in outcomes]
        if len(parts) != len(grid):
            raise ShapeError("outcomes are given time by time", got=len(parts), expected=len(grid))
        if any(part.ndim != 2 or part.shape[1] != parts[0].shape[1] for part in parts):
            raise ShapeError("the outcomes at a time are (n, N)", got=[tuple(part.shape) for part in parts])
        joined = torch.cat(parts)
        if joined.numel() and not 0 <= int(joined.min()) <= int(joined.max()) < num_outcomes:
            raise InvalidInputError(
                "outcomes are numbered from zero", got=int(joined.max()), expected=f"0 to {num_outcomes - 1}"
            )
        index = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
        which = torch.zeros_like(index)
        if preparation is not None:
            which = torch.cat([as_integers(part, "preparation").reshape(-1) for part in preparation])
            if which.shape != index.shape or (which.numel() and int(which.min()) < 0):
                raise ShapeError(
                    "there is one preparation for each record",
                    got=tuple(which.shape),
                    expected=tuple(index.shape),
                )
        return MeasurementRecords(grid, index, joined, num_outcomes, which)

    @staticmethod
    def from_counts(
        times: Any, counts: Sequence[Mapping[str, Mapping[Any, int]]], preparation: int = 0
    ) -> MeasurementRecords:
        """Return records of :class:`~stochdyn.povm.Pauli6` from counts by basis and bits, as hardware gives them.

        Args:
            times: The increasing times ``(T,)``.
            counts: The counts: for each time a mapping from bases to counts of bit strings, such as ``{"XX": {"00":
                480, "11": 520}, "ZZ": {"01": 1000}}``; the first letter and the first bit are of site 0.
            preparation: The number of the initial state of all of them.

        Raises:
            InvalidInputError: If a basis or a bit string can't be read, or a count is negative.
            ShapeError: If strings differ in length.

        Example:
            >>> records = MeasurementRecords.from_counts([1.0], [{"XZ": {"01": 3}, "ZZ": {"11": 2}}])
            >>> records.outcomes.tolist()
            [[0, 5], [0, 5], [0, 5], [5, 5], [5, 5]]
        """
        check_nonempty(counts, "counts")
        found = []
        for at in counts:
            rows: list[list[int]] = []
            for bases, table in _items(at, "counts"):
                for bits, count in _items(table, f"the counts of {bases!r}"):
                    if len(str(bits)) != len(str(bases)):
                        raise ShapeError("bases and bits differ in length", got=f"{bases!r} and {bits!r}")
                    check_positive_int(count, f"the count of {bits!r}", 0)
                    digits = [_bit(c, bits) for c in str(bits)]
                    row = [Pauli6.outcome(b, bit) for b, bit in zip(str(bases), digits, strict=True)]
                    rows += [row] * int(count)
            if len({len(row) for row in rows}) > 1:
                raise ShapeError("bases differ in their number of sites", got=sorted({len(r) for r in rows}))
            found.append(torch.tensor(rows, dtype=torch.long).reshape(len(rows), -1))
        which = [torch.full((len(part),), preparation) for part in found]
        return MeasurementRecords.of(times, found, 6, which)

    @staticmethod
    def from_bits(times: Any, bases: Sequence[str], bits: Any, time_index: Any = None) -> MeasurementRecords:
        """Return records of :class:`~stochdyn.povm.Pauli6` from the bases and the bits of single shots.

        Args:
            times: The increasing times ``(T,)``.
            bases: The bases: for each record a string such as ``"XZ"``, the first letter for site 0.
            bits: The zeros and ones ``(R, N)`` that were read, 0 for the eigenvalue +1.
            time_index: The time of each record ``(R,)``; the first for all if None.

        Raises:
            InvalidInputError: If a basis or a bit is unknown.
            ShapeError: If there isn't one string of bases for each record.
        """
        grid = as_times(times, "times")
        values = as_integers(bits, "bits")
        if values.ndim != 2 or len(bases) != len(values) or any(len(b) != values.shape[1] for b in bases):
            raise ShapeError(
                "bases and bits must have one entry for each record and site",
                got=f"{len(bases)} strings and shape {tuple(values.shape)}",
            )
        rows = [
            [Pauli6.outcome(b, int(x)) for b, x in zip(names, row, strict=True)]
            for names, row in zip(bases, values.tolist(), strict=True)
        ]
        index = (
            torch.zeros(len(rows), dtype=torch.long)
            if time_index is None
            else as_integers(time_index, "time_index")
        )
        if index.shape != (len(rows),) or (
            len(rows) and not 0 <= int(index.min()) <= int(index.max()) < len(grid)
        ):
            raise ShapeError(
                "time_index must name a time for each record", got=tuple(index.shape), expected=len(rows)
            )
        outcomes = torch.tensor(rows, dtype=torch.long).reshape(len(rows), values.shape[1])
        return MeasurementRecords(grid, index, outcomes, 6, torch.zeros_like(index))

    def __len__(self) -> int:
        return self.outcomes.shape[0]

    @property
    def num_sites(self) -> int:
        """The number ``N`` of sites."""
        return self.outcomes.shape[1]

    @property
    def num_preparations(self) -> int:
        """The number of initial states."""
        return 1 if self.preparation is None or not len(self) else int(self.preparation.max()) + 1

    @property
    def cell(self) -> Tensor:
        """For each record the number ``(R,)`` of its preparation and time, the preparation slowest."""
        if self.preparation is None:
            return self.time_index
        return self.preparation * len(self.times) + self.time_index

    def counts(self) -> Tensor:
        """Return how often each outcome string came at each time, ``(T, K**N)``; for small ``N``.

        With several preparations ``(preparations * T, K**N)``, the preparation slowest.
        """
        size = self.num_outcomes**self.num_sites
        rows = self.num_preparations * len(self.times)
        code = self.cell * size + encode(self.outcomes, self.num_outcomes)
        return torch.bincount(code, minlength=rows * size).reshape(rows, size)


def _items(value: Any, name: str) -> Iterable[tuple[Any, Any]]:
    check_type(value, Mapping, name)
    return value.items()


def _bit(character: str, bits: object) -> int:
    if character not in "01":
        raise InvalidInputError("bits must be 0 or 1", got=repr(bits)[:60])
    return int(character)


class RecordLaw(LawDistribution):
    r"""The law of independent measurement records at several times, as a Pyro distribution.

    Batch ``(*batch, R)``, one for each record; event ``(N,)``.

    .. math:: \log p(a_r) = \log p_{t_r}(a_r)

    Args:
        probabilities: The probabilities ``(T, K**N)`` of all outcomes at all times, such as a :class:`Propagator`
            gives; or ``(*batch, 1, T, K**N)``, with an axis of size one for the plate of records. Rounding may leave an
            impossible outcome a little below zero; it then has the least probability that a float can have.
        time_index: The time of each record ``(R,)``.
        num_sites: The number ``N`` of sites.
        num_outcomes: The number ``K`` of outcomes of a site.
        validate_args: Whether the distribution checks its arguments, as in torch.

    Raises:
        ShapeError: If the probabilities have the wrong shape.
        InvalidInputError: If one is below zero by more than rounding.

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
        check_positive_int(num_outcomes, "num_outcomes", 2)
        check_type(probabilities, Tensor, "probabilities")
        check_type(time_index, Tensor, "time_index")
        p = probabilities
        if not p.is_floating_point():
            raise InvalidInputError("probabilities must be floating", got=p.dtype)
        if p.ndim < 2 or p.shape[-1] != num_outcomes**num_sites or (p.ndim > 2 and p.shape[-3] != 1):
            raise ShapeError(
                "the probabilities must be (T, K**N) or (*batch, 1, T, K**N)",
                got=tuple(p.shape),
                expected=f"{num_outcomes**num_sites} outcomes",
            )
        if time_index.ndim != 1 or time_index.is_floating_point():
            raise ShapeError(
                "time_index must be integers (R,)", got=f"{time_index.dtype} {tuple(time_index.shape)}"
            )
        if time_index.numel() and not 0 <= int(time_index.min()) <= int(time_index.max()) < p.shape[-2]:
            raise InvalidInputError("time_index names a time that isn't there", got=int(time_index.max()))
        lowest = float(p.detach().min()) if p.numel() else 0.0
        if values_are_checked() and not lowest >= -1e-6:
            raise InvalidInputError("the probabilities must not be negative", got=f"{lowest:.3g}")
        self.num_sites, self.num_outcomes, self.time_index = num_sites, num_outcomes, time_index
        self.log_probabilities = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        if p.ndim == 2:
            self.log_probabilities = self.log_probabilities[None]
        batch = torch.Size((*p.shape[:-3], time_index.shape[0]))
        super().__init__(batch, torch.Size((num_sites,)), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Integers below the number of outcomes, on every site."""
        return constraints.independent(constraints.integer_interval(0, self.num_outcomes - 1), 1)

    def _fill(self, new: RecordLaw, batch_shape: torch.Size) -> None:
        """Copy what an expanded law needs; the axis of records stays as it is."""
        if batch_shape[-1:] != self.batch_shape[-1:]:
            raise ShapeError(
                "the axis of records can't be expanded", got=batch_shape, expected=self.batch_shape
            )
        tail = self.log_probabilities.shape[-3:]
        new.log_probabilities = self.log_probabilities.expand(*batch_shape[:-1], *tail)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw records ``(*sample, *batch, N)`` from torch's global generator."""
        shape = self._extended_shape(torch.Size(sample_shape))
        table = self.log_probabilities[..., 0, :, :].exp().detach()
        num_times, size = table.shape[-2:]
        rows, draws = table.reshape(-1, num_times, size), torch.Size(sample_shape).numel()
        code = torch.empty(draws, len(rows), len(self.time_index), dtype=torch.long, device=table.device)
        for k in self.time_index.unique().tolist():
            # all records of a time at once, so that no table is repeated for each of them
            members = (self.time_index == k).nonzero()[:, 0]
            found = torch.multinomial(rows[:, k], draws * len(members), True)
            code[:, :, members] = found.reshape(len(rows), draws, -1).transpose(0, 1)
        return decode(code, self.num_sites, self.num_outcomes).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log probabilities ``(*sample, *batch)``."""
        check_type(value, Tensor, "value")
        if self._validate_args:
            self._validate_sample(value)
        code = encode(value, self.num_outcomes)
        # one table of T * K**N log probabilities, in which each record has one place
        table = self.log_probabilities[..., 0, :, :].flatten(-2)
        cell = self.time_index * self.log_probabilities.shape[-1] + code
        if cell.ndim == 1:
            return table[..., cell]
        shape = torch.broadcast_shapes(cell.shape[:-1], table.shape[:-1])
        return table.expand(*shape, -1).gather(-1, cell.expand(*shape, -1))


def simulate_records(
    model: Lindbladian,
    povm: Measurement | SiteFrames,
    state: Any,
    times: Tensor | Sequence[float],
    num_records: int,
    *,
    max_step: float | None = None,
    breaks: Sequence[float] = (),
    generator: torch.Generator | int | None = None,
) -> MeasurementRecords:
    """Return simulated records, each from a fresh run of the system up to its time.

    Args:
        model: The Lindbladian, its parameters bound; small, since all probabilities are propagated exactly.
        povm: The measurement of all sites, or one for each site, complete or not.
        state: The state at time 0, as for :func:`~stochdyn.povm.exact.evolve`, or :class:`~stochdyn.povm.Preparations`.
        times: The times of the measurements, increasing, from zero on.
        num_records: The number of records at each time, from each preparation.
        max_step: The longest step, for pulses shorter than 1/4096 of the span.
        breaks: The times where coefficients aren't smooth; jumps are found without.
        generator: The source of randomness of the outcomes.

    Raises:
        TimeGridError, SystemSizeError: As for :class:`~stochdyn.povm.Propagator`.
        LindbladianError: If parameters aren't bound.

    Example:
        >>> from stochdyn.povm import Tetrahedral, systems
        >>> records = simulate_records(systems.ising(2), Tetrahedral(), "up", [0.5, 1.0], 100)
        >>> len(records), records.counts().shape
        (200, torch.Size([2, 16]))
    """
    check_model(model)
    check_bound(model)
    check_positive_int(num_records, "num_records")
    source = as_generator(generator)
    grid = as_times(times, "times")
    outcomes: list[list[Tensor]] = [[] for _ in grid]
    states = state.states if isinstance(state, Preparations) else [state]
    with torch.no_grad():
        for one in states:
            p = Propagator(model, povm, one, grid, max_step=max_step, breaks=breaks)().clamp(min=0.0)
            drawn = torch.multinomial(p, num_records, True, generator=source)
            for place, codes in enumerate(drawn):
                outcomes[place].append(decode(codes, model.num_sites, povm.num_outcomes))
    which = torch.arange(len(states)).repeat_interleave(num_records)
    return MeasurementRecords.of(
        grid, [torch.cat(parts) for parts in outcomes], povm.num_outcomes, [which] * len(grid)
    )


class Preparations:
    """Several initial states of one experiment; records say by number which they started from.

    Args:
        states: The initial states, one of the lattice for each preparation, as for :func:`~stochdyn.povm.exact.evolve`.

    Raises:
        EmptyDataError: If there are none.

    Example:
        >>> len(Preparations(["up", "down", ["x+", "up"]]).states)
        3
    """

    def __init__(self, states: Sequence[Any]) -> None:
        check_type(states, (list, tuple), "states")
        check_nonempty(states, "states")
        self.states = list(states)

    def __repr__(self) -> str:
        return f"Preparations({len(self.states)})"


def check_unused(method: str, options: Mapping[str, Any]) -> None:
    """Raise if options that a method doesn't use were given.

    Raises:
        InvalidInputError: Naming one of them.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InvalidInputError(f"{given[0]} isn't an option of method={method!r}", hint="leave it out")


def check_priors(names: Sequence[str], priors: Mapping[str, Any]) -> None:
    """Raise unless there is one prior for each parameter.

    Raises:
        InvalidInputError: If names are missing or unknown, or there are none.
    """
    check_type(priors, Mapping, "priors")
    if not names:
        raise InvalidInputError(
            "the model has no parameters", hint="name a coefficient: Lindbladian(2, [('g', 'X', 'all')], ...)"
        )
    if set(priors) != set(names):
        raise InvalidInputError(
            "there must be one prior for each parameter",
            got=sorted(priors),
            expected=sorted(names),
        )
