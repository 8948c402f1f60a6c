"""Rates of a reaction network from counts over time: by finite state projection, linear noise, or particle filters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from stochdyn._checks import as_seed, check_positive_int, check_real, check_type
from stochdyn.core.particles.filtering import ParticleModel, run_unjudged
from stochdyn.diagnostics.container import from_draws
from stochdyn.errors import InvalidInputError, ZeroProbabilityError
from stochdyn.jumps._runge_kutta import runge_kutta
from stochdyn.jumps.proposal import draw_posterior
from stochdyn.jumps.reaction_paths import Direct
from stochdyn.jumps.reactions import ReactionNetwork
from stochdyn.jumps.truncation import TruncatedNetwork, checked_counts, warn_leak

__all__ = [
    "CountLikelihood",
    "LinearNoise",
    "ParticleFilter",
    "ReactionPosterior",
    "StateProjection",
    "fit_reactions",
]

Counts = Mapping[str, Tensor]


class CountLikelihood(ABC):
    """How the likelihood of counts over time is computed.

    Attributes:
        leaves_out: What the number leaves out, in a sentence.
        obs_scale: The standard deviation of Gaussian noise on the counts, or None if they are exact.
    """

    leaves_out: str
    obs_scale: float | None

    @abstractmethod
    def log_likelihood(
        self,
        network: ReactionNetwork,
        times: Tensor,
        counts: Counts,
        constants: Tensor,
        source: torch.Generator,
    ) -> Tensor:
        """Return log-likelihoods ``(n,)``.

        Args:
            network: The network.
            times: The times ``(T,)``.
            counts: The counts ``(T,)`` by species, NaN where missing.
            constants: The rate constants ``(n, R)``.
            source: The source of randomness, for estimates.
        """

    def check(self, network: ReactionNetwork, times: Tensor, counts: Counts, constants: Tensor) -> None:  # noqa: B027
        """Warn where the likelihood isn't to be trusted; most have nothing to check.

        Args:
            network: The network.
            times: The times ``(T,)``.
            counts: The counts ``(T,)`` by species.
            constants: The rate constants ``(n, R)`` of the posterior.
        """


@dataclass
class StateProjection(CountLikelihood):
    """The exact likelihood, by the master equation on counts up to bounds (finite state projection).

    Use it for networks of one to three species with few molecules.

    Args:
        bounds: The largest number of molecules of each species.
        obs_scale: The standard deviation of Gaussian noise on the counts; None if they are exact.
    """

    bounds: Mapping[str, int]
    obs_scale: float | None = None
    leaves_out: str = field(default="nothing but the mass that leaves the bounds", init=False)

    def log_likelihood(
        self,
        network: ReactionNetwork,
        times: Tensor,
        counts: Counts,
        constants: Tensor,
        source: torch.Generator,
    ) -> Tensor:
        """Return log-likelihoods ``(n,)``."""
        return torch.as_tensor(self._evidence(network, times, counts, constants)[0])

    def _evidence(
        self, network: ReactionNetwork, times: Tensor, counts: Counts, constants: Tensor
    ) -> tuple[np.ndarray, float]:
        truncated = TruncatedNetwork(network, self.bounds)
        if self.obs_scale is None:
            truncated.check_counts(counts)
        return truncated.evidence(times, counts, constants.numpy(), self.obs_scale)

    def check(self, network: ReactionNetwork, times: Tensor, counts: Counts, constants: Tensor) -> None:
        """Warn where mass leaks over the bounds."""
        warn_leak(self._evidence(network, times, counts, constants)[1], "between two observations")


@dataclass
class LinearNoise(CountLikelihood):
    """The likelihood of the linear noise approximation, restarted at every observation from what is known there.

    Use it where all species have tens of molecules and more: its cost doesn't grow with their number.

    Args:
        obs_scale: The standard deviation of Gaussian noise on the counts; None if they are exact.

    Reference:
        Fearnhead, Giagos and Sherlock, "Inference for reaction networks using the linear noise approximation", 2014.
    """

    obs_scale: float | None = None
    leaves_out: str = field(
        default="that counts are whole and not negative: wrong near extinction and between several stable states",
        init=False,
    )

    def log_likelihood(
        self,
        network: ReactionNetwork,
        times: Tensor,
        counts: Counts,
        constants: Tensor,
        source: torch.Generator,
    ) -> Tensor:
        """Return log-likelihoods ``(n,)``."""
        n, size = len(constants), len(network.species)
        mean = network.start.expand(n, -1).clone()
        cov = torch.zeros(n, size, size, dtype=torch.float64)
        noise = 0.0 if self.obs_scale is None else self.obs_scale**2
        total, before = torch.zeros(n, dtype=torch.float64), network.start_time
        for k, t in enumerate(times.tolist()):
            mean, cov = _linear_noise(network, constants, mean, cov, t - before)
            for name, value in counts.items():
                if math.isnan(float(value[k])):
                    continue
                # one scalar observation after the other: the update of a Kalman filter
                m = network.species.index(name)
                spread = cov[:, m, m] + noise
                known = spread <= 0
                spread = torch.where(known, torch.ones_like(spread), spread)
                gap = value[k] - mean[:, m]
                score = -0.5 * gap**2 / spread - 0.5 * (2 * math.pi * spread).log()
                total = total + torch.where(known, torch.where(gap == 0, 0.0, -math.inf), score)
                gain = torch.where(known[:, None], torch.zeros_like(mean), cov[:, :, m] / spread[:, None])
                mean = mean + gain * gap[:, None]
                cov = cov - gain[:, :, None] * cov[:, m, None, :]
            before = t
        return total.nan_to_num(nan=-math.inf)


#: The largest number of Runge-Kutta steps between two observations.
_MOST_STEPS = 5000


def _linear_noise(
    network: ReactionNetwork, constants: Tensor, mean: Tensor, cov: Tensor, span: float
) -> tuple[Tensor, Tensor]:
    """Return mean ``(n, M)`` and covariance ``(n, M, M)`` after a time, by Runge-Kutta steps."""
    if span <= 0:
        return mean, cov
    nu = network.change.double()

    def slope(m: Tensor) -> Tensor:
        return nu.mT @ (constants[:, :, None] * network.unit_slopes(m))

    def flow(m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        # dm = nu' a(m), dC = J C + C J' + nu' diag(a) nu
        a = (constants * network.unit_propensities(m, whole=False)).clamp(min=0.0)
        jacobian = slope(m) @ c
        return a @ nu, jacobian + jacobian.mT + (nu.mT * a[:, None, :]) @ nu

    def speed(m: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(slope(m)).amax()

    def walk(steps: int) -> tuple[Tensor, Tensor, Tensor]:
        m, c, fastest = mean, cov, begin
        for _ in range(steps):
            m, c = runge_kutta(flow, (m, c), span / steps)
            fastest = torch.maximum(fastest, speed(m))
        return m, c, fastest

    # Steps are short beside the fastest rate met on the way, not only at its start: an epidemic speeds up.
    # Where the mean explodes all the same, it comes out as NaN and the likelihood as zero.
    begin = speed(mean)
    steps = _enough(float(begin), span)
    while True:
        m, c, fastest = walk(steps)
        wanted = _enough(float(fastest), span) if bool(fastest.isfinite()) else 4 * steps
        if steps == _MOST_STEPS or wanted <= 1.5 * steps or not bool(mean.isfinite().all()):
            return m, c
        steps = min(_MOST_STEPS, wanted)


def _enough(speed: float, span: float) -> int:
    """Return a number of Runge-Kutta steps for a fastest rate, six per its inverse."""
    return min(_MOST_STEPS, max(8, math.ceil(6.0 * speed * span))) if math.isfinite(speed) else 8


@dataclass
class ParticleFilter(CountLikelihood):
    """An estimate of the exact likelihood by a bootstrap particle filter over exact paths.

    Use it where counts are too many for a truncation and too few for linear noise. The estimate is noisy and its exponential
    unbiased, so the posterior is explored by Metropolis steps that keep their estimates (pseudo-marginal).

    Args:
        obs_scale: The standard deviation of Gaussian noise on the counts; it must be positive.
        num_particles: The number of particles.

    Reference:
        Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", 2010.
    """

    obs_scale: float | None
    num_particles: int = 300
    leaves_out: str = field(
        default="nothing in the limit of many particles; the chain of draws is as long as it was made",
        init=False,
    )

    def __post_init__(self) -> None:
        """Check the options."""
        check_real(self.obs_scale, "obs_scale", above=0.0)
        check_positive_int(self.num_particles, "num_particles", 2)

    def log_likelihood(
        self,
        network: ReactionNetwork,
        times: Tensor,
        counts: Counts,
        constants: Tensor,
        source: torch.Generator,
    ) -> Tensor:
        """Return estimates of log-likelihoods ``(n,)``."""
        particles = _Molecules(network, times, counts, constants, float(self.obs_scale or 1.0))
        # A chain of parameters asks for many runs, in which a poor one is no news.
        return run_unjudged(particles, self.num_particles, generator=source).log_evidence


class _Molecules(ParticleModel):
    """Exact paths of a network as particles, for several vectors of constants at once."""

    def __init__(
        self, network: ReactionNetwork, times: Tensor, counts: Counts, constants: Tensor, scale: float
    ) -> None:
        self.network, self.times, self.counts = network, [network.start_time, *times.tolist()], counts
        self.constants, self.scale, self.num_times = constants, scale, len(times)
        self._lanes: Any = None

    def start(self, num_particles: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Put all particles at the known start."""
        self._lanes = self.network.lanes(self.constants.repeat(num_particles, 1))
        x = self.network.start.expand(num_particles, len(self.constants), -1).clone()
        return x, torch.zeros(x.shape[:-1], dtype=torch.float64)

    def advance(self, step: int, z: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Let the molecules react until an observation, and weigh their numbers."""
        ahead = torch.tensor([self.times[step + 1]], dtype=torch.float64)
        x = Direct().paths(self._lanes, z.flatten(0, 1), self.times[step], ahead, generator)[:, 0]
        x = x.reshape(z.shape)
        score = torch.zeros(z.shape[:-1], dtype=torch.float64)
        for name, value in self.counts.items():
            if not math.isnan(float(value[step])):
                gap = (value[step] - x[..., self.network.species.index(name)]) / self.scale
                score = score - 0.5 * gap**2 - math.log(self.scale * math.sqrt(2 * math.pi))
        return x, score


@dataclass(frozen=True)
class ReactionPosterior:
    """What counts say of the rate constants of a network.

    Attributes:
        reactions: The reactions whose constants were learnt.
        draws: Posterior draws of the logarithms of the constants, ``(num_draws, R)``.
        leaves_out: What the likelihood leaves out.
        khat: The Pareto k of the importance weights behind the draws; NaN for a chain.
        acceptance: The share of accepted steps of a chain; NaN for importance weights.
        idata: The draws in ArviZ's container.
    """

    reactions: list[str]
    draws: Tensor
    leaves_out: str
    khat: float
    acceptance: float
    idata: Any

    def report(self) -> str:
        """Return a table of the constants with intervals, and what the likelihood leaves out."""
        low, middle, high = self.draws.exp().quantile(self.draws.new_tensor([0.025, 0.5, 0.975]), 0)
        width = max(len(r) for r in self.reactions)
        lines = [f"{'reaction':>{width}} {'constant':>10} {'2.5 %':>10} {'97.5 %':>10}"]
        for k, name in enumerate(self.reactions):
            lines.append(
                f"{name:>{width}} {float(middle[k]):10.4g} {float(low[k]):10.4g} {float(high[k]):10.4g}"
            )
        lines.append(f"This likelihood leaves out {self.leaves_out}.")
        return "\n".join(lines)


def fit_reactions(
    network: ReactionNetwork,
    times: object,
    counts: Mapping[str, object],
    method: CountLikelihood,
    prior: tuple[float, float] | None = None,
    num_draws: int = 500,
    seed: int = 0,
) -> ReactionPosterior:
    r"""Learn the rate constants of a network from counts of some of its species.

    Logarithms of the constants have independent normal priors. Deterministic likelihoods (:class:`StateProjection`,
    :class:`LinearNoise`) give weighted draws around the mode, as :func:`fit_rates` does; a :class:`ParticleFilter` gives a
    chain that starts at the mode of the linear noise.

    Args:
        network: The network; its rate constants are where the search begins, and own propensities are scaled.
        times: The increasing times ``(T,)``, none before the start.
        counts: The counts ``(T,)`` of each observed species; NaN where missing.
        method: How the likelihood is computed, which says what it leaves out.
        prior: The mean and the standard deviation of the log constants; if None, those of the network with a standard
            deviation of 2.
        num_draws: The number of posterior draws.
        seed: The seed of all randomness.

    Raises:
        ZeroProbabilityError: If the counts are impossible at the network's own constants.

    Example:
        >>> network = ReactionNetwork(["0 -> A", "A -> 0"], rates=[2.0, 0.5], initial={"A": 4})
        >>> fit = fit_reactions(network, [1.0, 2.0, 3.0], {"A": [5, 4, 6]}, StateProjection({"A": 30}), num_draws=200)
        >>> fit.draws.shape, fit.leaves_out
        (torch.Size([200, 2]), 'nothing but the mass that leaves the bounds')
    """
    check_type(network, ReactionNetwork, "network")
    check_type(method, CountLikelihood, "method")
    check_positive_int(num_draws, "num_draws", 2)
    at, seen = checked_counts(network, times, counts)
    source = torch.Generator().manual_seed(as_seed(seed))
    start = network.constants.detach().clamp(min=1e-300).log()
    if bool((network.constants.detach() <= 0).any()):
        raise InvalidInputError(
            "a rate constant to be learnt must be positive", got=network.constants.detach().tolist()
        )
    if prior is None:
        centre, width = start, 2.0
    else:
        if not isinstance(prior, tuple | list) or len(prior) != 2:
            raise InvalidInputError(
                "prior must be the mean and the standard deviation of log constants", got=repr(prior)[:60]
            )
        check_real(prior[0], "prior[0]")
        check_real(prior[1], "prior[1]", above=0.0)
        centre, width = torch.full_like(start, float(prior[0])), float(prior[1])

    def density_of(likelihood: CountLikelihood) -> Any:
        def density(theta: Tensor) -> Tensor:
            value = torch.empty(len(theta), dtype=torch.float64)
            for part in _alike(theta):
                value[part] = likelihood.log_likelihood(network, at, seen, theta[part].exp(), source)
            return value - 0.5 * ((theta - centre) / width).square().sum(-1)

        return density

    density = density_of(method)
    if bool(torch.isinf(density(start[None])).any()):
        raise ZeroProbabilityError(
            "the counts are impossible under the network",
            got=f"likelihood zero at {network.constants.detach().tolist()}",
            hint="is a reaction missing, or a bound too low?",
        )
    if isinstance(method, ParticleFilter):
        smooth = density_of(LinearNoise(method.obs_scale))
        mode = _mode(smooth, start)
        draws, acceptance = _chain(density, mode, _curvature(smooth, mode), num_draws, source)
        khat = math.nan
    else:
        mode = _mode(density, start)
        found = draw_posterior(density, mode, _curvature(density, mode), max(num_draws, 500), source)
        draws, khat, acceptance = found.draws[:num_draws], found.khat, math.nan
    method.check(network, at, seen, draws.mean(0, keepdim=True).exp())
    idata = from_draws(
        {"log_constant": draws.numpy()[None]},
        coords={"reaction": network.reactions},
        dims={"log_constant": ["reaction"]},
    )
    return ReactionPosterior(network.reactions, draws, method.leaves_out, khat, acceptance, idata)


#: Step of differences, and how much faster than the slowest the fastest constants of one batch are.
_STEP, _SPREAD = 1e-4, 4.0


def _alike(theta: Tensor) -> list[Tensor]:
    """Return groups of alike speed: the steps of a batch are those that its fastest member needs."""
    speed = theta.amax(-1)
    order = speed.argsort()
    group = ((speed[order] - speed[order[0]]) / math.log(_SPREAD)).floor().long()
    return list(order.split(group.unique_consecutive(return_counts=True)[1].tolist()))


def _differences(density: Any, theta: Tensor) -> tuple[float, Tensor]:
    """Return a density and its gradient by central differences, in one call."""
    moves = _STEP * torch.eye(len(theta), dtype=torch.float64)
    values = density(torch.cat([theta[None], theta + moves, theta - moves]))
    p = len(theta)
    return float(values[0]), (values[1 : p + 1] - values[p + 1 :]) / (2 * _STEP)


def _mode(density: Any, start: Tensor) -> Tensor:
    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _differences(density, torch.tensor(flat))
        if not math.isfinite(value) or not bool(torch.isfinite(slope).all()):
            return 1e25, np.zeros_like(flat)
        return -value, -slope.numpy()

    bounds = [(v - 10.0, v + 10.0) for v in start.tolist()]
    found = minimize(
        cost, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 200}
    )
    return torch.as_tensor(found.x)


def _curvature(density: Any, mode: Tensor) -> Tensor:
    """Return minus the Hessian by second differences, in one call."""
    p, h = len(mode), 1e-2
    eye = h * torch.eye(p, dtype=torch.float64)
    pairs = [(i, j) for i in range(p) for j in range(i, p)]
    points = [mode[None]]
    for i, j in pairs:
        points += [
            torch.stack(
                [
                    mode + eye[i] + eye[j],
                    mode + eye[i] - eye[j],
                    mode - eye[i] + eye[j],
                    mode - eye[i] - eye[j],
                ]
            )
        ]
    values = density(torch.cat(points))[1:].reshape(len(pairs), 4)
    # d2 f / dx_i dx_j = (f++ - f+- - f-+ + f--) / 4 h^2; for i = j the two mixed ones are the centre
    second = (values[:, 0] - values[:, 1] - values[:, 2] + values[:, 3]) / (4 * h**2)
    out = torch.zeros(p, p, dtype=torch.float64)
    for (i, j), value in zip(pairs, second.tolist(), strict=True):
        out[i, j] = out[j, i] = -value
    return out


def _chain(
    density: Any, mode: Tensor, curvature: Tensor, num_draws: int, source: torch.Generator
) -> tuple[Tensor, float]:
    """Return a pseudo-marginal chain and its share of accepted steps; its first fifth is thrown away."""
    values, vectors = torch.linalg.eigh(curvature)
    root = vectors / values.clamp(min=0.1 * float(values.max().clamp(min=1e-6)) / 10.0).sqrt()
    scale = 2.38 / math.sqrt(len(mode))
    theta, value = mode, float(density(mode[None])[0])
    kept, accepted, warmup = [], 0, num_draws // 5
    for k in range(num_draws + warmup):
        proposed = theta + scale * root @ torch.randn(len(mode), dtype=torch.float64, generator=source)
        other = float(density(proposed[None])[0])
        if math.log(float(torch.rand((), dtype=torch.float64, generator=source))) < other - value:
            theta, value = proposed, other
            accepted += k >= warmup
        if k >= warmup:
            kept.append(theta)
    return torch.stack(kept), accepted / num_draws
