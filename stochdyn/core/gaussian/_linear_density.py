"""Densities and divergences of linear-Gaussian laws."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_same_device, check_same_dtype, check_time_grid
from stochdyn.core.gaussian._batching import (
    align,
    broadcast_batches,
    columns,
    flatten_batch,
    restore,
    restore_columns,
)
from stochdyn.core.gaussian._psd import symmetrise
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.errors import ApproximationWarning, DiffusionMismatchError, ShapeError, SingularDiffusionError

if TYPE_CHECKING:
    from stochdyn.core.gaussian.measure import LinearGaussianMeasure

__all__ = ["chain_log_prob", "grid_kl", "joint_covariance", "path_kl"]

_PANEL_NODES = 8
_MAX_REFINEMENTS = 10


def joint_covariance(chain: GaussianChain) -> Tensor:
    """Return ``(*B, (N+1) z, (N+1) z)``, time leading in the flattened axes."""
    batch, size, steps = chain.batch_shape, chain.state_dim, chain.num_steps
    covs = chain.moments()[1].reshape(steps + 1, -1, size, size)
    a = flatten_batch(chain.transition, 1, 2, batch)
    row = covs[0].new_zeros(covs.shape[1], size, (steps + 1) * size)
    rows = []
    for n in range(steps + 1):
        if n:
            row = a[n - 1] @ row
        row = torch.cat((row[..., : n * size], covs[n], row[..., (n + 1) * size :]), -1)
        rows.append(row)
    lower = torch.stack(rows, 1).reshape(covs.shape[1], (steps + 1) * size, (steps + 1) * size)
    index = torch.arange(steps + 1, device=lower.device).repeat_interleave(size)
    full = torch.where(index[:, None] >= index, lower, lower.mT)
    return full.reshape(*batch, *full.shape[-2:])


def chain_log_prob(chain: GaussianChain, x: Tensor, conditional: bool) -> Tensor:
    """Return the log density of ``x (*sample, *B, N+1, z)``; ``conditional`` leaves the first point out."""
    paths = x.movedim(-2, 0)
    batch = broadcast_batches({"x": tuple(paths.shape[1:-1]), "law": tuple(chain.batch_shape)})
    covs = {
        "initial_cov": chain.initial_cov[None],
        "transition": chain.transition,
        "noise_cov": chain.noise_cov,
    }
    shared = broadcast_batches({n: tuple(c.shape[1:-2]) for n, c in covs.items()}).numel() == 1
    flat = 1 if shared else batch.numel()
    states = columns(paths, batch, flat)
    a = flatten_batch(chain.transition, 1, 2, batch, flat)
    residual = states[1:] - a @ states[:-1] - columns(chain.offset, batch, flat)
    factor = _factor(flatten_batch(chain.noise_cov, 1, 2, batch, flat), "a transition")
    if not conditional:
        start = states[:1] - columns(chain.initial_mean[None], batch, flat)
        initial = _factor(flatten_batch(chain.initial_cov[None], 1, 2, batch, flat), "the initial law")
        residual, factor = torch.cat((start, residual)), torch.cat((initial, factor))
    white = torch.linalg.solve_triangular(factor, residual, upper=False)
    squares = restore_columns(white.square().sum((0, 2), keepdim=True), batch, flat)[0, ..., 0]
    log_scale = restore(factor.diagonal(dim1=-2, dim2=-1).log().sum((0, 2))[None], batch, flat)[0]
    count = white.shape[0] * white.shape[2]
    return -0.5 * (squares + count * math.log(2 * math.pi)) - log_scale


def _factor(cov: Tensor, name: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(cov)
    if bool((info != 0).any()):
        raise SingularDiffusionError(
            f"the covariance of {name} is singular, so there is no density",
            hint="compare the laws through their noise, or look at the components that the noise reaches",
        )
    return factor


def _gaussian_kl(gap: Tensor, cov: Tensor, other: Tensor, name: str) -> Tensor:
    """Return the divergence of normals whose means differ by ``gap (..., d)``."""
    own, base = _factor(cov, name), _factor(other, name)
    spread = torch.linalg.solve_triangular(base, torch.cat((own, gap[..., None]), -1), upper=False)
    logs = base.diagonal(dim1=-2, dim2=-1).log().sum(-1) - own.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * (spread.square().sum((-2, -1)) - gap.shape[-1]) + logs


def _initial_kl(p: GaussianChain, q: GaussianChain, batch: torch.Size, fixed: tuple[bool, bool]) -> Tensor:
    gap = align(p.initial_mean - q.initial_mean, 0, 1, batch)
    if fixed[0] != fixed[1]:
        raise DiffusionMismatchError("a fixed and a random start are mutually singular")
    if fixed[0]:
        if bool((gap != 0).any()):
            raise DiffusionMismatchError(
                "the laws start from different fixed points, so they are mutually singular"
            )
        return gap.new_zeros(batch)
    own, base = (align(c.initial_cov, 0, 2, batch) for c in (p, q))
    return _gaussian_kl(gap, own, base, "the initial law")


def _common(
    p: LinearGaussianMeasure, q: LinearGaussianMeasure, ts: Tensor
) -> tuple[torch.Size, tuple[bool, bool]]:
    check_time_grid(ts, min_points=1)
    check_same_dtype(this=p.initial_mean, other=q.initial_mean)
    check_same_device(this=p.initial_mean, other=q.initial_mean, ts=ts)
    if p.dim != q.dim:
        raise ShapeError("the laws have states of different size", got=f"{p.dim} and {q.dim}")
    batch = broadcast_batches({"this": tuple(p.batch_shape), "other": tuple(q.batch_shape)})
    start = float(ts[0].detach())
    return batch, (p.fixed_start and start == p.initial_time, q.fixed_start and start == q.initial_time)


def grid_kl(p: LinearGaussianMeasure, q: LinearGaussianMeasure, ts: Tensor) -> Tensor:
    """Return the divergence of the laws at ``ts``, by the chain rule over transitions."""
    batch, fixed = _common(p, q, ts)
    one, two = p.chain(ts), q.chain(ts)
    mean, cov = (x[:-1] for x in one.moments())
    cov = align(cov, 1, 2, batch)
    own, base = (align(c.noise_cov, 1, 2, batch) for c in (one, two))
    change = align(one.transition, 1, 2, batch) - align(two.transition, 1, 2, batch)
    shift = align(one.offset, 1, 1, batch) - align(two.offset, 1, 1, batch)
    gap = (change @ align(mean, 1, 1, batch)[..., None]).squeeze(-1) + shift
    steps = _gaussian_kl(gap, own, base, "a transition")
    # The mean over the state enters only through the spread of the gap.
    inverse = torch.cholesky_solve(change @ cov @ change.mT, _factor(base, "a transition"))
    spread = 0.5 * inverse.diagonal(dim1=-2, dim2=-1).sum(-1)
    return _initial_kl(one, two, batch, fixed) + (steps + spread).sum(0)


def path_kl(p: LinearGaussianMeasure, q: LinearGaussianMeasure, ts: Tensor) -> Tensor:
    """Return the divergence of the path laws over the span of ``ts``."""
    check_time_grid(ts)
    batch, fixed = _common(p, q, ts)
    tolerance = 1e-10 if p.initial_mean.dtype == torch.float64 else 1e-5
    start = _initial_kl(p.chain(ts[:1]), q.chain(ts[:1]), batch, fixed)
    panels = 1
    with torch.no_grad():
        coarse = _control_energy(p, q, ts, panels)
        for _ in range(_MAX_REFINEMENTS):
            panels *= 2
            fine = _control_energy(p, q, ts, panels)
            change = float((fine - coarse).abs().max() / fine.abs().max().clamp_min(1e-300))
            if change <= tolerance or not bool(fine.abs().max() > 0):
                break
            coarse = fine
        else:
            message = f"the path divergence still changes by {change:.1e} (relative); a finer ts helps"
            warnings.warn(message, ApproximationWarning, stacklevel=3)
    return start + (_control_energy(p, q, ts, panels) if torch.is_grad_enabled() else fine)


def _control_energy(p: LinearGaussianMeasure, q: LinearGaussianMeasure, ts: Tensor, panels: int) -> Tensor:
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
    eps = torch.finfo(s.dtype).eps
    if bool(((s - s2).abs().amax((-2, -1)) > 100 * eps * s.abs().amax((-2, -1))).any()):
        raise DiffusionMismatchError(
            "the laws have different diffusions, so their path laws are mutually singular"
        )
    change = align(a, 1, 2, batch) - align(a2, 1, 2, batch)
    shift = align(b, 1, 1, batch) - align(b2, 1, 1, batch)
    inverse = torch.linalg.pinv(symmetrise(s), hermitian=True)
    joint = torch.cat((change, shift[..., None]), -1)
    lost = joint - s @ inverse @ joint
    if bool((lost.abs().amax((-2, -1)) > 1e4 * eps * joint.abs().amax((-2, -1))).any()):
        raise DiffusionMismatchError(
            "the drifts differ where no noise acts, so the path laws are mutually singular"
        )
    gap = (change @ align(mean, 1, 1, batch)[..., None]).squeeze(-1) + shift
    second = change @ align(cov, 1, 2, batch) @ change.mT + gap[..., :, None] * gap[..., None, :]
    return 0.5 * torch.tensordot(weight, (inverse * second).sum((-2, -1)), 1)
