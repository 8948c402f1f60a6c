"""Integrals between two known ends against matrix exponentials of twice the size, and names of hidden states."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.jumps import Exact, JumpMeasure, RateMatrix, order_states, transition, transition_integral

D = torch.float64
CYCLE = torch.tensor([[0.0, 1.0, 0.3], [0.4, 0.0, 2.0], [0.8, 0.5, 0.0]], dtype=D)


def block(q: torch.Tensor, middle: torch.Tensor, dt: float, last: torch.Tensor) -> torch.Tensor:
    size = len(q)
    whole = torch.cat([torch.cat([q, middle], 1), torch.cat([torch.zeros_like(q), last], 1)])
    return torch.matrix_exp(whole * dt)[:size, size:]


@pytest.mark.parametrize("dt", [0.0, 1e-4, 0.7, 30.0])
def test_integrals_are_corners_of_a_matrix_exponential(dt: float) -> None:
    q = RateMatrix(CYCLE).matrix
    middle = torch.randn(2, 3, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    found = transition_integral(q, [dt, 0.3], middle)
    assert found.shape == (2, 2, 3, 3)
    for k in range(2):
        torch.testing.assert_close(found[0, k], block(q, middle[k], dt, q), rtol=1e-11, atol=1e-13)
    stay = transition_integral(q, dt)
    torch.testing.assert_close(
        stay, block(q, torch.eye(3, dtype=D), dt, torch.zeros_like(q)), rtol=1e-11, atol=1e-13
    )
    torch.testing.assert_close(stay.sum(-1), torch.full((3,), dt, dtype=D), rtol=1e-12, atol=0)


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_times_between_ends_are_those_of_bridges_in_any_unit(unit: float) -> None:
    """From state 0 to state 2: expected times and jumps by Fisher's identity, and by integrals over what lies between."""
    law = JumpMeasure([1.0, 0.0, 0.0], CYCLE)
    dwell, jumps = law.conditioned([0.9], [2], Exact(3)).expected_statistics()
    q = RateMatrix(CYCLE / unit).matrix
    ends = torch.zeros(3, 3, 3, 3, dtype=D)
    for k in range(3):
        for j in range(3):
            ends[k, j, k, j] = 1.0
    over = transition_integral(q, 0.9 * unit, ends)[..., 0, 2] / transition(q, 0.9 * unit)[0, 2]
    torch.testing.assert_close(over.diagonal() / unit, dwell, rtol=1e-10, atol=0)
    moves = over * (q - torch.diag(q.diagonal()))
    torch.testing.assert_close(moves, jumps, rtol=1e-10, atol=1e-15)


def test_integrals_are_differentiable_and_checked() -> None:
    leaf = torch.randn(3, 3, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    off = 1 - torch.eye(3, dtype=D)
    dt = torch.tensor([0.4, 9.0], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, t: transition_integral(RateMatrix(x.exp() * off), t), (leaf, dt)
    )
    with pytest.raises(InvalidInputError, match="dt must not be negative"):
        transition_integral(CYCLE, -1.0)
    with pytest.raises(ShapeError, match="states of rates"):
        transition_integral(CYCLE, 1.0, torch.eye(2))
    with pytest.raises(ShapeError, match="one generator"):
        transition_integral(torch.stack([CYCLE, CYCLE]), 1.0)


def test_draws_of_hidden_states_are_put_in_one_order() -> None:
    source = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.0, 1.0, 2.0], dtype=D) + 0.1 * torch.randn(4, 50, 3, dtype=D, generator=source)
    start = torch.tensor([0.5, 0.3, 0.2], dtype=D).expand(4, 50, 3)
    rates = CYCLE.expand(4, 50, 3, 3).clone()
    assert order_states(levels, start, rates).relabelled == 0.0
    turn = [2, 0, 1]
    mixed = [levels.clone(), start.clone(), rates.clone()]
    # one chain of four has found another labelling
    mixed[0][1], mixed[1][1] = levels[1][:, turn], start[1][:, turn]
    mixed[2][1] = rates[1][:, turn][:, :, turn]
    found = order_states(*mixed)
    assert found.relabelled == pytest.approx(0.25)
    for one, known in zip((found.levels, *found.others), (levels, start, rates), strict=True):
        torch.testing.assert_close(one, known, rtol=0, atol=0)
    with pytest.raises(ShapeError, match=r"others\[0\]"):
        order_states(levels, rates[..., :2])
