"""Importance weights: Pareto smoothing, the k-hat diagnostic, and the estimates that the weights give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_bool, check_nonempty, check_positive_int, check_real
from stochdyn.core.law.path import Estimate
from stochdyn.core.particles.resampling import effective_size
from stochdyn.diagnostics.draws import draw_posterior
from stochdyn.diagnostics.probe import check_program
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError, TooFewDrawsError

__all__ = [
    "ImportanceEvidence",
    "ParetoSmoothed",
    "effective_sample_size",
    "importance_evidence",
    "importance_mean",
    "khat",
    "pareto_smooth",
]

# ArviZ has no public function for this in both majors: 0.x has psislw, 1.x only an array method that takes
# log likelihoods (the other sign) and normalises. Both are oracles of the tests instead.

_MIN_DRAWS = 100


class ParetoSmoothed(NamedTuple):
    """Smoothed log weights and the shape of their tail.

    Attributes:
        log_weights: The logarithms of importance weights, ``(..., S)`` on the scale of the input: not normalised.
        khat: The shape ``(...)`` of the generalised Pareto distribution fitted to the largest weights.
    """

    log_weights: Tensor
    khat: Tensor


@dataclass(frozen=True)
class ImportanceEvidence:
    """What importance weights say about the evidence.

    Attributes:
        log_evidence: The logarithm of the mean weight.
        stderr: The standard error of the mean, of first order in the variance of the weights.
        effective_sample_size: The effective sample size of the weights.
        khat: The shape of the tail of the weights; above 0.7 the other numbers mean nothing.
    """

    log_evidence: Tensor
    stderr: Tensor
    effective_sample_size: Tensor
    khat: Tensor


def pareto_smooth(
    log_weights: Tensor | np.ndarray, *, relative_efficiency: float = 1.0, rounding: float | None = None
) -> ParetoSmoothed:
    r"""Replace the largest importance weights by quantiles of a Pareto distribution fitted to them.

    The :math:`M=\lceil\min(S/5,\,3\sqrt{S/r})\rceil` largest weights, less the next smaller one, are fitted
    by

    .. math:: p(y\mid\sigma,k)=\frac1\sigma\Big(1+\frac{k\,y}{\sigma}\Big)^{-1/k-1},

    and become its quantiles at :math:`(j-\frac12)/M`, cut at the largest raw weight. The weights have
    :math:`1/k` finite moments: with :math:`\hat k<0.5` their variance is finite, above 0.7 no sample size is
    enough in practice.

    Args:
        log_weights: The logarithms of importance weights, ``(..., S)``; minus infinity is a weight of zero.
        relative_efficiency: The effective over the actual number of draws, ``r``; 1 for independent ones.
        rounding: The difference of log weights within which they count as equal; by default 1000 units in the last
            place of the largest of their row. If all are equal there is no tail: the weights stay and ``khat`` is 0.

    Returns:
        Smoothed log weights and k-hat; the latter is infinite if fewer than five weights exceed the rest.

    Raises:
        TooFewDrawsError: If there are fewer than 100 draws.
        NonFiniteError: If a log weight is NaN or plus infinity, or all are minus infinity.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> tail = -0.9 * torch.log(torch.rand(4000, generator=generator))  # Pareto, k = 0.9
        >>> bool((pareto_smooth(tail).khat - 0.9).abs() < 0.2)
        True

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", 2024, sections 2 and
        3; Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto
        distribution", 2009.
    """
    given = _checked(log_weights, _MIN_DRAWS)
    check_real(relative_efficiency, "relative_efficiency", above=0.0)
    if rounding is not None:
        check_real(rounding, "rounding", minimum=0.0)
    lw = given.double()
    top = lw.max(-1, keepdim=True).values
    # Every row is judged by its own numbers, whatever stands beside it.
    largest = torch.where(lw.isfinite(), lw, torch.zeros_like(lw)).abs().amax(-1).clamp(min=1.0).reshape(-1)
    unit = 1e3 * torch.finfo(given.dtype).eps
    close = (unit * largest).tolist() if rounding is None else [rounding] * largest.numel()
    size = lw.shape[-1]
    # The tail that is smoothed: min(S / 5, 3 sqrt(S / r)) draws.
    tail = math.ceil(min(size / 5, 3 * math.sqrt(size / relative_efficiency)))
    rows = (lw - top).reshape(-1, size)
    pairs = [_smooth_row(row, tail, near) for row, near in zip(rows, close, strict=True)]
    smoothed = torch.stack([row for row, _ in pairs]).reshape(lw.shape) + top
    shape = torch.tensor([k for _, k in pairs], dtype=lw.dtype, device=lw.device).reshape(lw.shape[:-1])
    return ParetoSmoothed(smoothed.to(given.dtype), shape)


def _smooth_row(log_weights: Tensor, tail: int, rounding: float) -> tuple[Tensor, float]:
    """Smooth one row of log weights whose largest is 0."""
    ordered, order = log_weights.sort()
    if ordered[0].item() > -rounding:
        return log_weights, 0.0
    floor = math.log(torch.finfo(torch.float64).tiny)
    cutoff = max(ordered[-tail - 1].item(), floor)
    above = int((ordered > cutoff).sum())
    if above < 5:
        return log_weights, math.inf
    excess = ordered[-above:].exp() - math.exp(cutoff)
    k, sigma = fit_generalized_pareto(excess)
    if not (math.isfinite(k) and math.isfinite(sigma)):
        return log_weights, k
    # Quantiles of the fitted Pareto distribution, F^{-1}(p) = sigma ((1 - p)^{-k} - 1) / k, in place of the tail.
    levels = (torch.arange(above, dtype=torch.float64, device=log_weights.device) + 0.5) / above
    quantiles = (
        sigma * torch.expm1(-k * torch.log1p(-levels)) / k if k != 0 else -sigma * torch.log1p(-levels)
    )
    out = log_weights.clone()
    out[order[-above:]] = (quantiles + math.exp(cutoff)).log().clamp(max=0.0)
    return out, k


def fit_generalized_pareto(excess: Tensor) -> tuple[float, float]:
    """Fit shape and scale to ascending positive ``excess (M,)``; the shape is drawn weakly to 0.5.

    Reference:
        Zhang and Stephens (2009), with the prior of Vehtari et al. (2024), appendix C: 10 pseudo-observations
        at 0.5.
    """
    count = excess.shape[0]
    grid = 30 + int(math.sqrt(count))
    quartile = excess[int(count / 4 + 0.5) - 1]
    # Zhang and Stephens (2009): the profile likelihood of theta = -k / sigma on a grid of their own, averaged as a posterior;
    # given theta the shape is mean log(1 - theta x). Ten pseudo-draws at k = 1/2 steady small tails.
    j = torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device)
    theta = 1 / excess[-1] + (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[:, None] * excess).mean(-1)
    profile = count * ((-theta / k).log() - k - 1)
    weight = torch.softmax(profile, 0)
    weight = torch.where(weight >= 10 * torch.finfo(excess.dtype).eps, weight, torch.zeros_like(weight))
    posterior = (theta * weight / weight.sum()).sum()
    shape = torch.log1p(-posterior * excess).mean()
    scale = (-shape / posterior).item()
    value = ((count * shape + 5.0) / (count + 10.0)).item()
    return (math.inf, math.nan) if math.isnan(value) else (value, scale)


def khat(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_draws: int = 1000,
    seed: int | None = 0,
    *,
    chunk_size: int | None = None,
) -> float:
    r"""Return the k-hat of a guide: how heavy the tail of the weights :math:`p(y,z)/q(z)` is.

    Below 0.5 the guide is close to the posterior; up to 0.7 importance weights can repair it; above, it
    misses mass that matters (as a guide that is too narrow does). The densities are those of the sites, so never
    a surrogate.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_draws: The number of draws; k-hat is uncertain by about 0.1 with 1000.
        seed: What the draws start from; the global random state is left alone. None draws from that instead.
        chunk_size: The number of draws at a time; by default what bounds the memory of the traced values.

    Returns:
        k-hat; 0 if all weights are equal, so that the guide is the posterior.

    Raises:
        TooFewDrawsError: If there are fewer than 100 draws.
        UnknownSiteError: If model and guide don't have the same latent sites.
        InvalidInputError: If the guide has no density, being a point mass.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def too_narrow():
        ...     pyro.sample("x", dist.Normal(0.0, 0.3))
        >>> khat(model, too_narrow, num_draws=10_000) > 0.7
        True

    Reference:
        Yao, Vehtari, Simpson and Gelman, "Yes, but did it work?: evaluating variational inference", 2018.
    """
    check_positive_int(num_draws, "num_draws")
    check_program(model, guide, args, kwargs)
    if num_draws < _MIN_DRAWS:
        raise _too_few(num_draws, _MIN_DRAWS)
    draws = draw_posterior(model, guide, args, kwargs, num_draws=num_draws, seed=seed, chunk_size=chunk_size)
    log_weights = draws.log_weights
    if bool(log_weights.isnan().all()):
        raise InvalidInputError(
            "the guide has no density, so no weights", hint="AutoDelta is a point estimate"
        )
    precisions = [torch.finfo(v.dtype).eps for v in draws.values.values() if v.is_floating_point()]
    # weights are differences of sums of this size in this precision
    rounding = 1e2 * max(precisions, default=1e-16) * max(1.0, draws.log_joint.abs().median().item())
    return pareto_smooth(log_weights, rounding=rounding).khat.item()


def importance_evidence(log_weights: Tensor | np.ndarray, *, smooth: bool = False) -> ImportanceEvidence:
    r"""Estimate the log evidence :math:`\log\int p(y,z)\,dz` from importance weights.

    .. math:: \log\hat Z=\log\frac1S\sum_s w_s,\qquad \mathrm{se}\approx\frac{\mathrm{sd}(w)}{\bar w\sqrt S}.

    Args:
        log_weights: The logarithms ``(S,)`` of unnormalised weights.
        smooth: Whether to smooth them first: far less variance where the tail is heavy, and a little bias.

    Returns:
        Estimate, standard error, effective sample size and k-hat.

    Raises:
        TooFewDrawsError: If there are fewer than 100 draws.
        NonFiniteError: As :func:`pareto_smooth`.

    Example:
        >>> importance_evidence(torch.full((100,), -2.0)).log_evidence
        tensor(-2.)
    """
    check_bool(smooth, "smooth")
    lw = _checked(log_weights, _MIN_DRAWS, ndim=1)
    smoothed, shape = pareto_smooth(lw)
    used = smoothed if smooth else lw
    size = used.shape[0]
    top = used.max()
    weights = (used - top).exp()
    # log mean w, with the delta method for its error: sd(w) / (mean(w) sqrt(S)).
    mean = weights.mean()
    stderr = weights.std() / mean / math.sqrt(size)
    return ImportanceEvidence(top + mean.log(), stderr, effective_sample_size(used), shape)


def importance_mean(values: Tensor, log_weights: Tensor | np.ndarray) -> Estimate:
    r"""Return the self-normalised importance estimate of a posterior mean.

    .. math:: \hat\mu=\sum_s\bar w_s f_s,\qquad \mathrm{se}^2\approx\sum_s\bar w_s^2(f_s-\hat\mu)^2,
        \qquad \bar w_s = w_s/\textstyle\sum_r w_r.

    Args:
        values: The values ``(S, ...)`` of the function at each draw.
        log_weights: The logarithms of importance weights, ``(S,)``.

    Returns:
        Mean and standard error, each ``(...)``.

    Raises:
        ShapeError: If the two have different numbers of draws.
        NonFiniteError: If a value isn't finite, and as :func:`pareto_smooth`.

    Example:
        >>> importance_mean(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])).mean
        tensor(2.)

    Reference:
        Owen, "Monte Carlo theory, methods and examples", section 9.2.
    """
    values = as_tensor(values, "values")
    lw = _checked(log_weights, 2, ndim=1).to(values.device)
    if values.ndim == 0 or values.shape[0] != lw.shape[0]:
        raise ShapeError(
            "values need one entry per weight", got=f"shape {tuple(values.shape)}", expected=lw.shape[0]
        )
    weight = torch.softmax(lw.to(values.dtype), 0).reshape(-1, *(1,) * (values.ndim - 1))
    mean = (weight * values).sum(0)
    return Estimate(mean, (weight**2 * (values - mean) ** 2).sum(0).sqrt())


def effective_sample_size(log_weights: Tensor | np.ndarray) -> Tensor:
    r"""Return Kish's effective sample size :math:`(\sum w)^2/\sum w^2` of weights ``(..., S)``.

    Args:
        log_weights: The logarithms of importance weights, ``(..., S)``.

    Returns:
        ``(...)``, between 1 and S.

    Raises:
        NonFiniteError: As :func:`pareto_smooth`.

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor(2.)

    Reference:
        Kish, "Survey sampling", 1965.
    """
    lw = _checked(log_weights, 1)
    return effective_size(lw, -1)


def _checked(log_weights: Tensor | np.ndarray, minimum: int, ndim: int | None = None) -> Tensor:
    lw = as_tensor(log_weights, "log_weights", finite=False)
    if lw.ndim == 0 or (ndim is not None and lw.ndim != ndim):
        raise ShapeError(
            "log_weights has the wrong number of axes",
            got=f"shape {tuple(lw.shape)}",
            expected="(..., draws)",
        )
    check_nonempty(lw, "log_weights")
    if lw.shape[-1] < minimum:
        raise _too_few(lw.shape[-1], minimum)
    bad = lw.isnan() | (lw == math.inf)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            "log_weights must not be NaN or plus infinity",
            got=f"log_weights{where}={lw[tuple(where)].item()}",
        )
    if bool((lw == -math.inf).all(-1).any()):
        raise NonFiniteError("all weights are zero", hint="the proposal misses the target's support")
    return lw


def _too_few(got: int, minimum: int) -> TooFewDrawsError:
    return TooFewDrawsError(
        "too few draws for the tail of the weights", got=got, expected=f"at least {minimum}"
    )
