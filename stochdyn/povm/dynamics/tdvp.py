"""The time-dependent variational principle: the change of parameters that follows a master equation best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.errors import NonFiniteError
from stochdyn.povm.dynamics.averages import Averages, local_rates

__all__ = ["FisherMetric", "Velocity", "fisher_matrix", "solve_velocity", "tdvp_velocity"]

_SHARPNESS = 6


@dataclass(frozen=True)
class FisherMetric:
    r"""The metric :math:`d(\delta)^2=\delta^\top S\,\delta`, kept as the scores it is made of.

    Attributes:
        factor: The scores ``(m, P)``, centred and times the root of their weights, so that ``S = factor.T @ factor``.
    """

    factor: Tensor

    def norm(self, delta: Tensor) -> Tensor:
        r"""Return :math:`\sqrt{\delta^\top S\delta}`; half its square is the divergence between the two laws."""
        return (self.factor @ delta.to(self.factor.dtype)).norm()


@dataclass(frozen=True)
class Velocity:
    r"""A solution of :math:`S\dot\theta=F` and how good it is.

    Attributes:
        direction: The change of the parameters per unit of time, ``(P,)``.
        residual: The part of the wanted change of the law that the ansatz can't make,
            :math:`\sqrt{E(\ell-O\dot\theta)^2/E\ell^2}`, between 0 and 1; by sampling that of draws left out of the
            solution, where 1 says that nothing of their change was foreseen.
        left_out: The residual without its bound: above 1 where the solution is worse on draws left out than none.
        rate_norm: The speed :math:`\sqrt{E\ell^2}` at which the law changes; zero in a steady state.
        mean_rate: The mean rate :math:`E\ell`, exactly zero but for sampling error.
        rank: The number of directions kept, as the sum of the filters.
        metric: The Fisher metric at these parameters.
    """

    direction: Tensor
    residual: float
    left_out: float
    rate_norm: float
    mean_rate: float
    rank: float
    metric: FisherMetric


def fisher_matrix(scores: Tensor, weights: Tensor) -> Tensor:
    r"""Return the Fisher information ``(P, P)``, the covariance of scores ``(m, P)`` under weights ``(m,)``.

    .. math:: S = E\,OO^\top - E\,O\;E\,O^\top

    Example:
        >>> fisher_matrix(torch.tensor([[1.0], [-1.0]]), torch.tensor([0.5, 0.5])).round(decimals=4)
        tensor([[1.]])
    """
    factor = _centred(scores, weights)
    return factor.mT @ factor


def _centred(x: Tensor, weights: Tensor) -> Tensor:
    root = weights.sqrt()
    mean = weights @ x
    return (x - mean) * (root if x.ndim == 1 else root[:, None])


def solve_velocity(
    scores: Tensor,
    rates: Tensor,
    weights: Tensor,
    num_samples: int | None = None,
    rcond: float = 1e-8,
    min_snr: float = 0.0,
) -> Velocity:
    r"""Solve for the change of parameters that changes the law most nearly at the given rates.

    .. math::
        \dot\theta = \arg\min_v E\bigl(\ell - O^\top v\bigr)^2 = S^+F,\qquad S=\operatorname{Cov}(O,O),\quad
        F=\operatorname{Cov}(O,\ell)

    in the eigenbasis of ``S`` ``(P, P)``, or of the matrix of the samples ``(m, m)`` where that is smaller (the
    "minSR" form, which has the same nonzero eigenvalues). The inverse eigenvalues are filtered: those below ``rcond``
    times the largest, and those along which the force is drowned by its sampling noise, fade out smoothly,

    .. math::
        \frac1{\sigma_k}\;\frac1{1+(\mathrm{rcond}\,\sigma_1/\sigma_k)^6}\;\frac1{1+(\mathrm{snr}/\mathrm{SNR}_k)^6}.

    The noise of :math:`F_k` is that of the products of score and *residual* :math:`\ell-O\dot\theta`, not of score
    and rate: errors of ``S`` and ``F`` on the same samples cancel as far as the ansatz can follow. Each draw's residual
    is that of the solution without it (by its leverage), since a solution that meets all samples has none on them.

    Args:
        scores: The scores ``(m, P)``.
        rates: The wanted changes ``(m,)`` of the log probability.
        weights: The weights ``(m,)`` of the outcomes, which sum to one.
        num_samples: The number of draws behind the weights; None where they are exact, which turns the noise filter
            off.
        rcond: The relative cut of the eigenvalues of the metric.
        min_snr: The least ratio of signal to noise; 0 keeps all directions.

    Returns:
        The velocity and its quality.

    Reference:
        Reh, Schmitt and Gärttner, "Time-dependent variational principle for open quantum systems with artificial
        neural networks", Phys. Rev. Lett. 127, 230501 (2021); Chen and Heyl, Nature Physics 20, 1476 (2024) for the
        smaller form.
    """
    weights = weights.to(scores.dtype)
    rates = rates.to(scores.dtype)
    b, r = _centred(scores, weights), _centred(rates, weights)
    m, p = b.shape
    small = m < p
    # S = B^T B and B B^T have the same nonzero eigenvalues; the smaller of them is diagonalised
    gram = b @ b.mT if small else b.mT @ b
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    largest = values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    keep = values > largest * max(1e-14, 1e-3 * rcond)
    values, vectors = values[keep], vectors[:, keep]
    # 1 / (1 + (rcond sigma_1/sigma_k)^6) / (1 + (snr/SNR_k)^6) over sigma_k, the soft inverse of the
    # docstring
    filters = 1 / (1 + (rcond * largest / values) ** _SHARPNESS)
    # left: samples in the eigenbasis (m, k), orthonormal; force: F_k over the root of the eigenvalue
    left = vectors if small else (b @ vectors) / values.sqrt()
    force = left.mT @ r
    slack = torch.maximum(rcond * largest / (values + rcond * largest), 1 - filters)
    if min_snr > 0 and num_samples is not None:
        rest = _left_out(r, left, slack, force, weights, num_samples)
        # F_k is a mean over draws, of which an outcome of weight w has a share w; left and rest carry its root
        spread = ((left * rest[:, None]).square() / weights[:, None]).sum(0)
        noise = (spread / num_samples).sqrt().clamp(min=torch.finfo(values.dtype).tiny)
        filters = filters / (1 + (min_snr * noise / force.abs().clamp(min=1e-300)) ** _SHARPNESS)
    coefficient = filters * force / values.sqrt()
    direction = b.mT @ (vectors @ (coefficient / values.sqrt())) if small else vectors @ coefficient
    total = float(r.norm())
    slack = torch.maximum(slack, 1 - filters) if num_samples is not None else 1 - filters
    missed = float(_left_out(r, left, slack, force, weights, num_samples).norm())
    return Velocity(
        direction,
        min(missed / total, 1.0) if total > 0 else 0.0,
        missed / total if total > 0 else 0.0,
        total,
        float(weights @ rates),
        float(filters.sum()),
        FisherMetric(b),
    )


def _left_out(
    r: Tensor, left: Tensor, slack: Tensor, force: Tensor, weights: Tensor, num_samples: int | None
) -> Tensor:
    """What each draw would miss if the solution were found without it; by full summation, what it misses.

    Where parameters outnumber samples a solution can meet all of them and still be wrong everywhere else. Left out,
    a draw's residual grows by 1 / (1 - its leverage); an outcome drawn c times has c times the leverage of one draw.

    Args:
        r: The centred rates ``(m,)``.
        left: The orthonormal directions ``(m, k)`` over the samples.
        slack: One minus the filter of each direction ``(k,)``, above rounding.
        force: The force ``(k,)`` along each direction.
        weights: The weights ``(m,)`` of the outcomes.
        num_samples: The number of draws behind the weights, or None.
    """
    rest = r - left @ force + left @ (slack * force)
    if num_samples is None:
        return rest
    share = left.square()
    leverage = share.sum(1) - share @ slack + weights  # the last is that of the mean
    return rest / (1 - leverage / (weights * num_samples).clamp(min=1.0)).clamp(min=1e-9)


def tdvp_velocity(
    averages: Averages,
    t: float | None = None,
    *,
    generator: torch.Generator | None = None,
    rcond: float = 1e-8,
    min_snr: float = 0.0,
) -> Velocity:
    """Return the velocity of the parameters at the present state; see :func:`solve_velocity`.

    Args:
        averages: The state, the master equation, and what means are taken over.
        t: The time, where the equation depends on it.
        generator: The source of randomness of the samples.
        rcond: The relative cut of the eigenvalues of the metric.
        min_snr: The least ratio of signal to noise.

    Raises:
        NonFiniteError: If scores or rates aren't finite.
    """
    batch = averages.draw(generator)
    _, scores = averages.net.scores(batch.outcomes)
    rates = local_rates(averages.net, averages.operator, batch.outcomes, t)
    if not (bool(torch.isfinite(scores).all()) and bool(torch.isfinite(rates).all())):
        raise NonFiniteError(
            "scores or rates of the state aren't finite",
            got="an outcome of probability zero, or parameters that ran away",
            hint="take smaller steps, more samples or a larger rcond",
        )
    return solve_velocity(scores.double(), rates, batch.weights, batch.num_samples, rcond, min_snr)
