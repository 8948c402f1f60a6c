"""Coupled batches that are computed ahead, in the background, while the networks train."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from stochdyn._checks import as_seed, as_tensor, check_positive_int, check_real
from stochdyn.errors import EmptyDataError, ShapeError
from stochdyn.interpolants.fields.conditions import as_condition
from stochdyn.interpolants.paths.interpolant import check_pair
from stochdyn.interpolants.training.couplings import Coupling, EntropicCoupling, as_coupling

__all__ = ["CoupledBatches"]

Batch = tuple[Tensor, ...]


class CoupledBatches(IterableDataset[Batch]):
    """An endless sequence of coupled batches, for :func:`stochdyn.fit` as its data.

    Plans are made by threads ahead of their use; the solvers leave Python's lock, so they run beside the training. One
    plan may serve several batches: it is made for ``slices`` batches at once, which also makes it better, and cut into them.
    Batch number k depends on the seed and on k alone, not on what the threads do.

    Train with ``coupling="independent"``: the pairs come coupled already. On one-sided paths, where the start is drawn by the
    objective, that would be wrong, so give those their coupling in the objective.

    Args:
        x0: The starts, ``(n0, d)``.
        x1: The ends, ``(n1, d)``.
        coupling: How points are paired: ``"ot"``, ``"entropic"`` or a :class:`Coupling`.
        batch_size: The number of pairs per batch.
        condition: The labels ``(n1,)`` or contexts ``(n1, c)`` of the ends, or None.
        scale: The scale of the interpolant, for ``"entropic"``.
        slices: The number of batches that one plan is cut into.
        ahead: The number of plans under way at a time.
        workers: The number of threads that make plans.
        seed: The seed of the batches.

    Raises:
        ShapeError: If the samples don't fit together.
        EmptyDataError: If there is none.
        InvalidInputError: If an option doesn't exist.

    Example:
        >>> batches = CoupledBatches(torch.randn(100, 2), torch.randn(80, 2), "ot", batch_size=16, slices=2)
        >>> [part.shape for part in next(iter(batches))]
        [torch.Size([16, 2]), torch.Size([16, 2])]
    """

    def __init__(
        self,
        x0: Tensor,
        x1: Tensor,
        coupling: str | Coupling = "ot",
        batch_size: int = 256,
        condition: Tensor | None = None,
        *,
        scale: float = 1.0,
        slices: int = 1,
        ahead: int = 2,
        workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("slices", slices),
            ("ahead", ahead),
            ("workers", workers),
        ):
            check_positive_int(value, name)
        check_real(scale, "scale", above=0.0)
        x0, x1 = as_tensor(x0, "x0", 2, "(n0, d)"), as_tensor(x1, "x1", 2, "(n1, d)")
        if x0.numel() == 0 or x1.numel() == 0:
            raise EmptyDataError(
                "x0 and x1 must not be empty", got=f"{tuple(x0.shape)} and {tuple(x1.shape)}"
            )
        check_pair(x0[:1], x1[:1])
        condition = None if condition is None else as_condition(condition, x1)
        if condition is not None and condition.shape[0] != x1.shape[0]:
            raise ShapeError(
                "there must be one condition per end", got=condition.shape[0], expected=x1.shape[0]
            )
        self.x0, self.x1, self.condition = x0, x1, condition
        self.coupling = as_coupling(coupling, scale)
        if isinstance(self.coupling, EntropicCoupling):
            # a warm start would make a plan depend on which thread was first
            self.coupling.warm_start = False
        self.batch_size, self.slices, self.ahead = batch_size, slices, ahead
        self.workers, self.seed = workers, as_seed(seed)

    def _plan(self, number: int) -> list[Batch]:
        """Make plan ``number`` and cut it."""
        g = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + number) % 2**63)
        size = self.batch_size * self.slices
        i, j = (torch.randint(len(x), (size,), generator=g).to(x.device) for x in (self.x0, self.x1))
        x0, x1 = self.x0[i], self.x1[j]
        condition: Any = None if self.condition is None else self.condition[j]
        own = g if x0.device.type == "cpu" else None
        partner = self.coupling.pair(x0, x1, condition, own)
        parts = [x0, x1[partner]] if condition is None else [x0, x1[partner], condition[partner]]
        # the rows are independent draws, so any cut is a batch
        return list(zip(*(p.split(self.batch_size) for p in parts), strict=True))

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="coupling") as pool:
            queue: deque[Future[list[Batch]]] = deque()
            number = 0
            try:
                while True:
                    while len(queue) < self.ahead:
                        queue.append(pool.submit(self._plan, number))
                        number += 1
                    yield from queue.popleft().result()
            finally:
                for future in queue:
                    future.cancel()
