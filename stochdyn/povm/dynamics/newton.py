"""Gauss-Newton steps towards the steady state: the rates of all samples are driven to zero together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.povm.ansatz.autoregressive import AutoregressiveAnsatz
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.ansatz.prefixes import unique_strings
from stochdyn.povm.dynamics.averages import Averages, local_rates

__all__ = ["GaussNewton", "NewtonStep", "rates_and_gradients"]

_SCORE_BYTES = 1 << 29


@dataclass(frozen=True)
class NewtonStep:
    r"""One step.

    Attributes:
        mean_square: The mean square :math:`E\ell^2` of the rates before the step, on its outcomes.
        mean_absolute: The mean :math:`E|\ell|=\|LP\|_1` before the step.
        accepted: Whether the mean square fell: on the same outcomes by full summation, on fresh draws by sampling.
    """

    mean_square: float
    mean_absolute: float
    accepted: bool


def rates_and_gradients(net: Ansatz, operator: SparseMasterEquation, a: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the rates :math:`\ell=LP/P` at outcomes and their gradients.

    .. math:: \nabla\ell(a) = \sum_b L_{ab}\,\frac{P(b)}{P(a)}\,\bigl(\nabla\log P(b)-\nabla\log P(a)\bigr)

    Where outcomes share most of what they are connected to, scores are computed once for each; where those would take
    too much memory, the sums are taken in the backward pass.

    Args:
        net: The variational state.
        operator: The master equation, constant in time.
        a: The distinct outcomes ``(m, N)``.

    Returns:
        ``(m,)`` and ``(m, P)`` in float64.
    """
    b, rates = operator.connected(a)
    m, k, sites = b.shape
    every = b.reshape(-1, sites)
    if isinstance(net, AutoregressiveAnsatz):
        every = net.representatives(every)
    unique, index = unique_strings(every, net.num_outcomes)
    with torch.no_grad():
        log_p = net.log_prob(unique).double()[index].reshape(m, k)
    flow = rates.double() * (log_p - log_p[:, :1]).exp()
    local = flow.sum(1)
    # what flows, less what the outcome's own score takes off
    coefficients = torch.cat([flow[:, :1] - local[:, None], flow[:, 1:]], 1)
    count = unique.shape[0]
    if count * net.parameter_vector().numel() * 8 <= _SCORE_BYTES and count * 8 <= m * k:
        row = torch.arange(m, device=a.device)[:, None].expand(m, k).reshape(-1)
        places = torch.stack([row, index])
        size = (m, count)
        through = torch.sparse_coo_tensor(places, coefficients.reshape(-1), size, check_invariants=False)
        return local, torch.sparse.mm(through, net.scores(unique)[1].double())
    return local, net.combined_scores(unique[index].reshape(m, k, sites), coefficients).double()


class GaussNewton:
    r"""Minimises :math:`E\ell^2`, which is zero in a steady state only, by damped Gauss-Newton steps.

    .. math:: \delta\theta = -A^\top(AA^\top+\lambda)^{-1}\sqrt w\,\ell,\qquad A=\sqrt w\,\nabla\ell,

    with the damping lowered after a step that lessens the mean square, and raised after one that doesn't. Since all
    rates vanish in the steady state, so does their sampling noise.

    Args:
        averages: The state, which is changed in place, the master equation, constant in time, and what means are taken
            over.
        damping: The damping at the start, relative to the largest eigenvalue.
        floor: The least damping; larger where there are fewer samples than parameters, so that the samples of one step
            aren't fitted to the last digit.
    """

    def __init__(
        self,
        averages: Averages,
        damping: float = 1e-3,
        floor: float | None = None,
    ) -> None:
        self.net, self.operator, self.averages = averages.net, averages.operator, averages
        self.damping = damping
        exact = averages.num_samples is None
        self.floor = floor if floor is not None else (1e-12 if exact else 1e-5)

    def step(self, generator: torch.Generator | None = None) -> NewtonStep:
        """Take one step."""
        batch = self.averages.draw(generator)
        a, w = batch.outcomes, batch.weights
        local, gradient = rates_and_gradients(self.net, self.operator, a)
        root = w.sqrt()
        matrix, right = gradient * root[:, None], local * root
        # delta theta = -A^T (A A^T + lambda)^-1 sqrt(w) l: the small system, of samples rather than
        # parameters
        gram = matrix @ matrix.mT
        scale = float(torch.linalg.matrix_norm(gram, 2)) if gram.shape[0] < 64 else _power(gram)
        eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        before = float(right.square().sum())
        judge, bar = batch, before
        if self.averages.num_samples is not None:
            # fresh draws decide, since a step can meet its own samples and be wrong elsewhere
            judge = self.averages.draw(generator)
            bar = self._mean_square(judge.outcomes, judge.weights)
        y = self.net.parameter_vector().double()
        accepted, start = False, self.damping
        for _ in range(8):
            solution = torch.linalg.solve(gram + self.damping * scale * eye, right)
            self.net.set_parameter_vector(y - matrix.mT @ solution)
            after = self._mean_square(judge.outcomes, judge.weights)
            if after < bar:
                accepted = True
                self.damping = max(self.floor, self.damping / 4)
                break
            self.damping = min(self.damping * 8, 1e6)
        else:
            self.net.set_parameter_vector(y)
            if self.averages.num_samples is not None:
                # these draws were misleading, which says little about the damping that the next ones need
                self.damping = min(8 * start, 1.0)
        return NewtonStep(before, float(w @ local.abs()), accepted)

    def _mean_square(self, a: Tensor, w: Tensor) -> float:
        value = float(w @ local_rates(self.net, self.operator, a).square())
        return value if math.isfinite(value) else math.inf


def _power(gram: Tensor) -> float:
    """Return the largest eigenvalue, near enough for a scale."""
    # power iteration
    v = gram.sum(1)
    for _ in range(12):
        v = gram @ (v / v.norm().clamp(min=1e-300))
    return float(v.norm())
