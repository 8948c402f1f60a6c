"""Interventions: what is done to a process from a time on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_callable, check_points, check_real
from stochdyn.core.sde.coefficients import Coefficient, Matrix
from stochdyn.errors import InvalidInputError, ShapeError

if TYPE_CHECKING:
    from stochdyn.core.sde.equation import SDE

__all__ = ["Intervention"]


@dataclass(frozen=True)
class Intervention:
    """Hold components of the state at values, or replace the drift, from a time on.

    ``law.do(intervention)`` is the law of what happens then; ``post.predict(ts, do=intervention)`` says what would have
    happened, or will, to each posterior draw, with the noise that drove it.

    Attributes:
        start_time: The time at which it begins.
        values: The values at which components are held, by index: numbers, or tensors ``(*batch,)``. No noise acts on them.
        drift: The drift ``(t, x, own) -> (..., d)`` that takes the place of the equation's own one, whose value it is given: what it
            takes from ``own`` depends on the parameters of each posterior draw. None keeps it.

    Raises:
        InvalidInputError: If nothing is done, or an argument has the wrong type.

    Example:
        >>> slower = Intervention(2.0, drift=lambda t, x, own: 0.5 * own)
        >>> held = Intervention(2.0, {1: 0.0})
        >>> held.set(torch.ones(2))
        tensor([1., 0.])
    """

    start_time: Tensor | float
    values: Mapping[int, Tensor | float] = field(default_factory=dict)
    drift: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_real(self.start_time, "start_time")
        if not isinstance(self.values, Mapping) or not all(
            isinstance(k, int) and not isinstance(k, bool) for k in self.values
        ):
            raise InvalidInputError(
                "values must map components to what they are held at",
                got=repr(self.values)[:60],
                expected="such as {1: 0.0}",
            )
        if self.drift is not None:
            check_callable(self.drift, "drift", "drift(t, x, own)")
        if not self.values and self.drift is None:
            raise InvalidInputError("an intervention needs values or a drift")

    def time(self, like: Tensor) -> Tensor:
        """Return the time at which it begins, in the precision of other times."""
        return torch.as_tensor(self.start_time, dtype=like.dtype, device=like.device)

    def set(self, x: Tensor) -> Tensor:
        """Return states ``(..., d)`` with the held components at their values."""
        check_points(x, "x", "(..., d)")
        if not self.values:
            return x
        parts = list(x.unbind(-1))
        for component, value in self.values.items():
            if not -len(parts) <= component < len(parts):
                raise ShapeError(
                    "the state has no such component", got=component, expected=f"less than {len(parts)}"
                )
            parts[component] = torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(x.shape[:-1])
        return torch.stack(parts, -1)

    def free(self, x: Tensor) -> Tensor:
        """Return one for every component that moves and zero for those that are held, ``(d,)``."""
        keep = torch.ones_like(x[(0,) * (x.ndim - 1)])
        for component in self.values:
            keep[component] = 0.0
        return keep

    def equation(self, sde: SDE) -> SDE:
        """Return the equation that holds from the intervention on, with the control of the one before.

        Raises:
            InvalidInputError: If the noise has memory, of which a held component would need its own.
        """
        from stochdyn.core.sde.equation import SDE

        sde._check_markov("intervened in")
        changed = _Changed(sde.uncontrolled(), self)
        if not self.values:
            return SDE(changed, sde._coefficient).with_control(sde.control)
        return SDE(changed, changed.diffusion).with_control(sde.control)


class _Changed(nn.Module):
    def __init__(self, sde: SDE, intervention: Intervention) -> None:
        super().__init__()
        self.sde, self.intervention = sde, intervention
        # A module is registered, so that its parameters are found; so are those that components are held at.
        self.change: Any = intervention.drift
        given = {"start_time": intervention.start_time} | {
            f"value_{k}": v for k, v in intervention.values.items()
        }
        for name, value in given.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        move: Tensor = self.sde.drift(t, x)
        if self.change is not None:
            move = self.change(t, x, move)
        return move.expand_as(x) * self.intervention.free(x) if self.intervention.values else move

    def diffusion(self, t: Tensor, x: Tensor) -> Coefficient:
        g = self.sde.diffusion(t, x).matrix(x.shape[-1]).to(x)
        return Matrix(g * self.intervention.free(x).unsqueeze(-1))
