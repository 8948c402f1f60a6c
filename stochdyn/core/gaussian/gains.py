r"""What a linear state gains between times: counts over intervals, averages and increments, as a chain of their own.

With :math:`w_n=Mz_n`, the pair :math:`(z_n,w_{n-1})` is a Markov chain again,

.. math:: \begin{pmatrix}z_{n+1}\\w_n\end{pmatrix}=\begin{pmatrix}A_n&0\\M&0\end{pmatrix}\begin{pmatrix}z_n\\w_{n-1}\end{pmatrix}
    +\begin{pmatrix}c_n+e_n\\0\end{pmatrix},

of which the gain :math:`Mz_n-w_{n-1}` is a linear function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.gaussian.observations import as_observations

__all__ = ["gain_log_evidence", "times_with_start"]


def times_with_start(law: LinearGaussianMeasure, times: Tensor) -> Tensor:
    """Return ``times (*batch, T)`` with the start of the law before them, ``(*batch, T + 1)``."""
    return torch.cat([torch.full_like(times[..., :1], law.initial_time), times], -1)


def gain_log_evidence(
    law: LinearGaussianMeasure, times: Tensor, y: Tensor, obs_scale: Tensor | float, emission: Tensor
) -> Tensor:
    """Return the log density ``(*B,)`` of what ``emission (p, d)`` times the state has gained since the time before.

    Args:
        law: The law of the state.
        times: The times ``(*B, T)``; the first gain is since the start of the law.
        y: The data ``(*B, T, p)``; NaN is missing.
        obs_scale: The standard deviation of the noise of the data.
        emission: The matrix M.
    """
    chain = _pairs(law.chain(times_with_start(law, times)), emission)
    read = torch.cat([emission, -torch.eye(emission.shape[0]).to(emission)], -1)
    seen = as_observations(times, y, obs_scale, read, None, read.shape[-1], law.like, True)
    return chain.log_evidence(**seen.on(seen.times)).to(law.like.dtype)  # type: ignore[arg-type]


def _pairs(chain: GaussianChain, emission: Tensor) -> GaussianChain:
    """Return the chain of pairs from the second point on."""
    m = emission.to(chain.initial_mean)
    size, count = m.shape[-1], m.shape[-2]
    mean, cov = chain.initial_mean, chain.initial_cov
    step, offset, noise = chain.transition, chain.offset, chain.noise_cov
    first = step[0]
    ahead = (first @ mean.unsqueeze(-1)).squeeze(-1) + offset[0]
    kept = (m @ mean.unsqueeze(-1)).squeeze(-1)
    batch = torch.broadcast_shapes(ahead.shape[:-1], kept.shape[:-1])
    start = torch.cat([ahead.expand(*batch, size), kept.expand(*batch, count)], -1)
    # Both parts of the first pair are linear in the start: J P J^T with J = (A_0; M), and the noise of the step.
    joint = torch.cat([first, m.expand(*first.shape[:-2], count, size)], -2)
    widen = (0, count, 0, count)
    spread = joint @ cov @ joint.mT + torch.nn.functional.pad(noise[0], widen)
    later = step[1:]
    lower = m.expand(*later.shape[:-2], count, size)
    wide = torch.nn.functional.pad(torch.cat([later, lower], -2), (0, count))
    return GaussianChain(
        start,
        spread,
        wide,
        torch.nn.functional.pad(offset[1:], (0, count)),
        torch.nn.functional.pad(noise[1:], widen),
    )
