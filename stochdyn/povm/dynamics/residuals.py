"""Residuals of linear equations for probabilities, in the 1-norm and the weighted 2-norm, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._transforms import recording
from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.core.forward.outcomes import all_configurations, encode
from stochdyn.povm.ansatz.autoregressive import AutoregressiveAnsatz
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.ansatz.prefixes import unique_strings
from stochdyn.povm.dynamics.averages import Averages, local_rates

__all__ = ["ResidualProblem", "ResidualValue", "StepSource"]

_MAX_TABLE = 1 << 16


@dataclass(frozen=True)
class ResidualValue:
    r"""A residual's norm, and its gradient as :math:`\sum_bc_b\nabla\log P(b)`.

    Attributes:
        loss: The estimate of the norm.
        outcomes: The distinct outcomes ``(m, N)``.
        coefficients: The coefficients ``(m,)`` of the gradient, float64.
    """

    loss: float
    outcomes: Tensor
    coefficients: Tensor


class ResidualProblem:
    r"""How far a state is from solving :math:`(\kappa-\tau L)P = G`.

    .. math::
        R = \kappa P - \tau LP - G,\qquad C_1 = \sum_a|R(a)| = E_P\,|R/P|,\qquad C_2 = \sum_aR(a)^2/P(a) = E_P\,(R/P)^2

    One step of the trapezoid rule has :math:`\kappa=1`, :math:`\tau=h/2` and :math:`G=(1+\tau L)P_t`; a steady state
    :math:`\kappa=0`, :math:`\tau=1`, :math:`G=0`. With the weights :math:`1/P` held fixed the gradient is

    .. math::
        \nabla C = E_{a\sim P}\Bigl[v(a)\sum_b\frac{P(b)}{P(a)}\,(\kappa\delta_{ab}-\tau L_{ab})\,\nabla\log
        P(b)\Bigr],\qquad v=\operatorname{sign}R\ \text{ or }\ 2R/P,

    without bias. All is formed from differences of log probabilities.

    Args:
        averages: The state that is trained, the master equation, and what means are taken over.
        norm: The norm of the residual, ``"l1"`` or ``"l2"``.
        kappa: The factor :math:`\kappa` of the probabilities, 1 or 0.
        tau: The factor :math:`\tau` of the operator ``L``.
        source: The known side ``G``; None for zero.
        t: The time at which the operator is evaluated.

    Reference:
        Luo, Chen, Carrasquilla and Clark, Phys. Rev. Lett. 128, 090501 (2022), the forward-backward trapezoid method.
    """

    def __init__(
        self,
        averages: Averages,
        norm: str = "l1",
        kappa: float = 0.0,
        tau: float = 1.0,
        source: StepSource | None = None,
        t: float | None = None,
    ) -> None:
        self.net, self.operator, self.averages, self.norm = averages.net, averages.operator, averages, norm
        self.kappa, self.tau, self.source, self.t = kappa, tau, source, t

    def evaluate(self, generator: torch.Generator | None = None) -> ResidualValue:
        """Return the norm and the coefficients of its gradient at the present parameters."""
        with torch.no_grad():
            return self._summed() if self.averages.num_samples is None else self._sampled(generator)

    def _derivative(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integrand of the norm and ``v`` from ``R / P``."""
        return (ratio.abs(), ratio.sign()) if self.norm == "l1" else (ratio.square(), 2 * ratio)

    def _summed(self) -> ResidualValue:
        net = self.net
        every = all_configurations(net.num_sites, net.num_outcomes, net.device)
        log_p = net.log_prob(every).double()
        # R = kappa P - tau L P - G over all outcomes
        p = log_p.exp()
        residual = self.kappa * p - self.tau * self.operator.apply(p, self.t)
        if self.source is not None:
            residual = residual - self.source.table()
        value, v = self._derivative(residual / p)
        # the gradient's coefficients c_b = P(b) sum_a v(a) (kappa delta_ab - tau L_ab): the adjoint of the
        # same operator
        back = self.kappa * v - self.tau * self.operator.apply_adjoint(v, self.t)
        coefficients = p * back
        if isinstance(net, AutoregressiveAnsatz) and net.symmetry is not None:
            every, place = unique_strings(net.representatives(every), net.num_outcomes)
            coefficients = coefficients.new_zeros(every.shape[0]).index_add(0, place, coefficients)
        return ResidualValue(float(p @ value), every, coefficients)

    def _sampled(self, generator: torch.Generator | None) -> ResidualValue:
        net = self.net
        batch = self.averages.draw(generator)
        a, w = batch.outcomes, batch.weights
        b, rates = self.operator.connected(a, self.t)
        row, place = rates[:, 1:].nonzero(as_tuple=True)
        outcomes = torch.cat([a, b[row, place + 1]])
        if isinstance(net, AutoregressiveAnsatz):
            outcomes = net.representatives(outcomes)
        unique, index = unique_strings(outcomes, net.num_outcomes)
        each = net.log_prob(unique).double()
        log_p = each[index]
        n = a.shape[0]
        # L_ab P(b)/P(a) for every connected b; with the diagonal it makes l(a)
        flow = rates[row, place + 1].double() * (log_p[n:] - log_p[row]).exp()
        diagonal = rates[:, 0].double()
        local = diagonal.index_add(0, row, flow)
        ratio = self.kappa - self.tau * local
        if self.source is not None:
            ratio = ratio - self.source.relative(a, log_p[:n])
        value, v = self._derivative(ratio)
        # the gradient E v(a) sum_b (P(b)/P(a)) (kappa delta_ab - tau L_ab) grad log P(b), split into b = a
        # and b != a
        own = w * v * (self.kappa - self.tau * diagonal)
        through = -self.tau * (w * v)[row] * flow
        coefficients = own.new_zeros(unique.shape[0]).index_add(0, index, torch.cat([own, through]))
        return ResidualValue(float(w @ value), unique, coefficients)

    def backward(self, value: ResidualValue) -> None:
        """Add the gradient to the ``grad`` of the parameters, part by part so that memory stays bounded."""
        net = self.net
        rows = 4096
        if isinstance(net, AutoregressiveAnsatz):
            rows = max(16, net.memory // (len(net.strings) * net.bytes_per_row * 8))
        for outcomes, part in zip(value.outcomes.split(rows), value.coefficients.split(rows), strict=True):
            with recording():
                log_p = net.log_prob(outcomes)
                (log_p * part.to(log_p.dtype)).sum().backward()


class StepSource:
    r"""The known side :math:`G=(1+\tau L)P_t` of a step, of a state that was frozen before it.

    Args:
        frozen: The state before the step; its parameters are not to change.
        operator: The master equation.
        tau: Half the length of the step.
        t: The time before the step.
    """

    def __init__(self, frozen: Ansatz, operator: SparseMasterEquation, tau: float, t: float | None) -> None:
        self.frozen, self.operator, self.tau, self.t = frozen, operator, tau, t
        self._table: Tensor | None = None
        if frozen.num_outcomes**frozen.num_sites <= _MAX_TABLE:
            self._table = self._make()

    def _make(self) -> Tensor:
        p = self.frozen.probabilities().double()
        return p + self.tau * self.operator.apply(p, self.t)

    def table(self) -> Tensor:
        """Return ``G`` over all outcomes ``(K**N,)``."""
        if self._table is None:
            self._table = self._make()
        return self._table

    def relative(self, a: Tensor, log_prob: Tensor) -> Tensor:
        """Return ``G(a) / exp(log_prob)`` ``(n,)``."""
        if self._table is not None:
            return self._table[encode(a, self.frozen.num_outcomes)] * (-log_prob).exp()
        before = self.frozen.log_prob(a).double()
        rate = local_rates(self.frozen, self.operator, a, self.t)
        return (before - log_prob).exp() * (1 + self.tau * rate)
