"""What the Fokker-Planck residual says about the law of the reverse SDE: density, evidence bound, energy."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_event_size,
    check_nonempty,
    check_positive_int,
    check_type,
)
from stochdyn._transforms import ordinarily
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError
from stochdyn.interpolants.fields.potential import Potential
from stochdyn.interpolants.paths.processes import AffineProcess

__all__ = ["LogDensity", "energy_identity", "evidence_bound", "feynman_kac_log_density"]


class LogDensity(NamedTuple):
    """Log densities ``(n,)`` and their standard errors ``(n,)``."""

    value: Tensor
    stderr: Tensor


@ordinarily
def feynman_kac_log_density(
    potential: Potential,
    x: Tensor,
    prior: Any,
    *,
    num_steps: int = 100,
    num_particles: int = 64,
    generator: torch.Generator | int | None = None,
) -> LogDensity:
    r"""Log density of the reverse SDE of a potential, at the start time, from paths of the *noising* process.

    .. math::
        \frac{q_t(x)}{e^{\Phi(t,x)}}=E\Big[\frac{\pi(X_T)}{e^{\Phi(T,X_T)}}\exp\int_t^TR(u,X_u)\,du\ \Big|\ X_t=x\Big]

    with ``R`` the residual of the potential: where it vanishes and the prior is that of the potential, the density is the
    exponential of the potential itself. The mean inside is unbiased but for the grid; its logarithm is too
    small by about half the squared standard error.

    Args:
        potential: The log density, up to a constant.
        x: The points at the start time, ``(n, d)``.
        prior: The law at the horizon.
        num_steps: The number of steps of the paths, equal in the log signal-to-noise ratio.
        num_particles: The number of paths per point.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Log densities and standard errors.

    Raises:
        ShapeError, EmptyDataError: If ``x`` isn't ``(n, d)`` with points in it.

    Example:
        >>> from stochdyn.interpolants import PotentialNetwork
        >>> from stochdyn.interpolants import OU
        >>> phi = PotentialNetwork(OU(), 1)
        >>> prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1), 0.5**0.5), 1)
        >>> feynman_kac_log_density(phi, torch.zeros(2, 1), prior, num_steps=4, num_particles=3).value.shape
        torch.Size([2])
    """
    _check_model(potential, prior)
    x = _checked(potential.process, x)
    check_positive_int(num_steps, "num_steps")
    check_positive_int(num_particles, "num_particles", 2)
    process, generator = potential.process, as_generator(generator, x.device)
    times = process.grid(num_steps).flip(0).to(x.device)
    center = process.center(x)
    start = times[0].to(x.dtype)
    y = (x - center).expand(num_particles, *x.shape)
    total = x.new_zeros(num_particles, x.shape[0])
    before = potential.score_and_residual(start, x).residuals[0].expand_as(total)
    # q(x) / p_theta(x) = E exp(int R(X_u, u) du) (q_T / p_theta,T)(X_T) along the noising process from x, by the trapezoid rule
    for s, t in itertools.pairwise(times):
        ratio, variance = (v.to(x.dtype) for v in process.kernel(s, t))
        noise = torch.randn(y.shape, dtype=x.dtype, device=x.device, generator=generator)
        y = ratio * y + variance.sqrt() * noise
        now = potential.score_and_residual(t.to(x.dtype), y + center).residuals[0]
        total = total + 0.5 * (t - s).to(x.dtype) * (before + now)
        before = now
    end = y + center
    total = total + prior.log_prob(end) - potential(times[-1].to(x.dtype), end)
    # log of the mean weight, with its standard error by the delta method
    weights = (total - total.amax(0)).exp()
    mean = weights.mean(0)
    stderr = weights.std(0) / (num_particles**0.5 * mean)
    return LogDensity(potential(start, x) + total.amax(0) + mean.log(), stderr)


@ordinarily
def evidence_bound(
    potential: Potential,
    x: Tensor,
    prior: Any,
    *,
    num_draws: int = 64,
    generator: torch.Generator | int | None = None,
) -> LogDensity:
    r"""Lower bound on the log density of the reverse SDE, free of simulation.

    .. math::
        \log q_t(x)\ \ge\ \Phi(t,x)+E\Big[\int_t^TR(u,X_u)\,du+\log\frac{\pi(X_T)}{e^{\Phi(T,X_T)}}\ \Big|\ X_t=x\Big],

    Jensen's inequality on :func:`feynman_kac_log_density`. Times are drawn uniformly in the log signal-to-noise ratio, one
    stratum per draw, and every point comes from the kernel of the process, so no path is simulated.

    Args:
        potential: The log density, up to a constant.
        x: The points at the start time, ``(n, d)``.
        prior: The law at the horizon.
        num_draws: The number of draws per point.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Unbiased estimates of the bound, differentiable, and standard errors (too large rather than too small, since they
        ignore the strata).

    Raises:
        ShapeError, EmptyDataError: If ``x`` isn't ``(n, d)`` with points in it.
    """
    _check_model(potential, prior)
    x = _checked(potential.process, x)
    check_positive_int(num_draws, "num_draws", 2)
    process, generator = potential.process, as_generator(generator, x.device)
    n, like = x.shape[0], {"dtype": x.dtype, "device": x.device}
    ends = torch.tensor([process.horizon, process.start], dtype=torch.float64)
    low, high = process.log_snr(ends).to(x).unbind()
    strata = torch.arange(num_draws, **like)[:, None, None]  # type: ignore[call-overload]
    share = (strata + torch.rand(num_draws, n, 1, generator=generator, **like)) / num_draws  # type: ignore[call-overload]
    t = process.time_of_log_snr(low + (high - low) * share).clamp(process.start, process.horizon)
    # dt = d(log snr) / |rate|, so that uniform times in the latter integrate over the former
    measure = (high - low) * 2 * process.variance(t) / process.squared_diffusion(t)
    start = torch.full((), process.start, **like)  # type: ignore[call-overload]
    residual = potential.score_and_residual(t, _carry(process, x, start, t, generator)).residuals[0]
    horizon = torch.full((), process.horizon, **like)  # type: ignore[call-overload]
    end = _carry(process, x.expand(num_draws, *x.shape), start, horizon, generator)
    # Jensen: log q(x) >= Phi(x) + E int R dt + E log(q_T / p_theta,T)(X_T), the integral with one time per stratum
    values = measure.squeeze(-1) * residual + prior.log_prob(end) - potential(horizon, end)
    return LogDensity(potential(start, x) + values.mean(0), values.std(0) / num_draws**0.5)


class Energy(NamedTuple):
    """Both sides of the energy identity that can be estimated, and their difference.

    Attributes:
        residual: The integral of the mean residual under the reverse SDE.
        prior: The divergence of the prior from the potential at the horizon, of a law from an unnormalised density.
        start: The divergence of the reverse SDE's law at the start time from the potential there.
        mismatch: The sum ``residual + prior - start``: the energy of what separates SDE and ODE, zero where they agree.
    """

    residual: Estimate
    prior: Estimate
    start: Estimate
    mismatch: Estimate


@ordinarily
def energy_identity(
    potential: Potential,
    prior: Any,
    *,
    num_samples: int = 512,
    num_steps: int = 200,
    num_particles: int = 64,
    generator: torch.Generator | int | None = None,
) -> Energy:
    r"""Energy of the velocity that separates the reverse SDE from the probability-flow ODE.

    .. math::
        \tfrac12\int g^2E_q|\nabla e|^2dt=\int E_q[R]\,dt+\mathrm{KL}(\pi\|e^{\Phi_T})-\mathrm{KL}(q_0\|e^{\Phi_0}),
        \qquad e=\log\frac{q_t}{e^{\Phi_t}},

    whose left side is the kinetic energy, in units of :math:`g^2/2`, of the difference between the ODE's velocity and the
    velocity that carries the law ``q`` of the SDE. The right side needs the residual along simulated reverse paths and
    the density of their ends.

    Args:
        potential: The log density, up to a constant.
        prior: The law at the horizon, with ``sample`` and ``log_prob``.
        num_samples: The number of reverse paths.
        num_steps: The number of steps of the reverse paths, and of the forward paths that give the density of their ends.
        num_particles: The number of forward paths per end.
        generator: The source of randomness; draws from the prior come from torch's global one.

    Returns:
        The parts and the energy, with standard errors.
    """
    check_positive_int(num_samples, "num_samples", 2)
    check_positive_int(num_steps, "num_steps")
    _check_model(potential, prior)
    process, generator = potential.process, as_generator(generator)
    with torch.no_grad():
        # the energy identity 1/2 int g^2 E_q |grad e|^2 dt = int E_q R dt + KL_T - KL_0, with e = log(q / p_theta)
        x = prior.sample((num_samples,))
        at_prior = prior.log_prob(x) - potential(process.horizon, x)
        times = process.grid(num_steps).to(x.device)
        total = x.new_zeros(num_samples)
        score, residual = _first(potential, times[0], x)
        for t, s in itertools.pairwise(times):
            x = _reverse_step(process, score, x, t, s, generator)
            score, after = _first(potential, s, x)
            total = total + 0.5 * (t - s).to(x.dtype) * (residual + after)
            residual = after
        log_q = feynman_kac_log_density(
            potential, x, prior, num_steps=num_steps, num_particles=num_particles, generator=generator
        ).value
        at_start = log_q - potential(process.start, x)
    parts = (total, at_prior, at_start, total + at_prior - at_start)
    return Energy(*(Estimate.of(part) for part in parts))


def _first(potential: Potential, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    score, residuals = potential.score_and_residual(t.to(x.dtype), x)
    return score, residuals[0]


def _reverse_step(
    process: AffineProcess, score: Tensor, x: Tensor, t: Tensor, s: Tensor, generator: torch.Generator | None
) -> Tensor:
    """One exponential step of order 1 of the reverse SDE from ``t`` down to ``s``."""
    h = process.log_snr(s) - process.log_snr(t)
    std, before = process.std(s).to(x.dtype), process.std(t).to(x.dtype)
    decay = (-h).exp().to(x.dtype)
    center = process.center(x)
    start = process.denoised(t.to(x.dtype), x, score) - center
    shrink = -torch.expm1(-2 * h).to(x.dtype)
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    # y_i = (s_i / s_{i-1}) e^{-h} y + a_i (1 - e^{-2h}) E[x0 | x] + s_i sqrt(1 - e^{-2h}) xi, as in exponential_sde
    moved = std / before * decay * (x - center) + process.scale(s).to(x.dtype) * shrink * start
    return center + moved + std * shrink.sqrt() * noise


def _carry(
    process: AffineProcess, x: Tensor, s: Tensor, t: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw ``X_t`` given ``X_s = x``."""
    ratio, variance = process.kernel(s, t)
    center = process.center(x)
    mean = center + ratio * (x - center)
    noise = torch.randn(mean.shape, dtype=x.dtype, device=x.device, generator=generator)
    return mean + variance.sqrt() * noise


def _check_model(potential: Potential, prior: Any) -> None:
    check_type(potential, Potential, "potential", "wrap a function in FunctionPotential")
    check_type(prior, torch.distributions.Distribution, "prior", "a distribution with event (d,)")


def _checked(process: AffineProcess, x: Any) -> Tensor:
    if isinstance(x, Tensor) and not x.is_floating_point():
        raise InvalidInputError("x must be floating", got=x.dtype)
    x = as_tensor(x, "x", 2, "(n, d)", finite=False)
    check_nonempty(x, "x")
    if process.mean.ndim:
        check_event_size(x, process.mean.shape[-1], "x")
    return x
