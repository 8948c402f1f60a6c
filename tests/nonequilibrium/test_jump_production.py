"""Cycles, large deviations, hidden states and counts of jump processes against closed forms."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError
from stochdyn.jumps import RateMatrix
from stochdyn.nonequilibrium import cycle_affinities, entropy_from_counts, scgf, visible_entropy_production
from stochdyn.testing import check_gradients, check_units

D = torch.float64


def columns(q: list[list[float]]) -> RateMatrix:
    """Return the generator of rates that are written from the column's state to the row's."""
    return RateMatrix(torch.as_tensor(np.asarray(q, dtype=float)).mT)


UNIFORM = columns([[0, 0.5, 2], [2, 0, 0.5], [0.5, 2, 0]])
CYCLE = columns([[0, 1, 3], [2, 0, 0.5], [0.5, 4, 0]])
FOUR = columns([[0, 1, 0.5, 2], [3, 0, 1, 0], [0.3, 2, 0, 1.5], [1, 0, 0.7, 0]])


def test_cycles() -> None:
    (cycle,) = cycle_affinities(CYCLE)
    assert abs(cycle.affinity) == pytest.approx(math.log(96), rel=1e-12)
    assert abs(cycle.current) == pytest.approx(5 / 7, rel=1e-12)
    cycles = cycle_affinities(FOUR)
    assert len(cycles) == 2
    total = sum(c.affinity * c.current for c in cycles)
    assert total == pytest.approx(0.4653956067, abs=1e-10)
    balanced = RateMatrix.reversible([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]], [0.2, 0.5, 0.3])
    assert all(abs(c.affinity) < 1e-5 for c in cycle_affinities(balanced))
    one_way = columns([[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    assert math.isinf(cycle_affinities(one_way)[0].affinity)


def test_large_deviations() -> None:
    values = scgf(UNIFORM, torch.tensor([0.0, 0.5, 1.0], dtype=D))
    torch.testing.assert_close(values, torch.tensor([0.0, -0.5, 0.0], dtype=D), rtol=0, atol=1e-12)
    for rates, mean, variance in ((UNIFORM, 1.5 * math.log(4), 4.8045), (CYCLE, 3.2602487082, 8.1613)):
        at = torch.zeros((), dtype=D, requires_grad=True)
        (first,) = torch.autograd.grad(scgf(rates, at), at, create_graph=True)
        (second,) = torch.autograd.grad(first, at)
        assert float(-first.detach()) == pytest.approx(mean, rel=1e-9)
        assert float(second.detach()) == pytest.approx(variance, rel=2e-5)
    field = torch.linspace(-0.5, 1.5, 7, dtype=D)
    torch.testing.assert_close(scgf(FOUR, field), scgf(FOUR, 1 - field), rtol=0, atol=1e-12)
    check_gradients(lambda f: scgf(FOUR, f), field)
    with pytest.raises(InvalidInputError, match="no reverse"):
        scgf(columns([[0, 0, 1], [1, 0, 0], [0, 1, 0]]), 0.5)


def test_hidden_states_hide_entropy_production() -> None:
    seen = visible_entropy_production(FOUR, [2, 3])
    assert seen.rate == pytest.approx(0.4469286, abs=1e-7)
    assert seen.affinity == pytest.approx(0.4453988, abs=1e-7)
    assert seen.affinity <= seen.rate <= float(FOUR.entropy_production())
    # one hidden state hides nothing
    assert visible_entropy_production(FOUR, [3]).affinity == pytest.approx(0.4653956067, abs=1e-9)
    for bad in ([], [4], [0, 1, 2, 3]):
        with pytest.raises(InvalidInputError, match="hidden"):
            visible_entropy_production(FOUR, bad)


def test_units_of_time() -> None:
    def answer(unit: float) -> torch.Tensor:
        rates = RateMatrix(FOUR.matrix / unit)
        seen = visible_entropy_production(rates, [2, 3])
        cycles = cycle_affinities(rates)
        field = scgf(rates, torch.tensor([0.3], dtype=D))
        return torch.cat(
            [
                unit * torch.tensor([seen.rate, seen.affinity], dtype=D),
                torch.tensor([c.affinity for c in cycles] + [unit * c.current for c in cycles], dtype=D),
                unit * field,
            ]
        )

    check_units(answer)


def test_errors_of_counts_are_calibrated() -> None:
    law = sd.jumps.JumpMeasure(CYCLE.stationary(), CYCLE)
    record = law.sample_record(1000.0, 60, 0)
    scores = []
    for counts in record.counts:
        one = _Counts(counts, record.ts)
        found = entropy_from_counts(one)
        scores.append((float(found) - 3.2602487082) / float(found.stderr))
    z = torch.tensor(scores)
    # the bias at T = 1000 is .01 of .2
    assert abs(float(z.mean())) < 4.5 / 60**0.5
    assert 0.6 < float(z.std()) < 1.5
    assert int((z.abs() < 1.96).sum()) >= 50


@dataclasses.dataclass
class _Counts:
    counts: torch.Tensor
    ts: torch.Tensor


def test_links_seen_one_way_are_warned_of() -> None:
    counts = torch.tensor([[0, 10.0], [10, 0]])
    one_way = torch.tensor([[0, 10.0, 0], [0, 0, 10], [10, 0, 0]])
    ts = torch.tensor([0.0, 10.0])
    assert float(entropy_from_counts(_Counts(counts, ts))) == 0.0
    with pytest.warns(ApproximationWarning, match="one direction"):
        entropy_from_counts(_Counts(one_way, ts))
    with pytest.raises(InvalidInputError, match="record"):
        entropy_from_counts(torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="one generator"):
        cycle_affinities(RateMatrix(torch.ones(2, 3, 3) - torch.eye(3)))
