"""Habits of Markov state models: implied time scales against lag, and the Chapman-Kolmogorov test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import check_nonempty, check_positive_int, check_type
from stochdyn.errors import InvalidInputError, ShapeError, TooFewDrawsError
from stochdyn.jumps.generator import RateMatrix
from stochdyn.jumps.panel import PanelData
from stochdyn.jumps.uniformisation import transition

__all__ = ["ChapmanKolmogorov", "TimeScales", "chapman_kolmogorov", "implied_time_scales"]


class TimeScales(NamedTuple):
    """Implied time scales against lag.

    Attributes:
        lags: The lags as times, ``(n,)``.
        times: The time scales ``(n, S - 1)``, longest first; NaN where an eigenvalue isn't positive.
    """

    lags: Tensor
    times: Tensor


class ChapmanKolmogorov(NamedTuple):
    """Predicted against observed transition probabilities at several lags.

    Attributes:
        lags: The lags as times, ``(n,)``.
        predicted: What the model says, ``(n, S, S)``.
        observed: The shares of transitions in the data, ``(n, S, S)``; NaN in rows without data.
        error: The standard errors of the observed shares, ``(n, S, S)``.
    """

    lags: Tensor
    predicted: Tensor
    observed: Tensor
    error: Tensor


def implied_time_scales(panel: PanelData, lags: Sequence[int]) -> TimeScales:
    r"""Return the time scales :math:`-\tau/\log|\lambda_k(\tau)|` of the shares of transitions at several lags.

    For a jump process they don't depend on the lag; where they grow with it, states lump together what isn't alike. Windows
    overlap, so that these are pictures of the data and not estimates: for rates with intervals use :func:`fit_rates`.

    Args:
        panel: Series at equal intervals.
        lags: The lags, in visits.

    Raises:
        InvalidInputError: If intervals aren't equal, or a lag is longer than all series.

    Example:
        >>> data = {"id": [0] * 8, "t": list(range(8)), "s": [0, 0, 1, 1, 1, 0, 0, 1]}
        >>> implied_time_scales(PanelData(data, "id", "t", "s"), [1]).times.shape
        torch.Size([1, 1])

    Reference:
        Swope, Pitera and Suits, "Describing protein folding kinetics by molecular dynamics simulations", 2004.
    """
    interval = _checked(panel, lags)
    times = []
    for lag in lags:
        counts = _counts(panel, lag)
        share = counts / counts.sum(-1, keepdim=True)
        if bool(torch.isnan(share).any()):
            raise TooFewDrawsError("a state is never left or held at this lag", got=f"lag {lag}")
        values = torch.linalg.eigvals(share).abs().sort(descending=True).values[1:]
        positive = (values > 0) & (values < 1)
        inner = torch.where(positive, values, torch.full_like(values, 0.5))
        times.append(torch.where(positive, -lag * interval / inner.log(), torch.full_like(values, torch.nan)))
    return TimeScales(torch.tensor([lag * interval for lag in lags], dtype=torch.float64), torch.stack(times))


def chapman_kolmogorov(panel: PanelData, rates: RateMatrix, lags: Sequence[int]) -> ChapmanKolmogorov:
    r"""Return what a rate matrix predicts for several lags, :math:`e^{Q\tau}`, beside the shares in the data.

    Args:
        panel: Series at equal intervals.
        rates: The model, such as ``RateMatrix(fit_rates(panel).rates)``.
        lags: The lags, in visits.

    Returns:
        Predictions, shares, and standard errors of the shares, for which windows are counted as if only every lag-th began one.

    Raises:
        InvalidInputError: If intervals aren't equal, or a lag is longer than all series.
        ShapeError: If the model has other states.

    Reference:
        Prinz et al., "Markov models of molecular kinetics: generation and validation", 2011, section IV F.
    """
    check_type(rates, RateMatrix, "rates")
    if rates.num_states != panel.num_states or rates.batch_shape:
        raise ShapeError(
            "rates must have the states of the panel", got=repr(rates), expected=panel.num_states
        )
    interval = _checked(panel, lags)
    at = torch.tensor([lag * interval for lag in lags], dtype=torch.float64)
    predicted = transition(rates.matrix.detach().double(), at)
    counts = torch.stack([_counts(panel, lag) for lag in lags])
    total = counts.sum(-1, keepdim=True)
    observed = counts / total
    # overlapping windows tell as much as windows side by side
    independent = total / torch.tensor(list(lags), dtype=torch.float64)[:, None, None]
    error = (predicted * (1 - predicted) / independent.clamp(min=1e-300)).sqrt()
    return ChapmanKolmogorov(at, predicted, observed, error)


def _checked(panel: PanelData, lags: Sequence[int]) -> float:
    check_type(panel, PanelData, "panel")
    check_nonempty(lags, "lags")
    for k, lag in enumerate(lags):
        check_positive_int(lag, f"lags[{k}]")
    dt = panel.gaps.dt
    if float(dt.max() - dt.min()) > 1e-6 * float(dt.max()):
        raise InvalidInputError(
            "lags need visits at equal intervals",
            got=f"{float(dt.min()):g} to {float(dt.max()):g}",
            hint="fit_rates takes any times",
        )
    longest = int(panel.panel.lengths.max()) - 1
    if max(lags) > longest:
        raise InvalidInputError(
            "a lag is longer than all series", got=max(lags), expected=f"at most {longest}"
        )
    return float(dt.median())


def _counts(panel: PanelData, lag: int) -> Tensor:
    states, _ = panel.rows()
    before, after = states[:, :-lag], states[:, lag:]
    cell = (before * panel.num_states + after)[after >= 0]
    return torch.bincount(cell, minlength=panel.num_states**2).double().reshape(panel.num_states, -1)
