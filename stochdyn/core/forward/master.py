"""The contract of master equations on discrete outcomes: on full vectors and on sampled strings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import check_type
from stochdyn.core.forward.operator import ForwardOperator
from stochdyn.core.forward.outcomes import all_configurations, encode, unique_rows
from stochdyn.errors import InvalidInputError, ShapeError, SystemSizeError

if TYPE_CHECKING:
    from stochdyn.core.forward.flow import MarginalFlow

__all__ = ["MasterEquation"]

LogProb = Callable[[Tensor], Tensor]
MAX_STATES = 1 << 24


class MasterEquation(ForwardOperator, ABC):
    r"""The generator of a master equation on strings of outcomes, ``N`` sites with ``q`` outcomes each.

    .. math:: \dot p(a) = (Lp)(a) = \sum_b L_{ab}\,p(b),\qquad \sum_a L_{ab} = 0

    Off-diagonal entries may be negative ("quasi-rates"): nothing here takes :math:`L` for the generator of a
    jump process. Vectors over all outcomes count strings with the first site slowest.

    Attributes:
        num_sites: The number of sites of a lattice, ``N``.
        num_outcomes: The number of outcomes per site, ``q``.
    """

    num_sites: int
    num_outcomes: int

    def apply(self, p: Any, t: Tensor | float | None = None) -> Any:
        """Return ``L p`` for vectors ``p (*batch, q**N)`` over all outcomes, without forming ``L``.

        Given a function in place of a tensor, this is ``nn.Module.apply``.

        Raises:
            ShapeError: If the last axis isn't ``q**N``.
            InvalidInputError: If the operator depends on time and ``t`` is None.
        """
        if not isinstance(p, Tensor):
            return super().apply(p)
        if p.shape[-1] != self.num_states:
            raise ShapeError(
                "a vector over all outcomes has q**N entries", got=p.shape[-1], expected=self.num_states
            )
        return self.multiply(p, t)

    @abstractmethod
    def multiply(self, p: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Return ``L p``; see :meth:`apply`, which checks the shape first."""

    @abstractmethod
    def connected(self, a: Tensor, t: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """Return every outcome that can feed given ones, each once, with the entries of ``L``.

        Args:
            a: The integer outcomes ``(n, N)``, the rows of ``L``.
            t: The time, or ``(n, 1)`` times, where ``L`` depends on it.

        Returns:
            Configurations ``(n, K, N)`` and rates ``(n, K)``, the entries of ``L`` in row ``a`` and column
            ``b``. Place 0 is ``a`` itself with the diagonal entry. Rates may be zero for single rows.
        """

    @abstractmethod
    def mass_defect(self) -> Tensor:
        """Return the largest absolute column sum relative to the largest rate; it is zero where mass is conserved."""

    @property
    def num_states(self) -> int:
        """``q**N``, the number of outcomes of all sites together."""
        return int(self.num_outcomes**self.num_sites)

    def check_mass(self, tolerance: float = 1e-6) -> None:
        """Raise unless every column of ``L`` sums to zero.

        Raises:
            InvalidInputError: If a column sum is over ``tolerance`` times the largest rate.
        """
        defect = float(self.mass_defect())
        if not defect <= tolerance:
            raise InvalidInputError(
                "the columns of a master operator must sum to zero",
                got=f"a column sum of {defect:.3g} times the largest rate",
                expected=f"at most {tolerance:.3g} times",
                hint="L[a, b] is the rate from b into a; pass the transpose if yours has zero row sums",
            )

    def configurations(self, device: torch.device | str | None = None) -> Tensor:
        """Return all outcomes ``(q**N, N)`` in the order of the vectors."""
        self._check_small()
        return all_configurations(self.num_sites, self.num_outcomes, device)

    def to_sparse(self, t: Tensor | float | None = None) -> Tensor:
        """Return ``L`` as a coalesced sparse matrix ``(q**N, q**N)``, for small ``N``.

        Raises:
            SystemSizeError: If there are over 2**24 outcomes.
        """
        a = self.configurations()
        # (L p)_a / p_a = L_aa + sum_b L_ab p_b / p_a over the outcomes b that flow into a.
        b, rates = self.connected(a, t)
        row, place = rates.nonzero(as_tuple=True)
        column = encode(b[row, place], self.num_outcomes)
        size = (self.num_states, self.num_states)
        places = torch.stack([row, column])
        return torch.sparse_coo_tensor(places, rates[row, place], size, check_invariants=False).coalesce()

    def _check_small(self) -> None:
        if self.num_states > MAX_STATES:
            raise SystemSizeError(
                "there are too many outcomes to list",
                got=f"{self.num_outcomes}**{self.num_sites}",
                hint="work on samples: connected, local_rate",
            )

    def local_rate(
        self,
        log_prob: LogProb,
        a: Tensor,
        t: Tensor | float | None = None,
        *,
        deduplicate: bool = True,
        chunk_size: int | None = None,
    ) -> Tensor:
        r"""Logarithmic rate of change that the equation asks of a distribution, at sampled outcomes.

        .. math:: \ell(a) = \frac{(Lp)(a)}{p(a)} = \sum_b L_{ab}\,e^{\log p(b)-\log p(a)},\qquad E_p[\ell]=0

        Ratios are formed from differences of logarithms, so probabilities may be smaller than any float.

        Args:
            log_prob: A function that maps outcomes ``(n, N)`` to log probabilities ``(n,)``, up to a constant.
            a: The integer outcomes ``(n, N)``.
            t: The time where the operator depends on it.
            deduplicate: Whether to evaluate ``log_prob`` once for outcomes that several samples share.
            chunk_size: The largest number of outcomes that are evaluated at a time.

        Returns:
            ``(n,)``, differentiable in the parameters of ``log_prob``. Outcomes of zero rate aren't
            evaluated, so the number of evaluations depends on the data (one host synchronisation).

        Reference:
            Luo, Chen, Carrasquilla and Clark, "Autoregressive neural network for simulating open quantum
            systems via a probabilistic formulation", Phys. Rev. Lett. 128, 090501 (2022).
        """
        self._check_outcomes(a)

        def evaluate(b: Tensor, _: Tensor) -> Tensor:
            if deduplicate:
                unique, index = unique_rows(b, self.num_outcomes)
                return _in_chunks(log_prob, unique, chunk_size)[index]
            return _in_chunks(log_prob, b, chunk_size)

        return self._local_rate(evaluate, a, t)

    def _local_rate(
        self, evaluate: Callable[[Tensor, Tensor], Tensor], a: Tensor, t: Tensor | float | None
    ) -> Tensor:
        b, rates = self.connected(a, t)
        row, place = rates[:, 1:].nonzero(as_tuple=True)
        own = torch.arange(a.shape[0], device=a.device)
        # one call for the samples and their neighbours, so that shared outcomes are evaluated once
        log_p = evaluate(torch.cat([a, b[row, place + 1]]), torch.cat([own, row]))
        ratio = (log_p[a.shape[0] :] - log_p[row]).exp()
        inflow = rates[row, place + 1].to(ratio.dtype) * ratio
        return rates[:, 0].to(ratio.dtype).index_add(0, row, inflow)

    def residual(
        self, flow: MarginalFlow, t: Tensor | float, x: Tensor, *, stationary: bool = False, **options: Any
    ) -> Tensor:
        r"""How far a flow of distributions is from solving the master equation, at given outcomes.

        .. math:: R(a) = \partial_t\log p_t(a) - \frac{(Lp_t)(a)}{p_t(a)}

        Args:
            flow: A flow with ``log_prob(t, a)`` on integer outcomes.
            t: A time, or ``(..., 1)``, one per sample.
            x: The integer outcomes ``(..., N)``.
            stationary: Whether to leave out the time derivative.
            options: No options are known; unknown ones raise.

        Returns:
            ``(...)``, zero for a solution.

        Raises:
            InvalidInputError: If an option is unknown or the outcomes aren't integers of the right range.
            ShapeError: If ``t`` doesn't broadcast or the number of sites is wrong.
        """
        from stochdyn.core.forward.flow import MarginalFlow, as_time

        if options:
            raise InvalidInputError("unknown option of a master equation", got=", ".join(options))
        check_type(flow, MarginalFlow, "flow")
        self._check_outcomes(x)
        time = as_time(t, x)
        shared = time.numel() == 1
        a = x.reshape(-1, x.shape[-1])
        times = time.reshape(()) if shared else time.expand(*x.shape[:-1], 1).reshape(-1, 1)

        def evaluate(b: Tensor, row: Tensor) -> Tensor:
            if not shared:
                return flow.log_prob(times[row], b)
            unique, index = unique_rows(b, self.num_outcomes)
            return flow.log_prob(times, unique)[index]

        rate = self._local_rate(evaluate, a, times).reshape(x.shape[:-1])
        return -rate if stationary else flow.time_derivative(time, x) - rate

    def residual_probes(self, flow: MarginalFlow, t: Tensor | float, x: Tensor, **options: Any) -> Tensor:
        """Return :meth:`residual` with a leading axis of 1: it is exact."""
        return self.residual(flow, t, x, **options)[None]

    def vector_residual(
        self, p: Tensor, change: Tensor | None = None, t: Tensor | float | None = None
    ) -> Tensor:
        """Return ``change - L p`` over all outcomes, and ``-L p`` (steady state) if ``change`` is None."""
        rate = self.apply(p, t)
        return -rate if change is None else change - rate

    def trapezoid_residual(
        self, p0: Tensor, p1: Tensor, dt: float, t0: float | None = None, t1: float | None = None
    ) -> Tensor:
        r"""Residual of one step of the trapezoid rule, over all outcomes.

        .. math:: R = p_1 - p_0 - \tfrac{h}{2}\,(L p_1 + L p_0)

        Args:
            p0: The probabilities ``(*batch, q**N)`` before the step.
            p1: The same after it.
            dt: The size ``h`` of the step.
            t0: The time before the step, where ``L`` depends on it.
            t1: The time after the step.

        Returns:
            ``(*batch, q**N)``.
        """
        return p1 - p0 - 0.5 * dt * (self.apply(p1, t1) + self.apply(p0, t0))

    def trapezoid_ratio(
        self,
        log_prob0: LogProb,
        log_prob1: LogProb,
        a: Tensor,
        dt: float,
        t0: float | None = None,
        t1: float | None = None,
        **options: Any,
    ) -> Tensor:
        r"""Residual of the trapezoid rule at samples, relative to the later probability.

        .. math::
            \frac{R(a)}{p_1(a)} = 1 - \tfrac h2\ell_1(a) - \frac{p_0(a)}{p_1(a)}\Bigl(1+\tfrac
            h2\ell_0(a)\Bigr)

        Args:
            log_prob0: The normalised log probability before the step, ``(n, N) -> (n,)``.
            log_prob1: The same after it.
            a: The integer outcomes ``(n, N)``.
            dt: The size ``h`` of the step.
            t0: The time before the step, where ``L`` depends on it.
            t1: The time after the step.
            options: The options of :meth:`local_rate`.

        Returns:
            ``(n,)``.
        """
        # (p1 - p0 - dt (L p1 + L p0) / 2) / p1 = 1 - dt/2 (L p1)/p1 - (p0 / p1) (1 + dt/2 (L p0)/p0).
        later = 0.5 * dt * self.local_rate(log_prob1, a, t1, **options)
        earlier = 0.5 * dt * self.local_rate(log_prob0, a, t0, **options)
        return 1 - later - (log_prob0(a) - log_prob1(a)).exp() * (1 + earlier)

    def _check_outcomes(self, a: Tensor) -> None:
        check_type(a, Tensor, "outcomes")
        if a.is_floating_point() or a.dtype == torch.bool:
            raise InvalidInputError("outcomes must be integers", got=a.dtype)
        if a.ndim < 2 or a.shape[-1] != self.num_sites:
            raise ShapeError(
                "outcomes must be (n, N)", got=f"shape {tuple(a.shape)}", expected=f"(n, {self.num_sites})"
            )


def _in_chunks(log_prob: LogProb, a: Tensor, size: int | None) -> Tensor:
    if size is None:
        return log_prob(a)
    return torch.cat([log_prob(part) for part in a.split(size)])
