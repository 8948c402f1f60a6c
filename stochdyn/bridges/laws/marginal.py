"""The law of a bridge at one time: a mixture of Gaussians, one for every pair of particles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_sample_shape, as_tensor, check_event_size
from stochdyn.core.law.marginals import Generator, Marginal, SampleShape
from stochdyn.errors import UnavailableError

__all__ = ["BridgeMarginal", "draw_index"]

_CHUNK_NUMBERS = 2**22


class BridgeMarginal(Marginal):
    r"""A mixture of Gaussians, or of points at the time of a snapshot.

    .. math:: q_t=\sum_sw_s\,N(m_s,\,V_s)

    Attributes:
        time: The time at which the law is taken.
        means: The means of the components, ``(S, d)``.
        factors: The lower Cholesky factors of the components' covariances, ``(S, d, d)``, or ``(1, d, d)`` for one that all
            share; None for points.
        weights: The weights of the components, ``(S,)``, which sum to one.
    """

    def __init__(self, time: float, means: Tensor, factors: Tensor | None, weights: Tensor) -> None:
        self.time, self.means, self.factors, self.weights = time, means, factors, weights

    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw ``(*sample, d)`` independent states."""
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.means.device)
        index = draw_index(self.weights, math.prod(shape), source)
        x = self.means[index]
        if self.factors is not None:
            factor = self.factors[index] if len(self.factors) > 1 else self.factors
            noise = torch.randn(x.shape, generator=source, dtype=x.dtype, device=x.device)
            x = x + (factor @ noise[..., None]).squeeze(-1)
        return x.reshape(*shape, x.shape[-1])

    @property
    def mean(self) -> Tensor:
        """The mean, ``(d,)``."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """The covariance, ``(d, d)``."""
        # law of total variance: that of the components' means, and the mean of their covariances
        centred = self.means - self.mean
        between = centred.mT @ (self.weights[:, None] * centred)
        if self.factors is None:
            return between
        own = self.factors @ self.factors.mT
        return between + (own[0] if len(own) == 1 else torch.einsum("s,sij->ij", self.weights, own))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density ``(...)`` at ``x (..., d)``.

        Raises:
            UnavailableError: If this is the law at a snapshot, which is a set of points and has no density.
        """
        if self.factors is None:
            raise UnavailableError(
                "at a snapshot the bridge is a set of points and has no density",
                got=f"t={self.time:g}",
                hint="ask at a time between two snapshots",
            )
        x = as_tensor(x, "x", like=self.means, finite=False)
        check_event_size(x, self.means.shape[1], "x")
        flat = x.reshape(-1, x.shape[-1])
        # log sum_s w_s N(x; m_s, L_s L_s^T), in blocks of points
        constant = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        offset = self.weights.log() - constant - 0.5 * x.shape[-1] * math.log(2 * math.pi)
        rows = max(1, _CHUNK_NUMBERS // self.means.numel())
        parts = []
        for own in flat.split(rows):
            gap = (own[:, None] - self.means)[..., None]
            white = torch.linalg.solve_triangular(self.factors, gap, upper=False).squeeze(-1)
            parts.append(torch.logsumexp(offset - 0.5 * white.square().sum(-1), -1))
        return torch.cat(parts).reshape(x.shape[:-1])


def draw_index(weights: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``n`` indices by weight; unlike ``torch.multinomial`` for any number of categories."""
    reach = weights.double().cumsum(0)
    points = torch.rand(n, generator=generator, dtype=torch.float64, device=weights.device) * reach[-1]
    return torch.searchsorted(reach, points, right=True).clamp_max(len(weights) - 1)
