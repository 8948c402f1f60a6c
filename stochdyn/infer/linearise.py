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

__all__ = [
    "LinearPosterior",
    "Quadratic",
    "backward_pass",
    "expand_likelihood",
    "linear_steps",
    "reference_states",
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


def linear_steps(sde: SDE, ts: Tensor, z: Tensor, e: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``A (N, *batch, Z, Z)``, ``B (N, *batch, Z, M)`` and ``c (N, *batch, Z)`` around ``z``, ``e``.

    ``B`` refers to increments in units of ``scale (N, M)``.
    """

    def step(z_: Tensor, e_: Tensor) -> Tensor:
        return step_everywhere(sde, ts, z_, e_)

    z, e = z.contiguous(), e.contiguous()
    if not sde.state_dependent:
        return _affine_steps(sde, ts, z, e.shape[-1] // sde.noise.num_innovations(ts))
    units = scale.reshape(scale.shape[0], *(1,) * (e.ndim - 2), -1).expand_as(e)
    after = step(z, e)
    by_state, by_noise = [], []
    for j in range(z.shape[-1]):
        direction = torch.zeros_like(z)
        direction[..., j] = 1.0
        by_state.append(torch.func.jvp(step, (z, e), (direction, torch.zeros_like(e)))[1])
    for j in range(e.shape[-1]):
        direction = torch.zeros_like(e)
        direction[..., j] = units[..., j]
        by_noise.append(torch.func.jvp(step, (z, e), (torch.zeros_like(z), direction))[1])
    a, b = torch.stack(by_state, -1), torch.stack(by_noise, -1)
    c = after - _times(a, z) - _times(b, e / units)
    return a, b, c


def _affine_steps(sde: SDE, ts: Tensor, z: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for a constant diffusion, where only the drift has to be differentiated."""
    dim = z.shape[-1] - channels * sde.noise.num_states
    x = z[..., :dim]
    t, slopes = time_column(ts[:-1], x), []
    value = torch.zeros_like(x)
    for j in range(dim):
        direction = torch.zeros_like(x)
        direction[..., j] = 1.0
        value, slope = torch.func.jvp(lambda x_: sde.drift(t, x_), (x,), (direction,))[:2]
        slopes.append(slope.expand_as(x))
    matrix = torch.stack(slopes, -1)
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


def reference_states(sde: SDE, x0: Tensor, ts: Tensor, e: Tensor, memory0: Tensor | None) -> Tensor:
    """Return the full states ``(T, *batch, Z)`` along increments ``e (N, *batch, M)``."""
    run = integrate(sde, x0, ts, e, memory0)
    return full_state(run.x, run.memory)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
