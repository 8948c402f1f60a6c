"""Explicit steps by fitting: the next state is the member of the family nearest to a target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.dynamics.averages import Averages, WeightedOutcomes, local_rates
from stochdyn.povm.dynamics.tdvp import solve_velocity

__all__ = ["TargetFit", "fit_to_target", "target_step"]

_SMALL = 1e-6


@dataclass(frozen=True)
class TargetFit:
    r"""How near a fit came to its target.

    Attributes:
        misfit: The misfit :math:`\sqrt{E_{P_\theta}(Q/P_\theta-1)^2}`; half its square is about
            :math:`KL(Q\|P_\theta)`.
        iterations: The number of steps taken.
        clipped: The weight of the outcomes where the target was negative and taken as zero.
    """

    misfit: float
    iterations: int
    clipped: float


def fit_to_target(
    net: Ansatz,
    batch: WeightedOutcomes,
    log_prob: Tensor,
    factor: Tensor,
    max_iterations: int = 4,
    rcond: float = 1e-6,
    min_snr: float = 0.0,
) -> TargetFit:
    r"""Minimise the divergence from a target that is known relative to the law the outcomes were drawn from.

    .. math::
        KL(Q\,\|\,P_\theta) = \text{const} - E_{a\sim P_0}\bigl[w(a)\log P_\theta(a)\bigr],\qquad w=Q/P_0,

    by natural-gradient steps: with ratios :math:`\rho=P_\theta/P_0`,

    .. math:: \delta\theta = S^+\,E_{P_0}\bigl[(w-\rho)\,\nabla\log P_\theta\bigr],

    where :math:`-\rho` is a control variate of mean zero, so that nothing is left to estimate at the solution. The
    gradient is taken at the outcomes alone, not at those connected to them.

    Args:
        net: The state where the fit starts, and which is changed.
        batch: The outcomes under :math:`P_0` with their weights.
        log_prob: The log probabilities ``(m,)`` of the outcomes under :math:`P_0`.
        factor: The weights ``w`` of the target, ``(m,)``.
        max_iterations: The largest number of steps.
        rcond: The relative cut of the eigenvalues of the metric.
        min_snr: The least ratio of signal to noise.

    Returns:
        The quality of the fit.

    Reference:
        Sinibaldi, Giuliani, Carleo and Vicentini, "Unbiasing time-dependent variational Monte Carlo by projected
        quantum evolution", Quantum 7, 1131 (2023), for the idea with wave functions.
    """
    negative = factor < 0
    clipped = float(batch.weights[negative].sum())
    target = factor.clamp(min=0)
    y = net.parameter_vector().double()
    best, best_y = math.inf, y
    count = 0
    for count in range(max_iterations + 1):
        now, scores = net.scores(batch.outcomes)
        # rho = P_theta/P_0 turns means under P_0 into means under P_theta
        ratio = (now.double() - log_prob).exp()
        weights = batch.weights * ratio
        weights = weights / weights.sum()
        # w/rho - 1: its mean under P_theta is zero where both laws are normalised, which makes it a control
        # variate
        gap = target / ratio - 1
        misfit = float((weights @ (gap - weights @ gap).square()).sqrt())
        if not misfit < best * 0.98:
            break
        best, best_y = misfit, y
        if count == max_iterations or misfit < _SMALL:
            break
        change = solve_velocity(scores.double(), gap, weights, batch.num_samples, rcond, min_snr).direction
        y = y + change
        net.set_parameter_vector(y)
    net.set_parameter_vector(best_y)
    return TargetFit(best, count, clipped)


def target_step(
    averages: Averages,
    t: float | None,
    step: float,
    generator: torch.Generator | None = None,
    max_iterations: int = 4,
    rcond: float = 1e-6,
    min_snr: float = 0.0,
) -> TargetFit:
    r"""Take one step of second order, by two fits to targets on the same outcomes.

    .. math::
        Q_1 = (1+hL)P_t,\qquad Q_2 = P_t + \tfrac h2L\,(P_t+P_1),\qquad P_1\approx Q_1

    Args:
        averages: The state, which is changed in place, the master equation, and what means are taken over.
        t: The time before the step; None if the equation doesn't depend on it.
        step: The length ``h`` of the step.
        generator: The source of randomness of the draws.
        max_iterations: The largest number of natural-gradient steps of a fit.
        rcond: The relative cut of the eigenvalues of the metric.
        min_snr: The least ratio of signal to noise.
    """
    net, operator = averages.net, averages.operator
    batch = averages.draw(generator)
    a = batch.outcomes
    later = None if t is None else t + step
    with torch.no_grad():
        before = net.log_prob(a).double()
    rate = local_rates(net, operator, a, t)
    options = (max_iterations, rcond, min_snr)
    fit_to_target(net, batch, before, 1 + step * rate, *options)
    with torch.no_grad():
        predicted = net.log_prob(a).double()
    # L P_1 over P_0, from the rates of the predicted state
    flow = (predicted - before).exp() * local_rates(net, operator, a, later)
    return fit_to_target(net, batch, before, 1 + 0.5 * step * (rate + flow), *options)
