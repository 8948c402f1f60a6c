"""CUDA-graph capture of the time loop: one launch for all steps, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.core.sde.equation import SDE

__all__ = ["integrate_graphed"]


class _Captures(dict[tuple[Any, ...], Any]):
    """The captured loops of one equation, kept on it and dropped with it. Copies of the equation start without."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Captures:
        return _Captures()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Captures, ()


class _Loop(nn.Module):
    """The time loop as a module, so that capture sees the parameters of drift, diffusion and control."""

    def __init__(self, sde: SDE, ts: Tensor, method: str) -> None:
        super().__init__()
        self.sde = sde
        self.ts = ts
        self.dt = (ts[1:] - ts[:-1]).tolist()
        self.method = method

    def forward(self, x0: Tensor, dw: Tensor) -> Tensor:
        from stochdyn.core.sde.solvers import run_loop

        return run_loop(self.sde, x0, self.ts, self.dt, dw, None, self.method, False).x


def integrate_graphed(sde: SDE, x0: Tensor, ts: Tensor, dw: Tensor, method: str) -> Tensor:
    """Integrate on CUDA by replaying a captured graph; capture happens on the first call of each kind.

    Drift, diffusion and control must be modules (or close over nothing that is replaced between calls): a graph
    replays the very tensors that it was captured with. They must not wait for the device.

    Args:
        sde: An equation without memory.
        x0: The points from which paths start, ``(*batch, d)``.
        ts: The grid of times of a path, ``(T,)``.
        dw: The increments of the driving noise, ``(T-1, *batch, m)``.
        method: As in :func:`stochdyn.core.sde.solvers.integrate`.

    Returns:
        States, ``(T, *batch, d)``.
    """
    grad = torch.is_grad_enabled()
    key = (
        method,
        tuple(ts.tolist()),
        x0.shape,
        dw.shape,
        x0.dtype,
        x0.device,
        x0.requires_grad,
        dw.requires_grad,
        grad,
    )
    loops = sde.__dict__.setdefault("_captures", _Captures())
    if key not in loops:
        x0_sample = torch.zeros_like(x0).requires_grad_(x0.requires_grad)
        dw_sample = torch.zeros_like(dw).requires_grad_(dw.requires_grad)
        loops[key] = torch.cuda.make_graphed_callables(_Loop(sde, ts, method), (x0_sample, dw_sample))
    return loops[key](x0, dw)
