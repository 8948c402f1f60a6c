"""Exact transitions of linear equations with constant coefficients, over few steps or very many."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochdyn._transforms import transforms_are_active
from stochdyn.core.gaussian.small import symmetrise, times

__all__ = ["Transition", "constant_transition"]

#: ``(phi, c, q)``: ``(N, *B, d, d)``, ``(N, *B, d)``, ``(N, *B, d, d)``.
Transition = tuple[Tensor, Tensor, Tensor]

# With a norm of at most 1/4 the first term left out is below 1e-16 of the sum; that of Q grows with twice the norm.
_TERMS, _COV_TERMS = 12, 14
_SERIES = 11
_BASE = 16  # of the digits
# Up to this many components, products of this many numbers are faster entry by entry.
_SMALL = 4
_MANY = 10_000


def constant_transition(a: Tensor, b: Tensor, s: Tensor, dt: Tensor, dtype: torch.dtype) -> Transition:
    r"""Return the transitions over ``dt (N,)`` of :math:`dX=(AX+b)dt+dM`, :math:`d\langle M\rangle=S\,dt`.

    Taylor series over times whose norm :math:`\|A\|h` is at most 1/4, and joints of two times, one after the other,

    .. math:: Q=Q_2+\Phi_2Q_1\Phi_2^\top,\qquad c=c_2+\Phi_2c_1,\qquad E=E_1+E_2+E_2E_1,\qquad E=\Phi-I .

    A few steps are halved until they are short and doubled again. Of many, each is a rest and a number of units, written in
    digits, and the transitions over multiples of the unit come from tables.

    No term is subtracted from :math:`Q` and nothing grows that the process doesn't, so stiff equations
    (:math:`\|A\|h\gg 1`) keep full accuracy, where Van Loan's exponential with :math:`-A^\top` overflows.

    Args:
        a: A batch of matrices ``(*B, d, d)``.
        b: A batch of vectors ``(*B, d)``.
        s: A batch of symmetric matrices ``(*B, d, d)``.
        dt: The nonnegative steps, possibly more precise than ``dtype``; ``(N, *G)`` where every series has its own,
            aligned with ``*B``.
        dtype: The precision of the result.
    """
    if a.shape[-1] == 1:
        return _scalar_transition(a, b, s, dt, dtype)
    longest = (float(dt.detach().max()) if dt.numel() else 0.0) or 1.0
    strength = 4 * float(a.detach().abs().sum(-2).max()) * longest
    count = math.ceil(strength) if math.isfinite(strength) else 0
    if count < 2 or dt.shape[0] <= _BASE or dt.numel() <= _MANY:
        doublings = (count - 1).bit_length() if count else 0
        flow = _series(_taylor_terms(a, b, s, longest / 2.0**doublings), (dt / longest).to(dtype))
        for _ in range(doublings):
            flow = _joined(flow, flow)
    else:
        lag = dt / (longest / count)
        number = lag.detach().floor()
        terms = _taylor_terms(a, b, s, longest / count)
        flow = _series(terms, (lag - number).to(dtype))
        excess, c, q = (x.sum(0, keepdim=True) for x in terms)
        step = _inside((excess, c, symmetrise(q)))
        while count:
            table = _multiples(step, min(_BASE, count + 1))
            above = (number / _BASE).floor()
            flow = _joined(_looked_up(table, (number - _BASE * above).long()), flow)
            number, count = above, count // _BASE
            if count:
                step = _joined(step, tuple(x[-1:] for x in table))  # type: ignore[arg-type]
    excess, c, q = flow
    phi = excess + torch.eye(a.shape[-1], dtype=dtype, device=a.device)
    return _batch_outside(phi, 2), _batch_outside(c, 1), _batch_outside(q, 2)


def _taylor_terms(a: Tensor, b: Tensor, s: Tensor, unit: float) -> Transition:
    """Return the terms ``(K, *B, d, d)``, ``(K, *B, d)``, ``(K, *B, d, d)`` of E, c and Q over a unit of time, by their order."""
    b = b.expand(*torch.broadcast_shapes(a.shape[:-1], b.shape))
    s = symmetrise(s).expand(*torch.broadcast_shapes(a.shape, s.shape))
    rate = a * unit
    drifts, means, covs = [rate], [b * unit], [s * unit]
    for k in range(2, _COV_TERMS + 1):
        scaled = rate / k
        if k <= _TERMS:
            drifts.append(scaled @ drifts[-1])
            means.append(times(scaled, means[-1]))
        half = scaled @ covs[-1]
        covs.append(half + half.mT)
    return torch.stack(drifts), torch.stack(means), torch.stack(covs)


def _series(terms: Transition, ratio: Tensor) -> Transition:
    """Return E, c and Q over ``ratio (N, *G)`` units of time: the sums over k of ``ratio**k`` times the terms."""
    if ratio.ndim == 1:
        powers = ratio.expand(_COV_TERMS, -1).cumprod(0).mT
        excess, c, q = (torch.tensordot(powers[:, : x.shape[0]], x, 1) for x in terms)
        return excess, c, symmetrise(q)
    sums = _horner if ratio.requires_grad or transforms_are_active() else _Series.apply
    parts = []
    for x, event in zip(terms, (2, 1, 2), strict=True):
        front, back = tuple(range(1, 1 + event)), tuple(range(-event, 0))
        lifted, x = _lifted(ratio, x.movedim(back, front).contiguous().unsqueeze(1 + event), 1 + event)
        parts.append(sums(lifted, x).movedim(tuple(range(event)), back))
    return parts[0], parts[1], symmetrise(parts[2])


def _batch_inside(x: Tensor, event: int) -> Tensor:
    """Return ``x (*B, *event)`` with the long axes inside its memory, where operations on small matrices are a few vectorised ones."""
    front, back = tuple(range(event)), tuple(range(-event, 0))
    return x.movedim(back, front).contiguous().movedim(front, back)


def _inside(parts: tuple[Tensor, ...]) -> Transition:
    """Return E, c and Q with their long axes inside."""
    return tuple(_batch_inside(x, e) for x, e in zip(parts, (2, 1, 2), strict=True))  # type: ignore[return-value]


def _batch_outside(x: Tensor, event: int) -> Tensor:
    """Return ``x`` with each matrix in one piece of memory, and its gradient with the long axes inside."""
    if x.is_contiguous() or transforms_are_active():
        return x.contiguous()
    return _Outside.apply(x, event)


class _Outside(torch.autograd.Function):
    """Another order of the axes in memory, which the gradient of ``contiguous`` would leave as it comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, event: int) -> Tensor:
        ctx.event = event
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return _batch_inside(slope, ctx.event), None


def _lifted(x: Tensor, y: Tensor, lead: int) -> tuple[Tensor, Tensor]:
    """Give ``x (N, *G)`` and ``y (*lead, M, *B)`` equally many batch axes."""
    more = (y.ndim - lead) - x.ndim
    y = y.reshape(*y.shape[: lead + 1], *(1,) * -more, *y.shape[lead + 1 :])
    return x.reshape(x.shape[0], *(1,) * more, *x.shape[1:]), y


def _horner(ratio: Tensor, terms: Tensor) -> Tensor:
    """Return the sums over k of ``ratio**(k + 1)`` times ``terms[k]``."""
    *shorter, last = terms.unbind(0)
    total = ratio * last
    for term in reversed(shorter):
        total = ratio * (term + total)
    return total


class _Series(torch.autograd.Function):
    """A power series in a ratio that has no derivative, by Horner's rule in one piece of memory and without a graph of its terms."""

    @staticmethod
    def forward(ctx: Any, ratio: Tensor, terms: Tensor) -> Tensor:
        ctx.save_for_backward(ratio, terms)
        *shorter, last = terms.unbind(0)
        total = last.expand(torch.broadcast_shapes(ratio.shape, last.shape)).contiguous()
        for term in reversed(shorter):
            torch.addcmul(term, ratio, total, out=total)
        return total.mul_(ratio)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor]:
        ratio, terms = ctx.saved_tensors
        slope = slope * ratio
        parts = [slope.sum_to_size(terms.shape[1:])]
        for _ in range(1, terms.shape[0]):
            slope = slope * ratio if torch.is_grad_enabled() else slope.mul_(ratio)
            parts.append(slope.sum_to_size(terms.shape[1:]))
        return None, torch.stack(parts)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y``, entry by entry where very many small matrices have their long axes inside."""
    many = max(x.numel(), y.numel()) > _MANY and x.shape[-1] <= _SMALL
    return _Product.apply(x, y) if many and not transforms_are_active() else x @ y


class _Product(torch.autograd.Function):
    """Products of matrices entry by entry; the derivatives are products too: a graph of every entry would take longer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        total = x[..., :1] * y[..., :1, :]
        for j in range(1, x.shape[-1]):
            total.addcmul_(x[..., j : j + 1], y[..., j : j + 1, :])
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return _product(slope, y.mT).sum_to_size(x.shape), _product(x.mT, slope).sum_to_size(y.shape)


def _joined(first: Transition, second: Transition) -> Transition:
    """Return E, c and Q over two times, one after the other."""
    (e1, c1, q1), (e2, c2, q2) = first, second
    spread = _product(e2, q1)
    # Half of E Q + Q E' + E Q E', and its transpose: what begins symmetric stays so, where an antisymmetric rounding error would
    # grow with the number of parts.
    half = spread + 0.5 * _product(spread, e2.mT)
    mean = _product(e2, c1.unsqueeze(-1)).squeeze(-1)
    return e1 + e2 + _product(e2, e1), c1 + c2 + mean, q1 + q2 + (half + half.mT)


def _multiples(step: Transition, count: int) -> Transition:
    """Return E, c and Q over 0, 1, ... steps ``(M, *B, ...)``, ``count`` of them."""
    table = step
    while (more := count - 1 - table[0].shape[0]) > 0:
        # n of them and the longest one after each are 2 n
        longest = tuple(x[-1:] for x in table)
        further = _joined(tuple(x[:more] for x in table), longest)  # type: ignore[arg-type]
        table = _inside(tuple(torch.cat(x) for x in zip(table, further, strict=True)))
    return _inside(tuple(torch.cat([torch.zeros_like(x[:1]), x]) for x in table))


def _looked_up(table: Transition, index: Tensor) -> Transition:
    """Return E, c and Q at ``index (N, *G)`` of a table ``(M, *B, ...)``."""
    return tuple(_picked(x, index, e) for x, e in zip(table, (2, 1, 2), strict=True))  # type: ignore[return-value]


def _picked(x: Tensor, index: Tensor, event: int) -> Tensor:
    if index.ndim == 1:
        return x.index_select(0, index)
    front, back = tuple(range(event)), tuple(range(-event, 0))
    index, x = _lifted(index, x.movedim(back, front), event)
    batch = torch.broadcast_shapes(x.shape[event + 1 :], index.shape[1:])
    index = index.expand(*x.shape[:event], index.shape[0], *batch)
    return x.expand(*x.shape[: event + 1], *batch).gather(event, index).movedim(front, back)


def _scalar_transition(a: Tensor, b: Tensor, s: Tensor, dt: Tensor, dtype: torch.dtype) -> Transition:
    r"""Return :func:`constant_transition` of one component, in closed form.

    .. math:: \Phi=e^x,\quad c=b\,\Delta\,\varphi(x),\quad Q=S\,\Delta\,\varphi(x)\tfrac{1+e^x}2,\qquad x=A\Delta,\ \varphi(x)=\frac{e^x-1}x
    """
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-1], s.shape[:-2])
    own = dt.ndim - 1
    lag = dt.to(dtype).reshape(dt.shape[0], *(1,) * (len(batch) - own), *dt.shape[1:])
    x = a[..., 0, 0] * lag
    grown = x.exp()
    # Near zero the quotient's derivatives lose digits, and the series has them all.
    near = x.detach().abs() < 0.1
    small, far = torch.where(near, x, torch.zeros_like(x)), torch.where(near, torch.ones_like(x), x)
    series = torch.full_like(x, 1.0 / math.factorial(_SERIES))
    for k in range(_SERIES - 1, 0, -1):
        series = torch.addcmul(x.new_tensor(1.0 / math.factorial(k)), series, small)
    mean = torch.where(near, series, torch.expm1(far) / far) * lag
    shape = (dt.shape[0], *torch.broadcast_shapes(batch, dt.shape[1:]))
    c = (b[..., 0] * mean).expand(shape)
    q = (s[..., 0, 0] * mean * (0.5 * (1.0 + grown))).expand(shape)
    return grown.expand(shape)[..., None, None], c[..., None], q[..., None, None]
