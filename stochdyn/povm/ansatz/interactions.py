"""The interaction ansatz: logits that are sums of functions of a few earlier outcomes each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochdyn._checks import check_bool
from stochdyn.errors import SystemSizeError
from stochdyn.povm.ansatz.autoregressive import AutoregressiveAnsatz
from stochdyn.povm.ansatz.strings import Strings
from stochdyn.povm.ansatz.window import lattice_offsets
from stochdyn.povm.dynamics.scores import Tape
from stochdyn.povm.frames.sizes import check_size

__all__ = ["AutoregressiveInteractions"]

_MAX_ENTRIES = 1 << 18


class AutoregressiveInteractions(AutoregressiveAnsatz):
    r"""Conditionals with all interactions of up to so many sites.

    .. math:: \lambda_i(k\mid b_{<i}) = \sum_{S\subseteq w(i),\,|S|<n} J_{S,i}(k, b_S),\qquad J = 0\ \text{ if } k \text{ or
        any outcome in } S \text{ is } 0

    with ``w(i)`` the earlier sites nearest to site ``i`` and ``n`` the number of ``bodies``. Interactions that vanish at
    outcome 0 say the same as any, without redundancy. When would I use this? For lattices with strong correlations among
    many sites, where a table of a whole window would be too large.

    Args:
        num_sites: The number ``N`` of sites.
        bodies: The largest number of sites in an interaction, 2 for pairs.
        order: The number of earlier sites that an outcome depends on; all of them if None.
        shape: The sizes of the lattice, its sites counted with the last axis fastest; a chain if None.
        periodic: Whether the lattice closes on itself.
        shared: Whether interactions of the same relative positions are the same; False for their own at every site.
            Sites at the end of a string see other sites than those at its start, so that on a small torus little can be
            shared.
        strings: The order of the sites, or the set of orders to average over, as in :class:`AutoregressiveAnsatz`.
        num_outcomes: The number ``K`` of outcomes of a site.
        memory: The number of bytes that caches may use at a time.

    Raises:
        InvalidInputError: If a size isn't a positive integer.
        ShapeError: If the lattice hasn't so many sites.
        SystemSizeError: If there were over 2**18 rows of interactions.

    Example:
        >>> net = AutoregressiveInteractions(4, bodies=2).double()
        >>> round(float(net.probabilities().sum()), 10), net.parameter_vector().numel()
        (1.0, 66)

    Reference:
        Hierarchical log-linear models: Lauritzen, Graphical Models (1996), chapter 4.
    """

    neighbours: Tensor
    strides: Tensor
    offsets: Tensor

    def __init__(
        self,
        num_sites: int,
        bodies: int = 3,
        *,
        order: int | None = None,
        shape: Sequence[int] | None = None,
        periodic: bool = True,
        shared: bool = False,
        strings: Strings | str | None = None,
        num_outcomes: int = 4,
        memory: int = 1 << 27,
    ) -> None:
        check_size(bodies, "bodies", 16)
        if order is not None:
            check_size(order, "order", 1 << 14)
        check_bool(periodic, "periodic")
        check_bool(shared, "shared")
        super().__init__(num_sites, num_outcomes, strings, shape, memory)
        base = num_outcomes - 1
        starts: dict[tuple[object, ...], int] = {}
        used = 0
        clusters: list[list[tuple[int, tuple[int, ...]]]] = []
        for i, nearest in enumerate(lattice_offsets(num_sites, shape, periodic)):
            clusters.append([])
            window = nearest[:order]
            # all subsets S of the window with |S| < bodies: a block of (K - 1)^|S| rows for each
            for size in range(min(bodies, len(window) + 1)):
                for chosen in combinations(window, size):
                    key = tuple(o for o, _ in chosen) if shared else (i, *(j for _, j in chosen))
                    if key not in starts:
                        starts[key], used = used, used + base**size
                    clusters[-1].append((starts[key], tuple(j for _, j in chosen)))
            if used > _MAX_ENTRIES:
                raise SystemSizeError(
                    "there are too many interactions",
                    got=f"{used} rows for the first {i + 1} sites",
                    expected=f"at most {_MAX_ENTRIES}",
                    hint="lower bodies or order",
                )
        self.bodies = bodies
        self.counts = [len(c) for c in clusters]
        width, depth = max(self.counts), max(1, bodies - 1)
        places = torch.zeros(num_sites, width, depth, dtype=torch.long)
        strides, offsets = torch.zeros_like(places), torch.full((num_sites, width), -1)
        for i, row in enumerate(clusters):
            for c, (start, sites) in enumerate(row):
                offsets[i, c] = start
                for p, j in enumerate(sites):
                    places[i, c, p], strides[i, c, p] = j, base**p
        self.register_buffer("neighbours", places, persistent=False)
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.couplings = nn.Parameter(torch.zeros(used, base))

    @property
    def bytes_per_row(self) -> int:
        """The number of bytes that evaluating one string takes."""
        return 16 * self.offsets.numel()

    def _rows(self, b: Tensor, where: int | slice, width: int) -> tuple[Tensor, Tensor]:
        """Return which rows of the couplings are added up, and which of them count ``(m, *, width)``."""
        read = b[:, self.neighbours[where, ..., :width, :]]
        strides, offsets = self.strides[where, ..., :width, :], self.offsets[where, ..., :width]
        # J vanishes where any outcome in S is 0, so those rows are skipped and digits run over K - 1 values
        alive = ((read > 0) | (strides == 0)).all(-1) & (offsets >= 0)
        index = offsets + ((read - 1) * strides).sum(-1)
        return torch.where(alive, index, 0), alive

    def logits(self, b: Tensor, tape: Tape | None = None) -> Tensor:
        """Return the logits ``(rows, N, K)`` of all steps of given strings."""
        index, alive = self._rows(b, slice(None), self.offsets.shape[1])
        rows = self.couplings[index] if tape is None else tape.rows(self.couplings, index)
        return F.pad((rows * alive[..., None]).sum(-2), (1, 0))

    def clear(self) -> None:
        """Make all logits zero, so that the reference alone is left."""
        with torch.no_grad():
            self.couplings.zero_()

    def start(self, rows: int) -> None:
        """Return an empty cache; nothing is kept but the outcomes themselves."""

    def next_logits(self, cache: None, b: Tensor, step: int, rows: int) -> Tensor:
        """Return the logits ``(rows, K)`` of the next step, given the outcomes before it."""
        if step == 0:
            return F.pad(self.couplings[self.offsets[0, 0]], (1, 0)).expand(rows, -1)
        index, alive = self._rows(b, step, self.counts[step])
        return F.pad((self.couplings[index] * alive[..., None]).sum(-2), (1, 0))

    def branch(self, cache: None, source: Tensor, target: slice, steps: int) -> None:
        """Copy rows of the cache; there is nothing in it to copy."""
