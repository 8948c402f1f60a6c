"""A fully connected tanh network whose evaluation is one fused kernel on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochdyn._checks import check_positive_int

__all__ = ["TanhNetwork"]

# Matrix products with fewer columns than this are several times faster in transposed form.
_NARROW = 16


class TanhNetwork(nn.Module):
    r"""Linear layers with :math:`\tanh` between them.

    .. math:: f(x) = W_L \tanh(W_{L-1}\cdots\tanh(W_1 x + b_1)\cdots) + b_L

    It is the same function as ``nn.Sequential(nn.Linear(...), nn.Tanh(), ...)`` and costs about two thirds of it on
    the CPU, where most of the time of a small network goes into :math:`\tanh`, narrow matrix products and the
    bookkeeping of the graph: one node of the graph holds the whole network, and
    :math:`\tanh x = 2\sigma(2x) - 1`, which has an absolute error of 2e-7 in float32. On other devices, under
    autocast and under the transforms of ``torch.func`` it runs layer by layer.

    Args:
        sizes: widths of input, hidden layers and output.
        zero_last: start with a last layer of zeros, so that the network starts as the zero function.

    Raises:
        InvalidInputError: for widths that aren't positive integers.

    Example:
        >>> TanhNetwork((2, 64, 64, 1), zero_last=True)(torch.ones(3, 2)).tolist()
        [[0.0], [0.0], [0.0]]
    """

    def __init__(self, sizes: Sequence[int], zero_last: bool = False) -> None:
        super().__init__()
        for size in sizes:
            check_positive_int(size, "sizes")
        check_positive_int(len(sizes), "len(sizes)", 2)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        if zero_last:
            nn.init.zeros_(layers[-1].weight)
            nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out)`` for ``x (..., in)``."""
        weights: list[Tensor] = []
        for layer in self.layers:
            weights += (layer.weight, layer.bias)  # type: ignore[arg-type]
        if not _fusible(x):
            return _layer_by_layer(x, weights)
        if x.ndim == 2:
            return _Fused.apply(x, *weights)
        return _Fused.apply(x.reshape(-1, x.shape[-1]), *weights).reshape(*x.shape[:-1], -1)


def _fusible(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def _layer_by_layer(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    for i in range(0, len(weights) - 2, 2):
        x = torch.tanh(F.linear(x, weights[i], weights[i + 1]))
    return F.linear(x, weights[-2], weights[-1])


class _Fused(torch.autograd.Function):
    """The network as one node: ``x (B, in)`` and alternating weights and biases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        layers = [x]
        for i in range(0, len(weights) - 2, 2):
            h = F.linear(layers[-1], weights[i], weights[i + 1])
            layers.append(h.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0))
        ctx.save_for_backward(*layers, *weights)
        return F.linear(layers[-1], weights[-2], weights[-1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        depth = len(saved) // 3
        layers, weights = saved[:depth], saved[depth:]
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, layers[0], weights, slope)
        grads: list[Tensor | None] = [None] * len(weights)
        for i in reversed(range(depth)):
            h, w = layers[i], weights[2 * i]
            narrow = h.shape[1] < _NARROW
            grads[2 * i] = (h.t() @ slope).t() if narrow else slope.t() @ h
            grads[2 * i + 1] = slope.sum(0)
            if i == 0 and not ctx.needs_input_grad[0]:
                return None, *grads
            slope = (w.t() @ slope.t()).t() if narrow else slope @ w
            if i:
                slope = torch.ops.aten.tanh_backward(slope, h)
        return slope, *grads


def _differentiable_backward(
    ctx: Any, x: Tensor, weights: Sequence[Tensor], slope: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiate layer by layer, so that the result has derivatives of its own."""
    inputs = (x, *weights)
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
    grads = iter(torch.autograd.grad(_layer_by_layer(x, weights), wanted, slope, create_graph=True))
    return tuple(next(grads) if need else None for need in ctx.needs_input_grad)
