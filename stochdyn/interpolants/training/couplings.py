"""Couplings: which point of the first sample travels to which point of the second."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_bool,
    check_choice,
    check_finite,
    check_ndim,
    check_positive_int,
    check_real,
)
from stochdyn.core._distance import squared_distance
from stochdyn.core.transport.entropic import TransportPlan, sinkhorn
from stochdyn.errors import ConvergenceWarning, InvalidInputError, ShapeError
from stochdyn.interpolants.paths.interpolant import as_points, check_pair

__all__ = [
    "Coupling",
    "EntropicCoupling",
    "ExactCoupling",
    "IndependentCoupling",
    "as_coupling",
    "coupling_cost",
]


class Coupling(nn.Module, ABC):
    """A rule that pairs two samples of one size.

    :class:`IndependentCoupling` costs nothing, keeps given pairs and lets one-sided paths have a score. :class:`ExactCoupling` makes flows
    nearly straight, so that few steps suffice, at the price of a linear assignment per batch (see ``reuse`` and
    :class:`CoupledBatches`). :class:`EntropicCoupling` is for Schrödinger bridges, whose noise it knows.
    """

    @abstractmethod
    def pair(
        self, x0: Tensor, x1: Tensor, condition: Any = None, generator: torch.Generator | int | None = None
    ) -> Tensor:
        """Return the partner in ``x1`` of every point of ``x0``, ``(n,)`` indices.

        Args:
            x0: The starts, ``(n, d)``.
            x1: The ends, ``(n, d)``.
            condition: The labels ``(n,)`` or context ``(n, c)`` of ``x1``, or None.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        """


class IndependentCoupling(Coupling):
    r"""The pairs as they come, :math:`\rho_0\otimes\rho_1` if the samples are independent.

    Example:
        >>> IndependentCoupling().pair(torch.zeros(3, 2), torch.ones(3, 2))
        tensor([0, 1, 2])
    """

    def pair(
        self, x0: Tensor, x1: Tensor, condition: Any = None, generator: torch.Generator | int | None = None
    ) -> Tensor:
        """Return the index of the end that goes with each start, ``(n,)``."""
        x0 = as_tensor(x0, "x0", (1, 2), "(n, d)", finite=False)
        return torch.arange(x0.shape[0], device=x0.device)


class ExactCoupling(Coupling):
    r"""Optimal transport of the batch, as a permutation.

    .. math:: \min_\pi\sum_i|x_{0,i}-x_{1,\pi(i)}|^2+w\,\mathbb 1[c_i\ne c_{\pi(i)}]

    Both samples are used once each: drawing pairs with replacement from the plan, which is a permutation, would leave
    out more than a third of the points and add noise for nothing.

    Args:
        condition_weight: The weight w of the distance between conditions. A point of the first law must not know the condition of its
            partner, or else sampling with a given condition starts from the wrong law. So every :math:`x_0` is given the condition that it
            came with, and the cost asks the partner to have the same: ``inf`` keeps labels apart exactly, numbers trade the two off (for
            contexts :math:`w|c_i-c_j|^2`), 0 ignores conditions. None, the default, keeps labels apart exactly, and for contexts takes a
            hundred times the ratio of the mean squared distances of points and of contexts.

    Raises:
        InvalidInputError: If the weight is negative.

    Example:
        >>> ExactCoupling().pair(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.1], [0.1]]))
        tensor([1, 0])

    Reference:
        Tong et al., "Improving and generalizing flow-based generative models with minibatch optimal transport", 2024;
        Cheng and Schwing, "The curse of conditions", 2025 (the condition-aware cost).
    """

    def __init__(self, condition_weight: float | None = None) -> None:
        super().__init__()
        self.condition_weight = _weight(condition_weight)

    def pair(
        self, x0: Tensor, x1: Tensor, condition: Any = None, generator: torch.Generator | int | None = None
    ) -> Tensor:
        """Return the index of the end that goes with each start, ``(n,)``.

        Raises:
            NonFiniteError: If a point isn't finite.
        """
        x0, x1 = _samples(x0, x1)
        if x0.shape[-1] == 1 and (self.condition_weight == 0.0 or condition is None):
            # on the line the sorted samples are matched
            partner = torch.empty(x0.shape[0], dtype=torch.long, device=x0.device)
            partner[x0[:, 0].argsort()] = x1[:, 0].argsort()
            return partner
        cost = coupling_cost(x0, x1, condition, self.condition_weight)
        return torch.from_numpy(_assign(cost.cpu().double().numpy())).to(x0.device)


def _assign(cost: np.ndarray) -> np.ndarray:
    """Return the optimal permutation, by POT's network simplex, which is faster here than scipy's assignment."""
    import ot

    # the solver's own tolerances are absolute
    n, largest = cost.shape[0], cost.max()
    cost = cost / largest if largest > 0 else cost
    weights = np.full(n, 1.0 / n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = ot.emd(
            weights,
            weights,
            cost,
            numItermax=max(100_000, 20 * n * n),
            log=True,
            center_dual=False,
            check_marginals=False,
        )
    partner = plan.argmax(1).astype(np.int64)
    if log["warning"] is None and np.array_equal(np.sort(partner), np.arange(n)):
        return partner
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)


class EntropicCoupling(Coupling):
    r"""Entropic optimal transport of the batch.

    .. math:: \min_P\ \langle P,C\rangle+\lambda\,KL(P\,\|\,a\otimes b),\qquad C_{ij}=|x_{0,i}-x_{1,j}|^2

    Every point of the first sample is used once, and its partner is drawn from its row of the plan. With
    :math:`\lambda=2\sigma^2` and the Brownian latent of scale :math:`\sigma` the interpolant has the law of the
    Schrödinger bridge between the batches, and :math:`b+\tfrac{\sigma^2}2s` is its drift.

    Args:
        reg: The strength :math:`\lambda` of the regularisation, in units of the squared distance; None takes :math:`2\sigma^2` from the interpolant.
        tolerance: The largest error of a plan's marginals, in L1, as a share of the mass.
        max_iterations: The bound on the number of iterations of Sinkhorn's method.
        warm_start: Whether to begin with the potentials of the batch before, carried over to the new points.
        condition_weight: The weight of the distance between conditions, as in :class:`ExactCoupling`.

    A plan that doesn't reach the tolerance isn't used: the exact permutation takes its place, with a ConvergenceWarning.

    Raises:
        InvalidInputError: If ``reg`` isn't positive, or the weight negative.

    Example:
        >>> x = torch.tensor([[0.0], [4.0]])
        >>> EntropicCoupling(0.1).pair(x, x.flip(0) + 0.1)
        tensor([1, 0])

    Reference:
        Shi et al., "Diffusion Schrödinger bridge matching", 2023; Tong et al., "Simulation-free Schrödinger bridges via
        score and flow matching", 2024.
    """

    def __init__(
        self,
        reg: float | None = None,
        tolerance: float = 1e-3,
        max_iterations: int = 20_000,
        warm_start: bool = True,
        condition_weight: float | None = None,
    ) -> None:
        super().__init__()
        if reg is not None:
            check_real(reg, "reg", above=0.0)
        check_real(tolerance, "tolerance", above=0.0)
        check_positive_int(max_iterations, "max_iterations")
        check_bool(warm_start, "warm_start")
        self.reg, self.tolerance, self.max_iterations = reg, tolerance, max_iterations
        self.warm_start, self.condition_weight = warm_start, _weight(condition_weight)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def plan(self, x0: Tensor, x1: Tensor, condition: Any = None) -> TransportPlan:
        """Return the plan between the samples, whether or not it converged."""
        if self.reg is None:
            raise InvalidInputError(
                "an entropic coupling needs reg", hint="give reg, in units of the squared distance"
            )
        x0, x1 = _samples(x0, x1)
        cost = coupling_cost(x0, x1, condition, self.condition_weight)
        if self.reg < 100 * torch.finfo(cost.dtype).eps * float(cost.max()):
            cost = cost.double()  # below what single precision tells apart
        start = (
            self._carry(x0, x1)
            if self.warm_start and (condition is None or self.condition_weight == 0.0)
            else None
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            plan = sinkhorn(None, None, self.reg, cost=cost, tolerance=self.tolerance,
                            max_iterations=self.max_iterations, warm_start=start)  # fmt: skip
            if start is not None and not plan.converged:
                plan = sinkhorn(None, None, self.reg, cost=cost, tolerance=self.tolerance,
                                max_iterations=self.max_iterations)  # fmt: skip
        self._last = (x1.detach(), plan.potentials[1], x0.detach()) if plan.converged else None
        return plan

    def _carry(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor] | None:
        """Carry the last potentials over to new points by the equations that define them."""
        if self._last is None or self._last[0].shape != x1.shape or self._last[0].dtype != x1.dtype:
            return None
        assert self.reg is not None
        old, g, _ = self._last
        if old.device != x1.device:
            return None
        f = _soft_min(coupling_cost(x0, old), g, self.reg)
        return f, _soft_min(coupling_cost(x1, x0), f, self.reg)

    def pair(
        self, x0: Tensor, x1: Tensor, condition: Any = None, generator: torch.Generator | int | None = None
    ) -> Tensor:
        """Return the index of the end that goes with each start, ``(n,)``."""
        x0, x1 = _samples(x0, x1)
        plan = self.plan(x0, x1, condition)
        if not plan.converged:
            warnings.warn(
                f"no entropic plan within {self.tolerance:.1e} (marginal error {float(plan.marginal_error):.1e}) at "
                f"reg={self.reg:g}; the exact permutation is used for this batch. Raise reg or max_iterations, or use "
                "float64",
                ConvergenceWarning,
                stacklevel=2,
            )
            return ExactCoupling(self.condition_weight).pair(x0, x1, condition, generator)
        return torch.multinomial(plan.plan(), 1, generator=as_generator(generator, x0.device)).squeeze(-1)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the potentials that the next batch starts from."""
        return {} if self._last is None else dict(zip(("x1", "g", "x0"), self._last, strict=True))

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take them up again."""
        self._last = (state["x1"], state["g"], state["x0"]) if state else None


def _samples(x0: Any, x1: Any) -> tuple[Tensor, Tensor]:
    x0, x1, _ = as_points(x0, x1)
    check_pair(x0, x1)
    check_ndim(x0, 2, "x0", "(n, d)")
    check_finite(x0, "x0")
    check_finite(x1, "x1")
    return x0, x1


def _soft_min(cost: Tensor, potential: Tensor, reg: float) -> Tensor:
    return -reg * torch.logsumexp((potential - cost) / reg - float(np.log(cost.shape[-1])), -1)


def _weight(value: float | None) -> float | None:
    if value is None or (isinstance(value, float) and value == float("inf")):
        return value
    check_real(value, "condition_weight", minimum=0.0)
    return float(value)


def coupling_cost(
    x0: Tensor, x1: Tensor, condition: Any = None, condition_weight: float | None = None
) -> Tensor:
    """Return squared distances ``(n, m)``, with what different conditions cost on top.

    Args:
        x0: The starts, ``(n, d)``.
        x1: The ends, ``(m, d)``.
        condition: The labels ``(m,)`` or contexts ``(m, c)`` of the ends; the same are given to the starts.
        condition_weight: The weight of the distance between conditions, as in :class:`ExactCoupling`.

    Raises:
        ShapeError: If the conditions don't fit the points.
        InvalidInputError: If contexts are to be kept apart exactly.
    """
    a, b = x0.detach(), x1.detach()
    cost = squared_distance(a, b)
    if condition is None or condition_weight == 0.0:
        return cost
    if not isinstance(condition, Tensor) or condition.shape[:1] != x1.shape[:1] or x0.shape[0] != x1.shape[0]:
        raise ShapeError(
            "a condition-aware cost needs one condition per point", got=getattr(condition, "shape", None)
        )
    if not condition.is_floating_point():
        labels = condition.reshape(len(condition), -1)
        differ = (labels[:, None] != labels[None]).any(-1)
        if condition_weight is not None and condition_weight < float("inf"):
            return cost + condition_weight * differ
        # "apart" must outweigh any permutation, and still be a number that the solver can add up
        largest = cost.max()
        return cost + torch.where(largest > 0, largest * (len(cost) + 1), 1.0) * differ
    if condition_weight == float("inf"):
        raise InvalidInputError(
            "contexts can't be kept apart exactly", got="condition_weight=inf", hint="give a number"
        )
    context = condition.reshape(len(condition), -1).to(cost)
    apart = squared_distance(context, context)
    if condition_weight is None:
        spread = apart.mean()
        return cost + 100.0 * torch.where(spread > 0, cost.mean() / spread, 0.0) * apart
    return cost + condition_weight * apart


def as_coupling(coupling: str | Coupling, scale: float) -> Coupling:
    """Turn a name into a :class:`Coupling`; the entropic one takes ``reg = 2 * scale**2``.

    Raises:
        InvalidInputError: If the name is unknown.
    """
    if isinstance(coupling, EntropicCoupling) and coupling.reg is None:
        coupling.reg = 2.0 * scale**2
    if isinstance(coupling, Coupling):
        return coupling
    check_choice(coupling, ("independent", "ot", "entropic"), "coupling")
    if coupling == "entropic":
        return EntropicCoupling(2.0 * scale**2)
    return ExactCoupling() if coupling == "ot" else IndependentCoupling()
