"""Strings are permutations, compose as they read, and give back what they read."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.povm import Strings


@pytest.mark.parametrize(
    ("strings", "size", "group"),
    [
        (Strings.identity(5), 1, True),
        (Strings.translations(6, reflections=False), 6, True),
        (Strings.translations(6), 12, True),
        (Strings.translations((3, 3), reflections=False), 9, True),
        (Strings.translations((3, 3)), 36, True),
        (Strings.translations((2, 3), reflections=False), 6, True),
        (Strings.reflection(4), 2, True),
        (Strings.snake((3, 3)), 1, False),
        (Strings.snakes((3, 3)), 8, False),
        (Strings.relabelling(3, (1, 2, 0, 3)), 3, True),
        (Strings.translations(3) @ Strings.relabelling(3, (3, 2, 1, 0)), 12, True),
    ],
)
def test_sizes_and_groups(strings: Strings, size: int, group: bool) -> None:
    assert len(strings) == size
    assert strings.is_group is group


@pytest.mark.parametrize(
    "strings", [Strings.snakes((3, 3)), Strings.translations(9) @ Strings.relabelling(9, (1, 2, 0, 3))]
)
def test_what_was_read_is_given_back(strings: Strings) -> None:
    a = torch.randint(4, (20, 9))
    read = strings.arrange(a)
    for s in range(len(strings)):
        assert torch.equal(strings.restore(read[:, s], torch.full((20,), s)), a)


def test_products_read_one_after_the_other() -> None:
    first, second = (
        Strings.snakes((2, 3)),
        Strings.translations((2, 3)) @ Strings.relabelling(6, (1, 2, 3, 0)),
    )
    a = torch.randint(4, (1, 6))
    product = {tuple(r) for r in (first @ second).arrange(a)[0].tolist()}
    by_hand = {tuple(r) for b in second.arrange(a)[0] for r in first.arrange(b[None])[0].tolist()}
    assert product == by_hand


def test_steps_of_a_snake_join_neighbours() -> None:
    for order in Strings.snakes((3, 4)).orders:
        row, column = order // 4, order % 4
        assert bool(((row.diff().abs() + column.diff().abs()) == 1).all())


def test_translations_keep_bonds_of_the_torus() -> None:
    bonds = {
        frozenset((3 * x + y, 3 * ((x + u) % 3) + (y + v) % 3))
        for x in range(3)
        for y in range(3)
        for u, v in ((0, 1), (1, 0))
    }
    for order in Strings.translations((3, 3)).orders.tolist():
        assert {frozenset(order[i] for i in bond) for bond in bonds} == bonds


def test_bad_strings_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="permutations"):
        Strings(torch.tensor([[0, 0, 1]]))
    with pytest.raises(InvalidInputError, match="twice"):
        Strings(torch.tensor([[0, 1], [0, 1]]))
    with pytest.raises(ShapeError, match="one relabelling for each string"):
        Strings(torch.tensor([[0, 1]]), torch.tensor([[0, 1], [1, 0]]))
    with pytest.raises(ShapeError, match="two dimensions"):
        Strings.snake((2, 2, 2))
    with pytest.raises(ShapeError, match="number of sites"):
        Strings.identity(3) @ Strings.identity(4)
