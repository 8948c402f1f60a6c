"""Arguments of an optimum whose first derivatives are right, and whose second ones are refused instead of wrong."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from stochdyn.errors import UnavailableError

__all__ = ["first_order"]


def first_order(argument: Tensor) -> Tensor:
    """Return the same values; a second derivative with respect to them raises an UnavailableError."""
    if not argument.requires_grad:
        return argument
    same: Tensor = _FirstOrder.apply(argument)
    return same


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(argument: Tensor) -> Tensor:
        return argument.view_as(argument)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        # the slope depends on the argument in a way that isn't followed
        return _Refused.apply(slope, *ctx.saved_tensors)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(slope: Tensor, _argument: Tensor) -> Tensor:
        return slope.view_as(slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise UnavailableError(
            "sinkhorn has first derivatives only: in them its plan is a constant",
            hint="take differences of the gradient for second ones",
        )
