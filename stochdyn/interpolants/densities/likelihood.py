"""Densities of flows and diffusions at given points: change of variables, Feynman-Kac, and ratios of transitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    check_bool,
    check_callable,
    check_choice,
    check_floating,
    check_positive_int,
)
from stochdyn._transforms import as_leaf, ordinarily, recording
from stochdyn.core.forward.divergences import divergence_probes, sample_probes, value_and_divergence
from stochdyn.core.particles.resampling import effective_size
from stochdyn.errors import InvalidInputError
from stochdyn.interpolants.sampling.methods import FlowMethod
from stochdyn.interpolants.sampling.samplers import Noise, _steps_of, integrate_ode, step_noise

__all__ = ["PathWeights", "feynman_kac_log_prob", "flow_log_prob", "flow_with_log_density"]

Field = Callable[[Tensor, Tensor], Tensor]
LogDensity = Callable[[Tensor], Tensor]


@ordinarily
def flow_with_log_density(
    velocity: Field,
    x: Tensor,
    ts: Tensor,
    method: str | FlowMethod = "rk4",
    *,
    exact: bool = True,
    num_probes: int | None = None,
    inside: tuple[bool, bool] = (False, False),
    generator: torch.Generator | int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Carry points along a flow together with the change of their log density, in one pass.

    .. math:: \dot x=b(t,x),\qquad \frac{d}{dt}\log\rho_t(x_t)=-\nabla\cdot b(t,x_t)

    Args:
        velocity: The velocity as a function ``b(t, x) -> (n, d)``, called with a time of no axes.
        x: The points at ``ts[0]``, ``(n, d)``.
        ts: The times, strictly increasing or strictly decreasing, ``(T,)``.
        method: How to take a step: one of the methods of :func:`integrate_ode`.
        exact: Whether to take the exact divergence, by ``d`` reverse passes; else Hutchinson's estimate with probes that stay the
            same along the path, which is unbiased for the log density.
        num_probes: The number of probes per point where the divergence isn't exact; one if None.
        inside: Whether the velocity is known at the first and at the last time as a limit only, as in :func:`integrate_ode`.
        generator: The source of randomness of the probes: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Points at ``ts[-1]`` and the change of the log density ``(n,)`` on the way; differentiable unless gradients are off.

    Raises:
        TimeGridError: If the grid isn't strictly monotone.
        InvalidInputError: If the method is unknown.

    Example:
        >>> x, change = flow_with_log_density(lambda t, x: -x, torch.ones(1, 2), torch.linspace(0, 1, 11))
        >>> change
        tensor([2.])

    Reference:
        Chen, Rubanova, Bettencourt and Duvenaud, "Neural ordinary differential equations", 2018, theorem 1; Grathwohl et
        al., "FFJORD", 2019.
    """
    check_callable(velocity, "velocity", "a velocity, b(t, x)")
    check_floating(x, "x", "(n, d)")
    check_bool(exact, "exact")
    if num_probes is not None:
        check_positive_int(num_probes, "num_probes")
        if exact:
            raise InvalidInputError("num_probes does nothing with exact=True", got=num_probes)
    probes = None if exact else sample_probes(x, num_probes or 1, generator=as_generator(generator, x.device))

    def joint(t: Tensor, state: Tensor) -> Tensor:
        # d log p / dt = -div b along a solution: the state and the log density are one equation
        value, divergence = _with_divergence(velocity, t, state[..., :-1], probes)
        return torch.cat([value, -divergence.unsqueeze(-1)], -1)

    state = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
    state = integrate_ode(joint, state, ts, method, inside=inside)
    return state[..., :-1], state[..., -1]


def _with_divergence(field: Field, t: Tensor, x: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    if probes is None:
        return value_and_divergence(lambda y: field(t, y), x)
    keep = torch.is_grad_enabled()
    with recording():
        y = x.view_as(x) if keep and x.requires_grad else as_leaf(x)
        value = field(t, y)
        estimate = divergence_probes(value, y, probes, keep).mean(0)
    return (value, estimate) if keep else (value.detach(), estimate.detach())


@ordinarily
def flow_log_prob(
    velocity: Field,
    log_start: LogDensity,
    x: Tensor,
    ts: Tensor,
    method: str | FlowMethod = "rk4",
    **options: object,
) -> Tensor:
    r"""Log density of the law that a flow carries from ``ts[0]`` to ``ts[-1]``.

    .. math:: \log\hat\rho_1(x)=\log\rho_0(X_0)-\int_0^1\nabla\cdot b(t,X_t)\,dt,\qquad X_1=x

    Args:
        velocity: The velocity as a function ``b(t, x) -> (n, d)``.
        log_start: The log density of the law at ``ts[0]``, ``(n, d) -> (n,)``.
        x: The points at ``ts[-1]``, ``(n, d)``.
        ts: The times from start to end, ``(T,)``.
        method: How to take a step: one of the methods of :func:`integrate_ode`.
        **options: Other options of :func:`flow_with_log_density`.

    Returns:
        ``(n,)``.
    """
    check_callable(log_start, "log_start", "a log density of points")
    # on the way back the ends change places
    if "inside" in options:
        options["inside"] = tuple(reversed(options["inside"]))  # type: ignore[call-overload]
    start, change = flow_with_log_density(velocity, x, ts.flip(0), method, **options)  # type: ignore[arg-type]
    # the way back subtracts what the way there adds
    return log_start(start) - change


@dataclass(frozen=True)
class PathWeights:
    r"""Log weights of paths whose mean exponential is a density.

    Attributes:
        log_weights: The log weights of K paths of each of n points, ``(K, n)``.
    """

    log_weights: Tensor

    @property
    def log_prob(self) -> Tensor:
        """Log of the mean weight, ``(n,)``: at finite K a lower bound in the mean, that tightens as K grows."""
        return self.log_weights.logsumexp(0) - math.log(self.log_weights.shape[0])

    @property
    def bound(self) -> Tensor:
        """Mean log weight, ``(n,)``: a lower bound by Jensen's inequality."""
        return self.log_weights.mean(0)

    @property
    def effective_size(self) -> Tensor:
        """Effective number of paths, ``(n,)``, between 1 and K."""
        return effective_size(self.log_weights)

    @property
    def stderr(self) -> Tensor:
        """Standard error of :attr:`log_prob` by the delta method, ``(n,)``."""
        k = self.log_weights.shape[0]
        share = self.log_weights.softmax(0) * k
        return share.std(0) / k**0.5


@ordinarily
def feynman_kac_log_prob(
    forward_drift: Field,
    noise: Noise,
    log_start: LogDensity,
    x: Tensor,
    ts: Tensor,
    *,
    score: Field | None = None,
    num_particles: int = 64,
    method: str = "feynman-kac",
    generator: torch.Generator | int | None = None,
) -> PathWeights:
    r"""Log density of the law of a diffusion at its last time, from weighted paths that run backwards.

    For :math:`dX=f\,dt+g\,dW` from :math:`\rho_0`, and :math:`Y` that runs back from :math:`Y_1=x` with the same drift f,

    .. math:: \hat\rho(1,x)=E\left[\exp\Big(-\int_0^1\nabla\cdot f(t,Y_t)\,dt\Big)\rho_0(Y_0)\right].

    Paths of that law run away from the data. With ``score`` they follow the time-reversed drift :math:`f-g^2s` instead,
    and the change of law enters the weight, which then is constant where the score is exact. No property of the score is
    assumed: it is a proposal.

    Args:
        forward_drift: The drift of the SDE as a function ``f(t, x) -> (n, d)``.
        noise: The strength g of the noise: a number, one number per step, or a function of times.
        log_start: The log density at ``ts[0]``, a function ``(n, d) -> (n,)``.
        x: The points at ``ts[-1]``, ``(n, d)``.
        ts: The increasing times, ``(T,)``.
        score: The score of the marginals or an approximation, a function ``s(t, x) -> (n, d)``; the nearer, the less the weights vary.
        num_particles: The number K of paths per point.
        method: How paths are weighed: ``"feynman-kac"`` takes the integrals above along Euler steps, with an error of the order of the step;
            ``"transition"`` weighs with the ratio of the transition densities of Euler-Maruyama, which needs no divergence and is
            unbiased for the density of that scheme on this grid, at any step.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Weights ``(K, n)``; ``.log_prob`` is the estimate.

    Raises:
        TimeGridError: If the grid isn't strictly increasing.
        InvalidInputError: If the noise vanishes in a step.

    Example:
        >>> normal = torch.distributions.Normal(0.0, 1.0)
        >>> weights = feynman_kac_log_prob(
        ...     lambda t, x: -x, 2**0.5, lambda x: normal.log_prob(x).sum(-1), torch.zeros(1, 1),
        ...     torch.linspace(0, 1, 21), score=lambda t, x: -x, num_particles=200)
        >>> abs(float(weights.log_prob) + 0.919) < 0.1
        True

    Reference:
        Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, section 2.5 (the unweighted identity).
    """
    check_callable(forward_drift, "forward_drift", "a drift, f(t, x)")
    check_callable(log_start, "log_start", "a log density of points")
    if score is not None:
        check_callable(score, "score", "a score, s(t, x)")
    check_floating(x, "x", "(n, d)")
    check_choice(method, ("feynman-kac", "transition"), "method")
    check_positive_int(num_particles, "num_particles")
    times, dts = _steps_of(ts, x)
    if dts[0] < 0:
        raise InvalidInputError(
            "ts must run from the start to the end", got=f"{float(ts[0]):g} to {float(ts[-1]):g}"
        )
    spread = step_noise(noise, ts, dts)
    if min(spread) <= 0:
        raise InvalidInputError("the noise must not vanish inside a step", hint="use the density of the flow")
    y = x.expand(num_particles, *x.shape).reshape(-1, x.shape[-1])
    log_weight = torch.zeros_like(y[:, 0])
    source = as_generator(generator, x.device)
    step = _feynman_kac_step if method == "feynman-kac" else _transition_step
    for n in reversed(range(len(dts))):
        xi = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=source)
        y, gain = step(forward_drift, score, times[n], times[n + 1], dts[n], spread[n], y, xi)
        log_weight = log_weight + gain
    return PathWeights((log_weight + log_start(y)).reshape(num_particles, -1))


def _feynman_kac_step(
    drift: Field,
    score: Field | None,
    before: Tensor,
    after: Tensor,
    h: float,
    spread: float,
    y: Tensor,
    xi: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step back: drift and control at its later end, the divergence by the trapezoid rule."""
    slope, late = value_and_divergence(lambda z: drift(after, z), y)
    back = torch.add(y, slope, alpha=-h)
    gain = torch.zeros_like(y[..., 0])
    if score is not None:
        # dW = u dt + dW' with u = g s: the log weight is -u dW' - u^2 h / 2
        s = score(after, y)
        back = torch.add(back, s, alpha=spread**2)
        gain = gain - spread * (s * xi).sum(-1) - 0.5 * spread**2 * s.square().sum(-1)
    back = torch.add(back, xi, alpha=spread)
    early = value_and_divergence(lambda z: drift(before, z), back)[1]
    return back, gain - 0.5 * h * (late + early)


def _transition_step(
    drift: Field,
    score: Field | None,
    before: Tensor,
    after: Tensor,
    h: float,
    spread: float,
    y: Tensor,
    xi: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step back, weighed with the ratio of the forward transition to the proposal."""
    back = torch.add(y, drift(after, y), alpha=-h)
    if score is not None:
        back = torch.add(back, score(after, y), alpha=spread**2)
    back = torch.add(back, xi, alpha=spread)
    # log N(y | back + h f, g^2 h) - log N(back | proposal, g^2 h): the normalisers are the same
    ahead = torch.add(y - back, drift(before, back), alpha=-h) / spread
    return back, 0.5 * (xi.square() - ahead.square()).sum(-1)
