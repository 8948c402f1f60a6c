r"""Linear recursions over time: all states, or all means and covariances, of a chain of affine steps.

.. math:: z_{n+1}=A_nz_n+c_n,\qquad P_{n+1}=A_nP_nA_n^\top+Q_n .

Few steps or large matrices are walked through one by one. Many steps of small matrices are solved in logarithmic depth:
neighbouring steps are composed to one of twice the length, the recursion is solved for the even states, and the odd
ones follow by one step each, which is :math:`2\log_2N` batched products instead of N in a row. The derivative of a linear
recursion is the transposed recursion backwards in time, so it is solved in the same way, and no graph of the steps is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochdyn._transforms import transforms_are_active
from stochdyn.core.gaussian.small import symmetrise
from stochdyn.errors import ShapeError

__all__ = [
    "affine_states",
    "align",
    "broadcast_batches",
    "columns",
    "covariance_states",
    "flatten_batch",
    "gaussian_moments",
    "joint_covariance",
    "restore",
    "restore_columns",
    "samples_first",
]

Advance = Callable[[Tensor, Tensor, Tensor], Tensor]
Compose = Callable[[Tensor, Tensor], Tensor]

# Below this many steps, a walk takes fewer operations than another level of halving.
_SHORT = 3
# A walk costs a call per step whatever its size; the scan multiplies whole matrices of states, B z^3 numbers per step.
# Measured on a CPU (benchmarks/core/recursion.py): the scan is faster from about 32 steps on, up to about B z^1.5 = 100.
_FEW_STEPS = 32
_MUCH_WORK = 100.0
# A GPU is busy with many states at once as long as they are fewer than this.
_MUCH_WORK_ON_GPU = 1e5


def affine_states(transition: Tensor, offset: Tensor, start: Tensor) -> Tensor:
    r"""Return all states of :math:`z_{n+1}=A_nz_n+c_n`, in columns.

    Args:
        transition: The matrices of the steps, ``A (N, *B, z, z)``.
        offset: The constant parts of the steps, ``c (N, *B, z, s)``, one column per path.
        start: The first states ``(*B, z, s)``.

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
    # The axes of the transition may be 1, so that many paths share it.
    transition = _lead(transition, ndim)
    offset = _lead(offset, ndim).expand(offset.shape[0], *batch, *event)
    start = start.expand(*batch, *event)
    # Transforms of torch differentiate the steps themselves, not our adjoint.
    if transforms_are_active():
        return _walk(transition, offset, start, _affine)
    return _States.apply(transition, offset, start)


def gaussian_moments(
    transition: Tensor, offset: Tensor, noise_cov: Tensor, mean: Tensor, cov: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return means and covariances of :math:`z_{n+1}=A_nz_n+c_n+e_n`, :math:`e_n\sim N(0,Q_n)`.

    .. math:: m_{n+1}=A_nm_n+c_n,\qquad P_{n+1}=A_nP_nA_n^\top+Q_n .

    Args:
        transition: The matrices of the steps, ``(N, *B, z, z)``.
        offset: The constant parts of the steps, ``(N, *B, z)``.
        noise_cov: The covariance of the noise of a step, ``(N, *B, z, z)``.
        mean: The mean ``(*B, z)``.
        cov: The covariance ``(*B, z, z)``.

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
    states = _moments(transition, noise_cov, cov, offset.unsqueeze(-1), mean.unsqueeze(-1))
    return states[..., -1], symmetrise(states[..., :-1])


def covariance_states(transition: Tensor, noise_cov: Tensor, cov: Tensor) -> Tensor:
    """Return the covariances ``(N+1, *B, z, z)`` of :func:`gaussian_moments` alone."""
    return symmetrise(_moments(transition, noise_cov, cov, noise_cov[..., :0], cov[..., :0]))


def joint_covariance(
    covs: Tensor, transition: Tensor, emission: Tensor | None = None, left: Tensor | None = None
) -> Tensor:
    r"""Return the covariance of the whole path :math:`(Hz_0,\dots,Hz_N)`.

    .. math:: \mathrm{Cov}(Hz_n,Hz_m)=H\,\Gamma_n\,A_{n-1}\cdots A_m\,P_m\,H^\top,\qquad n\ge m .

    Args:
        covs: The covariances of Gaussian snapshots, :math:`P`, ``(N+1, b, z, z)``.
        transition: The matrices of the steps, :math:`A`, ``(N, b, z, z)``.
        emission: The matrix that maps states to observations, :math:`H`, ``(d, z)``; None for the identity.
        left: The matrix :math:`\Gamma` from the left, ``(N+1, b, z, z)``; None for the identity.

    Returns:
        ``(b, (N+1) d, (N+1) d)``, time leading in the flattened axes.
    """
    times, batch = covs.shape[0], covs.shape[1]
    new = covs if emission is None else covs @ emission.mT
    dim = new.shape[-1]
    # row: Cov(z_n, H z_m) for all m up to n, moved on by one step at a time
    row, rows = new[0], [new[0]]
    for n in range(1, times):
        row = torch.cat((transition[n - 1] @ row, new[n]), -1)
        rows.append(row)
    blocks = []
    for n, row in enumerate(rows):
        block = row if left is None else left[n] @ row
        block = block if emission is None else emission @ block
        blocks.append(torch.nn.functional.pad(block, (0, (times - 1 - n) * dim)))
    lower = torch.stack(blocks, 1).reshape(batch, times * dim, times * dim)
    index = torch.arange(times, device=lower.device).repeat_interleave(dim)
    return torch.where(index[:, None] >= index, lower, lower.mT)


def _moments(transition: Tensor, noise_cov: Tensor, cov: Tensor, offset: Tensor, mean: Tensor) -> Tensor:
    """Return ``[P, m] (N+1, *B, z, z+s)`` for ``offset (N, *B, z, s)`` and ``mean (*B, z, s)``, s being 0 or 1."""
    batch = _common(
        transition.shape[1:-2], offset.shape[1:-2], noise_cov.shape[1:-2], mean.shape[:-2], cov.shape[:-2]
    )
    size, steps, extra, ndim = cov.shape[-1], transition.shape[0], offset.shape[-1], len(batch) + 3
    columns = torch.cat(
        [
            _lead(noise_cov, ndim).expand(steps, *batch, size, size),
            _lead(offset, ndim).expand(steps, *batch, size, extra),
        ],
        -1,
    )
    start = torch.cat([cov.expand(*batch, size, size), mean.expand(*batch, size, extra)], -1)
    transition = _lead(transition, ndim)
    if transforms_are_active():
        return _walk(_widen(transition, extra), columns, start, _advance)
    return _Moments.apply(transition, columns, start)


def _scans(steps: int, batch: int, size: int, device: torch.device) -> bool:
    """Return whether the scan is faster than a walk."""
    most = _MUCH_WORK if device.type == "cpu" else _MUCH_WORK_ON_GPU
    return steps >= _FEW_STEPS and batch * size**1.5 <= most


class _States(torch.autograd.Function):
    """``z' = A z + c`` and its adjoint."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, offset: Tensor, start: Tensor) -> Tensor:
        steps, work = offset.shape[0], transition.shape[1:-2].numel()
        # Columns cost as much as batch members where they outnumber the states.
        work *= max(1, offset.shape[-1] // offset.shape[-2])
        scan = _scans(steps, work, offset.shape[-2], offset.device)
        states = (
            _scan(transition, offset, start, _affine, _after)
            if scan
            else _walk(transition, offset, start, _affine)
        )
        ctx.save_for_backward(transition, states)
        return states

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:
        transition, states = ctx.saved_tensors
        # lambda_n = slope_n + A_n^T lambda_{n+1}
        adjoint = _States.apply(transition.mT.flip(0), slope[:-1].flip(0), slope[-1]).flip(0)
        later = adjoint[1:]
        return _sum_to(later @ states[:-1].mT, transition.shape), later, adjoint[0]


class _Moments(torch.autograd.Function):
    """``[P, m]' = [A P A^T + Q, A m + c]`` and its adjoint."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, columns: Tensor, start: Tensor) -> Tensor:
        size, steps = columns.shape[-2], columns.shape[0]
        wide = _widen(transition, columns.shape[-1] - size)
        scan = _scans(steps, columns.shape[1:-2].numel(), size, columns.device)
        states = (
            _scan(wide, columns, start, _advance, _after_wide)
            if scan
            else _walk(wide, columns, start, _advance)
        )
        ctx.save_for_backward(transition, states)
        return states

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:
        transition, states = ctx.saved_tensors
        size = states.shape[-2]
        adjoint = _Moments.apply(transition.mT.flip(0), slope[:-1].flip(0), slope[-1]).flip(0)
        later, before = adjoint[1:], states[:-1]
        # d(A P A^T) = dA P A^T + A P dA^T, P symmetric
        both = later[..., :size] + later[..., :size].mT
        to_transition = both @ transition @ before[..., :size] + later[..., size:] @ before[..., size:].mT
        return _sum_to(to_transition, transition.shape), later, adjoint[0]


def _walk(maps: Tensor, added: Tensor, start: Tensor, advance: Advance) -> Tensor:
    state, states = start, [start]
    for a, c in zip(maps.unbind(0), added.unbind(0), strict=True):
        state = advance(a, state, c)
        states.append(state)
    return torch.stack(states)


def _scan(maps: Tensor, added: Tensor, start: Tensor, advance: Advance, compose: Compose) -> Tensor:
    num_steps = added.shape[0]
    if num_steps <= _SHORT:
        return _walk(maps, added, start, advance)
    # Pairs of steps compose, z_{n+2} = (A_{n+1} A_n) z_n + (A_{n+1} c_n + c_{n+1}): half as many steps, solved alike,
    # give the even states, and one more step each the odd ones.
    even = num_steps - num_steps % 2
    first, early, second = maps[0:even:2], added[0:even:2], maps[1:even:2]
    pairs = compose(second, first), advance(second, early, added[1:even:2])
    evens = _scan(*pairs, start, advance, compose)
    odds = advance(first, evens[:-1], early)
    last = advance(maps[-1], evens[-1], added[-1]) if even < num_steps else None
    return _interleave(evens, odds, last)


def _affine(transition: Tensor, state: Tensor, offset: Tensor) -> Tensor:
    """Return ``A z + c``."""
    if state.ndim == 3 and transition.ndim == 3 and transition.shape[0] == state.shape[0]:
        return torch.baddbmm(offset, transition, state)
    return transition @ state + offset


def _after(second: Tensor, first: Tensor) -> Tensor:
    """Return the matrix of two steps ``A z``."""
    return second @ first


def _after_wide(second: Tensor, first: Tensor) -> Tensor:
    """Return the matrix of two steps of :func:`_advance`, which multiplies from the right."""
    return first @ second


def _advance(wide: Tensor, moments: Tensor, added: Tensor) -> Tensor:
    """Return ``[A P A^T + Q, A m + c]`` from ``[P, m]`` and ``[Q, c]``; ``wide`` is block-diagonal, of ``A^T`` and one."""
    size = moments.shape[-2]
    ahead = wide[..., :size, :size].mT @ moments
    if ahead.ndim == 3 and wide.ndim == 3 and wide.shape[0] == ahead.shape[0]:
        return torch.baddbmm(added, ahead, wide)
    return ahead @ wide + added


def _widen(transition: Tensor, extra: int) -> Tensor:
    if not extra:
        return transition.mT
    wide = torch.nn.functional.pad(transition.mT, (0, extra, 0, extra))
    corner = torch.zeros(wide.shape[-2:], dtype=wide.dtype, device=wide.device)
    corner[-1, -1] = 1.0
    return wide + corner


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


# Batch axes of the recursions: broadcasting, and one flat layout to compute in.


def broadcast_batches(shapes: dict[str, tuple[int, ...]]) -> torch.Size:
    """Broadcast named batch shapes; the error names them all."""
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listing = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ShapeError("batch shapes don't broadcast", got=listing) from None


def align(x: Tensor, lead: int, event: int, batch: torch.Size) -> Tensor:
    """Expand ``(*lead, *some batch, *event)`` to ``(*lead, *batch, *event)``, batch axes aligned right."""
    lead_shape, own, event_shape = x.shape[:lead], x.shape[lead : x.ndim - event], x.shape[x.ndim - event :]
    x = x.reshape(*lead_shape, *(1,) * (len(batch) - len(own)), *own, *event_shape)
    return x.expand(*lead_shape, *batch, *event_shape)


def flatten_batch(x: Tensor, lead: int, event: int, batch: torch.Size, flat: int | None = None) -> Tensor:
    """Bring ``(*lead, *some batch, *event)`` to ``(*lead, flat, *event)``; ``flat=1`` keeps one."""
    if flat != 1:
        x = align(x, lead, event, batch)
    return x.reshape(*x.shape[:lead], 1 if flat == 1 else batch.numel(), *x.shape[x.ndim - event :])


def columns(x: Tensor, batch: torch.Size, flat: int, n: int = 1) -> Tensor:
    """Bring vectors ``(T, *some batch, z)`` to ``(T, flat, z, s)``, ``n`` copies of each series."""
    x = flatten_batch(x, 1, 1, batch)
    if flat == 1:
        x = x.transpose(1, 2)[:, None, :, :, None]
        return x.expand(*x.shape[:-1], n).flatten(-2)
    return x[..., None].expand(*x.shape, n)


def restore_columns(x: Tensor, batch: torch.Size, flat: int) -> Tensor:
    """Undo :func:`columns` with ``n=1``: ``(T, flat, z, s)`` to ``(T, *batch, z)``."""
    x = x[:, 0].transpose(1, 2) if flat == 1 else x.squeeze(-1)
    return x.reshape(x.shape[0], *batch, x.shape[-1])


def restore(x: Tensor, batch: torch.Size, flat: int) -> Tensor:
    """Bring ``(T, flat, ...)`` to ``(T, *batch, ...)``; a shared value is expanded."""
    event = x.shape[2:]
    if flat == 1:
        return x.reshape(x.shape[0], *(1,) * len(batch), *event).expand(-1, *batch, *event)
    return x.reshape(x.shape[0], *batch, *event)


def samples_first(x: Tensor, n: int, batch: torch.Size) -> Tensor:
    """Bring ``(T, flat, z, s)`` with ``n`` draws of each series to ``(n, T, *batch, z)``."""
    times, _, size, _ = x.shape
    shared = x.shape[1] == 1
    x = x.reshape(times, size, -1, n).permute(3, 0, 2, 1) if shared else x.permute(3, 0, 1, 2)
    return x.reshape(n, times, *batch, size)
