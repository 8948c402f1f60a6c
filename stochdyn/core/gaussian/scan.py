r"""Linear recursions over time in logarithmic depth: means and covariances of all steps at once.

Neighbouring steps are composed to one of twice the length, the recursion is solved for the even states, and the odd
ones follow by one step each: :math:`2\log_2N` batched products instead of N in a row. The derivative of a linear recursion
is the transposed recursion backwards in time, so it is solved in the same way, and no graph of the levels is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["affine_states", "gaussian_moments"]

# Below this many steps a plain loop takes fewer operations than another level of halving.
_SHORT = 3


def affine_states(transition: Tensor, offset: Tensor, start: Tensor) -> Tensor:
    r"""Return all states of :math:`z_{n+1}=A_nz_n+c_n`, in columns.

    Args:
        transition: ``A (N, *B, z, z)``.
        offset: ``c (N, *B, z, s)``, one column a path.
        start: ``(*B, z, s)``.

    Returns:
        ``(N+1, *B, z, s)``, differentiable; batch axes broadcast.

    Example:
        >>> a = torch.full((4, 1, 1), 0.5)
        >>> affine_states(a, torch.zeros(4, 1, 1), torch.ones(1, 1)).flatten().tolist()
        [1.0, 0.5, 0.25, 0.125, 0.0625]

    Reference:
        G. E. Blelloch, Prefix sums and their applications, 1990.
    """
    batch = _common(transition.shape[1:-2], offset.shape[1:-2], start.shape[:-2])
    event, ndim = offset.shape[-2:], len(batch) + 3
    # the axes of the transition may be 1, so that many paths share it
    transition = _lead(transition, ndim)
    offset = _lead(offset, ndim).expand(offset.shape[0], *batch, *event)
    return _States.apply(transition, offset, start.expand(*batch, *event))


def gaussian_moments(
    transition: Tensor, offset: Tensor, noise_cov: Tensor, mean: Tensor, cov: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return means and covariances of :math:`z_{n+1}=A_nz_n+c_n+e_n`, :math:`e_n\sim N(0,Q_n)`.

    .. math:: m_{n+1}=A_nm_n+c_n,\qquad P_{n+1}=A_nP_nA_n^\top+Q_n,

    the parallel form of :meth:`stochdyn.core.gaussian.chain.GaussianChain.moments`, which walks through the steps.

    Args:
        transition: ``(N, *B, z, z)``.
        offset: ``(N, *B, z)``.
        noise_cov: ``(N, *B, z, z)``.
        mean: ``(*B, z)``.
        cov: ``(*B, z, z)``.

    Returns:
        ``(N+1, *B, z)`` and ``(N+1, *B, z, z)``; batch axes broadcast.

    Example:
        >>> one = torch.ones(3, 1, 1)
        >>> gaussian_moments(one, one[..., 0], one, one[0, 0] * 0, one[0] * 0)[1].flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]

    Reference:
        S. Särkkä and Á. F. García-Fernández, Temporal parallelization of Bayesian smoothers, IEEE Trans.
        Automat. Control 66, 2021.
    """
    batch = _common(
        transition.shape[1:-2], offset.shape[1:-1], noise_cov.shape[1:-2], mean.shape[:-1], cov.shape[:-2]
    )
    size, steps = mean.shape[-1], offset.shape[0]
    ndim = len(batch) + 3
    columns = torch.cat(
        [
            _lead(noise_cov, ndim).expand(steps, *batch, size, size),
            _lead(offset.unsqueeze(-1), ndim).expand(steps, *batch, size, 1),
        ],
        -1,
    )
    start = torch.cat([cov.expand(*batch, size, size), mean.expand(*batch, size).unsqueeze(-1)], -1)
    states = _Moments.apply(_lead(transition, ndim), columns, start)
    return states[..., -1], states[..., :-1]


class _States(torch.autograd.Function):
    """``z' = A z + c`` and its adjoint."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, offset: Tensor, start: Tensor) -> Tensor:
        states = _solve(transition, offset, start)
        ctx.save_for_backward(transition, states)
        return states

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:
        transition, states = ctx.saved_tensors
        adjoint = _States.apply(transition.mT.flip(0), slope[:-1].flip(0), slope[-1]).flip(0)
        later = adjoint[1:]
        return _sum_to(later @ states[:-1].mT, transition.shape), later, adjoint[0]


class _Moments(torch.autograd.Function):
    """``[P, m]' = [A P A^T + Q, A m + c]`` and its adjoint."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, columns: Tensor, start: Tensor) -> Tensor:
        states = _solve_moments(_widen(transition), columns, start)
        ctx.save_for_backward(transition, states)
        return states

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:
        transition, states = ctx.saved_tensors
        adjoint = _Moments.apply(transition.mT.flip(0), slope[:-1].flip(0), slope[-1]).flip(0)
        later, before = adjoint[1:], states[:-1]
        both = later[..., :-1] + later[..., :-1].mT
        # P is symmetric, so the two derivatives of A P A^T are one
        to_transition = both @ transition @ before[..., :-1] + later[..., -1:] @ before[..., -1:].mT
        return _sum_to(to_transition, transition.shape), later, adjoint[0]


def _solve(transition: Tensor, offset: Tensor, start: Tensor) -> Tensor:
    num_steps = offset.shape[0]
    if num_steps <= _SHORT:
        states = [start]
        for n in range(num_steps):
            states.append(transition[n] @ states[-1] + offset[n])
        return torch.stack(states)
    even = num_steps - num_steps % 2
    first, early = transition[0:even:2], offset[0:even:2]
    second = transition[1:even:2]
    evens = _solve(second @ first, second @ early + offset[1:even:2], start)
    odds = first @ evens[:-1] + early
    last = transition[-1] @ evens[-1] + offset[-1] if even < num_steps else None
    return _interleave(evens, odds, last)


def _solve_moments(wide: Tensor, columns: Tensor, start: Tensor) -> Tensor:
    """Solve with ``wide``, the block-diagonal matrix of ``A^T`` and 1, which multiplies ``[P, m]`` from the right."""
    num_steps = columns.shape[0]
    if num_steps <= _SHORT:
        states = [start]
        for n in range(num_steps):
            states.append(_advance(wide[n], states[-1], columns[n]))
        return torch.stack(states)
    even = num_steps - num_steps % 2
    first, early = wide[0:even:2], columns[0:even:2]
    second = wide[1:even:2]
    evens = _solve_moments(first @ second, _advance(second, early, columns[1:even:2]), start)
    odds = _advance(first, evens[:-1], early)
    last = _advance(wide[-1], evens[-1], columns[-1]) if even < num_steps else None
    return _interleave(evens, odds, last)


def _advance(wide: Tensor, moments: Tensor, added: Tensor) -> Tensor:
    """Return ``[A P A^T + Q, A m + c]`` from ``[P, m]`` and ``[Q, c]``."""
    ahead = wide[..., :-1, :-1].mT @ moments
    if ahead.ndim == 3 and wide.shape[0] == ahead.shape[0]:
        return torch.baddbmm(added, ahead, wide)
    return ahead @ wide + added


def _widen(transition: Tensor) -> Tensor:
    wide = torch.nn.functional.pad(transition.mT, (0, 1, 0, 1))
    wide[..., -1, -1] = 1.0
    return wide


def _interleave(evens: Tensor, odds: Tensor, last: Tensor | None) -> Tensor:
    """Merge ``(n+1, ...)`` and ``(n, ...)`` into ``(2n+1, ...)``, and one more state behind them."""
    count = 2 * odds.shape[0] + 1
    states = evens.new_empty(count + (last is not None), *evens.shape[1:])
    states[0:count:2] = evens
    states[1:count:2] = odds
    if last is not None:
        states[-1] = last
    return states


def _common(*shapes: torch.Size) -> torch.Size:
    """Broadcast shapes; the library's function takes longer than a level of the scan."""
    first = shapes[0]
    return first if all(s == first for s in shapes) else torch.broadcast_shapes(*shapes)


def _lead(x: Tensor, ndim: int) -> Tensor:
    """Give ``x (N, *b, z, s)`` batch axes after time until it has ``ndim`` axes."""
    if x.ndim == ndim:
        return x
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum over the axes that broadcasting has stretched."""
    axes = [i for i, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if have != want]
    return x.sum(axes, keepdim=True) if axes else x
