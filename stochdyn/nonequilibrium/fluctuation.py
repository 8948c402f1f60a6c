"""Fluctuation theorems of entropy production, with a guard against samples that can't hold the rare trajectories."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import DOUBLE, as_tensor, check_positive_int
from stochdyn.core.law.path import Estimate
from stochdyn.errors import ApproximationWarning, ShapeError

__all__ = ["DetailedTheorem", "detailed_theorem", "integral_theorem"]


def integral_theorem(s: object) -> Estimate:
    r"""Return the estimate of :math:`E[e^{-S}]`, which a fluctuation theorem says is one.

    Args:
        s: The entropy produced along independent trajectories, ``(n,)``, in units of Boltzmann's constant.

    Warns:
        ApproximationWarning: Where the mean is decided by rare trajectories that the sample doesn't hold: a variance above
            :math:`2\log n`. The estimate and its error mean nothing then.
    """
    values = _productions(s)
    return Estimate.of((-values).exp())


@dataclass(frozen=True)
class DetailedTheorem:
    r"""The test of :math:`\log p(s)/p(-s)=s`.

    Attributes:
        s: The centres of the bins of positive entropy production, ``(K,)``; bins without trajectories on either side are left out.
        log_ratio: The logarithm of how much more often ``s`` was seen than ``-s``, ``(K,)``.
        stderr: Its standard error from counting, ``(K,)``.
        slope: The slope of the ratio, from all trajectories, which is one by the theorem, with its error.
    """

    s: Tensor
    log_ratio: Tensor
    stderr: Tensor
    slope: Estimate


def detailed_theorem(s: object, num_bins: int = 10) -> DetailedTheorem:
    r"""Compare how often entropy production takes a value and its negative, by :math:`p(s)=e^s\,p(-s)`.

    The slope is the maximum-likelihood estimate of :math:`b` in :math:`P(+\mid |s|)=1/(1+e^{-b|s|})`, which needs no bins.

    Args:
        s: The entropy produced along independent trajectories of a steady state, ``(n,)``.
        num_bins: The number of bins of :math:`|s|`, equally wide up to the largest negative value seen.

    Raises:
        ShapeError: If no trajectory has a negative entropy production, so that there is nothing to compare.

    Warns:
        ApproximationWarning: If the variance is above :math:`2\log n`; the theorem is then tested on few trajectories.
    """
    values = _productions(s)
    check_positive_int(num_bins, "num_bins")
    negative = values[values < 0]
    if len(negative) == 0:
        raise ShapeError(
            "no trajectory has a negative entropy production, so the theorem can't be tested",
            got=f"{len(values)} trajectories",
            hint="take shorter trajectories, or more of them",
        )
    edges = torch.linspace(0, float(-negative.min()), num_bins + 1, dtype=values.dtype)
    there = torch.histogram(values[values > 0].cpu(), edges)[0]
    back = torch.histogram(-negative.cpu(), edges)[0]
    seen = (there > 0) & (back > 0)
    centres = 0.5 * (edges[1:] + edges[:-1])
    ratio = (there / back)[seen].log()
    stderr = (1 / there + 1 / back)[seen].sqrt()
    # Newton's method for the logistic slope; the log likelihood is concave.
    size, forward = values.abs(), (values > 0).to(values)
    slope = torch.ones((), dtype=values.dtype)
    for _ in range(50):
        p = torch.sigmoid(slope * size)
        information = (p * (1 - p) * size.square()).sum()
        slope = slope + ((forward - p) * size).sum() / information
    return DetailedTheorem(centres[seen], ratio, stderr, Estimate(slope, information.rsqrt()))


def _productions(s: object) -> Tensor:
    values = as_tensor(s, "s", 1, "(n,)", like=DOUBLE).double().detach()
    if len(values) < 2:
        raise ShapeError("s needs at least two trajectories", got=len(values))
    if float(values.var()) > 2 * math.log(len(values)):
        warnings.warn(
            f"The variance of the entropy production ({float(values.var()):.3g}) is too large for {len(values)} trajectories: "
            "rare ones decide the answer. Take shorter ones.",
            ApproximationWarning,
            stacklevel=3,
        )
    return values
