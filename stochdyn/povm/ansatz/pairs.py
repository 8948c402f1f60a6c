"""Direct couplings of pairs of steps: the part of the logits that is linear in earlier outcomes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from stochdyn.povm.dynamics.scores import Tape

__all__ = ["PairCouplings"]


class PairCouplings(nn.Module):
    r"""Logits that each earlier outcome adds on its own.

    .. math:: \lambda_i(k) = \sum_{j<i}J_{ij}(k, b_j),

    with a block of couplings for every pair of steps or, shared, for every distance ``i - j``. They start at zero.

    From a product state a sum of two-site terms changes probabilities by functions of pairs. With these couplings the
    law can follow that at once, whatever the network beside them has learnt, and the network need only account for
    what goes beyond pairs.

    Args:
        num_sites: The number ``N`` of sites.
        num_outcomes: The number ``K`` of outcomes of a site.
        shared: Whether there is one block for each distance instead of one for each pair.
    """

    slots: Tensor

    def __init__(self, num_sites: int, num_outcomes: int, shared: bool) -> None:
        super().__init__()
        self.num_sites, self.num_outcomes = num_sites, num_outcomes
        step = torch.arange(num_sites)
        gap = step[:, None] - step
        if shared:
            slots = gap.clamp(min=0)
            count = num_sites
        else:
            slots = torch.zeros_like(gap)
            row, column = torch.tril_indices(num_sites, num_sites, -1)
            slots[row, column] = torch.arange(1, len(row) + 1)
            count = len(row) + 1
        # slot 0 belongs to pairs that don't couple and isn't a parameter
        self.register_buffer("slots", slots, persistent=False)
        self.blocks = nn.Parameter(torch.zeros(count - 1, num_outcomes, num_outcomes))

    def matrix(self) -> Tensor:
        """Return the couplings as one matrix ``(N K, N K)`` from all outcomes, one-hot, to all logits."""
        n, k = self.num_sites, self.num_outcomes
        padded = torch.cat([self.blocks.new_zeros(1, k, k), self.blocks])
        return padded[self.slots].permute(0, 2, 1, 3).reshape(n * k, n * k)

    def forward(self, b: Tensor, tape: Tape | None = None) -> Tensor:
        """Return what is added to the logits ``(m, N, K)`` of whole strings ``(m, N)``."""
        # torch.nn.functional.one_hot looks at values, which vmap doesn't allow
        one_hot = b[..., None] == torch.arange(self.num_outcomes, device=b.device)
        x = one_hot.flatten(1).to(self.blocks.dtype)
        y = x @ self.matrix().mT
        if tape is not None:
            y = tape.custom(self.blocks, x, y, self._scores)
        return y.reshape(*b.shape, self.num_outcomes)

    def _scores(self, outer: Tensor) -> Tensor:
        """Turn derivatives by the matrix ``(n, N K, N K)`` into those by the blocks."""
        n, k, size = self.num_sites, self.num_outcomes, outer.shape[0]
        # d/dJ_ij is the block (i, j) of the derivative by the whole matrix; shared blocks add theirs up
        parts = outer.reshape(size, n, k, n, k).permute(1, 3, 0, 2, 4).reshape(n * n, size, k, k)
        total = parts.new_zeros(self.blocks.shape[0] + 1, size, k, k)
        return total.index_add(0, self.slots.reshape(-1), parts)[1:].transpose(0, 1).flatten(1)

    def step(self, b: Tensor, i: int) -> Tensor:
        """Return what is added to the logits ``(m, K)`` of step ``i`` after outcomes ``b (m, i)``."""
        k = self.num_outcomes
        if i == 0:
            return self.blocks.new_zeros(b.shape[0], k)
        # one-hot vectors times a matrix are sums of its rows: for every j < i the row of outcome b_j
        table = self.blocks[self.slots[i, :i] - 1].transpose(1, 2).reshape(i * k, k)
        index = b + k * torch.arange(i, device=b.device)
        return F.embedding_bag(index, table, mode="sum")
