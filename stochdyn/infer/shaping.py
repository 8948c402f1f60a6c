"""The control of a prior on all steps at once: from base increments to those that drive the path, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.core.sde.control import Control
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import steps_of, time_column
from stochdyn.errors import InvalidInputError

__all__ = ["base_increments", "check_control", "log_shrinkage", "shape_increments"]


def check_control(sde: SDE) -> None:
    """Raise unless the control of the equation is a drift and a precision, which is what a guide can account for."""
    control = sde.control
    if control is not None and type(control).shape_increment is not Control.shape_increment:
        raise InvalidInputError(
            "guides know the control of a prior by its drift and precision only", got=type(control).__name__
        )


def _control(sde: SDE, ts: Tensor, z: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if sde.control is None else sde.control.at(time_column(ts[..., :-1], z), z)


def shape_increments(sde: SDE, ts: Tensor, z: Tensor, e: Tensor) -> Tensor:
    r"""Return the increments :math:`s\,e+u\,\Delta` under the equation's own control.

    Args:
        sde: The equation.
        ts: ``(T,)``.
        z: ``(T-1, *batch, Z)`` full states before each step.
        e: ``(T-1, *batch, m R)`` increments without the control.
    """
    u, precision = _control(sde, ts, z)
    if u is None and precision is None:
        return e
    given = u if u is not None else precision
    assert given is not None
    dt, channels = steps_of(ts, z), given.shape[-1]
    dw = e[..., :channels]
    if precision is not None:
        dw = dw * torch.rsqrt(1.0 + precision * dt)
    if u is not None:
        dw = dw + u * dt
    return (
        dw if e.shape[-1] == channels else torch.cat([dw, e[..., channels:].expand(*dw.shape[:-1], -1)], -1)
    )


def base_increments(sde: SDE, ts: Tensor, z: Tensor, dw: Tensor) -> Tensor:
    """Return what :func:`shape_increments` turns into ``dw (T-1, *batch, m)``."""
    u, precision = _control(sde, ts, z)
    dt = steps_of(ts, z)
    if u is not None:
        dw = dw - u * dt
    return dw if precision is None else dw * torch.sqrt(1.0 + precision * dt)


def log_shrinkage(sde: SDE, ts: Tensor, z: Tensor) -> Tensor | float:
    """Return the sum over channels of log s in every step, ``(T-1, *batch)``: the log volume that the control takes away."""
    precision = _control(sde, ts, z)[1]
    if precision is None:
        return 0.0
    return -0.5 * torch.log1p(precision * steps_of(ts, z)).sum(-1)
