r"""The exact feedback law of a linearised model: where path guides start, and linear-Gaussian models end.

Around a reference path, a step reads :math:`z_{n+1}\approx A_nz_n+B_n\epsilon_n+c_n` with
:math:`\epsilon_n\sim N(0,I)`, and the log-likelihood is a quadratic in each state. The likelihood of all
data from step :math:`n` on is then :math:`\exp(-\tfrac12z^\top S_nz+\eta_n^\top z)` up to a constant, with

.. math::
    Q_n&=I+B_n^\top S_{n+1}B_n,\qquad
    \epsilon_n\mid z_n,\text{data}\sim N\big(Q_n^{-1}B_n^\top(\eta_{n+1}-S_{n+1}(A_nz_n+c_n)),
        \ Q_n^{-1}\big),\\
    S_n&=H_n+A_n^\top S_{n+1}A_n-A_n^\top S_{n+1}B_nQ_n^{-1}B_n^\top S_{n+1}A_n ,

and likewise for :math:`\eta_n`. It is the backward information filter, or the linear-quadratic regulator,
of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.core.gaussian.affine import affine_steps
from stochdyn.core.gaussian.recursion import covariance_states
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import noise_steps, time_column
from stochdyn.core.sde.methods import Euler, Method
from stochdyn.core.sde.noise import NoiseSteps
from stochdyn.core.sde.solvers import full_state, integrate, step_everywhere
from stochdyn.infer.shaping import shape_increments

__all__ = [
    "LinearPosterior",
    "Quadratic",
    "backward_pass",
    "expand_likelihood",
    "linear_steps",
    "second_order",
]


_EULER = Euler()


@dataclass(frozen=True)
class Quadratic:
    """A log-likelihood as a quadratic in the path: ``-1/2 x H x + h x`` at each grid point.

    Attributes:
        precision: ``H (T, *batch, d, d)``, positive semidefinite.
        linear: ``h (T, *batch, d)``.
        value: ``(*batch,)`` the log-likelihood at the reference path, or None.
    """

    precision: Tensor
    linear: Tensor
    value: Tensor | None = None


@dataclass(frozen=True)
class LinearPosterior:
    """The posterior of a linearised model in feedback form.

    Attributes:
        offset: ``(N, *batch, M)`` mean of the standardised increments at ``z = 0``.
        gain: ``(N, *batch, M, Z)``.
        factor: ``(N, *batch, M, M)`` lower Cholesky factor of their covariance.
        start_precision: ``(*batch, Z, Z)`` and start_linear ``(*batch, Z)``: the likelihood as a function
            of the start.
    """

    offset: Tensor
    gain: Tensor
    factor: Tensor
    start_precision: Tensor
    start_linear: Tensor


def expand_likelihood(log_likelihood: Callable[[Tensor], Tensor], path: Tensor) -> Quadratic:
    """Return the second-order expansion of a log-likelihood around a path.

    Args:
        log_likelihood: maps paths ``(T, *batch, d)`` to ``(*batch,)``, each path's own.
        path: ``(T, *batch, d)``.
    """
    with torch.enable_grad():
        leaf = path.detach().requires_grad_()
        value = log_likelihood(leaf)
        return second_order(value.sum() + 0.0 * leaf.sum(), leaf, value.detach())


def second_order(total: Tensor, leaf: Tensor, value: Tensor, keep_graph: bool = False) -> Quadratic:
    """Return gradient and curvature of ``total`` in ``leaf (T, *batch, d)``, block by block in time.

    Terms that couple different times are folded into the block of each time, and where the likelihood isn't
    log-concave it is taken to give no information.

    Args:
        total: a scalar that is a sum of the log-likelihoods of all series.
        leaf: the paths, a leaf of the graph.
        value: ``(*batch,)`` the log-likelihoods themselves.
        keep_graph: let gradients of the result reach what else the likelihood depends on.
    """
    slope = torch.autograd.grad(total, leaf, create_graph=True)[0]
    rows = []
    for j in range(leaf.shape[-1]):
        row = None
        if slope.requires_grad:
            row = torch.autograd.grad(
                slope[..., j].sum(), leaf, retain_graph=True, allow_unused=True, create_graph=keep_graph
            )[0]
        rows.append(torch.zeros_like(leaf) if row is None else row)
    curvature = -torch.stack(rows, -2)
    if not keep_graph:
        slope, curvature = slope.detach(), curvature.detach()
    curvature = 0.5 * (curvature + curvature.mT).nan_to_num(0.0, 0.0, 0.0)
    precision = curvature
    if leaf.shape[-1] == 1:
        precision = curvature.clamp_min(0.0)
    else:
        eigenvalues, vectors = torch.linalg.eigh(curvature.detach())
        concave = (vectors * eigenvalues.clamp_min(0.0).unsqueeze(-2)) @ vectors.mT
        # equal eigenvalues have no derivative, so only the curvature itself is differentiated
        precision = curvature + (concave - curvature.detach())
    linear = slope + (precision @ leaf.detach().unsqueeze(-1)).squeeze(-1)
    return Quadratic(precision, linear, value)


def linear_steps(
    sde: SDE,
    ts: Tensor,
    z: Tensor,
    e: Tensor,
    scale: Tensor,
    method: Method = _EULER,
    keep_graph: bool = False,
    noise: NoiseSteps | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``A (N, *batch, Z, Z)``, ``B (N, *batch, Z, M)`` and ``c (N, *batch, Z)`` around ``z``, ``e``.

    Args:
        sde: the equation; its own control is part of the step.
        ts: ``(T,)``.
        z: ``(N, *batch, Z)`` full states before each step.
        e: ``(N, *batch, M)`` increments.
        scale: ``(N, M)`` units of the increments that ``B`` refers to.
        method: the solver whose steps are linearised.
        keep_graph: whether gradients reach the parameters of the equation.
        noise: the recursion of the noise on the grid, where it is known already.
    """
    z, e = z.detach().contiguous(), e.detach().contiguous()
    if not sde.state_dependent and sde.control is None and method.name == "euler" and ts.ndim == 1:
        noise = noise_steps(sde.noise, ts, z.dtype) if noise is None else noise
        return _affine_steps(sde, ts, z, e.shape[-1] // sde.noise.num_innovations(ts), noise, keep_graph)
    units = scale.reshape(scale.shape[0], *(1,) * (e.ndim - scale.ndim), *scale.shape[1:])
    with torch.enable_grad():
        inputs = z.requires_grad_(), e.requires_grad_()
        after = _step(sde, ts, *inputs, method)
        a, b = _derivatives(after, inputs, keep_graph)
    b = b * units.unsqueeze(-2)
    z, e = (x.detach() for x in inputs)
    if not keep_graph:
        after = after.detach()
    return a, b, after - _times(a, z) - _times(b, e / units)


def _step(sde: SDE, ts: Tensor, z: Tensor, e: Tensor, method: Method) -> Tensor:
    """Take the step from every grid point, ``(N, *batch, Z)``."""
    e = shape_increments(sde, ts, z, e)
    if method.name == "euler":
        return step_everywhere(sde, ts, z, e)
    free, states = sde.uncontrolled(), sde.noise.num_states
    channels = e.shape[-1] // sde.noise.num_innovations(ts)
    dim = z.shape[-1] - channels * states
    rows = []
    for n in range(z.shape[0]):
        memory = z[n, ..., dim:].unflatten(-1, (channels, states)) if states else None
        run = integrate(free, z[n, ..., :dim], ts[..., n : n + 2], e[n : n + 1], memory, method=method)
        rows.append(full_state(run.x, run.memory)[1])
    return torch.stack(rows)


def _derivatives(value: Tensor, inputs: tuple[Tensor, ...], keep_graph: bool) -> list[Tensor]:
    """Return the matrices ``(..., O, I)`` of derivatives of ``value (..., O)``, row by row in the last axis.

    Reverse mode asks of a drift no more than training does.
    """
    rows: list[list[Tensor]] = [[] for _ in inputs]
    for j in range(value.shape[-1]):
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if value.requires_grad:
            found = torch.autograd.grad(
                value[..., j].sum(), inputs, retain_graph=True, create_graph=keep_graph, allow_unused=True
            )
        for row, slope, x in zip(rows, found, inputs, strict=True):
            row.append(torch.zeros_like(x) if slope is None else slope)
    matrices = [torch.stack(row, -2) for row in rows]
    return matrices if keep_graph else [m.detach() for m in matrices]


def _affine_steps(
    sde: SDE, ts: Tensor, z: Tensor, channels: int, noise: NoiseSteps, keep_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for a constant diffusion, where only the drift has to be differentiated."""
    x = z[..., : z.shape[-1] - channels * sde.noise.num_states].detach()
    t = time_column(ts[..., :-1], x)
    with torch.enable_grad():
        leaf = x.requires_grad_()
        value = sde.drift(t, leaf).expand_as(leaf)
        (matrix,) = _derivatives(value, (leaf,), keep_graph)
    x = leaf.detach()
    if not keep_graph:
        value = value.detach()
    offset = value - _times(matrix, x)
    dt = (ts[1:] - ts[:-1]).to(x.dtype)
    steps = affine_steps(noise, sde.diffusion(t[0], x[0]), dt, matrix, offset)
    return steps.transition, steps.load, steps.offset


def backward_pass(a: Tensor, b: Tensor, c: Tensor, data: Quadratic) -> LinearPosterior:
    """Run the backward information filter; see the module's formulas.

    Args:
        a: ``A (N, *batch, Z, Z)``.
        b: ``B (N, *batch, Z, M)``.
        c: ``(N, *batch, Z)``.
        data: the quadratic log-likelihood over the first ``d`` components of the state, at ``N + 1`` grid
            points.
    """
    size, dim, channels = a.shape[-1], data.linear.shape[-1], b.shape[-1]
    batch = torch.broadcast_shapes(
        a.shape[1:-2], b.shape[1:-2], c.shape[1:-1], data.precision.shape[1:-2], data.linear.shape[1:-1]
    )
    # One more component that is always 1 makes quadratics and maps homogeneous: V(z) = -1/2 [z 1] S [z 1]^T.
    width = size + 1
    load = torch.cat([_spread(b, batch, 2), b.new_zeros(b.shape[0], *batch, 1, channels)], -2)
    forth = torch.cat([_spread(a, batch, 2), _spread(c, batch, 1).unsqueeze(-1)], -1)
    last = torch.zeros(width, dtype=a.dtype, device=a.device)
    last[-1] = 1.0
    forth = torch.cat([forth, last.expand(*forth.shape[:-2], 1, width)], -2)
    precision = torch.nn.functional.pad(_spread(data.precision, batch, 2), (0, width - dim, 0, width - dim))
    slope = torch.nn.functional.pad(_spread(data.linear, batch, 1), (0, width - dim)).unsqueeze(-1)
    local = precision - slope * last - (slope * last).mT
    values = _values(forth, load, local)
    ahead = load.mT @ values[1:]
    eye = torch.eye(channels, dtype=b.dtype, device=b.device)
    chol = torch.linalg.cholesky(eye + ahead @ load)  # Q = I + B'SB is at least 1
    law = -torch.cholesky_solve(ahead @ forth, chol)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(chol)) if channels > 1 else 1.0 / chol
    first = values[0]
    return LinearPosterior(
        law[..., -1], law[..., :-1], factor, first[..., :size, :size], -first[..., :size, size]
    )


def _spread(x: Tensor, batch: torch.Size, events: int) -> Tensor:
    """Give ``x (N, *b, *event)`` the batch axes ``batch``."""
    event = x.shape[x.ndim - events :]
    lead = len(batch) - (x.ndim - 1 - events)
    return x.reshape(x.shape[0], *(1,) * lead, *x.shape[1:]).expand(x.shape[0], *batch, *event)


def _values(forth: Tensor, load: Tensor, local: Tensor) -> Tensor:
    """Return the quadratics ``S (N+1, *batch, W, W)`` of all data from every grid point on.

    Args:
        forth: the maps of the homogeneous state, ``(N, *batch, W, W)``.
        load: ``(N, *batch, W, M)``.
        local: the quadratics of the data at each grid point, ``(N+1, *batch, W, W)``.
    """
    batch = forth.shape[1:-2]
    flat = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (forth, load, local))
    values: Tensor = _Values.apply(*flat)
    return values.reshape(values.shape[0], *batch, *values.shape[-2:])


class _Values(torch.autograd.Function):
    r"""The Riccati recursion, and its derivative along the optimal increments.

    .. math:: S_n=H_n+A^\top S_{n+1}A-A^\top S_{n+1}B(I+B^\top S_{n+1}B)^{-1}B^\top S_{n+1}A

    With :math:`K` the optimal feedback and :math:`F=A+BK`, the derivative is that of the fixed feedback (the envelope
    theorem), :math:`dS_n=dH_n+F^\top dS_{n+1}F+F^\top S_{n+1}D+D^\top S_{n+1}F` with :math:`D=dA+dB\,K`: its adjoint is
    one covariance recursion forwards in time.
    """

    @staticmethod
    def forward(ctx: Any, forth: Tensor, load: Tensor, local: Tensor) -> Tensor:
        width, channels = forth.shape[-1], load.shape[-1]
        both = torch.cat([forth, load], -1)
        eye = torch.eye(channels, dtype=load.dtype, device=load.device)
        values = torch.empty_like(local)
        s = values[-1] = local[-1]
        for n in range(forth.shape[0] - 1, -1, -1):
            block = both[n].mT @ s @ both[n]
            cross = block[:, width:, :width]
            ahead = block[:, width:, width:] + eye
            if channels == 1:
                s = torch.baddbmm(block[:, :width, :width], cross.mT, cross / ahead, alpha=-1.0)
            else:
                s = torch.baddbmm(
                    block[:, :width, :width], cross.mT, torch.linalg.solve(ahead, cross), alpha=-1.0
                )
            s = local[n] + 0.5 * (s + s.mT)
            values[n] = s
        ctx.save_for_backward(forth, load, values)
        return values

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        forth, load, values = ctx.saved_tensors
        channels = load.shape[-1]
        slope = 0.5 * (slope + slope.mT)
        after = values[1:]
        eye = torch.eye(channels, dtype=load.dtype, device=load.device)
        ahead = load.mT @ after
        law = -torch.linalg.solve(eye + ahead @ load, ahead @ forth)
        closed = forth + load @ law
        # Lambda_{n+1} = slope_{n+1} + F Lambda_n F^T
        adjoint = covariance_states(closed, slope[1:], slope[0])
        to_map = 2.0 * (after @ closed @ adjoint[:-1])
        return to_map, to_map @ law.mT, adjoint


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
