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

from stochdyn._transforms import as_leaf, recording
from stochdyn.core.gaussian.affine import LinearSteps, affine_steps
from stochdyn.core.gaussian.feedback import LinearFeedback, feedback_given
from stochdyn.core.gaussian.small import times
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import noise_steps, time_column
from stochdyn.core.sde.methods import Euler, Exact, Method
from stochdyn.core.sde.noise import NoiseSteps
from stochdyn.core.sde.solvers import full_state, integrate, step_everywhere, stepped
from stochdyn.infer.coupling import Coupling
from stochdyn.infer.shaping import shape_increments

__all__ = [
    "LinearPosterior",
    "Quadratic",
    "expand_likelihood",
    "linear_posterior",
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
        coupling: The sums that observations of several times depend on, or None. A complete sum ``a`` adds
            ``-1/2 a^2 + pull a``.
        ends: ``(T, R)`` one where a sum is complete.
        pull: ``(T, *batch, R)``, zero elsewhere.
    """

    precision: Tensor
    linear: Tensor
    value: Tensor | None = None
    coupling: Coupling | None = None
    ends: Tensor | None = None
    pull: Tensor | None = None


def expand_likelihood(log_likelihood: Callable[[Tensor], Tensor], path: Tensor) -> Quadratic:
    """Return the second-order expansion of a log-likelihood around a path.

    Args:
        log_likelihood: The function that maps paths ``(T, *batch, d)`` to each path's own log likelihood, ``(*batch,)``.
        path: ``(T, *batch, d)``.
    """
    with recording():
        leaf = as_leaf(path)
        value = log_likelihood(leaf)
        return second_order(value.sum() + 0.0 * leaf.sum(), leaf, value.detach())


def second_order(
    total: Tensor,
    leaf: Tensor,
    value: Tensor,
    keep_graph: bool = False,
    coupled: tuple[Tensor, Coupling, Tensor] | None = None,
) -> Quadratic:
    """Return gradient and curvature of ``total`` in ``leaf (T, *batch, d)``, block by block in time.

    Where the likelihood isn't log-concave it is taken to give no information. Terms of ``total`` that couple different times
    are folded into the block of each time; those of ``coupled`` are kept whole.

    Args:
        total: A scalar that is a sum of the log-likelihoods of all series.
        leaf: The paths, a leaf of the graph.
        value: ``(*batch,)`` the log-likelihoods themselves.
        keep_graph: Let gradients of the result reach what else the likelihood depends on.
        coupled: The log-likelihood of observations that couple times, their sums, and where these are complete.
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
    point = leaf if keep_graph else leaf.detach()
    linear = slope + (precision @ point.unsqueeze(-1)).squeeze(-1)
    if coupled is None:
        return Quadratic(precision, linear, value)
    rest, coupling, ends = coupled
    more = torch.autograd.grad(rest, leaf, create_graph=keep_graph)[0]
    pull = coupling.sums(point) * ends.reshape(ends.shape[0], *(1,) * (leaf.ndim - 2), -1)
    return Quadratic(precision, linear + more, value, coupling, ends, pull)


def linear_steps(
    sde: SDE,
    ts: Tensor,
    z: Tensor,
    e: Tensor,
    scale: Tensor,
    method: Method = _EULER,
    keep_graph: bool = False,
    noise: NoiseSteps | None = None,
) -> LinearSteps:
    """Return the steps linearised around states ``z`` and increments ``e``.

    Args:
        sde: The equation; its own control is part of the step.
        ts: ``(T,)``.
        z: ``(N, *batch, Z)`` full states before each step.
        e: ``(N, *batch, M)`` increments.
        scale: ``(N, M)`` units of the increments that ``B`` refers to.
        method: The solver whose steps are linearised.
        keep_graph: Whether gradients reach the parameters of the equation.
        noise: The recursion of the noise on the grid, where it is known already.
    """
    z, e = z.detach().contiguous(), e.detach().contiguous()
    if isinstance(method, Exact):
        sde, method = stepped(sde, method, ts), _EULER
    if not sde.state_dependent and sde.control is None and method.name == "euler" and ts.ndim == 1:
        noise = noise_steps(sde.noise, ts, z.dtype) if noise is None else noise
        return _affine_steps(sde, ts, z, e.shape[-1] // sde.noise.num_innovations(ts), noise, keep_graph)
    units = scale.reshape(scale.shape[0], *(1,) * (e.ndim - scale.ndim), *scale.shape[1:])
    with recording():
        inputs = z.requires_grad_(), e.requires_grad_()
        after = _step(sde, ts, *inputs, method)
        a, b = _derivatives(after, inputs, keep_graph)
    b = b * units.unsqueeze(-2)
    z, e = (x.detach() for x in inputs)
    if not keep_graph:
        after = after.detach()
    return LinearSteps(a, b, after - times(a, z) - times(b, e / units))


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
) -> LinearSteps:
    """Return the same for a constant diffusion, where only the drift has to be differentiated."""
    x = z[..., : z.shape[-1] - channels * sde.noise.num_states].detach()
    t = time_column(ts[..., :-1], x)
    with recording():
        leaf = x.requires_grad_()
        value = sde.drift(t, leaf).expand_as(leaf)
        (matrix,) = _derivatives(value, (leaf,), keep_graph)
    x = leaf.detach()
    if not keep_graph:
        value = value.detach()
    offset = value - times(matrix, x)
    dt = (ts[1:] - ts[:-1]).to(x.dtype)
    return affine_steps(noise, sde.diffusion(t[0], x[0]), dt, matrix, offset)


@dataclass(frozen=True)
class LinearPosterior:
    """The posterior of a linearised model in feedback form.

    Attributes:
        law: The feedback on the state, followed by the sums of the coupling; its centre is zero.
        start_precision: ``(*batch, Z, Z)`` and start_linear ``(*batch, Z)``: the likelihood as a function of the start.
        coupling: The sums, or None.
        onward: ``S (T, *batch, Z, Z)`` and ``eta (T, *batch, Z)`` of the likelihood of the data from every grid point on,
            ``exp(-1/2 z S z + eta z)``; None with a coupling.
    """

    law: LinearFeedback
    start_precision: Tensor
    start_linear: Tensor
    coupling: Coupling | None = None
    onward: tuple[Tensor, Tensor] | None = None


def linear_posterior(steps: LinearSteps, data: Quadratic) -> LinearPosterior:
    """Return the exact posterior of linear steps given a quadratic log-likelihood, in float64."""
    a, b, c = steps.transition.double(), steps.load.double(), steps.offset.double()
    precision, linear, coupling = data.precision.double(), data.linear.double(), data.coupling
    if coupling is None:
        law, ahead, pull = feedback_given(LinearSteps(a, b, c), precision, linear)
        return LinearPosterior(law, ahead[0], pull[0], onward=(ahead, pull))
    assert data.ends is not None and data.pull is not None
    rows, size, dim, sums = coupling.rows.double(), a.shape[-1], linear.shape[-1], coupling.size
    # The sums go with the state: a' = keep a + v' x', and x' is part of the next state.
    batch = torch.broadcast_shapes(a.shape[1:-2], b.shape[1:-2], c.shape[1:-1], rows.shape[1:-2])
    a, b = (x.expand(x.shape[0], *batch, *x.shape[-2:]) for x in (_lead(a, batch, 2), _lead(b, batch, 2)))
    c, rows = _lead(c, batch, 1).expand(c.shape[0], *batch, size), _lead(rows, batch, 2)
    later = rows[1:]
    keep = torch.diag_embed(coupling.keep[1:].double()).reshape(-1, *(1,) * len(batch), sums, sums)
    keep = keep.expand(a.shape[0], *batch, sums, sums)
    lower = torch.cat([later @ a[..., :dim, :], keep], -1)
    upper = torch.cat([a, a.new_zeros(*a.shape[:-1], sums)], -1)
    wide = LinearSteps(
        torch.cat([upper, lower], -2),
        torch.cat([b, later @ b[..., :dim, :]], -2),
        torch.cat([c, times(later, c[..., :dim])], -1),
    )
    total = size + sums
    whole = precision.new_zeros(precision.shape[0], *batch, total, total)
    whole[..., :dim, :dim] = precision
    ends = torch.diag_embed(data.ends.double()).reshape(-1, *(1,) * len(batch), sums, sums)
    whole[..., size:, size:] = ends.expand(-1, *batch, sums, sums)
    slope = linear.new_zeros(linear.shape[0], *batch, total)
    slope[..., :dim] = linear
    slope[..., size:] = data.pull.double()
    law, ahead, slopes = feedback_given(wide, whole, slope)
    first, pull = ahead[0], slopes[0]
    # The sums of the first time are known from the start.
    lift = torch.eye(size, dtype=a.dtype, device=a.device).expand(*batch, size, size)
    known = torch.nn.functional.pad(rows[0].expand(*batch, sums, dim), (0, size - dim))
    lift = torch.cat([lift, known], -2)
    return LinearPosterior(law, lift.mT @ first @ lift, times(lift.mT, pull), coupling)


def _lead(x: Tensor, batch: torch.Size, events: int) -> Tensor:
    """Give ``x (N, *b, *event)`` as many batch axes as ``batch`` has."""
    return x.reshape(x.shape[0], *(1,) * (len(batch) - (x.ndim - 1 - events)), *x.shape[1:])
