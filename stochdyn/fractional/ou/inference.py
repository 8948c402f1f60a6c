"""Inference of rate, level, strength, Hurst index and observation error of a fractional Ornstein-Uhlenbeck series."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_seed,
    as_tensor,
    as_time_grid,
    check_bool,
    check_event_size,
    check_positive_int,
    check_real,
)
from stochdyn._lending import lent
from stochdyn.core.particles.resampling import effective_size, systematic
from stochdyn.diagnostics.container import from_draws
from stochdyn.diagnostics.psis import pareto_smooth
from stochdyn.errors import ConvergenceWarning, EmptyDataError, InvalidInputError, TooFewDrawsError
from stochdyn.fractional.ou.contrasts import Contrasts, Whitened
from stochdyn.run.progress import progress_bar

__all__ = ["infer_fou"]

_MIN_VALUES, _MIN_DRAWS = 8, 100
_DEGREES = 5  # of freedom of the kernels
# Shares of draws from kernels three times as wide, and from all that the prior allows, for tails and other modes.
_LONG, _REACH, _WIDE = 0.25, 3.0, 0.2
_ROUND = 300  # draws of each round in which the proposal is adapted
_ROUNDS = 2
_KERNELS = 100
_BLOCK = 100  # parameter sets at once


def infer_fou(
    times: Tensor,
    y: Tensor,
    obs_scale: float | None = None,
    *,
    num_draws: int = 1000,
    seed: int | None = 0,
    progress: bool = True,
) -> Any:
    r"""Return the posterior of a fractional Ornstein-Uhlenbeck process observed at any times, with or without error.

    .. math:: dX=-\theta(X-\mu)\,dt+\sigma\,dB^H,\qquad y_i=X_{t_i}+s\,\epsilon_i,\quad\epsilon_i\sim N(0,1),

    X being stationary, or fractional Brownian motion as :math:`\theta\to0`, which the prior allows for. The likelihood is exact:
    level and strength are integrated out in closed form, and the rest, three parameters, by importance sampling from
    kernels that are fitted to the posterior in rounds. What these miss shows in k-hat.

    The prior is flat in H and in :math:`\mu`, flat in :math:`\log\sigma`; flat in :math:`\log\theta` between one reversion per span of the
    times and one per observation, and falling off beyond; :math:`s` over the deviation of a median step,
    :math:`\sigma\Delta^H`, is half-Cauchy. So nothing depends on the units of times and values.

    Use it for log volatilities, temperatures, positions in a trap: series that return to a level, with memory. For a
    series of stationary increments take :func:`infer_hurst`, for a path without a level :func:`infer_roughness`.

    Args:
        times: The increasing times ``(n,)``, regular or not; data of any kind.
        y: The values ``(n,)``, NaN where one is missing. At least eight must be there.
        obs_scale: The standard deviation s of the errors where it is known, zero for none; None to infer it.
        num_draws: The number of posterior draws, at least 100.
        seed: The seed of the draws; the global random state is left alone. None draws a seed from that.
        progress: Whether to show a bar where it takes more than two seconds.

    Returns:
        ArviZ container (``InferenceData`` or ``DataTree``): ``posterior`` (``rate`` in 1/time, ``mean``, ``scale`` in units of y
        per unit time to the power H, ``hurst``, ``obs_scale``); ``log_likelihood`` (``y``: each value but the first given those
        before it), ``observed_data`` (``y``), ``constant_data`` (``times``), ``sample_stats`` (``lp``); attributes ``khat``,
        ``effective_draws``, ``seed``. Where the rate is nearly zero, ``mean`` is hardly determined.

    Raises:
        TimeGridError, ShapeError, InvalidInputError, NonFiniteError: For data that don't fit.
        EmptyDataError: With fewer than eight values.
        TooFewDrawsError: With fewer than 100 draws.

    Warns:
        ConvergenceWarning: If k-hat exceeds 0.7, so that the draws can't be trusted.

    Example:
        >>> from stochdyn.fractional import FractionalOU
        >>> times = torch.arange(100, dtype=torch.float64)
        >>> y = FractionalOU(0.2, 5.0, 1.0, 0.7, initial="stationary").sample(times, (), 0).x[:, 0]
        >>> idata = infer_fou(times, y, obs_scale=0.0, num_draws=200, progress=False)
        >>> bool(abs(idata.posterior["hurst"].mean() - 0.7) < 0.2)
        True

    Reference:
        P. Cheridito, H. Kawaguchi and M. Maejima, Fractional Ornstein-Uhlenbeck processes, Electron. J. Probab. 8, 2003;
        O. Cappé, A. Guillin, J.-M. Marin and C. P. Robert, Population Monte Carlo, J. Comput. Graph. Stat. 13, 2004.
    """
    check_positive_int(num_draws, "num_draws")
    if num_draws < _MIN_DRAWS:
        raise TooFewDrawsError("num_draws is too small to check them", got=num_draws, expected=_MIN_DRAWS)
    check_bool(progress, "progress")
    if obs_scale is not None:
        check_real(obs_scale, "obs_scale", minimum=0.0)
    problem, offset, unit = _problem(times, y, obs_scale)
    chosen = int(torch.randint(2**31, ())) if seed is None else as_seed(seed)
    g = torch.Generator().manual_seed(chosen)

    total = len(problem.grid()) + _ROUNDS * _ROUND + 2 * num_draws
    with progress_bar(total, "fractional Ornstein-Uhlenbeck", progress) as bar:

        def evaluate(q: Tensor) -> Tensor:
            parts = []
            for block in q.split(_BLOCK):
                parts.append(problem.log_target(block)[0])
                bar.update(len(block))
            return torch.cat(parts)

        centres = grid = problem.grid()
        weights = evaluate(centres)
        for _ in range(_ROUNDS):
            kernels = _Kernels.around(centres, weights, grid, g)
            centres = kernels.draw(_ROUND, g)
            weights = evaluate(centres) - kernels.log_prob(centres)
        kernels = _Kernels.around(centres, weights, grid, g)
        q = kernels.draw(2 * num_draws, g)
        log_weight = evaluate(q) - kernels.log_prob(q)
    smooth = pareto_smooth(log_weight)
    khat = float(smooth.khat)
    effective = float(effective_size(torch.as_tensor(smooth.log_weights)))
    if khat > 0.7:
        warnings.warn(
            f"the draws don't represent the posterior (k-hat {khat:.2f}); give more draws, "
            "or fix obs_scale, if the series doesn't tell error and roughness apart",
            ConvergenceWarning,
            stacklevel=2,
        )
    picked = systematic(torch.as_tensor(smooth.log_weights), num_draws, g)
    q = q[picked[torch.randperm(num_draws, generator=g)]]
    values, lp, pointwise = problem.complete(q, g, offset, unit)
    return from_draws(
        {name: value[None].numpy() for name, value in values.items()},
        log_likelihood={"y": pointwise[None].numpy()},
        observed_data={"y": problem.values.numpy()},
        constant_data={"times": problem.times.numpy()},
        sample_stats={"lp": lp[None].numpy()},
        dims={"times": ["time"]},
        attrs={"khat": khat, "effective_draws": effective, "seed": chosen},
    )


def _problem(times: object, y: object, obs_scale: float | None) -> tuple[_Problem, float, float]:
    """Check the data and bring them to a span and a spread of one; returns the level and spread taken out."""
    double = torch.zeros((), dtype=torch.float64)
    t = as_time_grid(times, "times", 1, like=double).detach().cpu().double()
    values = as_tensor(y, "y", 1, "(n,)", like=double, missing=True).detach().cpu().double()
    check_event_size(values, t.shape[0], "y")
    here = ~values.isnan()
    t, seen = t[here], values[here]
    if t.shape[0] < _MIN_VALUES:
        raise EmptyDataError(
            "the series is too short", got=t.shape[0], expected=f"at least {_MIN_VALUES} values"
        )
    offset, unit = float(seen.mean()), float(seen.std())
    if not unit > 100 * torch.finfo(torch.float64).eps * abs(offset):
        raise InvalidInputError("the series is constant", got=f"standard deviation {unit:g}")
    span = float(t[-1] - t[0])
    contrasts = Contrasts((t - t[0]) / span, (seen - offset) / unit)
    known = None if obs_scale is None else float(obs_scale) / unit
    return _Problem(contrasts, known, span, t, seen), offset, unit


@dataclass(frozen=True)
class _Problem:
    """The posterior of ``q = (logit H, log(rate * span), log r)``, r being the error in deviations of a median step."""

    contrasts: Contrasts
    obs_scale: float | None
    span: float
    times: Tensor
    values: Tensor

    @property
    def size(self) -> int:
        """The number of parameters: without error there is no r."""
        return 2 if self.obs_scale == 0 else 3

    def grid(self) -> Tensor:
        """Return a coarse grid over everything that the prior allows, from which the kernels start."""
        count = self.values.shape[0]
        axes = [
            torch.linspace(-3.5, 3.5, 8, dtype=torch.float64),
            torch.linspace(-3, math.log(3.0 * count), 9, dtype=torch.float64),
            torch.linspace(-4, 3, 6, dtype=torch.float64),
        ]
        return torch.cartesian_prod(*axes[: self.size])

    def _parameters(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return H, rate and error of ``q (D, 2 or 3)``, the error in deviations of a median step."""
        error = q[:, 2].exp() if self.size == 3 else torch.zeros_like(q[:, 0])
        return q[:, 0].sigmoid(), q[:, 1].exp(), error

    def log_target(self, q: Tensor) -> tuple[Tensor, Whitened]:
        """Return the log posterior density ``(D,)`` up to a constant, and the whitened differences."""
        hurst, rate, error = self._parameters(q)
        step = self.contrasts.step
        found = self.contrasts.whiten(hurst, rate, (error * step**hurst).square())
        quad, log_scale = found.white.square().sum(-1), found.log_scale.sum(-1)
        count = found.white.shape[-1]
        if self._determined:
            assert self.obs_scale is not None
            scale = self.obs_scale / (error * step**hurst)
            fit = -count * scale.log() - 0.5 * quad / scale.square() - log_scale
        else:
            # The strength of the noise, flat in its logarithm, is integrated out.
            fit = -0.5 * count * quad.log() - log_scale
        # Densities of H, log rate and log r, with the Jacobians of the transforms.
        prior = torch.nn.functional.logsigmoid(q[:, 0]) + torch.nn.functional.logsigmoid(-q[:, 0])
        prior = prior + q[:, 1] - torch.log1p(rate) - torch.log1p(rate / (count + 1))
        if self.size == 3:
            prior = prior + q[:, 2] - torch.log1p(error.square())
        return (fit + prior).nan_to_num(-math.inf, -math.inf, -math.inf), found

    @property
    def _determined(self) -> bool:
        """Whether the error is known, so that r gives the strength of the noise."""
        return self.obs_scale is not None and self.obs_scale > 0

    def complete(
        self, q: Tensor, generator: torch.Generator, offset: float, unit: float
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Draw what was integrated out; returns all parameters in the units of the data, and densities."""
        parts = [self.log_target(block) for block in q.split(_BLOCK)]
        lp = torch.cat([p[0] for p in parts])
        white, log_scale, level, spread = (
            torch.cat([getattr(p[1], name) for p in parts])
            for name in ("white", "log_scale", "level", "level_variance")
        )
        hurst, rate, error = self._parameters(q)
        step, count = self.contrasts.step, white.shape[-1]
        if self._determined:
            assert self.obs_scale is not None
            scale = self.obs_scale / (error * step**hurst)
        else:
            half = torch.full_like(hurst, 0.5 * count)
            with lent(generator):
                draws = torch._standard_gamma(half)
            scale = (0.5 * white.square().sum(-1) / draws).sqrt()
        # The stationary variance, Gamma(2H+1) / (2 theta^2H), comes to that of the estimated level.
        stationary = 0.5 * (torch.lgamma(2 * hurst + 1) - 2 * hurst * rate.log()).exp()
        normal = torch.randn(hurst.shape, generator=generator, dtype=torch.float64)
        mean = level + scale * (stationary + spread).clamp_min(0).sqrt() * normal
        pointwise = (
            -0.5 * (white / scale[:, None]).square()
            - log_scale
            - scale.log()[:, None]
            - 0.5 * math.log(2 * math.pi)
            - math.log(unit)
        )
        values = {
            "rate": rate / self.span,
            "mean": offset + unit * mean,
            "scale": unit * scale * self.span**-hurst,
            "hurst": hurst,
            "obs_scale": unit * scale * error * step**hurst,
        }
        return values, lp, pointwise


@dataclass(frozen=True)
class _Kernels:
    """A mixture of Student kernels of one shape, and of a wide one over all that the prior allows: where draws come from."""

    centres: Tensor
    factor: Tensor
    middle: Tensor
    reach: Tensor

    @classmethod
    def around(cls, q: Tensor, log_weight: Tensor, grid: Tensor, generator: torch.Generator) -> _Kernels:
        """Put kernels on weighted points ``(D, k)``, as wide as a density estimate of that many wants them."""
        chance = log_weight.softmax(-1)
        size = q.shape[-1]
        gap = q - chance @ q
        cov = (chance[:, None] * gap).mT @ gap
        effective = float(effective_size(log_weight))
        # Few effective points say little about their own spread: a floor of a tenth in each transformed parameter.
        cov = cov + 0.1**2 * torch.eye(size, dtype=q.dtype) / max(1.0, effective / 20)
        width = max(0.35, (4 / ((size + 2) * max(effective, 1.0))) ** (1 / (size + 4)))
        index = torch.multinomial(chance, _KERNELS, replacement=True, generator=generator)
        return cls(q[index], width * torch.linalg.cholesky(cov), grid.mean(0), grid.std(0).diag())

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``(count, k)`` points."""
        index = torch.randint(len(self.centres), (count,), generator=generator)
        normal = torch.randn(count, self.centres.shape[-1], generator=generator, dtype=torch.float64)
        squares = torch.randn(count, _DEGREES, generator=generator, dtype=torch.float64).square().sum(-1)
        student = normal * (_DEGREES / squares).sqrt()[:, None]
        kind = torch.rand(count, generator=generator)[:, None]
        near = student @ self.factor.mT
        near = self.centres[index] + torch.where(kind < _WIDE + _LONG, _REACH * near, near)
        return torch.where(kind < _WIDE, self.middle + student @ self.reach.mT, near)

    def log_prob(self, q: Tensor) -> Tensor:
        """Return the log density ``(D,)`` up to a constant."""
        gap, far = q[:, None] - self.centres, (q - self.middle)[:, None]
        parts = [
            math.log(1 - _WIDE - _LONG) + self._student(gap, self.factor).logsumexp(-1) - math.log(_KERNELS),
            math.log(_LONG) + self._student(gap, _REACH * self.factor).logsumexp(-1) - math.log(_KERNELS),
            math.log(_WIDE) + self._student(far, self.reach)[:, 0],
        ]
        return torch.stack(parts).logsumexp(0)

    def _student(self, gap: Tensor, factor: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(factor, gap.mT, upper=False)
        logs = -0.5 * (_DEGREES + gap.shape[-1]) * torch.log1p(white.square().sum(-2) / _DEGREES)
        return logs - factor.diagonal().log().sum()
