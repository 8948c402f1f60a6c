"""Autoregressive laws whose conditionals come from the features of a network, and from couplings of pairs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_choice, check_positive_int
from stochdyn.errors import InvalidInputError
from stochdyn.povm.ansatz.autoregressive import AutoregressiveAnsatz
from stochdyn.povm.ansatz.pairs import PairCouplings
from stochdyn.povm.ansatz.strings import Strings
from stochdyn.povm.dynamics.scores import Tape, apply_linear
from stochdyn.povm.frames.sizes import check_size

__all__ = ["AutoregressiveNetwork"]


class AutoregressiveNetwork(AutoregressiveAnsatz):
    r"""Logits that are linear in a network's features of earlier outcomes, and in those outcomes themselves.

    .. math:: \lambda_i(b_{<i}) = W h_i(b_{<i}) + c + \textstyle\sum_{j<i}J_{ij}(\cdot, b_j)

    The law is exactly the product state for ``W = c = J = 0``. Subclasses give the features ``h``: of whole strings
    (:meth:`features`) and step by step with a cache (:meth:`start`, :meth:`advance`, :meth:`branch`).

    Args:
        num_sites: The number ``N`` of sites.
        num_outcomes: The number ``K`` of outcomes of a site.
        width: The number of features of a step.
        strings: The order of the sites, or the set of orders to average over, as in :class:`AutoregressiveAnsatz`.
        shape: The sizes of the lattice, for strings that need them.
        memory: The number of bytes that caches may use at a time; larger evaluations are done in parts.
        pairs: The direct couplings of pairs of steps (:class:`~stochdyn.povm.ansatz.pairs.PairCouplings`): one block
            for ``"all"`` pairs, or one for each ``"distance"``; None for no couplings.
    """

    def __init__(
        self,
        num_sites: int,
        num_outcomes: int,
        width: int,
        strings: Strings | str | None = None,
        shape: Sequence[int] | None = None,
        memory: int = 1 << 27,
        pairs: str | None = "distance",
    ) -> None:
        if pairs is not None:
            check_choice(pairs, ("distance", "all"), "pairs")
        check_size(width, "width", 1 << 14)
        super().__init__(num_sites, num_outcomes, strings, shape, memory)
        self.width = width
        self.head = nn.Linear(width, num_outcomes)
        self.pairs: PairCouplings | None = None
        if pairs is not None and num_sites > 1:
            self.pairs = PairCouplings(num_sites, num_outcomes, shared=pairs == "distance")

    @abstractmethod
    def features(self, tokens: Tensor, tape: Tape | None = None) -> Tensor:
        """Return features ``(m, N, width)`` of whole strings; ``tokens (m, N)`` start with ``K``, the first place."""

    @abstractmethod
    def advance(self, cache: Any, outcomes: Tensor | None, step: int, rows: int) -> Tensor:
        """Read the last outcomes ``(rows,)`` (None at step 0), return features ``(rows, width)`` of the leading rows."""

    def read_out(self, h: Tensor, tape: Tape | None = None) -> Tensor:
        """Return logits ``(..., K)`` of features."""
        return apply_linear(self.head, h, tape)

    def logits(self, b: Tensor, tape: Tape | None = None) -> Tensor:
        """Return the logits ``(rows, N, K)`` of all steps of given strings."""
        tokens = torch.cat([b.new_full((b.shape[0], 1), self.num_outcomes), b[:, :-1]], 1)
        logits = self.read_out(self.features(tokens, tape), tape)
        return logits if self.pairs is None else logits + self.pairs(b, tape)

    def next_logits(self, cache: Any, b: Tensor, step: int, rows: int) -> Tensor:
        """Return the logits ``(rows, K)`` of the next step, given the outcomes before it."""
        logits = self.read_out(self.advance(cache, b[:, -1] if step else None, step, rows))
        return logits if self.pairs is None else logits + self.pairs.step(b, step)

    def clear(self) -> None:
        """Make all logits zero: the head and the couplings become zero."""
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.zero_()
            if self.pairs is not None:
                self.pairs.blocks.zero_()


def check_divisible(width: int, heads: int) -> None:
    """Raise unless ``heads`` divides ``width``."""
    check_positive_int(heads, "heads")
    if width % heads:
        raise InvalidInputError("heads must divide width", got=f"width={width}, heads={heads}")
