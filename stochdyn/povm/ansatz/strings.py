"""String States: mixtures of one autoregressive law over orders of the sites and relabellings of the outcomes."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.povm.frames.sizes import check_size

__all__ = ["Strings"]

_LARGEST_GROUP = 4096
_MAX_SITES = 1 << 14


class Strings:
    r"""A set of strings: each an order in which sites are visited, and a relabelling of their outcomes.

    A symmetrised law is the mixture, of equal weights, of one autoregressive law read along every string,

    .. math::
        P(a) = \frac1S\sum_s P_{\mathrm{AR}}(b^{(s)}),\qquad b^{(s)}_i = \sigma_s\bigl(a_{\pi_s(i)}\bigr),

    so it sums to one, and is invariant where the strings form a group. Probabilities are averaged, not their
    logarithms or square roots.

    Args:
        orders: The permutations ``(S, N)`` of the sites: string ``s`` visits site ``orders[s, i]`` at step ``i``.
        relabellings: The permutations ``(S, K)`` of the outcomes, the same on every site; no relabelling if None.

    Raises:
        InvalidInputError: If a row isn't a permutation, or a string occurs twice.
        ShapeError: If the shapes don't fit.

    Attributes:
        orders: The permutations ``(S, N)`` of the sites.
        relabellings: The permutations ``(S, K)`` of the outcomes, or None.

    Example:
        >>> ring = Strings.translations(3, reflections=False)
        >>> ring.orders.tolist()
        [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
        >>> ring.is_group
        True

    Reference:
        Luo, Chen, Carrasquilla and Clark, "Autoregressive neural network for simulating open quantum systems via
        a probabilistic formulation", Phys. Rev. Lett. 128, 090501 (2022), "String States".
    """

    def __init__(self, orders: Tensor | Sequence[Sequence[int]], relabellings: Tensor | None = None) -> None:
        self.orders = _as_rows(orders, "orders")
        _check_permutations(self.orders, "orders")
        self.relabellings = None if relabellings is None else _as_rows(relabellings, "relabellings")
        if self.relabellings is not None:
            _check_permutations(self.relabellings, "relabellings")
            if len(self.relabellings) != len(self.orders):
                raise ShapeError(
                    "there must be one relabelling for each string",
                    got=len(self.relabellings),
                    expected=len(self),
                )
        if len(set(self._keys())) < len(self):
            raise InvalidInputError("a string occurs twice", hint="every string has the same weight")

    def __len__(self) -> int:
        return int(self.orders.shape[0])

    def __repr__(self) -> str:
        labels = "" if self.relabellings is None else ", with relabelled outcomes"
        return f"Strings({len(self)} of {self.num_sites} sites{labels})"

    @property
    def num_sites(self) -> int:
        """The number ``N`` of sites."""
        return int(self.orders.shape[1])

    def _keys(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        labels = (
            [()] * len(self) if self.relabellings is None else [tuple(r) for r in self.relabellings.tolist()]
        )
        return [(tuple(o), label) for o, label in zip(self.orders.tolist(), labels, strict=True)]

    @property
    def is_group(self) -> bool:
        """Whether strings composed are strings, so that the mixture has their symmetry exactly."""
        keys = set(self._keys())
        return all(_compose(a, b) in keys for a, b in itertools.product(keys, keys))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Strings:
        """Return the same strings with their tensors passed through a function, such as a move to another device."""
        moved = copy.copy(self)
        moved.orders = function(self.orders)
        moved.relabellings = None if self.relabellings is None else function(self.relabellings)
        return moved

    def relative(self) -> Strings:
        """Return the strings as they differ from the first: the symmetries that a mixture of them supposes."""
        first = self.orders[0].argsort()
        labels = self.relabellings
        if labels is not None:
            labels = labels[0].argsort()[labels]
        return Strings(self.orders[:, first], labels)

    def arrange(self, a: Tensor) -> Tensor:
        """Return outcomes ``(n, N)`` as every string reads them, ``(n, S, N)``."""
        b = a[:, self.orders.to(a.device)]
        if self.relabellings is None:
            return b
        table = self.relabellings.to(a.device)
        return table[torch.arange(len(self), device=a.device)[None, :, None], b]

    def restore(self, b: Tensor, string: Tensor) -> Tensor:
        """Return outcomes ``(n, N)`` of the sites from what strings ``(n,)`` read, ``(n, N)``."""
        if self.relabellings is not None:
            inverse = self.relabellings.to(b.device).argsort(1)
            b = inverse[string[:, None], b]
        return torch.zeros_like(b).scatter(1, self.orders.to(b.device)[string], b)

    # ---------------------------------------------------------------- sets that people use

    @classmethod
    def identity(cls, num_sites: int) -> Strings:
        """Return the one string in the natural order."""
        check_size(num_sites, "num_sites", _MAX_SITES)
        return cls(torch.arange(num_sites)[None])

    @classmethod
    def translations(cls, shape: int | Sequence[int], reflections: bool = True) -> Strings:
        """Return all translations of a ring or of a lattice on a torus, by default with its reflections.

        Args:
            shape: The number of sites of the ring, or the sizes of the lattice, its sites counted with the last axis
                fastest.
            reflections: Whether every axis is reflected as well.

        Example:
            >>> len(Strings.translations(6)), len(Strings.translations((3, 3)))
            (12, 36)
        """
        sizes = _sizes(shape)
        index = torch.arange(int(torch.tensor(sizes).prod())).reshape(sizes)
        axes = range(len(sizes))
        check_size(
            len(index.reshape(-1)) * (2 ** len(sizes) if reflections else 1), "strings", _LARGEST_GROUP
        )
        flips: list[tuple[int, ...]] = [()]
        if reflections:
            # the group of the torus: a reflection of every subset of axes, then all shifts
            flips = [f for k in range(len(sizes) + 1) for f in itertools.combinations(axes, k)]
        found: dict[tuple[int, ...], None] = {}
        for flip in flips:
            for shift in itertools.product(*(range(n) for n in sizes)):
                moved = index.roll([-s for s in shift], list(axes))
                found.setdefault(tuple((moved.flip(flip) if flip else moved).reshape(-1).tolist()))
        return cls(list(found))

    @classmethod
    def reflection(cls, num_sites: int) -> Strings:
        """Return a chain read forwards and backwards.

        Example:
            >>> Strings.reflection(3).orders.tolist()
            [[0, 1, 2], [2, 1, 0]]
        """
        check_size(num_sites, "num_sites", _MAX_SITES)
        forward = torch.arange(num_sites)
        return cls(torch.stack([forward, forward.flip(0)]) if num_sites > 1 else forward[None])

    @classmethod
    def snake(cls, shape: Sequence[int]) -> Strings:
        """Return one path that runs to and fro through a square lattice, so that steps join neighbours.

        Example:
            >>> Strings.snake((2, 3)).orders.tolist()
            [[0, 1, 2, 5, 4, 3]]
        """
        return cls(_snake(_lattice(shape)).reshape(1, -1))

    @classmethod
    def snakes(cls, shape: Sequence[int]) -> Strings:
        """Return the eight paths to and fro: from each corner, by rows and by columns.

        Example:
            >>> len(Strings.snakes((3, 3)))
            8
        """
        index = _lattice(shape)
        found: dict[tuple[int, ...], None] = {}
        for grid in (index, index.mT):
            for flip in ((), (0,), (1,), (0, 1)):
                found.setdefault(tuple(_snake(grid.flip(flip) if flip else grid).tolist()))
        return cls(list(found))

    @classmethod
    def relabelling(cls, num_sites: int, labels: Sequence[int]) -> Strings:
        """Return the symmetry group that one relabelling of the outcomes generates.

        An internal symmetry of the state is one if it permutes the effects of the frame. A turn by π about z
        permutes those of the rotated tetrahedron by ``(3, 2, 1, 0)``, about x by ``(1, 0, 3, 2)`` and about y
        by ``(2, 3, 0, 1)``.

        Example:
            >>> Strings.relabelling(2, (3, 2, 1, 0)).relabellings.tolist()
            [[0, 1, 2, 3], [3, 2, 1, 0]]
        """
        check_size(num_sites, "num_sites", _MAX_SITES)
        step = _as_rows(labels, "labels").reshape(-1)
        _check_permutations(step[None], "labels")
        rows = [torch.arange(len(step))]
        # powers of the permutation until the identity comes again: the cyclic group
        while not torch.equal(step[rows[-1]], rows[0]):
            rows.append(step[rows[-1]])
        return cls(torch.arange(num_sites).repeat(len(rows), 1), torch.stack(rows))

    def __matmul__(self, other: Strings) -> Strings:
        """Return all strings of one set followed by those of another, each once.

        Example:
            >>> both = Strings.translations(4) @ Strings.relabelling(4, (3, 2, 1, 0))
            >>> len(both), both.is_group
            (16, True)
        """
        if not isinstance(other, Strings):
            return NotImplemented
        if self.num_sites != other.num_sites:
            raise ShapeError(
                "strings differ in their number of sites", got=other.num_sites, expected=self.num_sites
            )
        size = max((s.relabellings.shape[1] for s in (self, other) if s.relabellings is not None), default=0)
        first, second = self._padded(size), other._padded(size)
        found = list(dict.fromkeys(_compose(a, b) for a in first for b in second))
        if len(found) > _LARGEST_GROUP:
            raise InvalidInputError(
                "there are too many strings", got=len(found), expected=f"at most {_LARGEST_GROUP}"
            )
        labels = torch.tensor([label for _, label in found]) if size else None
        return Strings(torch.tensor([order for order, _ in found]), labels)

    def _padded(self, size: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [(order, label or tuple(range(size))) for order, label in self._keys()]


_Key = tuple[tuple[int, ...], tuple[int, ...]]


def _compose(a: _Key, b: _Key) -> _Key:
    """String ``a`` applied to what string ``b`` reads: c_i = a_label(b_label(x[b_order[a_order[i]]]))."""
    order = tuple(b[0][i] for i in a[0])
    label = tuple(a[1][i] for i in b[1]) if a[1] and b[1] else a[1] or b[1]
    return order, label


def _check_permutations(rows: Tensor, name: str) -> None:
    if rows.ndim != 2 or rows.numel() == 0:
        raise ShapeError(f"{name} must have two axes", got=f"shape {tuple(rows.shape)}")
    wanted = torch.arange(rows.shape[1]).expand_as(rows)
    bad = (rows.sort(1)[0].cpu() != wanted).any(1).nonzero()
    if bad.numel():
        i = int(bad[0, 0])
        raise InvalidInputError(f"{name} must be permutations", got=f"{name}[{i}]={rows[i].tolist()}")


def _as_rows(value: object, name: str) -> Tensor:
    """Return integers of any form as a tensor."""
    try:
        rows = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name} must be integers", got=repr(value)[:60]) from error
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise InvalidInputError(f"{name} must be integers", got=rows.dtype)
    return rows.long()


def lattice_shape(shape: object) -> tuple[int, ...]:
    """Return the sizes of a lattice from a number or a sequence of them.

    Raises:
        InvalidInputError: If they aren't positive integers.
        SystemSizeError: If there are over 16384 sites.
    """
    listed = shape.tolist() if isinstance(shape, Tensor | np.ndarray) else shape
    sizes = tuple(listed) if isinstance(listed, list | tuple) else (listed,)
    if not sizes:
        raise InvalidInputError("shape is empty")
    for size in sizes:
        check_size(size, "shape", _MAX_SITES)
    check_size(math.prod(sizes), "the number of sites of shape", _MAX_SITES)
    return tuple(int(size) for size in sizes)


def _sizes(shape: int | Sequence[int]) -> list[int]:
    return list(lattice_shape(shape))


def _lattice(shape: Sequence[int]) -> Tensor:
    sizes = _sizes(shape)
    if len(sizes) != 2:
        raise ShapeError("a snake needs a lattice of two dimensions", got=tuple(sizes))
    return torch.arange(sizes[0] * sizes[1]).reshape(sizes)


def _snake(grid: Tensor) -> Tensor:
    rows = [row if i % 2 == 0 else row.flip(0) for i, row in enumerate(grid)]
    return torch.cat(rows)
