"""Who comes from whom: couplings over several snapshots, descendants, ancestors and fates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor
from stochdyn.core.transport.entropic import TransportPlan
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = [
    "check_span",
    "fate_probabilities",
    "joint",
    "one_hot",
    "pull",
    "push",
    "row_stochastic",
    "weights_of",
]


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
