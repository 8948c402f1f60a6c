"""The fully connected network, one whose layers add up, and a field of time, state and context."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochdyn._checks import check_bool, check_callable, check_choice, check_positive_int
from stochdyn._transforms import transforms_are_active
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["MLP", "ResidualMLP", "StateNetwork"]

# Matrix products with fewer columns than this are several times faster in transposed form.
_NARROW = 16
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "softplus": F.softplus,
    "elu": F.elu,
}
Activation = str | Callable[[Tensor], Tensor]


class MLP(nn.Module):
    r"""Linear layers with an activation between them.

    .. math:: f(x) = W_L\,\sigma(W_{L-1}\cdots\sigma(W_1 x + b_1)\cdots) + b_L

    It is the same function as ``nn.Sequential(nn.Linear(...), nn.Tanh(), ...)``. With tanh it costs about two thirds of that on
    the CPU, where most of the time of a small network goes into :math:`\tanh`, narrow matrix products and the
    bookkeeping of the graph: one node of the graph holds the whole network, and
    :math:`\tanh x = 2\sigma(2x) - 1`, which has an absolute error of 2e-7 in float32. On other devices, under
    autocast and under the transforms of ``torch.func`` it runs layer by layer.

    Args:
        sizes: The widths of input, hidden layers and output.
        zero_last: Whether to start with a last layer of zeros, so that the network starts as the zero function.
        activation: The nonlinearity between the layers of a network, ``"tanh"``, ``"silu"``, ``"gelu"``, ``"relu"``,
            ``"softplus"``, ``"elu"``, or a function of a tensor (a module, for one).

    Raises:
        InvalidInputError: For widths that aren't positive integers, or an unknown activation.

    Example:
        >>> MLP((2, 64, 64, 1), zero_last=True)(torch.ones(3, 2)).tolist()
        [[0.0], [0.0], [0.0]]
    """

    def __init__(
        self, sizes: Sequence[int], zero_last: bool = False, activation: Activation = "tanh"
    ) -> None:
        super().__init__()
        if not isinstance(sizes, tuple | list):
            raise InvalidInputError("sizes must be a sequence of widths", got=repr(sizes)[:60])
        for size in sizes:
            check_positive_int(size, "sizes")
        check_positive_int(len(sizes), "len(sizes)", 2)
        check_bool(zero_last, "zero_last")
        self.activation = _as_activation(activation)
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
        if self.activation != "tanh" or not _fusible(x):
            chosen = _ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
            return _layer_by_layer(x, weights, chosen)
        if x.ndim == 2:
            return _Fused.apply(x, *weights)
        return _Fused.apply(x.reshape(-1, x.shape[-1]), *weights).reshape(*x.shape[:-1], -1)


class ResidualMLP(nn.Module):
    r"""Linear layers of one width, each of which adds to what came before.

    .. math:: h_1=W_1x,\qquad h_{k+1}=h_k+W_{k+1}\,\sigma(h_k),\qquad f(x)=W_L\,\sigma(h_{L-1})

    Six hidden layers and more train as easily as three of an :class:`MLP`. Biases are understood.

    Args:
        in_size: The number of components of the input.
        width: The width of the hidden layers.
        depth: The number of hidden layers.
        out_size: The number of components of the output.
        activation: As in :class:`MLP`.

    Raises:
        InvalidInputError: For sizes that aren't positive integers, or an unknown activation.

    Example:
        >>> ResidualMLP(2, 64, 6, 1)(torch.ones(3, 2)).shape
        torch.Size([3, 1])

    Reference:
        He, Zhang, Ren and Sun, "Identity mappings in deep residual networks", 2016.
    """

    def __init__(
        self, in_size: int, width: int, depth: int, out_size: int, activation: Activation = "silu"
    ) -> None:
        super().__init__()
        for name, size in (("in_size", in_size), ("width", width), ("depth", depth), ("out_size", out_size)):
            check_positive_int(size, name)
        self.activation = _as_activation(activation)
        sizes = [in_size, *[width] * depth, out_size]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out_size)`` for ``x (..., in_size)``."""
        act = _ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        first, *hidden, last = self.layers
        h = first(x)
        for layer in hidden:
            h = h + layer(act(h))
        value: Tensor = last(act(h))
        return value


class StateNetwork(nn.Module):
    r"""A network of time, state and context, in the calling convention of drifts and controls: ``net(t, x)``.

    Use it for a learnt drift, control, velocity or score. Time leads or has no axes, and a context aligns with the batch axes of
    the state from the right, so it serves every place where the library calls a field.

    Args:
        in_size: The number of components of the state.
        out_size: The number of components of the result, ``in_size`` if None.
        hidden: The widths of the hidden layers.
        context: The number of components of a context that is given with every call, 0 for none.
        time: A function of times ``(..., 1)`` that returns features ``(..., k)``; True for the time itself, False for a network
            that doesn't see the time. Times enter in their own unit: scale them here where they are far from one.
        activation: As in :class:`MLP`.
        zero_last: Whether to start as the zero function.

    Raises:
        InvalidInputError: For sizes that aren't positive integers, or an unknown activation.

    Example:
        >>> net = StateNetwork(2, hidden=(16,), time=lambda t: torch.cat([torch.sin(t), torch.cos(t)], -1))
        >>> net(torch.tensor(0.5), torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_size: int,
        out_size: int | None = None,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        time: bool | Callable[[Tensor], Tensor] = True,
        activation: Activation = "tanh",
        zero_last: bool = False,
    ) -> None:
        super().__init__()
        check_positive_int(in_size, "in_size")
        if out_size is not None:
            check_positive_int(out_size, "out_size")
        check_positive_int(context, "context", 0)
        if not isinstance(hidden, tuple | list):
            raise InvalidInputError("hidden must be a sequence of widths", got=repr(hidden)[:60])
        if not isinstance(time, bool):
            check_callable(time, "time", "True, False or a function of times")
        self.time, self.context = time, context
        features = 0
        if time is not False:
            features = 1 if time is True else time(torch.zeros(1)).shape[-1]
        self.net = MLP((in_size + features + context, *hidden, out_size or in_size), zero_last, activation)

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``(..., out_size)`` at ``x (..., in_size)``.

        Args:
            t: A number, or times that broadcast to ``x[..., :1]``.
            x: The states.
            context: The size of what a network sees beside time and state, ``(*batch, context)``, aligned with the
                batch axes of ``x`` from the right.
        """
        parts = [x]
        if self.time is not False:
            time = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 1)
            parts.append(time if self.time is True else self.time(time))
        if (0 if context is None else context.shape[-1]) != self.context:
            raise ShapeError(
                "the network needs the context that it was made for",
                got="none" if context is None else f"shape {tuple(context.shape)}",
                expected=f"(*batch, {self.context})" if self.context else "none",
            )
        if context is not None:
            parts.append(context.expand(*x.shape[:-1], self.context))
        return self.net(x if len(parts) == 1 else torch.cat(parts, -1))


def _as_activation(activation: Activation) -> Activation:
    if isinstance(activation, str):
        check_choice(activation, tuple(_ACTIVATIONS), "activation")
    else:
        check_callable(activation, "activation", "a name or a function of a tensor")
    return activation


def _fusible(x: Tensor) -> bool:
    return x.device.type == "cpu" and not transforms_are_active() and not torch.is_autocast_enabled("cpu")


def _layer_by_layer(
    x: Tensor, weights: Sequence[Tensor], activation: Callable[[Tensor], Tensor] = torch.tanh
) -> Tensor:
    return F.linear(_layers(x, weights, activation)[-1], weights[-2], weights[-1])


def _layers(
    x: Tensor, weights: Sequence[Tensor], activation: Callable[[Tensor], Tensor] = torch.tanh
) -> list[Tensor]:
    layers = [x]
    for i in range(0, len(weights) - 2, 2):
        layers.append(activation(F.linear(layers[-1], weights[i], weights[i + 1])))
    return layers


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
            # The result is to have derivatives of its own. A nested call of autograd would visit the whole graph behind x.
            layers = _layers(layers[0], weights)
        grads: list[Tensor | None] = [None] * len(weights)
        for i in reversed(range(depth)):
            h, w = layers[i], weights[2 * i]
            narrow = h.shape[1] < _NARROW
            if ctx.needs_input_grad[2 * i + 1]:
                grads[2 * i] = (h.t() @ slope).t() if narrow else slope.t() @ h
            if ctx.needs_input_grad[2 * i + 2]:
                grads[2 * i + 1] = slope.sum(0)
            if i == 0 and not ctx.needs_input_grad[0]:
                return None, *grads
            slope = (w.t() @ slope.t()).t() if narrow else slope @ w
            if i:
                slope = torch.ops.aten.tanh_backward(slope, h)
        return slope, *grads
