"""Densities and divergences of Gaussian laws on a grid, and of linear-Gaussian path laws."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_time_grid, check_same_device, check_same_dtype
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.core.gaussian.filter import forward_means, riccati
from stochdyn.core.gaussian.observations import prepare
from stochdyn.core.gaussian.recursion import (
    align,
    broadcast_batches,
    columns,
    flatten_batch,
    restore,
    restore_columns,
)
from stochdyn.core.gaussian.small import definite_factor, psd_inverse, standard_deviations
from stochdyn.errors import ApproximationWarning, DiffusionMismatchError, ShapeError

if TYPE_CHECKING:
    from stochdyn.core.gaussian.measure import LinearGaussianMeasure

__all__ = [
    "Conditionals",
    "chain_conditionals",
    "check_common_events",
    "grid_kl",
    "path_kl",
    "same_covariance",
]

_PANEL_NODES = 8
_MAX_REFINEMENTS = 10


@dataclass(frozen=True)
class Conditionals:
    r"""The Gaussian laws of every point of given paths, given the points before it.

    .. math:: X_n\mid X_{<n}\sim N(x_n-r_n,\;F_nF_n^\top)

    Attributes:
        residual: The residuals ``r (T, b, d, s)``: one column per path where ``b`` is 1.
        factor: F, ``(T, b, d, d)``.
        keep: ``(T, b)``, False where the point is certain and no part of the event.
        batch: The shape of paths and laws together.
    """

    residual: Tensor
    factor: Tensor
    keep: Tensor
    batch: torch.Size

    @property
    def flat(self) -> int:
        """The size of the batch axis."""
        return self.factor.shape[1]

    def log_prob(self) -> Tensor:
        """Return the log density of the paths, ``batch``."""
        # log N(r; 0, L L^T) = -|L^{-1} r|^2 / 2 - sum log L_ii - d log(2 pi) / 2, summed over the points that count.
        white = torch.linalg.solve_triangular(self.factor, self.residual, upper=False)
        squares = (white.square() * self.keep[..., None, None]).sum((0, 2), keepdim=True)
        squares = restore_columns(squares, self.batch, self.flat)[0, ..., 0]
        logs = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) * self.keep
        count = self.keep.sum(0).to(white.dtype) * white.shape[2]
        constant = restore((logs.sum(0) + 0.5 * math.log(2 * math.pi) * count)[None], self.batch, self.flat)[
            0
        ]
        return -0.5 * squares - constant

    def divergence(self, other: Conditionals) -> Tensor:
        """Return the sum over the points of KL(this || other), on the paths, ``batch``."""
        # KL(N(m, L L^T) || N(m', L' L'^T)) = (|L'^{-1} L|^2 + |L'^{-1} (m - m')|^2 - d) / 2 + log det L' / L.
        mine, theirs = self._spread(), other._spread()
        gap = theirs.residual - mine.residual
        ahead = torch.linalg.solve_triangular(theirs.factor, torch.cat((mine.factor, gap), -1), upper=False)
        logs = (
            (theirs.factor.diagonal(dim1=-2, dim2=-1) / mine.factor.diagonal(dim1=-2, dim2=-1)).log().sum(-1)
        )
        terms = 0.5 * (ahead.square().sum((-2, -1)) - gap.shape[-2]) + logs
        return (terms * mine.keep).sum(0).reshape(self.batch)

    def _spread(self) -> Conditionals:
        """Give every path a law of its own."""
        if self.flat == self.batch.numel():
            return self
        residual = self.residual[:, 0].movedim(-1, 1).unsqueeze(-1)
        count = residual.shape[1]
        return replace(
            self,
            residual=residual,
            factor=self.factor.expand(-1, count, -1, -1),
            keep=self.keep.expand(-1, count),
        )


def chain_conditionals(
    chain: GaussianChain, x: Tensor, emission: Tensor | None, certain: Tensor | None = None
) -> Conditionals:
    """Return the conditional laws of paths ``x (*sample, *B, T, d)`` of a chain, or of what ``emission`` shows of it.

    Args:
        chain: The chain.
        x: The paths.
        emission: The matrix that maps states to observations, ``(d, z)``, or None if the paths are the states.
        certain: ``(T, *B)``, True for points that are known beforehand; by default a fixed start.
    """
    if certain is None:
        fixed = (chain.initial_cov == 0).all(-1).all(-1)
        certain = torch.zeros(chain.num_steps + 1, *fixed.shape, dtype=torch.bool, device=x.device)
        certain[0] = fixed
    return _markov(chain, x, certain) if emission is None else _hidden(chain, x, emission, certain)


def _markov(chain: GaussianChain, x: Tensor, certain: Tensor) -> Conditionals:
    paths = x.movedim(-2, 0)
    batch = broadcast_batches({"x": tuple(paths.shape[1:-1]), "law": tuple(chain.batch_shape)})
    covs = (chain.initial_cov[None], chain.transition, chain.noise_cov)
    shared = broadcast_batches(
        {"law": torch.broadcast_shapes(*(c.shape[1:-2] for c in covs)), "event": tuple(certain.shape[1:])}
    )
    flat = 1 if shared.numel() == 1 else batch.numel()
    states = columns(paths, batch, flat)
    a = flatten_batch(chain.transition, 1, 2, batch, flat)
    first = states[:1] - columns(chain.initial_mean[None], batch, flat)
    residual = torch.cat((first, states[1:] - a @ states[:-1] - columns(chain.offset, batch, flat)))
    cov = torch.cat(
        (
            flatten_batch(chain.initial_cov[None], 1, 2, batch, flat),
            flatten_batch(chain.noise_cov, 1, 2, batch, flat),
        )
    )
    keep = ~flatten_batch(certain[..., None], 1, 1, batch, flat)[..., 0]
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    cov = torch.where(keep[..., None, None], cov, eye)
    factor = torch.cat(
        (definite_factor(cov[:1], "the initial law"), definite_factor(cov[1:], "a transition"))
    )
    return Conditionals(residual, factor, keep, batch)


def _hidden(chain: GaussianChain, x: Tensor, emission: Tensor, certain: Tensor) -> Conditionals:
    """Run the filter with exact observations, whose innovations are the residuals."""
    y = x.movedim(-2, 0)
    exact = torch.zeros(x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
    lift = (1,) * (y.ndim - 1 - certain.ndim)
    mask = (~certain).reshape(certain.shape[0], *lift, *certain.shape[1:])
    cov_batch = torch.broadcast_shapes(
        *(c.shape[k:-2] for c, k in ((chain.initial_cov, 0), (chain.transition, 1), (chain.noise_cov, 1)))
    )
    shape = chain.num_steps + 1, chain.state_dim
    seen = prepare(y, emission, exact, mask, shape, cov_batch, chain.batch_shape)
    flat, batch = seen.flat, seen.batch
    a = flatten_batch(chain.transition, 1, 2, batch, flat)
    gains = riccati(
        flatten_batch(chain.initial_cov, 0, 2, batch, flat),
        a,
        flatten_batch(chain.noise_cov, 1, 2, batch, flat),
        seen.emission,
        seen.obs_cov,
    )
    data = columns(seen.y, batch, flat)
    start = columns(chain.initial_mean[None], batch, flat)[0]
    predicted, _, _ = forward_means(gains, start, a, columns(chain.offset, batch, flat), seen.emission, data)
    keep = flatten_batch(mask[..., None], 1, 1, batch, flat)[..., 0]
    return Conditionals(data - seen.emission @ predicted, gains.factor, keep, batch)


def check_common_events(one: Tensor, two: Tensor) -> None:
    """Raise if a point ``(T, ...)`` is certain under one law and random under the other.

    Raises:
        DiffusionMismatchError: If so.
    """
    lead = max(one.ndim, two.ndim)
    one, two = (x.reshape(x.shape[0], *(1,) * (lead - x.ndim), *x.shape[1:]) for x in (one, two))
    if bool((one != two).any()):
        raise DiffusionMismatchError(
            "a point of the path is fixed under one law and random under the other, so they are mutually singular"
        )


def same_covariance(one: Tensor, two: Tensor) -> Tensor:
    """Return ``(...)``, whether covariances ``(..., n, n)`` agree up to rounding, each entry in its own units."""
    unit = standard_deviations(one)
    gap = (one - two).detach().abs() / unit[..., :, None] / unit[..., None, :]
    return gap.flatten(-2).amax(-1) <= 100 * torch.finfo(one.dtype).eps


def _gaussian_kl(gap: Tensor, cov: Tensor, other: Tensor, name: str) -> Tensor:
    """Return the divergence of normals whose means differ by ``gap (..., d)``."""
    own, base = definite_factor(cov, name), definite_factor(other, name)
    # The same formula as in Conditionals.divergence, for one pair of normals.
    spread = torch.linalg.solve_triangular(base, torch.cat((own, gap[..., None]), -1), upper=False)
    logs = base.diagonal(dim1=-2, dim2=-1).log().sum(-1) - own.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * (spread.square().sum((-2, -1)) - gap.shape[-1]) + logs


def _initial_kl(p: GaussianChain, q: GaussianChain, batch: torch.Size) -> Tensor:
    """Return the divergence of the first points, zero for members that start from the same fixed point."""
    gap = align(p.initial_mean - q.initial_mean, 0, 1, batch)
    own, base = (align(c.initial_cov, 0, 2, batch) for c in (p, q))
    fixed, other = ((c == 0).all(-1).all(-1) for c in (own, base))
    if bool((fixed != other).any()):
        raise DiffusionMismatchError("a fixed and a random start are mutually singular")
    if bool((gap != 0).any(-1)[fixed].any()):
        raise DiffusionMismatchError(
            "the laws start from different fixed points, so they are mutually singular"
        )
    eye = torch.eye(gap.shape[-1], dtype=gap.dtype, device=gap.device)
    own, base = (torch.where(fixed[..., None, None], eye, c) for c in (own, base))
    return _gaussian_kl(gap, own, base, "the initial law")


def _common(p: LinearGaussianMeasure, q: LinearGaussianMeasure, ts: Tensor) -> torch.Size:
    check_same_dtype(this=p.initial_mean, other=q.initial_mean)
    check_same_device(this=p.initial_mean, other=q.initial_mean, ts=ts)
    if p.dim != q.dim:
        raise ShapeError("the laws have states of different size", got=f"{p.dim} and {q.dim}")
    return broadcast_batches({"this": tuple(p.batch_shape), "other": tuple(q.batch_shape)})


def grid_kl(p: LinearGaussianMeasure, q: LinearGaussianMeasure, ts: object) -> Tensor:
    """Return the divergence of the laws at ``ts``, by the chain rule over transitions."""
    ts = as_time_grid(ts, "ts", 1, like=p.like)
    batch = _common(p, q, ts)
    one, two = p.chain(ts), q.chain(ts)
    mean, cov = (x[:-1] for x in one.moments())
    cov = align(cov, 1, 2, batch)
    own, base = (align(c.noise_cov, 1, 2, batch) for c in (one, two))
    # Given x the two transitions have means that differ by (A - A') x + c - c'; the divergence is averaged over x.
    change = align(one.transition, 1, 2, batch) - align(two.transition, 1, 2, batch)
    shift = align(one.offset, 1, 1, batch) - align(two.offset, 1, 1, batch)
    gap = (change @ align(mean, 1, 1, batch)[..., None]).squeeze(-1) + shift
    steps = _gaussian_kl(gap, own, base, "a transition")
    # The mean over the state enters only through the spread of the gap.
    inverse = torch.cholesky_solve(change @ cov @ change.mT, definite_factor(base, "a transition"))
    spread = 0.5 * inverse.diagonal(dim1=-2, dim2=-1).sum(-1)
    return _initial_kl(one, two, batch) + (steps + spread).sum(0)


def path_kl(p: LinearGaussianMeasure, q: LinearGaussianMeasure, ts: object) -> Tensor:
    """Return the divergence of the path laws over the span of ``ts``."""
    ts = as_time_grid(ts, like=p.like)
    batch = _common(p, q, ts)
    tolerance = 1e-10 if p.initial_mean.dtype == torch.float64 else 1e-5
    start = _initial_kl(p.chain(ts[:1]), q.chain(ts[:1]), batch)
    panels = 1
    with torch.no_grad():
        coarse = _control_energy(p, q, ts, panels)
        for _ in range(_MAX_REFINEMENTS):
            panels *= 2
            fine = _control_energy(p, q, ts, panels)
            # Every member of the batch by its own measure.
            change = (fine - coarse).abs()
            if bool((change <= tolerance * fine.abs()).all()):
                break
            coarse = fine
        else:
            worst = float((change / fine.abs().clamp_min(torch.finfo(fine.dtype).tiny)).max())
            message = f"the path divergence still changes by {worst:.1e} (relative); a finer ts helps"
            warnings.warn(message, ApproximationWarning, stacklevel=3)
    return start + (_control_energy(p, q, ts, panels) if torch.is_grad_enabled() else fine)


def _control_energy(p: LinearGaussianMeasure, q: LinearGaussianMeasure, ts: Tensor, panels: int) -> Tensor:
    # 1/2 E_p int |G^+ (f_p - f_q)|^2 dt by Gauss' rule on panels of every interval: for linear drifts the mean over the state
    # is the trace of S^{-1} times the second moment of (A - A') x + b - b'.
    nodes, weights = (
        torch.as_tensor(x, dtype=ts.dtype, device=ts.device)
        for x in np.polynomial.legendre.leggauss(_PANEL_NODES)
    )
    fractions = (torch.arange(panels, dtype=ts.dtype, device=ts.device)[:, None] + 0.5 * (nodes + 1)) / panels
    dt = (ts[1:] - ts[:-1])[:, None]
    times = (ts[:-1, None] + dt * fractions.flatten()).flatten()
    weight = (dt * (0.5 * weights / panels).repeat(panels)).flatten().to(p.initial_mean.dtype)
    a, b, s = p.coefficients(times.to(weight.dtype))
    a2, b2, s2 = q.coefficients(times.to(weight.dtype))
    mean, cov = p.chain(times).moments()
    batch = broadcast_batches({"this": tuple(p.batch_shape), "other": tuple(q.batch_shape)})
    s, s2 = align(s, 1, 2, batch), align(s2, 1, 2, batch)
    if not bool(same_covariance(s, s2).all()):
        raise DiffusionMismatchError(
            "the laws have different diffusions, so their path laws are mutually singular"
        )
    change = align(a, 1, 2, batch) - align(a2, 1, 2, batch)
    shift = align(b, 1, 1, batch) - align(b2, 1, 1, batch)
    inverse = psd_inverse(s)
    joint = torch.cat((change, shift[..., None]), -1)
    size = torch.cat((align(a, 1, 2, batch).abs() + align(a2, 1, 2, batch).abs(),
                      (align(b, 1, 1, batch).abs() + align(b2, 1, 1, batch).abs())[..., None]), -1)  # fmt: skip
    _check_reached(joint.detach(), size.detach(), s.detach(), inverse.detach())
    gap = (change @ align(mean, 1, 1, batch)[..., None]).squeeze(-1) + shift
    second = change @ align(cov, 1, 2, batch) @ change.mT + gap[..., :, None] * gap[..., None, :]
    return 0.5 * torch.tensordot(weight, (inverse * second).sum((-2, -1)), 1)


def _check_reached(joint: Tensor, size: Tensor, s: Tensor, inverse: Tensor) -> None:
    """Raise unless differences ``joint (..., d, k)`` of drifts of ``size`` lie where the noise ``s (..., d, d)`` acts."""
    eps = 1e4 * torch.finfo(s.dtype).eps
    noisy = (s.diagonal(dim1=-2, dim2=-1) > 0)[..., None]
    unit = standard_deviations(s)[..., None]
    left = (joint - s @ inverse @ joint).abs() / unit
    most = (joint.abs() / unit * noisy).amax(-2, keepdim=True)
    still = ~noisy & (joint.abs() > eps * size)
    if bool((still | (noisy & (left > eps * most))).any()):
        raise DiffusionMismatchError(
            "the drifts differ where no noise acts, so the path laws are mutually singular"
        )
