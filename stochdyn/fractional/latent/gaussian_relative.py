r"""What a nonlinear drift makes of a Gaussian path: the increments that drive the true equation along it.

Q is Gaussian in the path X and in all innovations, so it can be drawn without a loop. P has another drift and reaches
the same X by other increments. Write :math:`\hat g=|g|\hat u` for the response of X to the innovations of a step
(all in units of their standard deviation), r for its response to memory, and :math:`\tilde b` for the drift of
the linear equation behind Q. Both equations agree on :math:`X_{n+1}` if their innovations differ by
:math:`s_n\hat u` with

.. math::
    |g|s_n=\frac{(\tilde b-b)(X_n)\Delta}{\sigma}-r\cdot\delta_n,\qquad
    \delta_{n+1}=\mathrm{diag}(e^{-\gamma\Delta})\,\delta_n+\ell\,s_n,

:math:`\delta=Y-\tilde Y` being the difference of the memory states and :math:`\ell` the response of the states to a unit
innovation along :math:`\hat u`. This is linear in :math:`\delta`, so it is solved for all times at once too. The change of
variables has unit Jacobian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core.gaussian.affine import by_column
from stochdyn.core.gaussian.recursion import affine_states
from stochdyn.core.law.transition import time_column
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.noise import NoiseSteps

__all__ = ["Shift", "shift_by_channel", "shift_of"]


@dataclass(frozen=True)
class Shift:
    """The difference between the increments of P and of Q on given paths.

    Attributes:
        increments: The differences of the increments ``(N, *B, M, S)``, in units of their standard deviation.
        memory: The memory ``(N+1, *B, m K, S)`` of P less that of Q.
    """

    increments: Tensor
    memory: Tensor


def shift_of(
    sde: SDE, ts: Tensor, steps: NoiseSteps, z: Tensor, matrix: Tensor, offset: Tensor, dim: int
) -> Shift:
    """Return by how much the increments of the true equation differ from those of the linear one.

    Args:
        sde: The true equation, of constant and invertible diffusion.
        ts: The grid ``(N+1,)``.
        steps: The steps of its noise.
        z: The full states ``(N+1, *B, Z, S)`` under Q.
        matrix: The matrix ``(N or 1, *B, d, d)`` of the linear drift.
        offset: The offset ``(N or 1, *B, d)`` of the linear drift.
        dim: The number d of components of the state.
    """
    columns = z[:-1, ..., :dim, :]
    linear = matrix @ columns + offset.unsqueeze(-1)
    x = columns.movedim(-1, 1)
    t = time_column(ts[:-1], x)
    lag = time_column(ts[1:] - ts[:-1], x).to(x.dtype)
    gap = (linear.movedim(-1, 1) - sde.drift(t, x)) * lag
    # (N, S, *B, m) to columns (N, *B, m, S)
    shift, memory = shift_by_channel(steps, sde.diffusion(t, x).solve(gap).movedim(1, -1))
    return Shift(_columns(shift), memory.flatten(-3, -2))


def shift_by_channel(steps: NoiseSteps, gap: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the difference of the innovations ``(N, *B, m, R, S)`` and of the memory states ``(N+1, *B, m, K, S)``.

    Args:
        steps: The steps of the noise.
        gap: The differences :math:`(\tilde b-b)\Delta/\sigma` of the drifts in every channel, ``(N, *B, m, S)``.
    """
    states = steps.load.shape[-1]
    lead = (1,) * (gap.ndim - 3)
    root = steps.variance.sqrt()
    gain, recall = steps.gain * _lead(root, steps.gain.ndim), steps.recall
    if not steps.per_channel:
        gain, recall = gain.unsqueeze(-2), recall.unsqueeze(-2)
    gain, recall = (_lead(p, gap.ndim) for p in (gain, recall))  # (N, *b, 1 or m, R or K)
    # Only the component of the innovations along the response g of X may differ: |g| s = (b~ - b) dt / sigma - r . delta.
    size = gain.square().sum(-1, keepdim=True).sqrt()
    direction = gain / size
    forced = gap / size
    if not states:
        none = gap.new_zeros(gap.shape[0] + 1, *gap.shape[1:-1], 0, gap.shape[-1])
        return forced.unsqueeze(-2) * direction.unsqueeze(-1), none
    # The memory differs by delta' = (decay - l r' / |g|) delta + l (b~ - b) dt / (sigma |g|), l being the response to that component.
    load = (steps.load * root.unsqueeze(-1)).reshape(root.shape[0], *lead, *steps.load.shape[1:])
    answer = direction @ load  # (N, *b, 1 or m, K)
    pull = recall / size
    decay = torch.diag_embed(steps.decay.reshape(root.shape[0], *lead, 1, states))
    loop = decay - answer.unsqueeze(-1) * pull.unsqueeze(-2)
    start = gap.new_zeros(*forced.shape[1:-1], states, forced.shape[-1])
    memory = affine_states(loop, answer.unsqueeze(-1) * forced.unsqueeze(-2), start)  # (N+1, *B, m, K, S)
    along = forced - (pull.unsqueeze(-2) @ memory[:-1]).squeeze(-2)
    return along.unsqueeze(-2) * direction.unsqueeze(-1), memory


def _columns(shift: Tensor) -> Tensor:
    """Lay out ``(N, *B, m, R, S)`` as increments ``(N, *B, m R, S)``."""
    return by_column(shift.movedim(-1, 1)).movedim(1, -1)


def _lead(x: Tensor, ndim: int) -> Tensor:
    """Give ``x (N, *b, ...)`` batch axes after time until it has ``ndim`` axes."""
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])
