"""Coefficients of a linear equation: constants or functions of time, in one form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_finite, check_positive
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import DiffusionError, DtypeMismatchError, ShapeError

__all__ = ["TimeFunction", "TimeValue", "as_noise_matrix", "as_time_value"]

TimeFunction = Callable[[Tensor], Tensor]


class TimeValue(nn.Module):
    """A constant ``(*B, *event)`` or a function of times ``(n,)`` that returns ``(n, *B, *event)``.

    What a constant is made of moves with the module and is listed among its parameters if it is one; so is a module that
    serves as the function.

    Args:
        name: for errors.
        event: sizes of the last axes, None where any will do.
        parts: tensors of which the constant is made.
        build: makes the constant of its parts; None if it is the only part.
        function: the function of time, if there are no parts.
    """

    def __init__(
        self,
        name: str,
        event: tuple[int | None, ...],
        parts: tuple[Tensor, ...] = (),
        build: Callable[..., Tensor] | None = None,
        function: TimeFunction | None = None,
    ) -> None:
        super().__init__()
        self.name, self.event, self.build, self.function = name, event, build, function
        self._count = len(parts)
        for i, part in enumerate(parts):
            if isinstance(part, nn.Parameter):
                self.register_parameter(f"part_{i}", part)
            else:
                # A copy, so that loading a state doesn't write into the user's tensor.
                self.register_buffer(f"part_{i}", part if part.requires_grad else part.detach().clone())

    @property
    def constant(self) -> Tensor | None:
        """The value ``(*B, *event)`` if it doesn't depend on time, else None."""
        if self.function is not None:
            return None
        parts = [getattr(self, f"part_{i}") for i in range(self._count)]
        return parts[0] if self.build is None else self.build(*parts)

    def at(self, t: Tensor) -> Tensor:
        """Return the values at ``t (n,)``: ``(n, *B, *event)``."""
        if self.function is None:
            constant = self.constant
            assert constant is not None
            return constant.expand(t.shape[0], *constant.shape)
        value = self.function(t)
        if not isinstance(value, Tensor):
            raise ShapeError(f"{self.name}(t) must return a tensor", got=type(value).__name__)
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


def as_time_value(
    value: TimeValue | Tensor | TimeFunction, name: str, event: tuple[int | None, ...], like: Tensor
) -> TimeValue:
    """Wrap data or a callable, checking the shape of data."""
    if isinstance(value, TimeValue):
        return value
    if callable(value) and not isinstance(value, Tensor):
        return TimeValue(name, event, function=value)
    value = as_tensor(value, name, like=like)
    _check_event(value, event, name)
    return TimeValue(name, event, (value,))


def as_noise_matrix(
    value: TimeValue | Coefficient | Tensor | float | TimeFunction, like: Tensor
) -> TimeValue:
    """Wrap the diffusion of a state like ``like (*B, d)``, given in any of the accepted forms."""
    dim = like.shape[-1]
    if isinstance(value, Coefficient):
        value.check()
        value.check_dim(dim)
        value = value.matrix(dim).to(like.dtype)
    elif not callable(value) or isinstance(value, Tensor):
        strength = as_tensor(value, "diffusion", like=like)
        if strength.ndim < 2:
            check_positive(strength, "diffusion", DiffusionError)
            if strength.ndim == 1 and strength.shape[0] != dim:
                raise ShapeError(
                    "diffusion doesn't fit the state", got=tuple(strength.shape), expected=f"({dim},)"
                )
            # a number or one per component
            if isinstance(strength, nn.Parameter):
                ones = torch.ones(dim, dtype=strength.dtype, device=strength.device)
                return TimeValue("diffusion", (dim, None), (strength, ones), _scaled_diagonal)
            value = torch.diag_embed(strength.expand(dim))
    return as_time_value(value, "diffusion", (dim, None), like)


def _scaled_diagonal(strength: Tensor, ones: Tensor) -> Tensor:
    return torch.diag_embed(strength * ones)
