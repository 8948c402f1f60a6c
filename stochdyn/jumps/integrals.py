"""Integrals over transition probabilities: times in states and numbers of jumps between two known ends."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_same_device
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.jumps.generator import as_rates
from stochdyn.jumps.uniformisation import poisson_weights, series_terms

__all__ = ["integrate", "transition_integral"]

#: Longest time, in expected candidate jumps, of one series; longer ones are halved, and the results doubled.
_LONGEST = 4.0


def transition_integral(rates: object, dt: object, between: object = None) -> Tensor:
    r"""Return :math:`\int_0^\Delta e^{Qu}\,M\,e^{Q(\Delta-u)}\,du`, or :math:`\int_0^\Delta e^{Qu}\,du` without M.

    Without M entry ij is the expected time in j until Δ of a path that starts in i. With :math:`M=e_ke_k^\top`, entry ij over
    :math:`P_{ij}(\Delta)` is the expected time in k of a path from i to j; with :math:`M=Q_{kl}\,e_ke_l^\top` it is the expected
    number of jumps from k to l. Where M isn't negative all terms are positive, so that every entry keeps its relative accuracy.

    Args:
        rates: A :class:`~stochdyn.jumps.RateMatrix` or its matrix ``(S, S)`` in 1/time.
        dt: The times Δ, ``()`` or ``(n,)``, not negative and finite.
        between: The matrices M, ``(*m, S, S)``.

    Returns:
        ``(*n, *m, S, S)``, in time times the unit of M. Differentiable in rates, times and M.

    Raises:
        InvalidInputError: If rates aren't a generator, or a time is negative.
        ShapeError: If there is a batch of generators, or M has other states.

    Example:
        >>> Q = torch.tensor([[-0.7, 0.7], [1.9, -1.9]])
        >>> transition_integral(Q, 0.8)  # the rows sum to 0.8
        tensor([[0.6957, 0.1043],
                [0.2831, 0.5169]])

    Reference:
        Van Loan, "Computing integrals involving the matrix exponential", 1978.
    """
    q = as_rates(rates)
    if q.ndim != 2:
        raise ShapeError("one generator at a time", got=f"batch {tuple(q.shape[:-2])}")
    time = as_tensor(dt, "dt", (0, 1), "() or (n,)", like=q)
    check_same_device(rates=q, dt=time)
    if bool((time < 0).any()):
        raise InvalidInputError("dt must not be negative", got=f"minimum {float(time.min()):g}")
    middle = None
    if between is not None:
        middle = as_tensor(between, "between", like=q)
        if middle.ndim < 2 or middle.shape[-2:] != q.shape:
            raise ShapeError(
                "between must have the states of rates", got=tuple(middle.shape), expected=tuple(q.shape)
            )
        middle = middle.double()
    out = integrate(q.double(), time.reshape(-1).double(), middle)
    return out.reshape(*time.shape, *out.shape[1:]).to(q.dtype)


def integrate(q: Tensor, dt: Tensor, middle: Tensor | None) -> Tensor:
    """Return ``(n, *m, S, S)`` for ``q (S, S)``, ``dt (n,)`` and ``middle (*m, S, S)`` in double precision."""
    size = q.shape[-1]
    eye = torch.eye(size, dtype=q.dtype, device=q.device)
    rate = float((-q.detach().diagonal()).max()) or 1.0
    halvings = torch.log2((dt.detach() * rate / _LONGEST).clamp(min=1e-300)).ceil().clamp(min=0)
    short = dt / 2.0**halvings
    chain = eye + q / rate
    # of the block matrix [[B, M / λ], [0, C]], C = B or the identity, the upper blocks of its powers
    added, last = (eye, eye) if middle is None else (middle, chain)
    power, upper = eye, torch.zeros_like(added)
    powers, uppers = [power], [upper]
    for _ in range(series_terms(min(_LONGEST, rate * float(dt.detach().max())) if len(dt) else 0.0, size)):
        upper = upper @ last + power @ added / rate
        power = power @ chain
        powers.append(power)
        uppers.append(upper)
    weight = poisson_weights(short * rate, len(powers))
    p = torch.einsum("kn,kij->nij", weight, torch.stack(powers))
    out = torch.einsum("kn,k...->n...", weight, torch.stack(uppers))
    p = p.reshape(len(dt), *(1,) * (out.ndim - 3), size, size)
    halvings = halvings.reshape(-1, *(1,) * (out.ndim - 1))
    for k in range(int(halvings.max()) if len(dt) else 0):
        double = out @ (p if middle is not None else eye) + p @ out
        square = p @ p
        square = square / square.detach().sum(-1, keepdim=True)
        out, p = torch.where(halvings > k, double, out), torch.where(halvings > k, square, p)
    return out
