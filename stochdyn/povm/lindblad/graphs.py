"""Bonds of common lattices, as lists of pairs of sites."""

from __future__ import annotations

from stochdyn._checks import check_bool
from stochdyn.povm.frames.sizes import check_size

__all__ = ["all_to_all", "chain", "ring", "square_lattice"]

Bond = tuple[int, int]


def chain(num_sites: int) -> list[Bond]:
    """Return the bonds of an open chain.

    Example:
        >>> chain(3)
        [(0, 1), (1, 2)]
    """
    check_size(num_sites, "num_sites", 1 << 20, 2)
    return [(i, i + 1) for i in range(num_sites - 1)]


def ring(num_sites: int) -> list[Bond]:
    """Return the bonds of a closed chain, each once: two sites have a single bond.

    Example:
        >>> ring(3)
        [(0, 1), (1, 2), (2, 0)]
    """
    bonds = chain(num_sites)
    return bonds if num_sites == 2 else [*bonds, (num_sites - 1, 0)]


def square_lattice(rows: int, columns: int, periodic: bool = True) -> list[Bond]:
    """Return the bonds of a square lattice with sites ``row * columns + column``, each once.

    Args:
        rows: The number of rows.
        columns: The number of columns.
        periodic: Whether the lattice is a torus rather than open at its ends. Along a side of two sites the way around
            is the same bond, which isn't counted twice.

    Example:
        >>> len(square_lattice(3, 3)), len(square_lattice(3, 3, periodic=False)), len(square_lattice(2, 2))
        (18, 12, 4)
    """
    check_size(rows, "rows", 1 << 10)
    check_size(columns, "columns", 1 << 10)
    check_bool(periodic, "periodic")
    bonds: list[Bond] = []
    seen: set[frozenset[int]] = set()
    for r in range(rows):
        for c in range(columns):
            right, below = (r, (c + 1) % columns), ((r + 1) % rows, c)
            for (row, column), wraps in ((right, c + 1 == columns), (below, r + 1 == rows)):
                pair = (r * columns + c, row * columns + column)
                if (wraps and not periodic) or pair[0] == pair[1] or frozenset(pair) in seen:
                    continue
                seen.add(frozenset(pair))
                bonds.append(pair)
    return bonds


def all_to_all(num_sites: int) -> list[Bond]:
    """Return all pairs of sites.

    Example:
        >>> len(all_to_all(5))
        10
    """
    check_size(num_sites, "num_sites", 1 << 10, 2)
    return [(i, j) for i in range(num_sites) for j in range(i + 1, num_sites)]
