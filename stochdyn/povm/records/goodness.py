"""Whether records look as a model says they should: a test of their counts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from stochdyn._checks import as_generator, check_finite, check_nonempty, check_type
from stochdyn.core.forward.outcomes import encode
from stochdyn.errors import ConvergenceWarning, InvalidInputError, ShapeError
from stochdyn.povm.frames.operators import as_array
from stochdyn.povm.frames.sizes import check_size
from stochdyn.povm.records.measurement import MeasurementRecords

__all__ = ["GoodnessOfFit", "goodness_of_fit"]

_MAX_CELLS = 4096
_SUSPICIOUS, _LARGEST_RHAT = 1e-3, 1.1
_POSSIBLE = 1e-12


@dataclass(frozen=True)
class GoodnessOfFit:
    r"""How records agree with probabilities.

    Attributes:
        statistic: Pearson's :math:`\sum(n-\mu)^2/\mu` over counts of outcome strings at each time, or of outcomes of
            pairs of sites where there are too many strings.
        p_value: The part of simulated data sets whose statistic is larger; a small one says that frame, model or
            initial state are wrong.
        impossible: The number of records of probability zero.
        worst: The time index, the sites and the outcome with the largest deviation.
    """

    statistic: float
    p_value: float
    impossible: int
    worst: tuple[int, tuple[int, ...], tuple[int, ...]]


def goodness_of_fit(
    records: MeasurementRecords,
    probabilities: Tensor,
    *,
    num_simulations: int = 200,
    generator: torch.Generator | int | None = 0,
) -> GoodnessOfFit:
    """Test whether records come from given probabilities.

    Args:
        records: The measurement records.
        probabilities: The probabilities ``(T, K**N)`` of all outcomes at all times, such as a
            :class:`~stochdyn.povm.Propagator` gives; with several preparations those of the first, then of the second,
            and so on.
        num_simulations: The number of data sets that are simulated for the p-value.
        generator: The source of randomness of the simulations.

    Raises:
        ShapeError: If the probabilities don't fit the records.
        EmptyDataError: If there are no records.

    Example:
        >>> from stochdyn.povm import Propagator, Tetrahedral, simulate_records, systems
        >>> model = systems.ising(2)
        >>> records = simulate_records(model, Tetrahedral(), "up", [0.5], 500, generator=0)
        >>> bool(goodness_of_fit(records, Propagator(model, Tetrahedral(), "up", [0.5])()).p_value > 0.01)
        True
    """
    check_type(records, MeasurementRecords, "records")
    probabilities = as_array(probabilities, "probabilities")
    check_nonempty(records.outcomes, "records")
    if not probabilities.is_floating_point():
        raise InvalidInputError("probabilities must be floating", got=probabilities.dtype)
    if probabilities.numel() and float(probabilities.detach().min()) < -1e-6:
        raise InvalidInputError(
            "the probabilities must not be negative", got=float(probabilities.detach().min())
        )
    check_size(num_simulations, "num_simulations", 1 << 16)
    source = as_generator(generator)
    rows = records.num_preparations * len(records.times)
    size = records.num_outcomes**records.num_sites
    p = probabilities.detach().double().cpu().clamp(min=0)
    if p.shape != (rows, size):
        raise ShapeError("the probabilities don't fit the records", got=tuple(p.shape), expected=(rows, size))
    check_finite(p, "probabilities")
    if not bool((p.sum(1) > 0).all()):
        raise InvalidInputError("the probabilities of a time are all zero")
    p = p / p.sum(1, keepdim=True)
    cell = records.cell
    impossible = int((p[cell, encode(records.outcomes, records.num_outcomes)] <= _POSSIBLE).sum())
    found, expected = _tables(records.outcomes, cell, rows, records), _expected(p, cell, records)
    deviation = _deviation(found, expected)
    statistic = float(deviation.sum())
    place = int(deviation.argmax())
    # the law of the statistic under the model, by simulating data sets with the same numbers of records
    larger = 0
    counts = torch.bincount(cell, minlength=rows)
    for _ in range(num_simulations):
        codes = torch.cat(
            [
                torch.multinomial(p[r], int(counts[r]), True, generator=source)
                for r in range(rows)
                if counts[r]
            ]
        )
        order = torch.repeat_interleave(torch.arange(rows), counts)
        outcomes = _decode(codes, records)
        larger += float(_deviation(_tables(outcomes, order, rows, records), expected).sum()) >= statistic
    return GoodnessOfFit(statistic, (larger + 1) / (num_simulations + 1), impossible, _name(place, records))


def warn_of_fit(fit: GoodnessOfFit, stacklevel: int = 3) -> None:
    """Warn if records can't, or hardly can, come from what was fitted.

    Warns:
        ConvergenceWarning: If records are impossible, or the p-value is below 0.001 or the least that it can be.
    """
    if fit.impossible:
        warnings.warn(
            f"{fit.impossible} records are impossible under the model: they have probability zero; "
            "put readout errors into the measurement, or check frame and initial state",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )
    elif fit.p_value < max(_SUSPICIOUS, 1 / 199):
        warnings.warn(
            f"the records don't look as the fitted model says (p-value {fit.p_value:.2g}, most so at time "
            f"{fit.worst[0]} for outcome {fit.worst[2]} on sites {fit.worst[1]}); check frame, model and initial state",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )


def warn_of_chains(series: Mapping[str, Tensor], stacklevel: int = 3) -> None:
    """Warn if chains haven't mixed: by R-hat of their halves, and of each other where there are several.

    Args:
        series: The draws ``(chains, n)`` of every quantity by name.
        stacklevel: The number of calls above this one that the warning is attributed to.

    Warns:
        ConvergenceWarning: If an R-hat exceeds 1.1.

    Reference:
        Gelman et al., Bayesian Data Analysis, third edition (2013), section 11.4.
    """
    found = {name: float(split_gelman_rubin(draws)) for name, draws in series.items() if draws.shape[1] >= 4}
    worst = max(found, key=lambda name: found[name], default=None)
    if worst is not None and not found[worst] <= _LARGEST_RHAT:
        warnings.warn(
            f"the chains haven't mixed: R-hat of {worst} is {found[worst]:.3g}; take a longer warmup and more draws",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )


def _groups(records: MeasurementRecords) -> list[tuple[int, ...]]:
    """Return the sets of sites whose outcomes are counted together: all, or every pair where that is too much."""
    n = records.num_sites
    if records.num_outcomes**n <= _MAX_CELLS:
        return [tuple(range(n))]
    return [(i, j) for i in range(n) for j in range(i)]


def _tables(outcomes: Tensor, cell: Tensor, rows: int, records: MeasurementRecords) -> Tensor:
    """Count outcomes by row and group of sites, in one vector."""
    k = records.num_outcomes
    parts = []
    for sites in _groups(records):
        size = k ** len(sites)
        code = cell * size + encode(outcomes[:, list(sites)], k)
        parts.append(torch.bincount(code, minlength=rows * size))
    return torch.cat(parts).double()


def _expected(p: Tensor, cell: Tensor, records: MeasurementRecords) -> Tensor:
    n, k, rows = records.num_sites, records.num_outcomes, p.shape[0]
    counts = torch.bincount(cell, minlength=rows).double()[:, None]
    tensor = p.reshape(rows, *(k,) * n)
    parts = []
    for sites in _groups(records):
        rest = [1 + i for i in range(n) if i not in sites]
        reduced = tensor.sum(rest) if rest else tensor
        order = sorted(sites)
        axes = [1 + order.index(site) for site in sites]
        parts.append((counts * reduced.permute(0, *axes).reshape(rows, -1)).reshape(-1))
    return torch.cat(parts)


def _deviation(found: Tensor, expected: Tensor) -> Tensor:
    # an expected count of zero is met by zero, and by nothing else
    return (found - expected).square() / expected.clamp(min=_POSSIBLE)


def _decode(codes: Tensor, records: MeasurementRecords) -> Tensor:
    from stochdyn.core.forward.outcomes import decode

    return decode(codes, records.num_sites, records.num_outcomes)


def _name(place: int, records: MeasurementRecords) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return time, sites and outcome of a place in the vector of counts."""
    rows = records.num_preparations * len(records.times)
    for sites in _groups(records):
        size = records.num_outcomes ** len(sites)
        if place < rows * size:
            code, digits = place % size, []
            for _ in sites:
                code, digit = divmod(code, records.num_outcomes)
                digits.append(digit)
            return (place // size) % len(records.times), sites, tuple(reversed(digits))
        place -= rows * size
    return 0, (), ()  # pragma: no cover (places lie within the vector)
