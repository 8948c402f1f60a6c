"""Particle-marginal Metropolis-Hastings: chains through the parameters whose likelihood is an unbiased estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from stochdyn._checks import check_positive_int
from stochdyn.core.particles.resampling import systematic
from stochdyn.diagnostics.probe import Probe, random_values
from stochdyn.errors import InvalidInputError, ZeroProbabilityError
from stochdyn.infer.particle_site import ParticleObservations, ParticlesInSites
from stochdyn.run.progress import progress_bar

__all__ = ["ChainRun", "PMMHMethod", "run_chains"]

# The variance of the log likelihood at which more particles no longer pay (Doucet et al., 2015: a deviation of 1 to 1.7).
_VARIANCE = 1.2
_REPLICAS = 50
_ROUNDS = 5
_FEWEST, _MOST = 10, 20_000
# The share of accepted steps that the size of the steps is adapted to, with a noisy likelihood.
_ACCEPTANCE = 0.2


@dataclass(frozen=True)
class PMMHMethod:
    """Particle-marginal Metropolis-Hastings on the parameters of models with :class:`ParticleObservations`.

    Use it where the answer has to be right whatever the law of the data and however nonlinear the equation: chains are exact for
    any number of particles. All chains run at once, from draws of the prior that are taken by their likelihood, and learn the
    shape of their steps from each other while they warm up.

    Attributes:
        warmup: The number of steps of each chain that adapt the sampler and are thrown away.
        num_chains: The number of chains.
        num_particles: The number of particles; None chooses it halfway through the warm-up so that the log likelihood has a
            variance of about one, from which on more particles don't pay.
        num_starts: The number of draws of the prior of which starts are taken.

    Reference:
        C. Andrieu, A. Doucet and R. Holenstein, Particle Markov chain Monte Carlo methods, 2010; A. Doucet, M. K. Pitt,
        G. Deligiannidis and R. Kohn, Efficient implementation of Markov chain Monte Carlo when using an unbiased likelihood
        estimator, 2015.
    """

    warmup: int = 400
    num_chains: int = 8
    num_particles: int | None = None
    num_starts: int = 400

    def __post_init__(self) -> None:
        check_positive_int(self.warmup, "warmup", 20)
        check_positive_int(self.num_chains, "num_chains", 2)
        if self.num_particles is not None:
            check_positive_int(self.num_particles, "num_particles", 2)
        check_positive_int(self.num_starts, "num_starts", 10)


@dataclass(frozen=True)
class ChainRun:
    """What chains have found.

    Attributes:
        draws: The draws ``(num_chains, num_draws, *shape)`` by site.
        log_likelihood: The estimates that were kept with them, ``(num_chains, num_draws, *batch)`` by observed site.
        log_joint: The logarithms ``(num_chains, num_draws)`` of the estimated joint density.
        acceptance: The share of accepted steps.
        num_particles: The number of particles.
    """

    draws: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    log_joint: Tensor
    acceptance: float
    num_particles: int


@dataclass
class _State:
    """Where chains stand: ``u (C, D)`` on the unconstrained scale, joint density there, likelihoods by site."""

    u: Tensor
    joint: Tensor
    parts: dict[str, Tensor]


class _Target:
    """The estimated joint density of a model at many points at once."""

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], num_starts: int
    ) -> None:
        self.model, self.args, self.kwargs = model, args, dict(kwargs)
        self.particles: int | None = None
        with ParticlesInSites(None):
            traces = [poutine.trace(model).get_trace(*args, **kwargs) for _ in range(num_starts)]
            self.starts: dict[str, Tensor] = {
                n: torch.stack([torch.as_tensor(t.nodes[n]["value"]) for t in traces])
                for n in random_values(traces[0])
            }
            nodes: Any = traces[0].nodes
            sites = [
                s
                for s in nodes.values()
                if s["type"] == "sample" and isinstance(s["fn"], ParticleObservations)
            ]
            if not sites or not self.starts:
                raise InvalidInputError(
                    "particle-marginal chains need parameters and a site of ParticleObservations",
                    got=f"{len(sites)} such sites, {len(self.starts)} parameters",
                )
            self.default = sites[0]["fn"].num_particles
            self.transforms = {n: biject_to(nodes[n]["fn"].support) for n in self.starts}
            self.probe = Probe(model, None, args, dict(kwargs), False, False, self.starts)

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return values by site as points ``(n, D)``, in double precision."""
        rows = [self.transforms[n].inv(values[n]).reshape(len(values[n]), -1) for n in self.starts]
        return torch.cat(rows, -1).double()

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return values by site, and the logarithm ``(n,)`` of the volume that they are worth."""
        found, volume, at = {}, u.new_zeros(len(u)), 0
        for name, like in self.starts.items():
            transform = self.transforms[name]
            shape = transform.inv(like[:1]).shape[1:]
            part = u[:, at : at + shape.numel()].reshape(len(u), *shape).to(like.dtype)
            at += shape.numel()
            value = transform(part)
            jacobian = transform.log_abs_det_jacobian(part, value).double()
            volume = volume + jacobian.reshape(len(u), -1).sum(-1)
            found[name] = value
        return found, volume

    def at(self, u: Tensor) -> _State:
        """Return the state of chains at ``u (n, D)``."""
        values, volume = self.values(u)
        count, depth = len(u), self.probe.depth
        given = {n: v.reshape(count, *(1,) * (depth - 1 - len(self.probe.sites[n].batch_shape)), *v.shape[1:])
                 for n, v in values.items()}  # fmt: skip
        with ParticlesInSites(self.particles or self.default):
            trace = self.probe.run_model(given, count, depth)
        joint, parts = volume, {}
        nodes: Any = trace.nodes
        for name, node in nodes.items():
            if node["type"] != "sample":
                continue
            log_prob = node["log_prob"].double()
            joint = joint + log_prob.expand(
                torch.broadcast_shapes(log_prob.shape, (count, *(1,) * (depth - 1)))
            ).reshape(count, -1).sum(-1)
            if isinstance(node["fn"], ParticleObservations):
                parts[name] = log_prob.reshape(count, *self.probe.sites[name].batch_shape)
        return _State(u, torch.nan_to_num(joint, nan=-math.inf, neginf=-math.inf), parts)


def run_chains(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: PMMHMethod,
    num_draws: int,
    progress: bool,
) -> ChainRun:
    """Run all chains.

    Args:
        model: The Pyro model.
        args: The positional arguments of the model.
        kwargs: The keyword arguments of the model.
        method: The options.
        num_draws: The number of draws of each chain.
        progress: Whether a bar is shown.

    Raises:
        InvalidInputError: If the model has no site of :class:`ParticleObservations`, or no parameters.
        ZeroProbabilityError: If the data are impossible at all draws of the prior.
    """
    # Parameters far out make paths explode: they are improbable, not errors.
    with torch.no_grad(), pyro.validation_enabled(False):
        target = _Target(model, args, kwargs, method.num_starts)
        target.particles = method.num_particles
        first = target.at(target.flat(target.starts))
        weights = sum(p.reshape(method.num_starts, -1).sum(-1) for p in first.parts.values())
        weights = torch.nan_to_num(torch.as_tensor(weights), nan=-math.inf, neginf=-math.inf)
        if not bool(torch.isfinite(weights).any()):
            raise ZeroProbabilityError(
                "the data are impossible at all draws of the prior",
                hint="a narrower prior, more num_starts, or ParticleObservations(method='guided')",
            )
        chosen = systematic(weights, method.num_chains)
        state = target.at(first.u[chosen])
        # The first steps have the covariance of the weighted draws, flattened so that more than a few count.
        share = torch.softmax(
            weights / max(1.0, float(weights.max() - weights[torch.isfinite(weights)].median()) / 5), 0
        )
        factor = _factor(first.u, share)
        dim, scale = first.u.shape[-1], 2.38 / first.u.shape[-1] ** 0.5
        accepted = 0.0
        history: list[Tensor] = []
        kept: list[_State] = []
        for k in progress_bar(range(method.warmup + num_draws), "PMMH", progress):
            warm = k < method.warmup
            if warm and method.num_particles is None and k == method.warmup // 2:
                target.particles = _tuned(target, torch.cat(history[k // 2 :]).median(0).values)
                state = target.at(state.u)
            trial = target.at(state.u + scale * torch.randn_like(state.u) @ factor.mT)
            take = torch.rand(len(state.u), dtype=torch.float64).log() < trial.joint - state.joint
            state = _State(
                torch.where(take[:, None], trial.u, state.u),
                torch.where(take, trial.joint, state.joint),
                {
                    n: torch.where(take.reshape(-1, *(1,) * (v.ndim - 1)), trial.parts[n], v)
                    for n, v in state.parts.items()
                },
            )
            rate = float(take.double().mean())
            if warm:
                history.append(state.u)
                scale *= math.exp((rate - _ACCEPTANCE) / (1 + k) ** 0.6)
                if k >= 20 and k % 20 == 0:
                    recent = torch.cat(history[k // 2 :])
                    factor = _factor(
                        recent, torch.full((len(recent),), 1.0 / len(recent), dtype=torch.float64)
                    )
            else:
                kept.append(state)
                accepted += rate / num_draws
    u = torch.stack([s.u for s in kept], 1)
    flat, _ = target.values(u.reshape(-1, dim))
    lead = (method.num_chains, num_draws)
    return ChainRun(
        {n: v.reshape(*lead, *v.shape[1:]) for n, v in flat.items()},
        {n: torch.stack([s.parts[n] for s in kept], 1) for n in kept[0].parts},
        torch.stack([s.joint for s in kept], 1) - target.values(u.reshape(-1, dim))[1].reshape(lead),
        accepted,
        target.particles or target.default,
    )


def _factor(u: Tensor, share: Tensor) -> Tensor:
    """Return the Cholesky factor of a weighted covariance, whose components keep some room of their own."""
    gap = u - share @ u
    cov = (share[:, None] * gap).mT @ gap
    wide = gap.square().mean(0).clamp_min(torch.finfo(u.dtype).tiny)
    return torch.linalg.cholesky(cov + 1e-6 * torch.diag(wide))


def _tuned(target: _Target, u: Tensor) -> int:
    """Return a number of particles at which the log likelihood has a variance of about one.

    The variance falls as a power of their number, between the first and the third, that two measurements tell.
    """
    before = target.particles
    count, power, last = before or target.default, 1.0, (0, 0.0)
    for _ in range(_ROUNDS):
        target.particles = count
        found = target.at(u.expand(_REPLICAS, -1)).joint
        variance = float(found[torch.isfinite(found)].var())
        if 0.5 * _VARIANCE < variance < 2 * _VARIANCE:
            break
        if not math.isfinite(variance):
            wanted = 2.0 * count
        else:
            if last[0] and last[0] != count and min(variance, last[1]) > 0.0:
                power = math.log(last[1] / variance) / math.log(count / last[0])
                power = min(max(power, 1.0), 3.0)
            wanted = count * (variance / _VARIANCE) ** (1 / power)
            last = count, variance
        now, count = count, int(min(max(math.ceil(wanted), _FEWEST), _MOST))
        if now == count:
            break
    target.particles = before
    return count
