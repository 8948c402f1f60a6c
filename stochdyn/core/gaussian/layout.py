"""Batch axes of the Kalman recursions: broadcasting, and one flat layout to compute in."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.errors import ShapeError

__all__ = [
    "align",
    "broadcast_batches",
    "columns",
    "flatten_batch",
    "restore",
    "restore_columns",
    "samples_first",
]


def broadcast_batches(shapes: dict[str, tuple[int, ...]]) -> torch.Size:
    """Broadcast named batch shapes; the error names them all."""
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listing = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ShapeError("batch shapes don't broadcast", got=listing) from None


def align(x: Tensor, lead: int, event: int, batch: torch.Size) -> Tensor:
    """Expand ``(*lead, *some batch, *event)`` to ``(*lead, *batch, *event)``, batch axes aligned right."""
    lead_shape, own, event_shape = x.shape[:lead], x.shape[lead : x.ndim - event], x.shape[x.ndim - event :]
    x = x.reshape(*lead_shape, *(1,) * (len(batch) - len(own)), *own, *event_shape)
    return x.expand(*lead_shape, *batch, *event_shape)


def flatten_batch(x: Tensor, lead: int, event: int, batch: torch.Size, flat: int | None = None) -> Tensor:
    """Bring ``(*lead, *some batch, *event)`` to ``(*lead, flat, *event)``; ``flat=1`` keeps one."""
    if flat != 1:
        x = align(x, lead, event, batch)
    return x.reshape(*x.shape[:lead], 1 if flat == 1 else batch.numel(), *x.shape[x.ndim - event :])


def columns(x: Tensor, batch: torch.Size, flat: int, n: int = 1) -> Tensor:
    """Bring vectors ``(T, *some batch, z)`` to ``(T, flat, z, s)``, ``n`` copies of each series."""
    x = flatten_batch(x, 1, 1, batch)
    if flat == 1:
        x = x.transpose(1, 2)[:, None, :, :, None]
        return x.expand(*x.shape[:-1], n).flatten(-2)
    return x[..., None].expand(*x.shape, n)


def restore_columns(x: Tensor, batch: torch.Size, flat: int) -> Tensor:
    """Undo :func:`columns` with ``n=1``: ``(T, flat, z, s)`` to ``(T, *batch, z)``."""
    x = x[:, 0].transpose(1, 2) if flat == 1 else x.squeeze(-1)
    return x.reshape(x.shape[0], *batch, x.shape[-1])


def restore(x: Tensor, batch: torch.Size, flat: int) -> Tensor:
    """Bring ``(T, flat, ...)`` to ``(T, *batch, ...)``; a shared value is expanded."""
    event = x.shape[2:]
    if flat == 1:
        return x.reshape(x.shape[0], *(1,) * len(batch), *event).expand(-1, *batch, *event)
    return x.reshape(x.shape[0], *batch, *event)


def samples_first(x: Tensor, n: int, batch: torch.Size) -> Tensor:
    """Bring ``(T, flat, z, s)`` with ``n`` draws of each series to ``(n, T, *batch, z)``."""
    times, _, size, _ = x.shape
    shared = x.shape[1] == 1
    x = x.reshape(times, size, -1, n).permute(3, 0, 2, 1) if shared else x.permute(3, 0, 1, 2)
    return x.reshape(n, times, *batch, size)
