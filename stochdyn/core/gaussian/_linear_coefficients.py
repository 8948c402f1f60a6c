"""Coefficients of a linear equation: constants or functions of time, in one form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import check_finite, check_positive
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import DiffusionError, DtypeMismatchError, ShapeError

__all__ = ["TimeFunction", "TimeValue", "as_diffusion", "as_time_value"]

TimeFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TimeValue:
    """A constant ``(*B, *event)`` or a function of times ``(n,)`` that returns ``(n, *B, *event)``."""

    name: str
    event: tuple[int | None, ...]
    constant: Tensor | None = None
    function: TimeFunction | None = None

    def at(self, t: Tensor) -> Tensor:
        """Return the values at ``t (n,)``: ``(n, *B, *event)``."""
        if self.function is None:
            return self.constant.expand(t.shape[0], *self.constant.shape)  # type: ignore[union-attr]
        value = self.function(t)
        if value.ndim < 1 + len(self.event) or value.shape[0] != t.shape[0]:
            raise ShapeError(
                f"{self.name}(t) must lead with time",
                got=f"shape {tuple(value.shape)} for t {tuple(t.shape)}",
                expected=f"({t.shape[0]}, *B, {', '.join(str(n or 'm') for n in self.event)})",
            )
        _check_event(value, self.event, f"{self.name}(t)")
        if value.dtype != t.dtype:
            raise DtypeMismatchError(
                f"{self.name}(t) has another precision than t", got=f"{value.dtype}, {t.dtype}"
            )
        return value

    def batch(self, probe: Tensor) -> tuple[int, ...]:
        """Return ``*B``; ``probe (1,)`` is a time at which a function may be called."""
        with torch.no_grad():
            value = self.at(probe)
        check_finite(value, self.name)
        return tuple(value.shape[1 : value.ndim - len(self.event)])


def _check_event(value: Tensor, event: tuple[int | None, ...], name: str) -> None:
    own = tuple(value.shape[value.ndim - len(event) :])
    if value.ndim < len(event) or any(want not in (None, got) for want, got in zip(event, own, strict=True)):
        expected = f"(*B, {', '.join(str(n or 'm') for n in event)})"
        raise ShapeError(f"{name} has the wrong shape", got=tuple(value.shape), expected=expected)


def as_time_value(value: Tensor | TimeFunction, name: str, event: tuple[int | None, ...]) -> TimeValue:
    """Wrap a tensor or a callable, checking the shape of a tensor."""
    if isinstance(value, Tensor):
        _check_event(value, event, name)
        check_finite(value.detach(), name)
        return TimeValue(name, event, constant=value)
    if not callable(value):
        raise ShapeError(f"{name} must be a tensor or a function of time", got=type(value).__name__)
    return TimeValue(name, event, function=value)


def as_diffusion(value: Coefficient | Tensor | float | TimeFunction, like: Tensor) -> TimeValue:
    """Wrap the diffusion of a state like ``like (*B, d)``, given in any of the accepted forms."""
    dim = like.shape[-1]
    if isinstance(value, Coefficient):
        value.check()
        value.check_dim(dim)
        value = value.matrix(dim).to(like.dtype)
    elif isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim < 2):
        check_positive(value, "diffusion", DiffusionError)
        strength = torch.as_tensor(
            value, dtype=None if isinstance(value, Tensor) else like.dtype, device=like.device
        )
        if strength.ndim == 1 and strength.shape[0] != dim:
            raise ShapeError(
                "diffusion doesn't fit the state", got=tuple(strength.shape), expected=f"({dim},)"
            )
        value = torch.diag_embed(strength.expand(dim))
    return as_time_value(value, "diffusion", (dim, None))
