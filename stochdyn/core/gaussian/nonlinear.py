r"""Approximate Kalman filters of nonlinear models: extended, unscented and ensemble.

All three follow Gaussian beliefs through a chain :math:`z_{n+1}=m_n(z_n)+B_n(z_n)\epsilon_n` and observations
:math:`y_k=h(z)+\sigma(z)\eta_k`. They differ in how they average over a belief :math:`N(m,P)`: by the derivative at the mean, by
a rule with :math:`2Z+1` points, or over an ensemble. The update is the same:

.. math:: S=C_{hh}+R,\quad K=C_{zh}S^{-1},\quad \log p(y)=\log N(y;E h,S),\quad m'=m+K(y-E h),\quad P'=P-KSK^\top .
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stochdyn._checks import as_seed, check_positive_int, values_are_checked
from stochdyn._transforms import as_leaf, recording
from stochdyn.core.gaussian.small import psd_factor, psd_inverse, symmetrise, times
from stochdyn.errors import SingularDiffusionError

__all__ = [
    "EnsembleKalman",
    "ExtendedKalman",
    "GaussianStates",
    "NonlinearKalman",
    "UnscentedKalman",
    "kalman_states",
]

Map = Callable[[Tensor], Tensor]


class Chain(Protocol):
    """What a filter asks of a Markov chain."""

    def span(self, step: int) -> range:
        """Return the steps that lead to observation ``step``."""

    def mean(self, n: int, z: Tensor) -> Tensor:
        """Return the mean ``(..., Z)`` of the state after step ``n``."""

    def load(self, n: int, z: Tensor) -> Tensor:
        """Return the matrix ``(..., Z, M)`` from standard normals to the noise of step ``n``."""


@dataclass(frozen=True)
class GaussianStates:
    """The law of the states of a nonlinear model given data, as a Gaussian at each time.

    Attributes:
        times: The times of the data, ``(T,)`` or ``(*batch, T)``.
        mean: The means ``(*batch, T, Z)`` of the full state: the path, then the memory of its noise where it has any.
        covariance: The covariances ``(*batch, T, Z, Z)``.
        log_evidence: The logarithm ``(*batch,)`` of the approximate evidence.
    """

    times: Tensor
    mean: Tensor
    covariance: Tensor
    log_evidence: Tensor

    @property
    def variance(self) -> Tensor:
        """The variances ``(*batch, T, Z)``, clipped at zero."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)


@dataclass(frozen=True)
class _Belief:
    """A Gaussian, or an ensemble ``(N, *batch, Z)`` that stands for one."""

    mean: Tensor
    cov: Tensor
    members: Tensor | None = None


@dataclass(frozen=True)
class _Moments:
    """Mean ``(*batch, P)`` and covariance of a function of a belief, and the covariance ``(*batch, Z, P)`` with the state."""

    mean: Tensor
    cov: Tensor
    cross: Tensor
    slope: Tensor | None = None
    noise: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class _Row:
    """A belief after a step and, for smoothing, the belief before it and the covariance of the two states."""

    before: _Belief
    after: _Belief
    cross: Tensor


@dataclass(frozen=True)
class NonlinearKalman(ABC):
    """How a Gaussian belief is averaged over, by a filter of a nonlinear model."""

    @abstractmethod
    def _begin(self, mean: Tensor, cov: Tensor) -> _Belief:
        """Return the belief at the start."""

    @abstractmethod
    def _through(self, belief: _Belief, function: Map, load: Map, size: int) -> _Moments:
        """Return the moments of ``function(z) + load(z) e``, with ``size`` components."""

    @abstractmethod
    def _move(self, belief: _Belief, found: _Moments, load: Map, step: int) -> _Belief:
        """Return the belief after a step whose moments are known."""

    @abstractmethod
    def _update(
        self,
        belief: _Belief,
        found: _Moments,
        excess: Tensor,
        gain: Tensor,
        scale: Map,
        seen: Tensor,
        step: int,
    ) -> _Belief:
        """Return the belief after data.

        Args:
            belief: The belief before.
            found: The moments of the observations, their noise included.
            excess: The data less their mean, zero where missing.
            gain: The matrix ``(*batch, Z, p)``, zero where data are missing.
            scale: The noise of the observations as a function of the state.
            seen: The mask of what was observed.
            step: The number of steps of the chain before.
        """


@dataclass(frozen=True)
class _GaussianKalman(NonlinearKalman):
    """Filters whose belief is a mean and a covariance."""

    def _begin(self, mean: Tensor, cov: Tensor) -> _Belief:
        """Return the belief at the start."""
        return _Belief(mean, cov)

    def _move(self, belief: _Belief, found: _Moments, load: Map, step: int) -> _Belief:
        """Return the belief after a step whose moments are known."""
        return _Belief(found.mean, found.cov)

    def _update(
        self,
        belief: _Belief,
        found: _Moments,
        excess: Tensor,
        gain: Tensor,
        scale: Map,
        seen: Tensor,
        step: int,
    ) -> _Belief:
        """Return the belief after data."""
        mean = belief.mean + times(gain, excess)
        if found.slope is None or found.noise is None:
            return _Belief(mean, symmetrise(belief.cov - gain @ found.cov @ gain.mT))
        # Joseph's form (I - K H) P (I - K H)^T + K R K^T loses no digits where the data are far better than the belief.
        closed = torch.eye(gain.shape[-2], dtype=gain.dtype, device=gain.device) - gain @ found.slope
        return _Belief(mean, symmetrise(closed @ belief.cov @ closed.mT + gain @ found.noise @ gain.mT))


@dataclass(frozen=True)
class ExtendedKalman(_GaussianKalman):
    """The extended Kalman filter: equation and observation linearised at the mean.

    Use it first: it is the cheapest, exact for linear models, and good where the belief is narrow beside the curvature of the
    model. It needs drift, diffusion and observation that can be differentiated.

    Reference:
        A. H. Jazwinski, Stochastic processes and filtering theory, 1970.
    """

    def _through(self, belief: _Belief, function: Map, load: Map, size: int) -> _Moments:
        """Return the moments of ``function(z) + load(z) e``, by the derivative at the mean."""
        value, slope = _linearised(function, belief.mean, size)
        spread = load(belief.mean)
        noise = spread @ spread.mT
        cross = belief.cov @ slope.mT
        return _Moments(value, symmetrise(slope @ cross + noise), cross, slope, noise)


@dataclass(frozen=True)
class UnscentedKalman(_GaussianKalman):
    r"""The unscented Kalman filter: averages by a rule with :math:`2Z+1` points, exact for polynomials of third degree.

    Use it where the extended filter errs because the belief is wide; it asks for no derivatives of the model.
    The point in the middle has the weight :math:`\kappa/(Z+\kappa)` with :math:`\kappa=\max(3-Z,0)`, so that no weight is
    negative and covariances stay so.

    Reference:
        S. J. Julier and J. K. Uhlmann, Unscented filtering and nonlinear estimation, 2004.
    """

    def _through(self, belief: _Belief, function: Map, load: Map, size: int) -> _Moments:
        """Return the moments of ``function(z) + load(z) e``, by the rule of points."""
        dim = belief.mean.shape[-1]
        middle = max(3.0 - dim, 0.0)
        wide = (dim + middle) ** 0.5 * _factor(belief.cov)
        arms = wide.movedim(-1, 0)
        points = belief.mean + torch.cat([torch.zeros_like(arms[:1]), arms, -arms])
        weights = points.new_full((2 * dim + 1,), 0.5 / (dim + middle))
        weights[0] = middle / (dim + middle)
        values, noise = function(points), load(points)
        column = weights.reshape(-1, *(1,) * (points.ndim - 1))
        mean = (column * values).sum(0)
        gap = values - mean
        spread = noise @ noise.mT
        if spread.ndim > belief.mean.ndim + 1:
            # The noise depends on the state: E[B B^T] over the points.
            spread = (column.unsqueeze(-1) * spread).sum(0)
        cov = torch.einsum("n,n...i,n...j->...ij", weights, gap, gap) + spread
        cross = torch.einsum("n,n...i,n...j->...ij", weights, points - belief.mean, gap)
        return _Moments(mean, symmetrise(cov), cross)


@dataclass(frozen=True)
class EnsembleKalman(NonlinearKalman):
    """The ensemble Kalman filter: averages over simulated members, which move with noise of their own.

    Use it for states of many components, where covariances by the other two are too dear, and where drift or observation have
    no derivatives. Its noise comes from a fixed seed, the same for all series and parameters, so that the evidence is a smooth
    function of the parameters; its error falls as one over the number of members.

    Attributes:
        num_particles: The number of members.
        seed: The seed of their noise.

    Reference:
        G. Burgers, P. J. van Leeuwen and G. Evensen, Analysis scheme in the ensemble Kalman filter, 1998.
    """

    num_particles: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_int(self.num_particles, "num_particles", 3)
        as_seed(self.seed, "seed")

    def _begin(self, mean: Tensor, cov: Tensor) -> _Belief:
        """Return the belief at the start."""
        normal = self._normal(mean, mean.shape[-1], 0, 0)
        return self._belief(mean + times(_factor(cov), normal))

    def _through(self, belief: _Belief, function: Map, load: Map, size: int) -> _Moments:
        """Return the moments of ``function(z) + load(z) e`` over the members."""
        assert belief.members is not None
        z = belief.members
        values, noise = function(z), load(z)
        spread = noise @ noise.mT
        if spread.ndim > belief.mean.ndim + 1:
            spread = spread.mean(0)
        mean = values.mean(0)
        gap = values - mean
        share = 1.0 / (self.num_particles - 1)
        cov = share * torch.einsum("n...i,n...j->...ij", gap, gap) + spread
        cross = share * torch.einsum("n...i,n...j->...ij", z - belief.mean, gap)
        return _Moments(mean, symmetrise(cov), cross, values=values)

    def _move(self, belief: _Belief, found: _Moments, load: Map, step: int) -> _Belief:
        """Return the belief after a step whose moments are known."""
        assert belief.members is not None and found.values is not None
        noise = load(belief.members)
        normal = self._normal(found.mean, noise.shape[-1], 1, step)
        return self._belief(found.values + times(noise, normal))

    def _update(
        self,
        belief: _Belief,
        found: _Moments,
        excess: Tensor,
        gain: Tensor,
        scale: Map,
        seen: Tensor,
        step: int,
    ) -> _Belief:
        """Return the belief after data: every member sees them with a noise of its own."""
        assert belief.members is not None and found.values is not None
        noise = scale(belief.members)
        normal = self._normal(found.mean, noise.shape[-1], 2, step)
        own = excess + torch.where(seen, found.mean - found.values - times(noise, normal), 0.0)
        return self._belief(belief.members + times(gain, own))

    def _belief(self, members: Tensor) -> _Belief:
        mean = members.mean(0)
        gap = members - mean
        cov = torch.einsum("n...i,n...j->...ij", gap, gap) / (self.num_particles - 1)
        return _Belief(mean, symmetrise(cov), members)

    def _normal(self, like: Tensor, width: int, purpose: int, step: int) -> Tensor:
        """Return standard normals ``(N, *1, width)`` of a purpose and a step: centred, and the same in every precision."""
        words = 3 * step + purpose
        source = torch.Generator(like.device).manual_seed((int(self.seed) * 1_000_003 + words) % 2**62)
        shape = (self.num_particles, *(1,) * (like.ndim - 1), width)
        normal = torch.randn(shape, generator=source, dtype=torch.float64, device=like.device)
        return (normal - normal.mean(0)).to(like.dtype)


def kalman_states(
    method: NonlinearKalman,
    chain: Chain,
    start: tuple[Tensor, Tensor],
    observe: Map,
    scale: Map,
    y: Tensor,
    times: Tensor,
    *,
    smooth: bool = False,
) -> GaussianStates:
    """Filter, and smooth, data of a nonlinear model.

    Args:
        method: How beliefs are averaged over.
        chain: The chain.
        start: The mean ``(*batch, Z)`` and the covariance ``(*batch, Z, Z)`` at the start, with the batch axes of the data.
        observe: The function from full states ``(..., Z)`` to the means ``(..., p)`` of the observations.
        scale: The function from full states to matrices ``(..., p, p)`` from standard normals to the noise of observations.
        y: The data ``(*batch, T, p)``; NaN is missing.
        times: The times of the data.
        smooth: Whether later data count too.
    """
    belief = method._begin(*start)
    size, p = belief.mean.shape[-1], y.shape[-1]
    seen = ~torch.isnan(y)
    y = torch.where(seen, y, torch.zeros_like(y))
    eye = torch.eye(p, dtype=belief.mean.dtype, device=y.device)
    total = belief.mean.new_zeros(belief.mean.shape[:-1])
    failed = torch.zeros_like(total, dtype=torch.bool)
    rows: list[_Row] = []
    beliefs, places = [], []
    for k in range(y.shape[-2]):
        for n in chain.span(k):
            load = _at(chain.load, n)
            found = method._through(belief, _at(chain.mean, n), load, size)
            moved = method._move(belief, found, load, n)
            if smooth:
                rows.append(_Row(belief, _Belief(found.mean, found.cov), found.cross))
            belief = moved
        here = seen[..., k, :]
        found = method._through(belief, observe, scale, p)
        # A missing component is independent noise of variance one that was seen at its mean: it says nothing.
        pair = here.unsqueeze(-1) & here.unsqueeze(-2)
        cov = torch.where(pair, found.cov, eye)
        excess = torch.where(here, y[..., k, :] - found.mean, torch.zeros_like(found.mean))
        factor, info = torch.linalg.cholesky_ex(cov)
        failed = failed | (info != 0)
        white = torch.linalg.solve_triangular(factor, excess.unsqueeze(-1), upper=False)[..., 0]
        count = here.sum(-1).to(white.dtype)
        total = (
            total
            - 0.5 * white.square().sum(-1)
            - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            - 0.5 * math.log(2 * math.pi) * count
        )
        cross = torch.where(here.unsqueeze(-2), found.cross, torch.zeros_like(found.cross))
        gain = torch.cholesky_solve(cross.mT, factor).mT
        slope = noise = None
        if found.slope is not None and found.noise is not None:
            slope = torch.where(here.unsqueeze(-1), found.slope, torch.zeros_like(found.slope))
            noise = torch.where(pair, found.noise, eye)
        kept = _Moments(found.mean, cov, cross, slope, noise, found.values)
        # The place in the grid, since other times of data mustn't change the members' noise.
        belief = method._update(belief, kept, excess, gain, scale, here, chain.span(k).stop)
        beliefs.append(belief)
        places.append(len(rows))
    if values_are_checked() and bool(failed.any()):
        raise SingularDiffusionError(
            "the predicted covariance of an observation is not positive definite",
            hint="give the observations a positive scale, smaller steps dt, or compute in float64",
        )
    # A wild proposal of a sampler is improbable, not an error.
    total = torch.where(failed, torch.full_like(total, -torch.inf), total)
    mean = torch.stack([b.mean for b in beliefs], -2)
    cov = torch.stack([b.cov for b in beliefs], -3)
    if smooth:
        mean, cov = _smoothed(rows, places, beliefs)
    return GaussianStates(times, mean, cov, total)


def _smoothed(rows: list[_Row], places: list[int], beliefs: list[_Belief]) -> tuple[Tensor, Tensor]:
    """Run the Rauch-Tung-Striebel recursion backwards over all steps, and return what it says at the data."""
    mean, cov = beliefs[-1].mean, beliefs[-1].cov
    means, covs = [mean], [cov]
    for k in range(len(beliefs) - 2, -1, -1):
        for row in reversed(rows[places[k] : places[k + 1]]):
            # J = C P'^-1, m_s = m + J (m_s' - m'), P_s = P + J (P_s' - P') J^T.
            gain = row.cross @ psd_inverse(row.after.cov)
            mean = row.before.mean + times(gain, mean - row.after.mean)
            cov = symmetrise(row.before.cov + gain @ (cov - row.after.cov) @ gain.mT)
        means.append(mean)
        covs.append(cov)
    return torch.stack(means[::-1], -2), torch.stack(covs[::-1], -3)


def _at(function: Callable[[int, Tensor], Tensor], n: int) -> Map:
    return lambda z: function(n, z)


def _factor(cov: Tensor) -> Tensor:
    """Return a factor of positive semi-definite matrices; numbers need no loop."""
    if cov.shape[-1] > 1:
        return psd_factor(cov)
    known = cov <= 0
    return torch.where(known, torch.zeros_like(cov), torch.where(known, torch.ones_like(cov), cov).sqrt())


def _linearised(function: Map, z: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the value ``(*batch, P)`` and the Jacobian ``(*batch, P, Z)`` of a function, by one backward pass.

    Copy i of the point asks for the derivative of component i alone.
    """
    keep = torch.is_grad_enabled()
    if keep and not z.requires_grad:
        # Without parameters that are differentiated there is no graph to keep.
        keep = function(z).requires_grad
    with recording():
        point = z if keep and z.requires_grad else as_leaf(z)
        copies = point.unsqueeze(0).expand(size, *z.shape)
        values = function(copies).expand(size, *z.shape[:-1], size)
        total = values.diagonal(dim1=0, dim2=-1).sum()
        slope = None
        if total.requires_grad:
            slope = torch.autograd.grad(total, copies, create_graph=keep, allow_unused=True)[0]
    if slope is None:
        slope = torch.zeros_like(copies)
    value = values[0]
    return (value, slope.movedim(0, -2)) if keep else (value.detach(), slope.movedim(0, -2).detach())
