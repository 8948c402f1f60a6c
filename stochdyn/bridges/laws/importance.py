r"""What linearisation leaves out, by importance weights of pinned paths.

For paths of the linearised process pinned at both ends, Girsanov's theorem gives

.. math::
    \frac{p(y\mid x)}{\tilde p(y\mid x)}=\tilde{\mathbb E}\Big[e^Z\,\Big|\,X_0=x,X_T=y\Big],\qquad
    Z=\int(b-\tilde b)^\top a^{-1}(dX-\tilde b\,dt)-\tfrac12\int|b-\tilde b|^2_{a^{-1}}dt

where :math:`\tilde b` is the linearised drift. :math:`b-\tilde b` is of second order in the distance from the nominal path, so the
weights are even, and grids may be coarse.

Reference: Schauer, van der Meulen & van Zanten (2017), Guided proposals for simulating multi-dimensional diffusion bridges.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.chain import Chain
from stochdyn.core.gaussian.batch_last import mv
from stochdyn.core.particles.resampling import effective_size

__all__ = ["effective_share", "log_correction", "weighted_paths"]


def weighted_paths(
    family: DriftFamily, chain: Chain, x: Tensor, y: Tensor, repeats: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pinned paths in opposite pairs, and what they weigh under the nonlinear drift.

    Args:
        family: The nonlinear drift.
        chain: The linearisation of the drift about the paths of the pairs.
        x: The first ends of the pairs, ``(d, P)``.
        y: The second ends of the pairs, ``(d, P)``.
        repeats: The number of paths per pair, an even number.
        generator: The source of randomness: a ``torch.Generator``, or None for torch's global one.

    Returns:
        States ``(R, K+1, d, P)``, innovations ``(R, K, d, P)``, log weights ``(R, P)``.
    """
    pinned = chain.pin(y)
    halves = [pinned.sample(x, generator) for _ in range(repeats // 2)]
    mean = pinned.mean(x)
    states = torch.stack([s for own, _ in halves for s in (own, 2 * mean - own)])
    increments = torch.stack([k for _, own in halves for k in (own, -own)])
    t = chain.ts[:-1].to(x)[:, None, None]
    h = chain.ts.diff().to(x)[:, None, None]
    now = states[:, :-1]
    linear = mv(chain.slope[:-1], now) + chain.level[:-1]
    gap = family(t, now.movedim(-2, -1)).movedim(-1, -2) - linear
    precision = torch.linalg.inv(chain.spread)[..., None]
    weighed = mv(precision, gap)
    moved = (
        states[:, 1:] - mv(chain.matrix, now) - chain.shift
    )  # what the noise of the linear process brought
    # Z = sum (b - b~)^T a^{-1} (dX - b~ dt) - h/2 |b - b~|^2, by Euler's rule, with the exact innovation for dX - b~ dt
    terms = (weighed * (moved - 0.5 * h * gap)).sum((1, 2))
    return states, increments, terms


def log_correction(log_weights: Tensor) -> Tensor:
    """Return the log of the mean weight of each pair, ``(P,)``, from ``(R, P)``."""
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])


def effective_share(log_weights: Tensor) -> Tensor:
    """Return the effective number of paths of each pair, as a share, ``(P,)``: one where linearisation is exact."""
    return effective_size(log_weights) / log_weights.shape[0]
