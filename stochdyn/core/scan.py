"""Linear recursions over time in logarithmic depth: means and covariances of all steps at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["affine_states", "gaussian_moments"]

# Below this many steps a plain loop takes fewer operations than another level of halving.
_SHORT = 3


def affine_states(transition: Tensor, offset: Tensor, start: Tensor) -> Tensor:
    r"""Return all states of :math:`z_{n+1}=A_nz_n+c_n`, in columns.

    Neighbouring steps are composed to one of twice the length, the recursion is solved for the even
    states, and the odd ones follow by one step each: :math:`2\log_2N` batched products instead of N in a row.

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
    num_steps = offset.shape[0]
    if num_steps <= _SHORT:
        states = [start.expand(torch.broadcast_shapes(start.shape, offset.shape[1:]))]
        for n in range(num_steps):
            states.append(transition[n] @ states[-1] + offset[n])
        return torch.stack(states)
    even = num_steps - num_steps % 2
    first, second = transition[0:even:2], transition[1:even:2]
    shift_first, shift_second = offset[0:even:2], offset[1:even:2]
    evens = affine_states(second @ first, second @ shift_first + shift_second, start)
    odds = first @ evens[:-1] + shift_first
    states = _interleave(evens, odds)
    if even == num_steps:
        return states
    return torch.cat([states, (transition[-1] @ states[-1] + offset[-1])[None]])


def gaussian_moments(
    transition: Tensor, offset: Tensor, noise_cov: Tensor, mean: Tensor, cov: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return means and covariances of :math:`z_{n+1}=A_nz_n+c_n+e_n`, :math:`e_n\sim N(0,Q_n)`.

    .. math:: m_{n+1}=A_nm_n+c_n,\qquad P_{n+1}=A_nP_nA_n^\top+Q_n,

    by the same halving as :func:`affine_states`. It is the parallel form of
    :meth:`stochdyn.core.chain.GaussianChain.moments`, which walks through the steps.

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
    # one matrix carries covariance and mean, so that each level is three products
    columns = _beside(noise_cov, offset)
    start = _beside(cov, mean)
    states = _moments(transition, columns, start)
    return states[..., -1], states[..., :-1]


def _beside(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``[matrix, vector]`` with common batch axes."""
    shape = torch.broadcast_shapes(matrix.shape[:-1], vector.shape)
    return torch.cat([matrix.expand(*shape, matrix.shape[-1]), vector.expand(shape).unsqueeze(-1)], -1)


def _moments(transition: Tensor, columns: Tensor, start: Tensor) -> Tensor:
    num_steps = columns.shape[0]
    if num_steps <= _SHORT:
        states = [start.expand(torch.broadcast_shapes(start.shape, columns.shape[1:]))]
        for n in range(num_steps):
            states.append(_advance(transition[n], states[-1], columns[n]))
        return torch.stack(states)
    even = num_steps - num_steps % 2
    first, second = transition[0:even:2], transition[1:even:2]
    early, late = columns[0:even:2], columns[1:even:2]
    evens = _moments(second @ first, _advance(second, early, late), start)
    states = _interleave(evens, _advance(first, evens[:-1], early))
    if even == num_steps:
        return states
    return torch.cat([states, _advance(transition[-1], states[-1], columns[-1])[None]])


def _advance(transition: Tensor, moments: Tensor, added: Tensor) -> Tensor:
    """Return ``[A P A^T + Q, A m + c]`` from ``[P, m]`` and ``[Q, c]``."""
    ahead = transition @ moments
    cov = ahead[..., :-1] @ transition.mT
    return torch.cat([cov, ahead[..., -1:]], -1) + added


def _interleave(evens: Tensor, odds: Tensor) -> Tensor:
    """Merge ``(n+1, ...)`` and ``(n, ...)`` into ``(2n+1, ...)``."""
    pairs = torch.stack(torch.broadcast_tensors(evens[:-1], odds), 1).flatten(0, 1)
    return torch.cat([pairs, evens[-1:].expand(1, *pairs.shape[1:])])
