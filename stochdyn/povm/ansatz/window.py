"""The window ansatz: each outcome depends on the nearest earlier sites alone, by a table that all places share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_bool
from stochdyn.errors import ShapeError, SystemSizeError
from stochdyn.povm.ansatz.autoregressive import AutoregressiveAnsatz
from stochdyn.povm.ansatz.strings import Strings, lattice_shape
from stochdyn.povm.ansatz.window_ratios import RatioPlan
from stochdyn.povm.dynamics.scores import Tape
from stochdyn.povm.frames.sizes import check_size

__all__ = ["AutoregressiveWindow", "lattice_offsets"]

_MAX_ENTRIES = 1 << 20


class AutoregressiveWindow(AutoregressiveAnsatz):
    r"""A Markov law of some order on a lattice.

    .. math:: \lambda_i(b_{<i}) = T_{w(i)}\bigl(\cdot\,;\,b_{j_1},\dots,b_{j_k}\bigr)

    with :math:`j_1,\dots,j_k` the ``order`` earlier sites nearest to site ``i``, and one table ``T`` for each pattern
    ``w`` of their relative positions. In the bulk of a lattice the pattern is the same everywhere, so a sample of ``N``
    sites counts ``N`` times for the table. On a ring the last few sites see the first ones as well, by tables of their own.

    The tangent space of such a law on a long chain holds every sum of functions of ``order + 1`` neighbouring outcomes, so
    the variational principle moves all averages of ``order + 1`` neighbours at their exact rates; what is
    approximated are correlations beyond. There are few parameters, whatever the number of sites, and looking one up
    costs next to nothing. When would I use this? For dynamics with short correlations, on chains of any length; raise
    ``order`` until nothing changes.

    Args:
        num_sites: The number ``N`` of sites.
        order: The number of earlier sites that an outcome depends on.
        shape: The sizes of the lattice, its sites counted with the last axis fastest; a chain if None.
        periodic: Whether the lattice closes on itself.
        shared: Whether all sites that see the same pattern of neighbours share a table; False for a table of its own
            for every site, where sites differ.
        strings: The order of the sites, or the set of orders to average over, which should be symmetries of the
            lattice, as in :class:`AutoregressiveAnsatz`.
        num_outcomes: The number ``K`` of outcomes of a site.
        memory: The number of bytes that caches may use at a time.

    Raises:
        InvalidInputError: If a size isn't a positive integer.
        ShapeError: If the lattice hasn't so many sites.
        SystemSizeError: If the tables had over 2**20 rows.

    Example:
        >>> net = AutoregressiveWindow(4, order=2).double()
        >>> round(float(net.probabilities().sum()), 10), net.tables.shape
        (1.0, torch.Size([37, 4]))

    Reference:
        Markov approximations of stationary laws: Cover and Thomas, Elements of Information Theory, chapter 4.
    """

    neighbours: Tensor
    strides: Tensor
    offsets: Tensor
    _derived_: tuple[str, ...] = ("_read_references", "_plan")

    def __init__(
        self,
        num_sites: int,
        order: int = 3,
        *,
        shape: Sequence[int] | None = None,
        periodic: bool = True,
        shared: bool = True,
        strings: Strings | str | None = None,
        num_outcomes: int = 4,
        memory: int = 1 << 27,
    ) -> None:
        check_size(order, "order", 64)
        check_bool(periodic, "periodic")
        check_bool(shared, "shared")
        super().__init__(num_sites, num_outcomes, strings, shape, memory)
        rows: dict[Any, int] = {}
        used = 0
        nearest, strides, offsets = [], [], []
        for i, earlier in enumerate(lattice_offsets(num_sites, shape, periodic)):
            chosen = earlier[:order]
            # sites whose windows look alike share rows; a row is numbered by the outcomes in the window as
            # digits of base K
            pattern = tuple(offset for offset, _ in chosen) if shared else i
            if pattern not in rows:
                rows[pattern] = used
                used += num_outcomes ** len(chosen)
            spare = order - len(chosen)
            nearest.append([j for _, j in chosen] + [0] * spare)
            strides.append([num_outcomes**p for p in range(len(chosen))] + [0] * spare)
            offsets.append(rows[pattern])
        if used > _MAX_ENTRIES:
            raise SystemSizeError(
                "the tables are too large",
                got=f"{used} rows",
                expected=f"at most {_MAX_ENTRIES}",
                hint="lower order",
            )
        self.order = order
        self._kinds = [list(rows.values()).index(offset) for offset in offsets]
        self._plan: tuple[Any, list[int], RatioPlan] | None = None
        self.register_buffer("neighbours", torch.tensor(nearest), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self.tables = nn.Parameter(torch.zeros(used, num_outcomes))

    @property
    def bytes_per_row(self) -> int:
        """The number of bytes that evaluating one string takes."""
        return 16 * self.num_sites

    def logits(self, b: Tensor, tape: Tape | None = None) -> Tensor:
        """Return the logits ``(rows, N, K)`` of all steps of given strings."""
        index = self.offsets + (b[:, self.neighbours] * self.strides).sum(-1)
        return self.tables[index] if tape is None else tape.rows(self.tables, index)

    def clear(self) -> None:
        """Make all logits zero, so that the reference alone is left."""
        with torch.no_grad():
            self.tables.zero_()

    def start(self, rows: int) -> None:
        """Return an empty cache; nothing is kept but the outcomes themselves."""

    def next_logits(self, cache: None, b: Tensor, step: int, rows: int) -> Tensor:
        """Return the logits ``(rows, K)`` of the next step, given the outcomes before it."""
        index = self.offsets[step].expand(rows)
        for place, stride in zip(self.neighbours[step], self.strides[step], strict=True):
            if step and stride:
                index = index + b[:, place] * stride
        return self.tables[index]

    def branch(self, cache: None, source: Tensor, target: slice, steps: int) -> None:
        """Copy rows of the cache; there is nothing in it to copy."""

    # ---------------------------------------------------------------- ratios without whole strings

    def log_ratios(self, a: Tensor, shifts: Tensor) -> Tensor | None:
        """Return log ratios of probabilities; a shift changes the conditionals of the few sites that see it, each looked up."""
        if len(self.strings) > 1 or self.strings.relabellings is not None:
            return None
        read = self.strings.orders[0].to(a.device)
        b, reference = a[:, read], self._references()[0][0]
        plain = bool((reference == reference[0]).all())
        key = (hash(shifts.cpu().numpy().tobytes()), tuple(shifts.shape), shifts.device, plain)
        if self._plan is None or self._plan[0] != key:
            kinds = self._kinds if plain else list(range(self.num_sites))
            plan = RatioPlan(shifts[:, read], self.neighbours, self.strides, kinds, self.num_outcomes)
            self._plan = (key, kinds, plan)
        _, kinds, plan = self._plan
        with torch.no_grad():
            rows = []
            for step in [kinds.index(i) for i in range(max(kinds) + 1)]:
                size = self.num_outcomes ** int((self.strides[step] > 0).sum())
                table = self.tables[self.offsets[step] : self.offsets[step] + size]
                rows.append((table + reference[step]).log_softmax(-1).reshape(-1))
            code = (b[:, self.neighbours] * self.strides).sum(-1) * self.num_outcomes + b
            return plan.sum(torch.cat(rows), code, len(shifts))


def lattice_offsets(
    num_sites: int, shape: Sequence[int] | None, periodic: bool
) -> list[list[tuple[tuple[int, ...], int]]]:
    """Return for every site of a lattice the earlier ones, the nearest first: relative position and number.

    Args:
        num_sites: The number ``N`` of sites.
        shape: The sizes of the lattice, the last axis fastest; a chain if None.
        periodic: Whether the lattice closes on itself.

    Raises:
        ShapeError: If the lattice has another number of sites.
    """
    sizes = (num_sites,) if shape is None else lattice_shape(shape)
    places = list(product(*(range(n) for n in sizes)))
    if len(places) != num_sites:
        raise ShapeError("the lattice has another number of sites", got=sizes, expected=num_sites)
    found = []
    for i in range(num_sites):
        earlier = [(_offset(places[j], places[i], sizes, periodic), j) for j in range(i)]
        found.append(sorted(earlier, key=lambda pair: (sum(x * x for x in pair[0]), -pair[1])))
    return found


def _offset(
    at: tuple[int, ...], origin: tuple[int, ...], sizes: tuple[int, ...], periodic: bool
) -> tuple[int, ...]:
    """The position of a site relative to another, the short way around."""
    steps = []
    for x, y, n in zip(at, origin, sizes, strict=True):
        d = x - y
        if periodic:
            # the representative of the class of d modulo n that is nearest to zero
            d = (d + n // 2) % n - n // 2
        steps.append(d)
    return tuple(steps)
