"""Transition probabilities of a jump process over any time, by uniformisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_same_device
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["propagate", "transition"]

#: Series up to this many expected candidate jumps; longer times are halved first, and the result squared. Where there are many
#: times the second bound holds: further terms are shared by all of them, and squares are not.
_LONGEST, _LONGEST_OF_MANY, _MANY = 4.0, 16.0, 256


def transition(rates: object, dt: object) -> Tensor:
    r"""Return the transition probabilities :math:`P(\Delta)=e^{Q\Delta}` of a jump process.

    .. math:: P(\Delta)=\sum_{k\ge 0}e^{-\lambda\Delta}\frac{(\lambda\Delta)^k}{k!}\,B^k,\qquad B=I+Q/\lambda,\quad
        \lambda=\max_i|Q_{ii}|

    All terms are positive, so every entry keeps its relative accuracy, also for degenerate, defective, stiff, reducible and
    absorbing generators. Long times are halved, and the result squared with its rows
    scaled to sum to one.

    Args:
        rates: A :class:`~stochdyn.jumps.RateMatrix` or its matrix ``(*batch, S, S)`` in 1/time, rows summing to zero.
        dt: The times ``()`` or ``(n,)``, not negative and finite.

    Returns:
        ``(S, S)``, ``(n, S, S)``, or with a batch of generators ``(*n, *batch, S, S)``. Differentiable in rates and times; the
        derivative in the matrix's entries takes them as independent.

    Raises:
        InvalidInputError: If the matrix isn't a generator, or a time is negative.

    Example:
        >>> transition(torch.tensor([[-0.7, 0.7], [1.9, -1.9]]), 0.8)
        tensor([[0.7644, 0.2356],
                [0.6395, 0.3605]])

    Reference:
        Jensen, "Markoff chains as an aid in the study of Markoff processes", 1953.
    """
    from stochdyn.jumps.generator import as_rates

    q = as_rates(rates)
    time = as_tensor(dt, "dt", (0, 1), "() or (n,)", like=q)
    check_same_device(rates=q, dt=time)
    if bool((time < 0).any()):
        raise InvalidInputError("dt must not be negative", got=f"minimum {float(time.min()):g}")
    out = _transition(q.double(), time.reshape(-1).double())
    return out.reshape(*time.shape, *q.shape).to(q.dtype)


def _transition(q: Tensor, dt: Tensor) -> Tensor:
    """Return ``(n, *batch, S, S)`` for ``q (*batch, S, S)`` and ``dt (n,)`` in double precision."""
    size = q.shape[-1]
    eye = torch.eye(size, dtype=q.dtype, device=q.device)
    # The result doesn't depend on λ, so it needs no derivative.
    exit_rates = -q.detach().diagonal(dim1=-2, dim2=-1)
    largest = exit_rates.amax(-1)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    b = eye + q / largest[..., None, None]
    most = float(largest.max())
    limit = _LONGEST if len(dt) < _MANY else _LONGEST_OF_MANY
    longest = min(limit, most * float(dt.detach().max())) if len(dt) else 0.0
    stack = chain_powers(b, series_terms(longest, size))
    halvings = torch.log2((dt.detach() * most / limit).clamp(min=1e-300)).ceil().clamp(min=0).long()
    out, places = [], []
    counts = halvings.unique().tolist()
    if counts == [0]:
        return _series(stack, largest, dt)
    for count in counts:
        chosen = (halvings == count).nonzero()[:, 0]
        part = _series(stack, largest, dt[chosen] / 2.0**count)
        for _ in range(count):
            part = part @ part
            # rows drift from one by rounding only; the factor is a constant for derivatives
            part = part / part.detach().sum(-1, keepdim=True)
        out.append(part)
        places.append(chosen)
    return torch.cat(out)[torch.cat(places).argsort()]


def paired_transition(q: Tensor, dt: Tensor) -> Tensor:
    """Return ``(T, B, S, S)``: generators ``q (B, S, S)`` each over its own times ``dt (T, B)``, in double precision."""
    size = q.shape[-1]
    rate = -q.detach().diagonal(dim1=-2, dim2=-1)
    rate = rate.amax(-1)
    rate = torch.where(rate > 0, rate, torch.ones_like(rate))
    mean = float((rate * dt.detach()).max())
    halvings = max(0, math.ceil(math.log2(max(mean / _LONGEST_OF_MANY, 1e-300))))
    mean /= 2.0**halvings
    chain = torch.eye(size, dtype=q.dtype, device=q.device) + q / rate[:, None, None]
    stack = chain_powers(chain, series_terms(mean, size))
    weight = poisson_weights(rate * dt / 2.0**halvings, len(stack))
    p = torch.einsum("ktb,kbij->tbij", weight, stack)
    for _ in range(halvings):
        p = p @ p
        p = p / p.detach().sum(-1, keepdim=True)
    return p


def chain_powers(chain: Tensor, count: int) -> Tensor:
    """Return the powers ``0, ..., count - 1`` of jump chains ``(*batch, S, S)``, ``(count, *batch, S, S)``."""
    stack = [torch.eye(chain.shape[-1], dtype=chain.dtype, device=chain.device).expand_as(chain)]
    for _ in range(count - 1):
        stack.append(stack[-1] @ chain)
    return torch.stack(stack)


def _series(stack: Tensor, rate: Tensor, dt: Tensor) -> Tensor:
    """Return the Poisson mixture of powers ``stack (K + 1, *batch, S, S)`` at times ``dt (n,)``."""
    if rate.ndim == 0:  # one product of matrices for all times
        return mixture(dt * rate, stack.flatten(1)).reshape(-1, *stack.shape[1:])
    weight = poisson_weights(dt.reshape(-1, *(1,) * rate.ndim) * rate, len(stack))
    return torch.einsum("kn...,k...ij->n...ij", weight, stack)


def poisson_weights(x: Tensor, count: int) -> Tensor:
    """Return the probabilities of 0, 1, ..., ``count - 1`` under Poisson laws of means ``x (...)``, ``(count, ...)``."""
    if x.requires_grad and torch.is_grad_enabled():
        weights = [torch.exp(-x)]
        for k in range(1, count):
            weights.append(weights[-1] * (x / k))
        return torch.stack(weights)
    out = x.new_empty(count, *x.shape)
    torch.exp(-x, out=out[0])
    for k in range(1, count):
        torch.mul(out[k - 1], x, out=out[k])
        out[k] /= k
    return out


def mixture(x: Tensor, stack: Tensor) -> Tensor:
    """Return the mixtures ``(n, M)`` of rows ``stack (K + 1, M)`` with Poisson weights of means ``x (n,)``.

    Differentiable in both any number of times; the derivatives cost a product of matrices each, where a tape through the
    weights would keep an array for each term.
    """
    out: Tensor = _Mixture.apply(x, stack)
    return out


class _Mixture(torch.autograd.Function):
    """Poisson mixtures of rows, with their derivatives in closed form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Tensor) -> Tensor:
        ctx.save_for_backward(x, stack)
        ctx.weight = poisson_weights(x, len(stack))
        return ctx.weight.mT @ stack

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, stack = ctx.saved_tensors
        again = torch.is_grad_enabled() and x.requires_grad
        weight = poisson_weights(x, len(stack)) if again else ctx.weight
        in_x, in_stack = None, None
        if ctx.needs_input_grad[0]:
            # d w_k / dx = w_{k-1} - w_k
            before = torch.cat([torch.zeros_like(weight[:1]), weight[:-1]])
            in_x = ((before - weight) * (stack @ slope.mT)).sum(0)
        if ctx.needs_input_grad[1]:
            in_stack = weight @ slope
        return in_x, in_stack


def propagate(p: object, rates: object, dt: object) -> Tensor:
    r"""Return the law :math:`pe^{Q\Delta}` after a time.

    Args:
        p: The law before, ``(*batch, S)``.
        rates: A :class:`~stochdyn.jumps.RateMatrix` or its matrix ``(*batch, S, S)`` in 1/time.
        dt: The times ``()`` or ``(n,)``, not negative.

    Returns:
        ``(*n, *batch, S)``.
    """
    matrix = transition(rates, dt)
    start = as_tensor(p, "p", like=matrix)
    if start.ndim < 1 or start.shape[-1] != matrix.shape[-1]:
        raise ShapeError(
            "p must hold one number per state", got=tuple(start.shape), expected=matrix.shape[-1]
        )
    return (start.to(matrix)[..., None, :] @ matrix)[..., 0, :]


def series_terms(mean: float, size: int) -> int:
    r"""Return how many powers of a chain of ``size`` states the transition probabilities over ``mean`` expected candidate jumps need.

    A walk of k steps contains a path of :math:`l<S` steps without loops, in one of :math:`\binom kl` places, so that what is left out
    of an entry is less than :math:`\sum_{j\ge K-l}x^j/j!` of it. For long times that is far too careful: terms beyond eight
    standard deviations are below 1e-17 of one.
    """
    term, count = 1.0, 0
    most = math.ceil(mean + 8.0 * math.sqrt(mean) + 13.0)
    while count < most and term > 1e-17:
        count += 1
        term *= mean / count
    return count + size


def poisson_terms(mean: float) -> int:
    """Return how many Poisson terms around a mean leave out less than 1e-16."""
    return math.ceil(mean + 9.0 * math.sqrt(mean) + 25.0)
