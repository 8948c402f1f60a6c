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

import torch
from torch import Tensor

from stochdyn.core.gaussian.affine import affine_steps
from stochdyn.core.law.transition import time_column
from stochdyn.core.sde.equation import SDE
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
    method: str = "euler",
    keep_graph: bool = False,
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
    """
    z, e = z.detach().contiguous(), e.detach().contiguous()
    if not sde.state_dependent and sde.control is None and method == "euler":
        return _affine_steps(sde, ts, z, e.shape[-1] // sde.noise.num_innovations(ts), keep_graph)
    units = scale.reshape(scale.shape[0], *(1,) * (e.ndim - 2), -1)
    with torch.enable_grad():
        inputs = z.requires_grad_(), e.requires_grad_()
        after = _step(sde, ts, *inputs, method)
        a, b = _derivatives(after, inputs, keep_graph)
    b = b * units.unsqueeze(-2)
    z, e = (x.detach() for x in inputs)
    if not keep_graph:
        after = after.detach()
    return a, b, after - _times(a, z) - _times(b, e / units)


def _step(sde: SDE, ts: Tensor, z: Tensor, e: Tensor, method: str) -> Tensor:
    """Take the step from every grid point, ``(N, *batch, Z)``."""
    e = shape_increments(sde, ts, z, e)
    if method == "euler":
        return step_everywhere(sde, ts, z, e)
    free, states = sde.uncontrolled(), sde.noise.num_states
    channels = e.shape[-1] // sde.noise.num_innovations(ts)
    dim = z.shape[-1] - channels * states
    rows = []
    for n in range(z.shape[0]):
        memory = z[n, ..., dim:].unflatten(-1, (channels, states)) if states else None
        run = integrate(free, z[n, ..., :dim], ts[n : n + 2], e[n : n + 1], memory, method=method)
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
    sde: SDE, ts: Tensor, z: Tensor, channels: int, keep_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for a constant diffusion, where only the drift has to be differentiated."""
    x = z[..., : z.shape[-1] - channels * sde.noise.num_states].detach()
    t = time_column(ts[:-1], x)
    with torch.enable_grad():
        leaf = x.requires_grad_()
        value = sde.drift(t, leaf).expand_as(leaf)
        (matrix,) = _derivatives(value, (leaf,), keep_graph)
    x = leaf.detach()
    if not keep_graph:
        value = value.detach()
    offset = value - _times(matrix, x)
    dt = (ts[1:] - ts[:-1]).to(x.dtype)
    steps = affine_steps(sde.noise.steps(ts, dtype=x.dtype), sde.diffusion(t[0], x[0]), dt, matrix, offset)
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
    num_steps, size, dim = a.shape[0], a.shape[-1], data.linear.shape[-1]
    pad = size - dim
    precision = torch.nn.functional.pad(data.precision, (0, pad, 0, pad))
    linear = torch.nn.functional.pad(data.linear, (0, pad))
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    s, eta = precision[-1], linear[-1].unsqueeze(-1)
    # Rows are unbound once: the derivative of indexing costs a tensor of all steps each time.
    forth, back, load, push, shift, curve, slope = (
        x.unbind(0) for x in (a, a.mT, b, b.mT, c.unsqueeze(-1), precision, linear.unsqueeze(-1))
    )
    offsets, gains, covariances = [], [], []
    for n in range(num_steps - 1, -1, -1):
        bs = push[n] @ s
        # Q = I + B'SB is at least 1, so inverting it is harmless.
        covariance = torch.linalg.inv(eye + bs @ load[n])
        bsa = bs @ forth[n]
        pull = eta - s @ shift[n]
        inner = push[n] @ pull
        gain = -covariance @ bsa
        gains.append(gain)
        offsets.append(covariance @ inner)
        covariances.append(covariance)
        s_new = curve[n] + back[n] @ s @ forth[n] + bsa.mT @ gain
        s = 0.5 * (s_new + s_new.mT)
        eta = slope[n] + back[n] @ pull + gain.mT @ inner
    offset, gain, covariance = (torch.stack(rows[::-1]) for rows in (offsets, gains, covariances))
    factor = torch.linalg.cholesky(0.5 * (covariance + covariance.mT))
    return LinearPosterior(offset.squeeze(-1), gain, factor, s, eta.squeeze(-1))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
