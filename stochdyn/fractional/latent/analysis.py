"""Beyond one bound: evidence from true path weights, their k-hat, forecasts, predictions and comparison of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_seed, as_time_grid, check_bool, check_positive_int, check_type
from stochdyn._lending import lent
from stochdyn.core.sde.solvers import draw_increments, integrate
from stochdyn.errors import InvalidInputError, TimeGridError
from stochdyn.fractional.latent.base import Draws
from stochdyn.fractional.latent.model import LatentSDE
from stochdyn.fractional.latent.networks import interpolate
from stochdyn.fractional.latent.series import Series
from stochdyn.fractional.noise.memory import MemoryStates
from stochdyn.run.jobs import run_each

__all__ = [
    "Comparison",
    "SeriesEvidence",
    "compare_models",
    "evidence",
    "forecast",
    "posterior_paths",
    "predict",
]

_MIN_FOR_KHAT = 100


@dataclass(frozen=True)
class SeriesEvidence:
    r"""Importance-sampling estimates of the log evidence of each series.

    Attributes:
        log_evidence: The importance-weighted bound :math:`\log\frac1n\sum_iw_i` of each series, ``(B,)``.
        elbo: The mean log weight of each series, ``(B,)``.
        khat: The Pareto shape of the weights of each series, ``(B,)``: up to 0.7 the estimate can be trusted; NaN for fewer than 100 draws.
        stderr: The standard error of ``log_evidence``, ``(B,)``, meaningful where k-hat is small.
    """

    log_evidence: Tensor
    elbo: Tensor
    khat: Tensor
    stderr: Tensor


@dataclass(frozen=True)
class Comparison:
    """Models ranked by what they give to series they weren't trained on.

    Attributes:
        names: The names of the models, the best first.
        total: The log predictive density of all held-out series under each.
        difference: The total of each model less that of the best.
        stderr: The standard error of the difference, from the spread over series; 0 for the best.
        pointwise: The log predictive densities ``(B,)`` of each series, by name.
    """

    names: tuple[str, ...]
    total: dict[str, float]
    difference: dict[str, float]
    stderr: dict[str, float]
    pointwise: dict[str, Tensor]


@torch.no_grad()
def posterior_paths(model: LatentSDE, series: Series, num_draws: int = 100, seed: int | None = None) -> Draws:
    """Draw latent paths of each series from the fitted posterior, with their exact log weights.

    Args:
        model: The fitted model.
        series: The B series.
        num_draws: The number S of draws per series.
        seed: The seed of the draws; the global random state is left as it was. None draws from that instead.

    Returns:
        Paths of shape ``(S, B)`` and weights ``(S, B)``.
    """
    check_type(model, LatentSDE, "model")
    check_positive_int(num_draws, "num_draws")
    model._admit(series)
    with lent(None if seed is None else as_seed(seed)):
        return model.posterior.draw(model, series, num_draws)


def evidence(model: LatentSDE, series: Series, num_draws: int = 1000, seed: int | None = 0) -> SeriesEvidence:
    r"""Estimate the log evidence of each series from the true weights of posterior paths.

    .. math:: \log p(y)\approx\log\frac1S\sum_s\exp\big[\log p(y\mid x_s)+\log p(x_s)-\log q(x_s\mid y)\big],

    in expectation a lower bound that is tighter than the ELBO and tends to the evidence.

    Args:
        model: The fitted model.
        series: The B series.
        num_draws: The number S of draws per series.
        seed: The seed of the draws; None draws from the global random state.

    Example:
        >>> ts = torch.linspace(0, 1, 11)
        >>> model = LatentSDE(1, 1, ts, drift=(8,))
        >>> found = evidence(model, Series.regular(ts[::5], torch.zeros(2, 3, 1)), num_draws=200)
        >>> bool((found.log_evidence >= found.elbo).all())
        True

    Reference:
        Y. Burda, R. Grosse and R. Salakhutdinov, Importance weighted autoencoders, 2016; A. Vehtari et al., Pareto
        smoothed importance sampling, JMLR 2024.
    """
    from stochdyn.diagnostics.psis import pareto_smooth

    draws = posterior_paths(model, series, num_draws, seed)
    log_weight = draws.log_weight
    total = torch.logsumexp(log_weight, 0)
    share = torch.softmax(log_weight, 0)
    khat = torch.full_like(total, torch.nan)
    if num_draws >= _MIN_FOR_KHAT:
        khat = torch.stack([torch.as_tensor(pareto_smooth(w).khat) for w in log_weight.T]).to(total)
    stderr = (share.square().sum(0) - 1 / num_draws).clamp_min(0.0).sqrt()
    return SeriesEvidence(total - math.log(num_draws), log_weight.mean(0), khat, stderr)


@torch.no_grad()
def predict(
    model: LatentSDE,
    series: Series,
    times: Tensor | None = None,
    num_draws: int = 100,
    seed: int | None = None,
) -> Tensor:
    """Draw replicated observations from the posterior predictive law.

    Args:
        model: The fitted model.
        series: The observed series.
        times: The times ``(n,)`` on the grid of the model; each series' own times if None.
        num_draws: The number S of draws per series.
        seed: The seed of the draws; None draws from the global random state.

    Returns:
        ``(S, B, n, p)``.

    Raises:
        TimeGridError: For times off the grid (see :func:`forecast` for later ones).
    """
    with lent(None if seed is None else as_seed(seed)):
        draws = posterior_paths(model, series, num_draws)
        at = series.times
        if times is not None:
            times = as_time_grid(times, "times", min_points=1, like=model.ts)
            if bool(((times < model.ts[0]) | (times > model.ts[-1])).any()):
                raise TimeGridError(
                    "times must lie on the grid of the model", hint="forecast() goes beyond its end"
                )
            at = times.to(series.times).expand(len(series), -1)
        x = interpolate(draws.path.x.movedim(-2, 0), model.ts, at)  # (n, S, B, d)
        return model.decoder.sample(x).movedim(0, -2)


@torch.no_grad()
def forecast(
    model: LatentSDE,
    series: Series,
    times: Tensor,
    num_draws: int = 100,
    seed: int | None = None,
    noise: bool = True,
) -> Tensor:
    """Draw observations at times after the end of the grid: the equation continued, memory of the noise included.

    Args:
        model: The fitted model.
        series: The observed series.
        times: The increasing times ``(n,)`` after the last grid point. The equation is simulated on the model's grid continued (with its
            median step), whatever the times, and paths are interpolated between its points.
        num_draws: The number S of draws per series.
        seed: The seed of the draws; None draws from the global random state.
        noise: Whether to add observation noise; without it the decoder's means are returned.

    Returns:
        ``(S, B, n, p)``.

    Raises:
        TimeGridError: If a time isn't after the grid, or the times span more than the horizon of the noise.
    """
    check_type(model, LatentSDE, "model")
    check_bool(noise, "noise")
    times = as_time_grid(times, "times", min_points=1, like=model.ts)
    if not bool(times[0] > model.ts[-1]):
        raise TimeGridError(
            "forecasts begin after the grid",
            got=f"{float(times[0]):g}",
            expected=f"more than {float(model.ts[-1]):g}",
        )
    with lent(None if seed is None else as_seed(seed)):
        path = posterior_paths(model, series, num_draws).path
        grid = _continued(model, times)
        last = path.x[..., -1, :]
        memory = path.aux["memory"][..., -1, :, :] if "memory" in path.aux else None
        dw, _ = draw_increments(model.sde, last, grid)
        x = integrate(model.sde, last, grid, dw, memory, method=model.posterior.method).x
        x = interpolate(x, grid, times.to(grid).expand(len(series), -1))
        out = model.decoder.sample(x) if noise else model.decoder.mean(x)
        return out.movedim(0, -2)


def _continued(model: LatentSDE, times: Tensor) -> Tensor:
    """The grid of the model continued to the last of the times, in float64 steps of its median."""
    ts = model.ts.double()
    start, dt = float(ts[-1]), float(ts.diff().median())
    last = float(times[-1])
    count = max(1, math.ceil((last - start) / dt * (1 - 1e-9)))
    grid = start + dt * torch.arange(count + 1, dtype=torch.float64, device=ts.device)
    noise = model.sde.noise
    horizon = noise.horizon if isinstance(noise, MemoryStates) else math.inf
    if last - start <= horizon < float(grid[-1]) - start:
        grid[-1] = last  # what lies beyond the horizon of the noise isn't asked for
    return grid.to(model.ts)


def compare_models(
    build: Mapping[str, Callable[[], LatentSDE]],
    series: Series,
    folds: int = 5,
    num_draws: int = 500,
    seed: int = 0,
    progress: bool = True,
    *,
    executor: Executor | None = None,
    **options: Any,
) -> Comparison:
    """Compare models by cross-validation over series: each series is predicted by a model that hasn't seen it.

    With as many folds as series this leaves out one series at a time.

    Args:
        build: A function for each name that returns a fresh model: Hurst index fixed at 1/2 against a free one, say.
        series: The series, which are split into parts.
        folds: The number of parts; each is left out once.
        num_draws: The posterior paths for the log evidence of a held-out series.
        seed: The seed of the folds, the training and the draws.
        progress: Whether to show a bar over the fits, which appears after two seconds.
        executor: An executor of ``concurrent.futures`` for the fits; this thread if None. The answer is the same to the bit.
        options: The options of :func:`stochdyn.fit`: ``steps``, ``lr``, ``batch_size``.

    Raises:
        InvalidInputError: For fewer series than folds.

    Reference:
        A. Vehtari, A. Gelman and J. Gabry, Practical Bayesian model evaluation using leave-one-out cross-validation,
        Statistics and Computing 27, 2017.
    """
    count = len(series)
    check_positive_int(folds, "folds", 2)
    if count < folds or len(build) < 2:
        raise InvalidInputError(
            "a comparison needs two models and at least one series per fold",
            got=f"{len(build)} models, {count} series",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = [order[part::folds] for part in range(folds)]
    cases = [(name, part) for name in build for part in range(folds)]
    held_out = partial(_held_out, build, series, parts, num_draws, seed, options)
    found = run_each(held_out, cases, seed=seed, executor=executor, progress=progress)
    pointwise = {name: torch.zeros(count) for name in build}
    for (name, part), log_evidence in zip(cases, found, strict=True):
        pointwise[name][parts[part]] = log_evidence.to(pointwise[name])
    total = {name: float(values.sum()) for name, values in pointwise.items()}
    names = tuple(sorted(total, key=lambda name: -total[name]))
    gaps = {name: pointwise[name] - pointwise[names[0]] for name in names}
    return Comparison(
        names,
        total,
        {name: float(gap.sum()) for name, gap in gaps.items()},
        {name: float(gap.std() * math.sqrt(count)) for name, gap in gaps.items()},
        pointwise,
    )


def _held_out(
    build: Mapping[str, Callable[[], LatentSDE]],
    series: Series,
    parts: list[Tensor],
    num_draws: int,
    seed: int,
    options: Mapping[str, Any],
    case: tuple[str, int],
) -> Tensor:
    """Return the log evidence of the series of one part by a model fitted to the other parts."""
    from stochdyn.run.trainer import fit

    name, part = case
    kept = torch.cat([own for k, own in enumerate(parts) if k != part])
    with lent(as_seed(seed)):
        model = build[name]()
    fit(model, _select(series, kept), seed=seed, progress=False, **options)
    return evidence(model, _select(series, parts[part]), num_draws, seed).log_evidence


def _select(series: Series, index: Tensor) -> Series:
    return Series(series.times[index], series.values[index], series.mask[index])
