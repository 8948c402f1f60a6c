"""Bonds of lattices: each once, also where the way around is the same bond."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.povm import all_to_all, chain, ring, square_lattice


def test_every_bond_comes_once() -> None:
    assert ring(2) == [(0, 1)]
    assert chain(4) == [(0, 1), (1, 2), (2, 3)]
    torus = square_lattice(3, 4)
    assert len(torus) == 24
    degree = torch.zeros(12, dtype=torch.long)
    for i, j in torus:
        degree[i] += 1
        degree[j] += 1
    assert degree.tolist() == [4] * 12
    assert sorted(tuple(sorted(b)) for b in square_lattice(2, 2)) == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert len(square_lattice(4, 3, periodic=False)) == 4 * 2 + 3 * 3
    assert square_lattice(1, 4) == ring(4)
    assert len(all_to_all(6)) == 15


def test_a_lattice_needs_sites() -> None:
    for make in (chain, ring, all_to_all):
        with pytest.raises(InvalidInputError, match="num_sites"):
            make(1)
    with pytest.raises(InvalidInputError, match="rows"):
        square_lattice(0, 3)
