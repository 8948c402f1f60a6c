"""CUDA-graph capture of the time loop: one launch for all steps, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.core.sde.equation import SDE

__all__ = ["replayed"]


class _Captures(dict[tuple[Any, ...], Any]):
    """The captured loops of one equation, kept on it and dropped with it. Copies of the equation start without."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Captures:
        return _Captures()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Captures, ()


def replayed(sde: SDE, x0: Tensor, dw: Tensor, key: tuple[Any, ...], loop: Callable[[], nn.Module]) -> Tensor:
    """Run a time loop on CUDA by replaying a captured graph; capture happens on the first call of each kind.

    Drift, diffusion and control must be modules (or close over nothing that is replaced between calls): a graph
    replays the very tensors that it was captured with. They must not wait for the device.

    Args:
        sde: The equation, which keeps its captured loops.
        x0: The points from which paths start, ``(*batch, d)``.
        dw: The increments of the driving noise, ``(T-1, *batch, m)``.
        key: What tells loops apart besides the layout of their tensors: the method and the times.
        loop: What makes the loop as a module, so that capture sees the parameters of drift, diffusion and control.

    Returns:
        States, ``(T, *batch, d)``.
    """
    grad = torch.is_grad_enabled()
    kind = (*key, x0.shape, dw.shape, x0.dtype, x0.device, x0.requires_grad, dw.requires_grad, grad)
    loops = sde.__dict__.setdefault("_captures", _Captures())
    if kind not in loops:
        x0_sample = torch.zeros_like(x0).requires_grad_(x0.requires_grad)
        dw_sample = torch.zeros_like(dw).requires_grad_(dw.requires_grad)
        loops[kind] = torch.cuda.make_graphed_callables(loop(), (x0_sample, dw_sample))
    return loops[kind](x0, dw)
