"""Where means under a variational state are taken: over samples, or over all outcomes (up to symmetry)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.core.forward.master import MasterEquation
from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.core.forward.outcomes import all_configurations
from stochdyn.errors import ConvergenceWarning, SystemSizeError
from stochdyn.povm.ansatz.autoregressive import AutoregressiveAnsatz
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.ansatz.invariance import is_invariant
from stochdyn.povm.ansatz.prefixes import unique_strings

__all__ = ["Averages", "WeightedOutcomes", "local_rates"]

_MAX_SUMMED = 1 << 14
_MAX_LISTED = 1 << 20
_RATE_BYTES = 1 << 27


@dataclass(frozen=True)
class WeightedOutcomes:
    r"""Distinct outcomes with weights that sum to one, so that :math:`E_P f \approx \sum_a w_a f(a)`.

    Attributes:
        outcomes: The distinct outcomes ``(m, N)``.
        weights: The weight ``(m,)`` of each of them, float64.
        num_samples: The number of draws that the weights count; None if they are the probabilities themselves.
    """

    outcomes: Tensor
    weights: Tensor
    num_samples: int | None


class Averages:
    """Draws what means are taken over.

    Args:
        net: The variational state.
        operator: The master equation; where the state has a symmetry that the equation shares, outcomes of one orbit
            are counted together, since all that is averaged is the same on them.
        num_samples: The number of draws; None sums over all outcomes.
        stratified: Whether to draw evenly instead of independently, as in :meth:`Ansatz.sample`.

    Raises:
        SystemSizeError: If there are too many outcomes (after symmetry) to sum over.
    """

    def __init__(
        self, net: Ansatz, operator: SparseMasterEquation, num_samples: int | None, stratified: bool = True
    ) -> None:
        if num_samples is not None:
            check_positive_int(num_samples, "num_samples", 2)
        self.net, self.operator, self.num_samples, self.stratified = net, operator, num_samples, stratified
        symmetry = net.symmetry
        self.symmetric = symmetry is not None and is_invariant(operator, symmetry)
        self._warn_of_symmetry()
        self._all: tuple[Tensor, Tensor] | None = None
        if num_samples is None:
            self._all = self._list()

    def _warn_of_symmetry(self) -> None:
        """Say so if the state is averaged over strings that the model doesn't share."""
        strings = getattr(self.net, "strings", None)
        if strings is None or len(strings) == 1 or self.symmetric:
            return
        if not is_invariant(self.operator, strings.relative()):
            what = "the model isn't symmetric under the strings that the ansatz averages over"
        elif self.net.symmetry is None and strings.is_group:
            what = "the initial state isn't symmetric under the strings that the ansatz averages over"
        else:
            return
        warnings.warn(
            f"{what} ({strings!r}), so it can't follow: use strings=None, or symmetries of the model",
            ConvergenceWarning,
            stacklevel=5,
        )

    def _list(self) -> tuple[Tensor, Tensor]:
        """Return the outcomes to sum over and how many each stands for."""
        net = self.net
        limit = _MAX_LISTED if self.symmetric else _MAX_SUMMED
        net.check_listable(limit)
        every = all_configurations(net.num_sites, net.num_outcomes, net.device)
        if not self.symmetric:
            return every, torch.ones(every.shape[0], dtype=torch.float64, device=net.device)
        representatives, place = unique_strings(self._representatives(every), net.num_outcomes)
        if representatives.shape[0] > _MAX_SUMMED:
            raise SystemSizeError(
                "there are too many outcomes to sum over",
                got=f"{representatives.shape[0]} that symmetry doesn't relate",
                expected=f"at most {_MAX_SUMMED}",
                hint="pass num_samples",
            )
        return representatives, torch.bincount(place, minlength=representatives.shape[0]).double()

    def _representatives(self, a: Tensor) -> Tensor:
        if self.symmetric and isinstance(self.net, AutoregressiveAnsatz):
            return self.net.representatives(a)
        return a

    def draw(self, generator: torch.Generator | None = None) -> WeightedOutcomes:
        """Return outcomes and weights for the present parameters."""
        if self._all is not None:
            outcomes, multiplicity = self._all
            with torch.no_grad():
                weights = self.net.log_prob(outcomes).double().exp() * multiplicity
            return WeightedOutcomes(outcomes, weights / weights.sum(), None)
        assert self.num_samples is not None
        a, _ = self.net.sample(self.num_samples, generator=generator, stratified=self.stratified)
        # outcomes of one orbit count together; the weight is the share of the draws
        distinct, place = unique_strings(self._representatives(a), self.net.num_outcomes)
        weights = torch.bincount(place, minlength=distinct.shape[0]).double() / self.num_samples
        return WeightedOutcomes(distinct, weights, self.num_samples)


def local_rates(net: Ansatz, operator: MasterEquation, a: Tensor, t: float | None = None) -> Tensor:
    r"""Return :math:`\ell(a)=(LP)(a)/P(a)` ``(n,)`` in float64, without gradients, in parts that fit the memory.

    Args:
        net: The state, which gives the log probabilities.
        operator: The master equation.
        a: The outcomes ``(n, N)`` at which rates are wanted.
        t: The time, where the equation depends on it.
    """
    width = getattr(operator, "shifts", a[:1]).shape[0]
    rows = max(1, _RATE_BYTES // (8 * a.shape[1] * width))
    with torch.no_grad():
        return torch.cat([_local_rates(net, operator, part, t) for part in a.split(rows)]).double()


def _local_rates(net: Ansatz, operator: MasterEquation, a: Tensor, t: float | None) -> Tensor:
    if isinstance(operator, SparseMasterEquation):
        ratios = net.log_ratios(a, operator.shifts)
        if ratios is not None:
            rates = operator.rates(a, t).to(ratios.dtype)
            # l(a) = sum_b L_ab P(b) / P(a), with ratios of probabilities from differences of logarithms
            return (rates * ratios.exp()).sum(1)
    return operator.local_rate(net.log_prob, a, t, deduplicate=False)
