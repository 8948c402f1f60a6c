"""Bounds on the divergence between the data and an SDE sampler, by Girsanov's theorem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_positive_int, check_real
from stochdyn.core._distance import distance_between
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError, UnavailableError
from stochdyn.interpolants.paths.interpolant import Interpolant, as_points, check_pair
from stochdyn.interpolants.sampling.noise_level import TabulatedEpsilon, as_epsilon

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.generator import InterpolantGenerator

__all__ = ["field_errors", "kl_bound", "kl_bound_from_losses", "optimal_epsilon"]


def kl_bound_from_losses(excess_velocity: float, excess_score: float, epsilon: float) -> float:
    r"""Bound the divergence by the excess losses of velocity and score.

    .. math:: KL(\rho_1\,\|\,\hat\rho_1)\le\frac1\varepsilon\Delta L_b+\varepsilon\,\Delta L_s

    with :math:`\Delta L_b=\tfrac12\int E|\hat b-b|^2dt` and :math:`\Delta L_s=\tfrac12\int E|\hat s-s|^2dt`, as the losses of
    :class:`stochdyn.interpolants.InterpolantRegression` are normalised. (Printed in the paper with half these constants, which
    belong to losses without the factor one half: with errors that are aligned, :math:`\delta b=\varepsilon\delta s`, the
    divergence exceeds the smaller number.) The bound is least at :math:`\varepsilon=\sqrt{\Delta L_b/\Delta L_s}`.

    Args:
        excess_velocity: The loss of the velocity minus its minimum.
        excess_score: The loss of the score minus its minimum.
        epsilon: The strength of the noise, positive.

    Raises:
        InvalidInputError: If epsilon isn't positive, or an excess is negative.

    Example:
        >>> kl_bound_from_losses(0.1, 0.4, 0.5)
        0.4

    Reference:
        Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, theorem 2.23, with corrected constants.
    """
    check_real(epsilon, "epsilon", above=0.0)
    check_real(excess_velocity, "excess_velocity")
    check_real(excess_score, "excess_score")
    if excess_velocity < 0 or excess_score < 0:
        raise InvalidInputError(
            "an excess loss isn't negative", got=f"{excess_velocity:g} and {excess_score:g}"
        )
    return float(excess_velocity / epsilon + epsilon * excess_score)


class _EmpiricalTruth:
    """Velocity and score of the interpolant between the empirical laws of two paired samples."""

    def __init__(self, it: Interpolant, x0: Tensor, x1: Tensor, clip: float) -> None:
        if not it.has_latent and it.kind != "one-sided":
            raise InvalidInputError(
                "a path without a latent has no score", hint="give the interpolant a gamma"
            )
        self.it, self.x0, self.x1, self.clip = it, x0, x1, clip

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return self._both(t, x)[0]

    def score(self, t: Tensor, x: Tensor) -> Tensor:
        return self._both(t, x)[1]

    def _both(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        it = self.it
        inner = t.clamp(self.clip, 1 - self.clip)
        if it.kind == "one-sided":
            # the noise is x0 itself, known in law: only x1 is a sample
            scale = it.alpha.value(inner)
            means = it.beta.value(t) * self.x1
            slopes = it.beta.derivative(t) * self.x1
            rate = it.alpha.square_derivative(inner) / (2 * it.alpha.square(inner))
        else:
            scale = it.gamma.value(inner)
            means = it.mean(t, self.x0, self.x1)
            slopes = it.mean_derivative(t, self.x0, self.x1)
            rate = it.gamma.square_derivative(inner) / (2 * it.gamma.square(inner))
        # the law between two samples is a mixture of Gaussians at the means of the pairs, weighed by their likelihood
        share = (-0.5 * (distance_between(x, means) / scale).square()).softmax(-1)
        offset = x - share @ means
        return share @ slopes + rate * offset, -offset / scale.square()


def field_errors(
    model: InterpolantGenerator,
    x0: Tensor,
    x1: Tensor,
    truth: Any = None,
    *,
    num_times: int = 40,
    margin: float = 1e-3,
    generator: torch.Generator | int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Errors of velocity and score of a model along the path.

    Args:
        model: The generator.
        x0: The starts, paired row by row with the ends, ``(n, d)``.
        x1: The ends, ``(n, d)``; other ones than those of the training.
        truth: An object with ``velocity(t, x)`` and ``score(t, x)``, such as a
            :class:`stochdyn.interpolants.GaussianMixtureInterpolant`. None takes the interpolant of the two samples.
        num_times: The number of times, in the middles of equal intervals.
        margin: The least distance of these times from 0 and 1; what lies nearer is left out.
        generator: The source of the latents: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Times ``(T,)``; :math:`\delta b` and :math:`\delta s`, ``(T, n, d)``.
    """
    x0, x1, _ = as_points(x0, x1)
    check_pair(x0, x1)
    check_positive_int(num_times, "num_times")
    it, clip = model.interpolant, model.fields.clip
    source = as_generator(generator, x1.device)
    # the midpoint rule on [margin, 1 - margin]
    u = (torch.arange(num_times, dtype=x1.dtype, device=x1.device) + 0.5) / num_times
    times = margin + (1 - 2 * margin) * u
    exact: Any = _EmpiricalTruth(it, x0, x1, clip) if truth is None else truth
    db, ds = [], []
    with torch.no_grad():
        for t in times:
            x = it.sample(t, x0, x1, generator=source)
            b, s = exact.velocity(t, x), exact.score(t, x)
            db.append(model.velocity(t, x) - b)
            ds.append(model.score(t, x) - s)
    return times, torch.stack(db), torch.stack(ds)


def kl_bound(
    model: InterpolantGenerator,
    x0: Tensor,
    x1: Tensor,
    epsilon: Any,
    truth: Any = None,
    *,
    num_times: int = 40,
    margin: float = 0.01,
    generator: torch.Generator | int | None = None,
) -> Estimate:
    r"""Bound the divergence of the data from the law of the SDE sampler.

    .. math:: KL(\rho_1\,\|\,\hat\rho_1)\le KL(P\,\|\,\hat P)=\int_0^1\frac1{4\varepsilon}E\left|\delta b+\varepsilon\,\delta s\right|^2dt,

    the divergence of the two laws on paths that start alike. It needs the true fields. Where ``truth`` isn't given, those of
    the interpolant between the two *samples* stand in, which are known in closed form: in the mean over samples the result is
    then at least the true integral, since the least loss on a sample is below the least loss. In many dimensions,
    or with few points, it is far above it; it tends to it as the samples grow. Cost: ``num_times * n**2 * d``.

    The integral runs from ``margin`` to ``1 - margin``: the ends are left out of the bound, since a sample says nothing there, and
    since for a noise prediction with an error the integrand grows like the inverse of the distance. It bounds the divergence
    of a sampler that is exact there.

    Args:
        model: The generator.
        x0: The starts, paired as in training, ``(n, d)``.
        x1: The ends, ``(n, d)``; other ones than those of the training.
        epsilon: A positive number, a function of time, or ``"optimal"``.
        truth: An object with the true ``velocity(t, x)`` and ``score(t, x)``. None takes the fields between the two samples.
        num_times: The number of times of the quadrature.
        margin: The least distance of these times from 0 and 1; what lies nearer is left out.
        generator: The source of the latents: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        The bound in nats, with the standard error of its Monte Carlo average.

    Raises:
        InvalidInputError: If epsilon vanishes.
        UnavailableError: If the networks give no score.
    """
    if not model.fields.has_score:
        raise UnavailableError(
            "these networks give no score, so no SDE", got=" and ".join(model.fields.names)
        )
    level = as_epsilon(epsilon, model.interpolant)
    if level.vanishes:
        raise InvalidInputError("without noise errors of the fields bound no divergence", got="epsilon=0")
    times, db, ds = field_errors(
        model, x0, x1, truth, num_times=num_times, margin=margin, generator=generator
    )
    eps = level(times)[:, None, None]
    rates = (db + eps * ds).square().sum(-1) / (4 * eps.squeeze(-1))
    return Estimate.of(rates.mean(0) * (1 - 2 * margin))


def optimal_epsilon(
    model: InterpolantGenerator, truth: Any, x0: Tensor, x1: Tensor, *, num_times: int = 40, margin: float = 1e-3,
    generator: torch.Generator | int | None = None,
) -> TabulatedEpsilon:  # fmt: skip
    r"""Return the noise that minimises the path divergence of a model, :math:`\varepsilon^*(t)=\sqrt{E|\delta b|^2/E|\delta s|^2}`.

    Args:
        model: The generator.
        truth: An object with the true ``velocity(t, x)`` and ``score(t, x)``, or better ones than the model's.
        x0: The starts, ``(n, d)``.
        x1: The ends, ``(n, d)``.
        num_times: The number of times.
        margin: The least distance of these times from 0 and 1; what lies nearer is left out.
        generator: The source of the latents: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        A function of time that every sampler takes as ``epsilon``.
    """
    times, db, ds = field_errors(
        model, x0, x1, truth, num_times=num_times, margin=margin, generator=generator
    )
    squares = [e.double().square().sum(-1).mean(-1) for e in (db, ds)]
    return TabulatedEpsilon(times, (squares[0] / squares[1]).sqrt())
