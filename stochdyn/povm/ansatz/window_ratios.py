"""How a change of a few outcomes changes the law of a window ansatz: which conditionals see it, and their tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RatioPlan"]


class RatioPlan:
    r"""The part of :math:`\log P(a+s)-\log P(a)` that doesn't depend on parameters or outcomes, for many shifts ``s``.

    A conditional is an entry of a table, and its *code* says which: the outcomes of its window and its own, as
    digits. A shift of one or two outcomes changes the codes of the few steps whose windows hold them,

    .. math:: \log P(a+s)-\log P(a) = \sum_{i\,\text{sees}\,s}\bigl(\lambda[c_i(a+s)]-\lambda[c_i(a)]\bigr),

    so that with one table of differences for every kind of step and every shift within its window, a ratio is a sum of a
    few entries, whatever the number of sites.

    Args:
        shifts: The numbers ``(M, N)`` that are added to the outcomes, modulo ``K``, in the order in which steps read
            them.
        neighbours: The earlier steps ``(N, R)`` that each step looks at.
        strides: The strides ``(N, R)`` with which their outcomes count in a row number; zero for no neighbour.
        kinds: The number of the kind of every step; steps of a kind share table and reference.
        num_outcomes: The number ``K`` of outcomes of a site.

    Attributes:
        before: The entries ``(D,)`` among those of all kinds, one after the other, each row with its ``K`` outcomes.
        after: The entries ``(D,)`` that those become.
        step: The steps ``(F,)`` that shifts change, one for each pair of a step and a shift.
        move: The number ``(F,)`` of the shift of each such pair.
        first: The place ``(F,)`` where the differences of this kind and shift start.
    """

    def __init__(
        self, shifts: Tensor, neighbours: Tensor, strides: Tensor, kinds: Sequence[int], num_outcomes: int
    ) -> None:
        k, device = num_outcomes, shifts.device
        kind = torch.tensor(kinds, device=device)
        # the digits by which a shift changes the code of a step: its window and its own outcome
        local = (shifts[:, neighbours] * strides).sum(-1) * k + shifts
        self.move, self.step = local.nonzero(as_tuple=True)
        seen = torch.stack([kind[self.step], local[self.move, self.step]], 1)
        pairs, which = torch.unique(seen, dim=0, return_inverse=True)
        sizes = [int(k ** (1 + (strides[kinds.index(i)] > 0).sum())) for i in range(max(kinds) + 1)]
        before, after, firsts, used = [], [], [], 0
        for i, shift in pairs.tolist():
            start = sum(sizes[:i])
            code = torch.arange(sizes[i], device=device)
            # digit by digit, without carry: (c + s) mod K
            moved, unit = torch.zeros_like(code), 1
            while unit < sizes[i]:
                moved += (code // unit + shift // unit) % k * unit
                unit *= k
            before.append(start + code)
            after.append(start + moved)
            firsts.append(used)
            used += sizes[i]
        empty = [torch.zeros(0, dtype=torch.long, device=device)]
        self.before, self.after = torch.cat(before or empty), torch.cat(after or empty)
        self.first = torch.tensor(firsts, dtype=torch.long, device=device)[which]

    def sum(self, log_p: Tensor, code: Tensor, count: int) -> Tensor:
        """Return the logarithms of ratios ``(n, count)``.

        Args:
            log_p: The log conditionals of all kinds, one after the other.
            code: The code ``(n, N)`` of each step before the shifts.
            count: The number of shifts.
        """
        # log P(a + s) - log P(a), the sum over the steps that see the shift
        change = log_p[self.after] - log_p[self.before]
        found = change[code.mT[self.step] + self.first[:, None]]
        return change.new_zeros(count, code.shape[0]).index_add_(0, self.move, found).mT
