"""GaussianPosterior: a linear-Gaussian control whose bound needs no simulated path, parallel over time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochdyn._checks import as_generator, check_callable, check_positive_int, check_time_grid, check_type
from stochdyn.core.gaussian.affine import LinearSteps, affine_steps, by_column
from stochdyn.core.gaussian.feedback import (
    FeedbackDraws,
    FeedbackLaw,
    LiftedStart,
    LinearFeedback,
    start_lift,
)
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.initial import DistributionStart, FixedStart
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.noise import NoiseSteps
from stochdyn.errors import InvalidInputError
from stochdyn.fractional.latent.affine_drift import AffineDrift
from stochdyn.fractional.latent.gaussian_relative import Shift, shift_of

__all__ = ["GaussianPosterior"]


@dataclass(frozen=True)
class Prepared:
    """What a posterior needs of its prior on the grid.

    Attributes:
        noise: The steps of the noise.
        start: The law of the start under P.
        steps: The linear steps of the path; None where the drift isn't affine.
    """

    noise: NoiseSteps
    start: LiftedStart
    steps: LinearSteps | None

    @property
    def requires_grad(self) -> bool:
        """Whether something here has to be computed anew for every gradient."""
        parts = [self.noise.gain, self.start.origin, self.start.prior_mean, self.start.prior_precision]
        if self.steps is not None:
            parts += [self.steps.transition, self.steps.load, self.steps.offset]
        return any(p.requires_grad for p in parts)


class GaussianPosterior(nn.Module):
    r"""A posterior of a latent path that is Gaussian: linear feedback on a linear equation.

    The increments of each step follow :math:`\epsilon_n\mid z_n\sim N(k_n+K_n(z_n-Ez_n),L_nL_n^\top)`, in units of their
    prior standard deviation, and drive :math:`dX=(A_tX+a_t)\,dt+\sigma\,dZ`. Here z is the path with the
    memory states of its noise. So means and covariances of all times follow from one linear recursion,
    solved in logarithmic depth.

    - If the drift of the prior is an :class:`AffineDrift`, it is the drift of this equation, and the divergence
      is known in closed form. At the optimum the law is the exact posterior of a Gaussian model, at any step.
    - Otherwise :math:`A_t, a_t` are parameters as well. The nonlinear drift reaches the same path by other
      increments, which are again found for all times at once; only the mean over the path of that
      correction is estimated, from draws that need no loop.

    A Gaussian law with arbitrary marginals would not do here: the memory states and the path are
    driven by one noise, so its divergence would be infinite.

    Attributes:
        width: The scale ``(Z,)`` of the states in the gains, from the prior.

    Args:
        prior: The law of the path: constant diffusion, a fixed or Gaussian start.
        ts: The grid ``(T,)``.
        batch_shape: The shape of independent posteriors.

    Raises:
        InvalidInputError: If the diffusion depends on the state (a nonlinear map of the state to one with
            constant noise, where there is one, helps), is singular for a nonlinear drift, or the start isn't
            fixed or Gaussian.

    Example:
        >>> from stochdyn import SDE, GaussianObservations
        >>> from stochdyn.fractional import MarkovNoise
        >>> noise = MarkovNoise(0.7, 5, horizon=1.0, dt=0.05)
        >>> prior = DiffusionMeasure(torch.zeros(1), SDE(AffineDrift(-torch.eye(1)), 1.0, noise))
        >>> ts = torch.linspace(0, 1, 21)
        >>> posterior = GaussianPosterior(prior, ts)
        >>> posterior.linearise(GaussianObservations(ts, ts[-1:], torch.tensor([0.5]), 0.1))
        >>> posterior.mean.shape, bool(posterior.divergence() > 0)
        (torch.Size([21, 1]), True)

    Reference:
        C. Archambeau et al., Gaussian process approximations of stochastic differential equations, 2007, for the
        Brownian case; the treatment of memory is this library's.
    """

    ts: Tensor
    width: Tensor

    def __init__(self, prior: DiffusionMeasure, ts: Tensor, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        check_time_grid(ts)
        check_type(prior, DiffusionMeasure, "prior")
        self.prior = prior
        self.register_buffer("ts", ts)
        self._check_prior()
        start = self._start_prior()
        self.dim, batch = prior.initial.dim, tuple(batch_shape)
        like = start.origin[..., : self.dim]
        noise = prior.sde.noise
        channels = prior.sde.noise_dim(ts[0].to(like), like)
        count = channels * noise.num_innovations(ts)
        size = self.dim + channels * noise.num_states
        steps = ts.shape[0] - 1
        self.offset = nn.Parameter(like.new_zeros(steps, *batch, count))
        self.gain = nn.Parameter(like.new_zeros(steps, *batch, count, size))
        self.log_diagonal = nn.Parameter(like.new_zeros(steps, *batch, count))
        self.lower = nn.Parameter(like.new_zeros(steps, *batch, count, count)) if count > 1 else None
        if self.exact:
            self.drift_matrix = self.drift_offset = None
        else:
            self.drift_matrix = nn.Parameter(like.new_zeros(steps, *batch, self.dim, self.dim))
            self.drift_offset = nn.Parameter(like.new_zeros(steps, *batch, self.dim))
        self.start_mean = self.start_log_diagonal = self.start_lower = None
        width = start.mean.shape[-1]
        if width:
            self.start_mean = nn.Parameter(start.mean.detach().expand(*batch, width).clone())
            factor = torch.linalg.cholesky(torch.linalg.inv(start.prior_precision.detach()))
            log_diagonal = factor.diagonal(dim1=-2, dim2=-1).log()
            self.start_log_diagonal = nn.Parameter(log_diagonal.expand(*batch, width).clone())
            self.start_lower = nn.Parameter(factor.tril(-1).expand(*batch, width, width).clone())
        self.batch_shape = torch.Size(batch)
        self._kept: tuple[Any, Prepared] | None = None
        # gains refer to the spread of the state under the prior, so that all of them are of one size
        self.register_buffer("width", like.new_ones(size))
        with torch.no_grad():
            spread = self.law().moments[1].diagonal(dim1=-2, dim2=-1)[1:].flatten(0, -2).mean(0).sqrt()
            self.width.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    # ------------------------------------------------------------------------------------------- the law

    @property
    def exact(self) -> bool:
        """Whether the prior's drift is affine, so that everything is in closed form."""
        return isinstance(self.prior.sde.drift, AffineDrift)

    def prepare(self) -> Prepared:
        """Return what depends on the prior alone; as long as nothing in the prior changes, it is computed once."""
        tensors = [*self.prior.parameters(), *self.prior.buffers(), self.ts]
        key = (torch.is_grad_enabled(), [(id(x), x._version, x.device, x.dtype) for x in tensors])
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        noise = self.prior.sde.noise.steps(self.ts, dtype=self.offset.dtype)
        found = Prepared(noise, self._start_prior(), self._linear_steps(noise) if self.exact else None)
        self._kept = None if found.requires_grad else (key, found)
        return found

    def _linear_steps(self, noise: NoiseSteps) -> LinearSteps:
        ts = self.ts
        point = self._start_prior().origin[..., : self.dim]
        coefficient = self.prior.sde.diffusion(ts[0].to(point), point)
        matrix, offset = self._affine()
        return affine_steps(noise, coefficient, (ts[1:] - ts[:-1]).to(point.dtype), matrix, offset)

    def _affine(self) -> tuple[Tensor, Tensor]:
        drift = self.prior.sde.drift
        if isinstance(drift, AffineDrift):
            return cast(Tensor, drift.matrix)[None], cast(Tensor, drift.offset)[None]
        assert self.drift_matrix is not None and self.drift_offset is not None
        return self.drift_matrix, self.drift_offset

    def law(self, prepared: Prepared | None = None) -> FeedbackLaw:
        """Return the Gaussian law with the present parameters."""
        known = self.prepare() if prepared is None else prepared
        start = known.start
        steps = self._linear_steps(known.noise) if known.steps is None else known.steps
        lead = len(self.batch_shape)
        steps = LinearSteps(
            *(
                _with_batch(x, lead, event)
                for x, event in ((steps.transition, 2), (steps.load, 2), (steps.offset, 1))
            )
        )
        factor = torch.diag_embed(self.log_diagonal.exp())
        if self.lower is not None:
            factor = factor + self.lower.tril(-1)
        if self.start_mean is not None and self.start_log_diagonal is not None:
            assert self.start_lower is not None
            chol = torch.diag_embed(self.start_log_diagonal.exp()) + self.start_lower.tril(-1)
            start = LiftedStart(
                start.origin, start.lift, self.start_mean, chol, start.prior_mean, start.prior_precision
            )
        return FeedbackLaw(steps, LinearFeedback(self.offset, self.gain / self.width, factor), start)

    @property
    def mean(self) -> Tensor:
        """Posterior means of the path, ``(*B, T, d)``."""
        return self.law().moments[0][..., : self.dim].movedim(0, -2)

    @property
    def variance(self) -> Tensor:
        """Posterior variances of the path, ``(*B, T, d)``."""
        cov = self.law().moments[1]
        return cov.diagonal(dim1=-2, dim2=-1)[..., : self.dim].movedim(0, -2)

    # ------------------------------------------------------------------------------------ the divergence

    def divergence(self, num_particles: int = 8, generator: torch.Generator | int | None = None) -> Tensor:
        """Return KL(Q || P) of paths, ``(*B)``: exact for an affine drift, else unbiased."""
        known = self.prepare()
        law = self.law(known)
        if self.exact:
            return law.divergence()
        return self.estimate_divergence(
            law, known.noise, law.draw(num_particles, as_generator(generator, self.ts.device))
        )

    def estimate_divergence(self, law: FeedbackLaw, noise: NoiseSteps, draws: FeedbackDraws) -> Tensor:
        """Return the closed form, plus the mean over draws of what the nonlinear drift adds."""
        extra = self._shift(noise, draws).increments
        pull = law.increments(draws)[1]
        # E|pull + extra|^2 / 2 - E|pull|^2 / 2: the increments' own noise is independent of both
        correction = (extra * (pull + 0.5 * extra)).sum(-2).sum(0)
        return law.divergence() + correction.mean(-1)

    def _shift(self, noise: NoiseSteps, draws: FeedbackDraws) -> Shift:
        matrix, offset = self._affine()
        return shift_of(self.prior.sde, self.ts, noise, draws.z, matrix, offset, self.dim)

    def sample(self, n: int, generator: torch.Generator | int | None = None) -> tuple[PathSample, Tensor]:
        """Draw ``n`` paths with their exact log density ratios.

        Returns:
            A path sample of shape ``(n, *B)``, with the increments and memory that P needs for it (so that it
            can be continued), and ``log p - log q (n, *B)`` on these paths.
        """
        check_positive_int(n, "n")
        known = self.prepare()
        noise, law = known.noise, self.law(known)
        draws = law.draw(n, as_generator(generator, self.ts.device))
        e, _ = law.increments(draws)
        z = draws.z
        if not self.exact:
            shift = self._shift(noise, draws)
            e = e + shift.increments
            z = torch.cat([z[..., : self.dim, :], z[..., self.dim :, :] + shift.memory], -2)
        log_det = law.feedback.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).sum(0)
        log_ratio = 0.5 * (draws.noise.square() - e.square()).sum(-2).sum(0) + log_det.unsqueeze(-1)
        log_ratio = log_ratio - law.start.log_ratio(draws.start_noise)
        return self._path(noise, z, e), log_ratio.movedim(-1, 0)

    def _path(self, noise: NoiseSteps, z: Tensor, e: Tensor) -> PathSample:
        """Bring columns ``(T, *B, Z, S)`` and standardised increments ``(N, *B, M, S)`` into a sample."""
        z, e = z.movedim(-1, 0).movedim(1, -2), e.movedim(-1, 0).movedim(1, -2)  # (S, *B, time, .)
        channels = e.shape[-1] // noise.variance.shape[1]
        scale = by_column(noise.variance.sqrt()[:, None, :].expand(-1, channels, -1))
        dw = e * scale
        aux = {}
        if noise.load.shape[-1]:
            aux["memory"] = z[..., self.dim :].unflatten(-1, (channels, -1))
        if e.shape[-1] > channels:
            aux["residual"] = dw[..., channels:]
        return PathSample(self.ts, z[..., : self.dim], dw[..., :channels], aux)

    # --------------------------------------------------------------------------------------- where to start

    def linearise(self, likelihood: Callable[[PathSample, Any], Tensor], batch: Any = None) -> None:
        """Set the parameters to the posterior of the model linearised around its most probable path.

        For an affine drift and Gaussian observations this is the exact posterior.

        Args:
            likelihood: The function from a :class:`PathSample` (and ``batch``) to log-likelihoods, one for each path.
            batch: The data that are handed to the likelihood.

        Raises:
            NonFiniteError: If the path without noise has no finite likelihood.
        """
        from stochdyn.fractional.latent.gaussian_start import set_linearised

        check_callable(likelihood, "likelihood", "a function of a path and a batch")
        set_linearised(self, likelihood, batch)

    # -------------------------------------------------------------------------------------------- the start

    def _start_prior(self) -> LiftedStart:
        """Return the law of the start under P, as its own posterior."""
        initial, sde = self.prior.initial, self.prior.sde
        ts = self.ts
        if isinstance(initial, FixedStart):
            point, mean, precision = initial.point, None, None
        else:
            law = cast(DistributionStart, initial).distribution
            mean, precision = _gaussian(law)
            point = torch.zeros_like(mean)
        channels = sde.noise_dim(ts[0].to(point), point)
        dim, states = point.shape[-1], channels * sde.noise.num_states
        origin = torch.nn.functional.pad(point, (0, states))
        factor = sde.noise.initial_factor(dtype=point.dtype, device=point.device)
        width = dim if mean is not None else 0
        past = 0 if factor is None else channels * factor.shape[0]
        lift = start_lift(point, dim + states, width, factor, channels)
        start = point.new_zeros(*point.shape[:-1], past)
        center = start if mean is None else torch.cat([mean, start], -1)
        total = torch.eye(width + past, dtype=point.dtype, device=point.device)
        if precision is not None:
            total = total.expand(*precision.shape[:-2], -1, -1).clone()
            total[..., :width, :width] = precision
        return LiftedStart.of_prior(origin, lift, center, total)

    def _check_prior(self) -> None:
        sde, initial = self.prior.sde, self.prior.initial
        if sde.control is not None or sde.state_dependent:
            raise InvalidInputError(
                "a Gaussian posterior needs a constant diffusion and no control of the prior",
                hint="map the state to one with constant noise, or take a simulated posterior",
            )
        if isinstance(initial, DistributionStart):
            _gaussian(initial.distribution)
        elif not isinstance(initial, FixedStart):
            raise InvalidInputError(
                "a Gaussian posterior needs a fixed or Gaussian start", got=type(initial).__name__
            )


def _with_batch(x: Tensor, lead: int, event: int) -> Tensor:
    """Give ``x (N, *b, ...)`` at least ``lead`` batch axes."""
    missing = lead - (x.ndim - 1 - event)
    return x if missing <= 0 else x.reshape(x.shape[0], *(1,) * missing, *x.shape[1:])


def _gaussian(law: Any) -> tuple[Tensor, Tensor]:
    """Return mean and precision of a normal law on vectors."""
    base = law
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if isinstance(base, torch.distributions.MultivariateNormal):
        return base.loc, base.precision_matrix
    if isinstance(base, torch.distributions.Normal):
        return base.loc, torch.diag_embed(base.scale**-2)
    raise InvalidInputError(
        "a Gaussian posterior needs a fixed or Gaussian start", got=type(base).__name__, expected="Normal"
    )
