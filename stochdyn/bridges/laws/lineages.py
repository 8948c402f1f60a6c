"""Who comes from whom: couplings over several snapshots, descendants, ancestors and fates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.core.transport.entropic import TransportPlan
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = [
    "Lineages",
    "check_span",
    "fate_probabilities",
    "joint",
    "one_hot",
    "pull",
    "push",
    "row_stochastic",
    "weights_of",
]


class Lineages(ABC):
    """What the couplings of a bridge through particles say of their ancestors and descendants."""

    snapshots: Snapshots

    @property
    @abstractmethod
    def plans(self) -> list[TransportPlan]:
        """The coupling of each pair of neighbouring snapshots."""

    @torch.no_grad()
    def coupling(self, first: int, last: int) -> Tensor:
        """Return the joint weights ``(n, m)`` of the particles of two snapshots, over those between them; they sum to one.

        Args:
            first: The index of the earlier snapshot.
            last: The index of the later snapshot; negative ones count from the end.
        """
        first, last = check_span(first, last, len(self.snapshots))
        return joint(self.plans[first:last])

    @torch.no_grad()
    def transition_matrix(self, first: int, last: int) -> Tensor:
        """Return the probabilities ``(n, m)`` with which each particle of a snapshot goes to those of a later one; rows sum to one.

        Args:
            first: The index of the earlier snapshot.
            last: The index of the later snapshot; negative ones count from the end.
        """
        first, last = check_span(first, last, len(self.snapshots))
        eye = torch.eye(self.snapshots.sizes[first], dtype=torch.float64, device=self.snapshots.device)
        return push(self.plans[first:last], eye)

    @torch.no_grad()
    def descendants(self, members: Any, first: int, last: int) -> Tensor:
        """Return the distribution ``(m,)`` at a later snapshot of what comes from particles of an earlier one.

        Args:
            members: The particles that are followed: weights ``(n,)``, a mask, or indices.
            first: The index of the snapshot of ``members``.
            last: The index of the later snapshot; negative ones count from the end.
        """
        first, last = check_span(first, last, len(self.snapshots))
        start = weights_of(members, self.snapshots.sizes[first], self.snapshots.device)
        return push(self.plans[first:last], start)

    @torch.no_grad()
    def ancestors(self, members: Any, first: int, last: int) -> Tensor:
        """Return the distribution ``(n,)`` at an earlier snapshot of what particles of a later one come from.

        Args:
            members: The particles that are followed: weights ``(m,)``, a mask, or indices.
            first: The index of the earlier snapshot.
            last: The index of the snapshot of ``members``; negative ones count from the end.
        """
        first, last = check_span(first, last, len(self.snapshots))
        end = weights_of(members, self.snapshots.sizes[last], self.snapshots.device)
        return pull(self.plans[first:last], end)

    @torch.no_grad()
    def fates(self, labels: Sequence[Any], first: int = 0, last: int = -1) -> tuple[list[Any], Tensor]:
        """Return the classes of a later snapshot, and the probabilities ``(n, k)`` with which particles of an earlier one end in them.

        Args:
            labels: The class of each particle of the later snapshot, such as its cell type.
            first: The index of the earlier snapshot.
            last: The index of the later snapshot; negative ones count from the end.
        """
        first, last = check_span(first, last, len(self.snapshots))
        classes, members = one_hot(labels, self.snapshots.sizes[last])
        return classes, fate_probabilities(self.plans[first:last], members.to(self.snapshots.device))

    @torch.no_grad()
    def transition_table(
        self, labels: tuple[Sequence[Any], Sequence[Any]], first: int = 0, last: int = -1
    ) -> tuple[list[Any], list[Any], Tensor]:
        """Return the classes of two snapshots, and the probabilities ``(k, l)`` with which members of the first go to each of the last.

        Particles count by their weights within their class, and rows sum to one.

        Args:
            labels: The classes of the particles of the earlier snapshot, and those of the later one.
            first: The index of the earlier snapshot.
            last: The index of the later snapshot; negative ones count from the end.
        """
        first, last = check_span(first, last, len(self.snapshots))
        if not isinstance(labels, tuple | list) or len(labels) != 2:
            raise ShapeError(
                "labels must be two sequences, of the earlier and of the later snapshot",
                got=type(labels).__name__,
            )
        before, rows = one_hot(labels[0], self.snapshots.sizes[first])
        after, chances = self.fates(labels[1], first, last)
        weighed = rows.to(chances).mT * self.snapshots.weights[first].to(chances)
        return before, after, (weighed / weighed.sum(1, keepdim=True)) @ chances


def check_span(first: object, last: object, count: int) -> tuple[int, int]:
    """Return indices of two snapshots, the first before the last; negative ones count from the end.

    Raises:
        InvalidInputError: If they aren't.
    """
    found = []
    for name, value in (("first", first), ("last", last)):
        if isinstance(value, bool) or not isinstance(value, int) or not -count <= value < count:
            raise InvalidInputError(
                f"{name} must be the index of a snapshot",
                got=repr(value)[:40],
                expected=f"{-count} to {count - 1}",
            )
        found.append(value % count)
    if found[0] >= found[1]:
        raise InvalidInputError("first must be before last", got=f"{found[0]} and {found[1]}")
    return found[0], found[1]


def row_stochastic(plan: TransportPlan) -> Tensor:
    """Return the transition matrix ``(n, m)`` of a coupling, whose rows sum to one."""
    matrix = plan.plan().double()
    total = matrix.sum(1, keepdim=True)
    even = torch.full_like(matrix, 1.0 / matrix.shape[1])
    return torch.where(total > 0, matrix / total, even)


def joint(plans: Sequence[TransportPlan]) -> Tensor:
    """Return the coupling ``(n, m)`` of the first and the last snapshot of a chain, whose entries sum to one."""
    whole = plans[0].plan().double()
    whole = whole / whole.sum()
    for plan in plans[1:]:
        whole = whole @ row_stochastic(plan)
    return whole


def push(plans: Sequence[TransportPlan], start: Tensor) -> Tensor:
    """Return where weights ``(..., n)`` of the first snapshot's particles are at the last one, ``(..., m)``."""
    for plan in plans:
        start = start @ row_stochastic(plan)
    return start


def pull(plans: Sequence[TransportPlan], end: Tensor) -> Tensor:
    """Return where weights ``(..., m)`` of the last snapshot's particles come from at the first one, ``(..., n)``."""
    for plan in reversed(plans):
        matrix = plan.plan().double()
        total = matrix.sum(0, keepdim=True)
        even = torch.full_like(matrix, 1.0 / matrix.shape[0])
        end = end @ torch.where(total > 0, matrix / total, even).mT
    return end


def fate_probabilities(plans: Sequence[TransportPlan], labels: Tensor) -> Tensor:
    """Return the probabilities ``(n, k)`` with which particles end in classes ``labels (m, k)``."""
    value = labels
    for plan in reversed(plans):
        value = row_stochastic(plan) @ value
    return value


def one_hot(labels: Sequence[Any], size: int) -> tuple[list[Any], Tensor]:
    """Return the classes in order, and the membership ``(m, k)`` of every particle.

    Raises:
        ShapeError: If there isn't one label per particle.
    """
    own = np.asarray(labels)
    if own.shape != (size,):
        raise ShapeError(
            "labels must have one label per particle of their snapshot", got=own.shape, expected=(size,)
        )
    classes, place = np.unique(own.astype(str) if own.dtype == object else own, return_inverse=True)
    return classes.tolist(), torch.nn.functional.one_hot(
        torch.as_tensor(place.reshape(-1)), len(classes)
    ).double()


def weights_of(members: Any, size: int, device: torch.device) -> Tensor:
    """Return weights ``(size,)`` that sum to one, from weights, a mask, or indices of particles.

    Raises:
        ShapeError: If they don't fit.
        InvalidInputError: If an index doesn't exist, or weights are negative or all zero.
    """
    own = torch.as_tensor(members) if not isinstance(members, Tensor) else members
    if not own.is_floating_point() and own.dtype != torch.bool:
        if own.ndim > 1 or own.numel() == 0 or int(own.min()) < 0 or int(own.max()) >= size:
            raise InvalidInputError(
                "members must be indices of particles", got=own.tolist(), expected=f"0 to {size - 1}"
            )
        mask = torch.zeros(size, dtype=torch.float64, device=device)
        mask[own.reshape(-1).to(device)] = 1.0
        own = mask
    own = as_tensor(own.double(), "members", 1, "(n,) weights, a mask, or indices").to(device)
    if own.shape != (size,):
        raise ShapeError("members must have one weight per particle", got=tuple(own.shape), expected=(size,))
    if bool((own < 0).any()) or not float(own.sum()) > 0:
        raise InvalidInputError(
            "members must be nonnegative and not all zero", got=f"minimum {float(own.min()):g}"
        )
    return own / own.sum()
