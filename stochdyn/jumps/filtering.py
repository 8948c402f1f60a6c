"""Filter and smoother of a hidden jump process: evidence with an analytic gradient, marginals, statistics, paths."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_type
from stochdyn.errors import ShapeError, TimeGridError, ZeroProbabilityError
from stochdyn.jumps.observations import Observation
from stochdyn.jumps.uniformisation import _transition, paired_transition

__all__ = ["Filtered", "filter_with", "prepare", "run_filter", "viterbi"]


#: Series of so many observations and more are filtered in blocks, if series times squared states are no more than the second number.
_LONG, _SMALL = 64, 400
#: The smallest normal number.
_SMALLEST = torch.finfo(torch.float64).tiny
#: What numbers without a precision of their own become.
_DOUBLE = torch.empty((), dtype=torch.float64)


class Filtered(NamedTuple):
    """What the filter knows.

    Attributes:
        log_evidence: The log densities of the series, ``(B,)``.
        alpha: The filtered probabilities after each observation, ``(T, B, S)``.
        beta: The likelihoods of all later observations, ``(T, B, S)``, scaled so that ``alpha * beta`` sums to one.
    """

    log_evidence: Tensor
    alpha: Tensor
    beta: Tensor


class Prepared(NamedTuple):
    """Data laid out for the filter.

    Attributes:
        times: The times of the observations, ``(B or 1, T)``.
        log_b: The log-likelihoods of the observations, ``(T, B, S)``.
        entries: The states that are entered exactly, or -1, ``(T, B)``.
        shape: The shape of the series.
    """

    times: Tensor
    log_b: Tensor
    entries: Tensor
    shape: torch.Size


def prepare(times: object, y: object, observation: Observation, start_time: float) -> Prepared:
    """Check observations and lay them out with time leading.

    Args:
        times: The times ``(T,)`` or ``(*series, T)``, not decreasing, none before the start; ties are allowed. Series that are
            shorter than others are padded with missing values at any later time, such as the last one.
        y: The observations ``(*series, T)``, NaN where missing.
        observation: The law of an observation given the state.
        start_time: The time at which the law starts.
    """
    check_type(observation, Observation, "observation")
    value = as_tensor(y, "y", missing=True, like=_DOUBLE)
    if value.ndim < 1 or not value.shape[-1]:
        raise ShapeError("y must hold times along its last axis", got=tuple(value.shape))
    value = value.double()
    at = as_tensor(times, "times", like=_DOUBLE).double().to(value.device)
    if at.ndim not in (1, value.ndim) or at.shape[-1] != value.shape[-1]:
        raise ShapeError(
            "times must be (T,) or have the shape of y", got=tuple(at.shape), expected=tuple(value.shape)
        )
    if bool((at[..., 1:] < at[..., :-1]).any()):
        bad = tuple((at[..., 1:] < at[..., :-1]).nonzero()[0].tolist())
        raise TimeGridError(
            "times must not decrease within a series", got=f"times{list(bad[:-1])} at place {bad[-1] + 1}"
        )
    if bool((at < start_time).any()):
        raise TimeGridError("times start before the law", got=float(at.min()), expected=f">= {start_time:g}")
    shape = value.shape[:-1]
    series = value.reshape(-1, value.shape[-1])
    log_b = observation.log_likelihood(series).movedim(-2, 0)
    entries = observation.entries(series).mT
    return Prepared(
        at.reshape(-1, at.shape[-1]).expand(series.shape[0] if at.ndim > 1 else 1, -1), log_b, entries, shape
    )


def transitions(q: Tensor, times: Tensor, start_time: float, entries: Tensor) -> Tensor:
    """Return the matrices ``(T, B or 1, S, S)`` that lead from each observation to the next, from the start to the first.

    Each distinct gap is computed once. Where a state is entered exactly, the matrix leads into it at that very moment.
    """
    start = torch.full_like(times[:, :1], start_time)
    gaps = torch.cat([start, times], 1).diff(dim=1).mT
    if q.ndim == 3:
        matrices = paired_transition(q, gaps.expand(-1, len(q)))
    elif gaps.requires_grad:  # equal gaps of learnt times move apart
        matrices = _transition(q, gaps.reshape(-1)).reshape(*gaps.shape, *q.shape)
    else:
        unique, place = gaps.reshape(-1).unique(return_inverse=True)
        matrices = _transition(q, unique)[place].reshape(*gaps.shape, *q.shape)
    if bool((entries >= 0).any()):
        off = q - torch.diag_embed(q.diagonal())
        into = torch.nn.functional.one_hot(entries.clamp(min=0), q.shape[-1]).to(q)
        # one may enter at the start of the record only by being there
        entering = (matrices @ off) * into[..., None, :]
        matrices = torch.where((entries >= 0)[..., None, None], entering, matrices)
    return matrices


def _forth(now: Tensor, each: Tensor, seen: Tensor, alpha: Tensor | None, scales: Tensor) -> Tensor:
    """Filter rows ``now (..., S)`` over steps of matrices and likelihoods; write what is known after each, and return the last.

    Args:
        now: The law before the first step.
        each: The matrices ``(K, ..., S, S)``.
        seen: The likelihoods ``(K, ..., S)``.
        alpha: Where filtered laws go, ``(K, ..., S)``; nowhere if None.
        scales: Where their sums before scaling go, ``(K, ..., 1)``.
    """
    for k, (matrix, b) in enumerate(zip(each.unbind(), seen.unbind(), strict=True)):
        now = (now @ matrix) * b
        scale = torch.sum(now, -1, keepdim=True, out=scales[k])
        # past impossible data the filter is zero, and not 0/0
        now = torch.div(now, scale.clamp(min=_SMALLEST), out=None if alpha is None else alpha[k])
    return now


def _back(now: Tensor, each: Tensor, scaled: Tensor, beta: Tensor) -> None:
    """Write the likelihoods of what comes later, ``beta (K, ..., S)``, from those after the last step, ``now (..., S)``."""
    beta[-1] = now
    # what a message is multiplied by on its way to the observation before
    matrices, scaled_each = each.mT.unbind(), scaled.unbind()
    for k in range(len(beta) - 2, -1, -1):
        now = (scaled_each[k + 1] * now) @ matrices[k + 1]
        beta[k] = now


def _step_by_step(start: Tensor, matrices: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return filtered laws, likelihoods of later observations ``(T, B, S)`` and scales ``(T, B, 1)``, one observation after the other."""
    shared = matrices.shape[1] == 1
    # series that share their matrices are the rows of one product; others have a product each
    each, seen, now = (matrices[:, 0], b, start) if shared else (matrices, b[..., None, :], start[:, None])
    alpha, beta, scales = torch.empty_like(seen), torch.empty_like(seen), seen.new_empty(*seen.shape[:-1], 1)
    _forth(now, each, seen, alpha, scales)
    _back(torch.ones_like(now), each, seen / scales.clamp(min=_SMALLEST), beta)
    return alpha.view_as(b), beta.view_as(b), scales.view(*b.shape[:2], 1)


def _pays_in_blocks(steps: int, count: int, states: int) -> bool:
    """Whether blocks side by side take less time than steps one after the other, though they multiply matrices."""
    return steps >= _LONG and count * states**2 <= _SMALL


def _in_blocks(start: Tensor, matrices: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`_step_by_step` does, for long series: all blocks of observations at once.

    Filters from every state run through each block; then laws at the beginnings of blocks are known one from the
    other, and filters from there run through all blocks again.
    """
    steps, count, states = b.shape
    length = math.ceil(math.sqrt(2 * steps / 3))
    number = math.ceil(steps / length)
    shared, missing = matrices.shape[1] == 1, number * length - steps

    def blocks(x: Tensor, padding: Tensor) -> Tensor:
        whole = torch.cat([x, padding.expand(missing, *x.shape[1:])])
        return whole.unflatten(0, (number, length)).transpose(0, 1).contiguous()

    eye = torch.eye(states, dtype=b.dtype, device=b.device)
    each, seen = blocks(matrices, eye), blocks(b, torch.ones_like(b[0]))
    if shared:
        each = each[:, :, 0]
    # from every state, with the logarithms of what scaling has taken out
    rows = eye.expand(number, count, states, states)
    starts = rows.flatten(1, 2) if shared else rows
    likely = seen.repeat_interleave(states, -2) if shared else seen[..., None, :]
    sums = b.new_empty(length, *starts.shape[:-1], 1)
    over = _forth(starts, each, likely, None, sums).view(number, count, states, states)
    log_over = sums.log().sum(0).view(number, count, states)
    begins, now = [start], start
    for k in range(number - 1):
        log_weight = now.log() + log_over[k]
        top = log_weight.amax(-1, keepdim=True)
        weight = (log_weight - torch.where(torch.isfinite(top), top, 0.0)).exp()
        now = (weight[:, None] @ over[k])[:, 0]
        now = now / now.sum(-1, keepdim=True).clamp(min=_SMALLEST)
        begins.append(now)
    if not shared:
        seen = seen[..., None, :]
    alpha, beta, scales = torch.empty_like(seen), torch.empty_like(seen), seen.new_empty(*seen.shape[:-1], 1)
    _forth(torch.stack(begins).view_as(seen[0]), each, seen, alpha, scales)
    taken = scales.log().sum(0).view(number, count, 1)
    taken = torch.where(torch.isfinite(taken), taken, 0.0)
    ends = [torch.ones_like(start)]
    for k in range(number - 1, 0, -1):
        ends.append((log_over[k] - taken[k]).exp() * (over[k] @ ends[-1][..., None])[..., 0])
    _back(torch.stack(ends[::-1]).view_as(seen[0]), each, seen / scales.clamp(min=_SMALLEST), beta)

    def series(x: Tensor, last: int) -> Tensor:
        return x.view(length, number, count, last).transpose(0, 1).reshape(-1, count, last)[:steps]

    return series(alpha, states), series(beta, states), series(scales, 1)


class _LogEvidence(torch.autograd.Function):
    """The scaled forward filter; its derivative is the backward pass."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, matrices: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, b = _likelihoods(log_b)
        messages = _in_blocks if _pays_in_blocks(*b.shape) else _step_by_step
        alpha, beta, scales = messages(start.expand(b.shape[1:]), matrices, b)
        total = total + scales.log().sum(0)[..., 0]
        scales = scales[..., 0]
        ctx.save_for_backward(start, matrices, log_b, b, alpha, beta, scales)
        ctx.mark_non_differentiable(alpha, beta)
        return total, alpha, beta

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        start, matrices, log_b, b, alpha, beta, scales = ctx.saved_tensors
        if torch.is_grad_enabled():  # derivatives of the derivative are wanted: those of a filter on the tape
            inputs = (start, matrices, log_b)
            wanted = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
            total = _taped_filter(*inputs).log_evidence
            grads = iter(torch.autograd.grad(total, wanted, slope, create_graph=True))
            first, second, third = (next(grads) if need else None for need in ctx.needs_input_grad)
            return first, second, third
        # the message that reaches each observation from its own and all later ones
        weighted = b * beta / scales.clamp(min=_SMALLEST)[..., None] * slope[:, None]
        before = torch.cat([start.expand_as(alpha[:1]), alpha[:-1]])
        # d log Z / dP_ij is the product of what has arrived at i and of what is still to come at j, summed over what shares P
        if matrices.shape[1] == 1:
            grad_matrices = (before.mT @ weighted)[:, None]
        else:
            grad_matrices = before[..., :, None] * weighted[..., None, :]
        grad_start = grad_seen = None
        if ctx.needs_input_grad[0]:
            grad_start = (matrices[0] @ weighted[0].unsqueeze(-1)).squeeze(-1)
            grad_start = grad_start.sum(0) if start.ndim == 1 else grad_start
        if ctx.needs_input_grad[2]:
            grad_seen = alpha * beta * slope[:, None]
        return grad_start, grad_matrices, grad_seen


def _likelihoods(log_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums ``(B,)`` of the largest log-likelihoods, and likelihoods ``(T, B, S)`` relative to these."""
    top = log_b.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    return top[..., 0].sum(0), (log_b - top).exp()


def _taped_filter(start: Tensor, matrices: Tensor, log_b: Tensor) -> Filtered:
    """Run filter and smoother step by step on torch's tape: every part has derivatives of every order."""
    total, b = _likelihoods(log_b)
    now = start.expand(b.shape[1:])
    alpha, scales = [], []
    for k in range(len(b)):
        now = (now.unsqueeze(-2) @ matrices[k]).squeeze(-2) * b[k]
        scale = now.sum(-1, keepdim=True)
        now = now / scale.clamp(min=_SMALLEST)
        alpha.append(now)
        scales.append(scale)
    scaled = b / torch.stack(scales).clamp(min=_SMALLEST)
    beta = [torch.ones_like(b[0])]
    for k in range(len(b) - 1, 0, -1):
        beta.append((matrices[k] @ (scaled[k] * beta[-1]).unsqueeze(-1)).squeeze(-1))
    total = total + torch.stack(scales).log().sum(0)[..., 0]
    return Filtered(total, torch.stack(alpha), torch.stack(beta[::-1]))


def run_filter(
    start: Tensor, q: Tensor, data: Prepared, start_time: float, *, taped: bool = False
) -> Filtered:
    """Run filter and smoother.

    Args:
        start: The law at the start, ``(S,)`` or ``(B, S)``.
        q: The generator ``(S, S)``, or one per series ``(B, S, S)``.
        data: The observations.
        start_time: The time at which the law starts.
        taped: Whether the filtered probabilities and messages are to have derivatives, not the evidence alone.

    Raises:
        ZeroProbabilityError: If a series is impossible; it names series and time.
    """
    return filter_with(
        start, transitions(q.double(), data.times, start_time, data.entries), data, taped=taped
    )


def filter_with(start: Tensor, matrices: Tensor, data: Prepared, *, taped: bool = False) -> Filtered:
    """Run filter and smoother with given transition matrices; see :func:`run_filter`."""
    start = start.double()
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (start, matrices, data.log_b))
    run = _taped_filter if taped and tracked else _LogEvidence.apply
    total, alpha, beta = run(start, matrices, data.log_b)
    if bool(torch.isinf(total.detach()).any()):
        series = int(torch.isinf(total.detach()).nonzero()[0, 0])
        lost = int((alpha[:, series].sum(-1) == 0).nonzero()[0, 0])
        time = data.times[series if data.times.shape[0] > 1 else 0, lost]
        raise ZeroProbabilityError(
            "the observations are impossible under the law",
            got=f"series {series} at time {float(time):g}",
            hint="is a jump missing from the mask, or a state absent from the initial law?",
        )
    return Filtered(total, alpha, beta)


def viterbi(start: Tensor, q: Tensor, data: Prepared, start_time: float) -> Tensor:
    """Return the most probable states at the times of the observations, jointly, ``(B, T)``."""
    with torch.no_grad():
        log_p = transitions(q.double(), data.times, start_time, data.entries).log()
        steps, count, states = data.log_b.shape
        score = start.double().log().expand(count, states)
        back = []
        for k in range(steps):
            best, origin = (score[..., None] + log_p[k]).max(-2)
            score = best + data.log_b[k]
            back.append(origin)
        if bool(torch.isinf(score.amax(-1)).any()):
            run_filter(start, q, data, start_time)  # names series and time
        here = score.argmax(-1)
        path = [here]
        for k in range(steps - 1, 0, -1):
            here = back[k].gather(-1, here[:, None])[:, 0]
            path.append(here)
        return torch.stack(path[::-1], -1)
