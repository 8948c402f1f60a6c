"""Entropy production of jump processes: bounds, and estimates from counted jumps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_tensor
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["entropy_from_counts", "short_time_bound"]


def short_time_bound(rates: Any) -> Tensor:
    r"""Return the best bound on entropy production that short-time currents give, :math:`\sum_{i<j}2J_{ij}^2/A_{ij}`.

    With the net flow J and the traffic A of every edge. It lies below the entropy production rate, and isn't tight for jumps.

    Args:
        rates: a :class:`stochdyn.jumps.RateMatrix`.
    """
    if not hasattr(rates, "stationary"):
        raise InvalidInputError("rates must be a RateMatrix", got=type(rates).__name__)
    flow = rates.stationary()[..., None] * rates.matrix
    upper = torch.triu_indices(flow.shape[-1], flow.shape[-1], 1)
    there, back = flow[..., upper[0], upper[1]], flow[..., upper[1], upper[0]]
    traffic = there + back
    terms = torch.where(
        traffic > 0,
        2 * (there - back) ** 2 / torch.where(traffic > 0, traffic, 1.0),
        torch.zeros_like(traffic),
    )
    return terms.sum(-1)


def entropy_from_counts(record: Any) -> Estimate:
    r"""Estimate the entropy production rate from the jumps of long records.

    .. math:: \hat\sigma=\frac1T\sum_{i<j}(n_{ij}-n_{ji})\log\frac{n_{ij}+1/2}{n_{ji}+1/2}

    The half counts keep one-way links finite. The estimate is biased upwards for short records.

    Args:
        record: a jump record with ``counts (*shape, S, S)`` and ``ts``; several records are averaged, with the error of their mean.

    Returns:
        Mean and standard error; for a single record the error follows from counting.
    """
    counts = as_tensor(record.counts, "record.counts").double()
    if counts.ndim < 2:
        raise ShapeError("counts must be (*shape, S, S)", got=tuple(counts.shape))
    span = float(record.ts[-1] - record.ts[0])
    upper = torch.triu_indices(counts.shape[-1], counts.shape[-1], 1)
    there, back = counts[..., upper[0], upper[1]], counts[..., upper[1], upper[0]]
    log_ratio = torch.log((there + 0.5) / (back + 0.5))
    rate = ((there - back) * log_ratio).sum(-1) / span
    if counts.ndim > 2:
        return Estimate.of(rate.reshape(-1))
    error = ((there + back) * log_ratio**2).sum(-1).sqrt() / span
    return Estimate(rate, error)
