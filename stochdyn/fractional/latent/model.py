"""LatentSDE: series explained by a latent neural SDE with fractional noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stochdyn._checks import check_choice, check_positive_int, check_time_grid
from stochdyn.core.gaussian.affine import by_column
from stochdyn.core.networks import MLP, StateNetwork
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.noise import Brownian, NoiseProcess, NoiseSteps
from stochdyn.errors import InvalidInputError
from stochdyn.fractional._options import check_unused
from stochdyn.fractional.latent.base import LatentPosterior
from stochdyn.fractional.latent.control import ControlPosterior
from stochdyn.fractional.latent.encoded import AmortisedGaussianPosterior
from stochdyn.fractional.latent.matching import MatchingPosterior, check_brownian
from stochdyn.fractional.latent.networks import (
    ConstantDiffusion,
    GaussianDecoder,
    StateDiffusion,
    interpolate,
)
from stochdyn.fractional.latent.series import Series
from stochdyn.fractional.latent.series_encoder import SeriesEncoder
from stochdyn.fractional.noise.markov import MarkovNoise
from stochdyn.objectives.base import Objective, ObjectiveValue

if TYPE_CHECKING:
    from stochdyn.fractional.latent.path_law import LatentPathLaw

__all__ = ["LatentSDE"]

PosteriorKind = Literal["control", "tight", "gaussian", "matching"]
_PRIOR_PATHS = 64


class LatentSDE(Objective):
    r"""Series as noisy functions of a latent path with a learnt equation.

    .. math::
        dX=b(X)\,dt+\sigma(X)\,dB^H,\qquad X_{t_0}\sim N(\mu_0,\sigma_0^2),\qquad y_i\sim N(f(X_{t_i}),s^2).

    As an objective its loss is minus the evidence lower bound, averaged over the series of a :class:`Series`
    batch: ``sd.fit(model, series, batch_size=32)`` trains equation, decoder, Hurst indices and posterior together.

    The posterior is one of

    - ``"control"``: the paper's. A network controls the Brownian increments, which keep their variance. Simulated.
    - ``"tight"``: all innovations get means, and a covariance for every step, so that the bound doesn't pay for the
      time step. Simulated.
    - ``"gaussian"``: linear feedback on a linear equation; parallel over time. Needs a constant diffusion.
    - ``"matching"``: Gaussian marginals, for Brownian noise alone; the cost of a step doesn't grow with the grid.

    Args:
        obs_dim: ``p``, components of an observation.
        latent_dim: ``d``, components of the path; each has noise of its own.
        ts: ``(T,)`` grid of the latent path. All series must lie on it.
        posterior: which of the posteriors above.
        hurst: where the Hurst indices start (a number, or one for each component), or None for Brownian noise.
        learn_hurst: whether they are parameters, by default yes.
        noise: a noise process instead, such as :class:`MultifractionalNoise`; without the options of the built-in one.
        kind: ``"II"`` for noise that starts with the grid, or ``"I"`` for stationary increments.
        num_states: memory states per component; by default as many as :class:`MarkovNoise` takes, so that learnt Hurst
            indices aren't biased.
        drift: hidden widths of the drift network, or a function ``(t, x)``.
        diffusion: ``"constant"`` or ``"state"`` (each component sees its own state), learnt both; or anything that
            :class:`~stochdyn.SDE` takes.
        decoder: hidden widths of the network f (empty for a linear map), or a function from ``(..., d)`` to ``(..., p)``.
        obs_scale: where s starts.
        learn_obs_scale: whether it is a parameter.
        context: size of the encoder's summary.
        hidden: hidden widths of the posterior's network, by default (64, 64); not for ``"gaussian"``, which has none.
        num_particles: draws per series (for ``"matching"``, random times per series).
        method: solver of simulated paths (``"control"`` and ``"tight"``), by default ``"euler"``;
            with a state-dependent diffusion ``"heun"`` and ``"milstein"`` apply the Itô
            correction of the noise.
        checkpoint: whether to recompute segments of simulated paths in back-propagation, to save memory.

    Attributes:
        sde: the equation. ts: the grid. encoder, decoder, posterior: the parts.

    Raises:
        InvalidInputError: for parts that don't fit each other.
        TimeGridError: in use, if a series reaches beyond the grid.

    Example:
        >>> ts = torch.linspace(0, 1, 21)
        >>> model = LatentSDE(1, 2, ts, hurst=0.7, drift=(8,), hidden=(8,), context=8)
        >>> series = Series.regular(ts[::4], torch.randn(5, 6, 1))
        >>> model(series).bound
        'evidence_lower'

    Reference:
        R. Daems, M. Opper, G. Crevecoeur and T. Birdal, ICLR 2024; X. Li, T.-K. L. Wong, R. T. Q. Chen and D. Duvenaud,
        Scalable gradients for stochastic differential equations, 2020.
    """

    ts: Tensor
    width: Tensor

    def __init__(
        self,
        obs_dim: int,
        latent_dim: int,
        ts: Tensor,
        *,
        posterior: PosteriorKind = "tight",
        hurst: float | Tensor | None = 0.5,
        learn_hurst: bool | None = None,
        noise: NoiseProcess | None = None,
        kind: Literal["I", "II"] | None = None,
        num_states: int | None = None,
        drift: Sequence[int] | Callable[[Tensor, Tensor], Tensor] = (64, 64),
        diffusion: Any = "constant",
        decoder: Sequence[int] | Callable[[Tensor], Tensor] = (),
        obs_scale: float = 0.1,
        learn_obs_scale: bool = True,
        context: int = 64,
        hidden: Sequence[int] | None = None,
        num_particles: int = 1,
        method: str | None = None,
        checkpoint: bool | int | None = None,
    ) -> None:
        super().__init__()
        check_time_grid(ts)
        for name, value in (
            ("obs_dim", obs_dim),
            ("latent_dim", latent_dim),
            ("num_particles", num_particles),
        ):
            check_positive_int(value, name)
        check_choice(posterior, ("control", "tight", "gaussian", "matching"), "posterior")
        if posterior in ("gaussian", "matching"):
            check_unused({"method": method, "checkpoint": checkpoint}, f"posterior={posterior!r}")
        if posterior == "gaussian":
            check_unused({"hidden": hidden}, "posterior='gaussian'")
        about_noise = {"learn_hurst": learn_hurst, "kind": kind, "num_states": num_states}
        if noise is not None:
            check_unused(about_noise, "noise of its own")
        elif hurst is None:
            check_unused(about_noise, "hurst=None, which is Brownian noise")
        hidden = (64, 64) if hidden is None else hidden
        for name, given in (("drift", drift), ("decoder", decoder)):
            if not callable(given) and not isinstance(given, tuple | list):
                raise InvalidInputError(f"{name} must be hidden widths or a function", got=repr(given)[:60])
        self.dim, self.obs_dim, self.num_particles = latent_dim, obs_dim, num_particles
        self.method = "euler" if method is None else method
        self.register_buffer("ts", ts)
        span = float(ts[-1] - ts[0])
        if noise is None:
            noise = Brownian()
            if hurst is not None:
                index = torch.as_tensor(hurst, dtype=torch.get_default_dtype()).expand(latent_dim).clone()
                # short steps matter, a single one that is far shorter than the others doesn't
                dt = float((ts[1:] - ts[:-1]).double().quantile(0.1))
                noise = MarkovNoise(
                    index,
                    num_states,
                    span,
                    dt,
                    kind=kind or "II",
                    learn_hurst=learn_hurst is not False,
                    per_channel=True,
                )
        field = drift if callable(drift) else StateNetwork(latent_dim, hidden=drift, time=False)
        named = {"constant": ConstantDiffusion, "state": StateDiffusion}
        strength = (
            named[diffusion](latent_dim) if isinstance(diffusion, str) and diffusion in named else diffusion
        )
        if isinstance(strength, str):
            check_choice(strength, tuple(named), "diffusion")
        self.sde = SDE(field, strength, noise)
        point = torch.zeros(latent_dim)
        if isinstance(self.sde.diffusion(ts[0].to(point), point), Matrix):
            raise InvalidInputError(
                "each latent component has noise of its own",
                got="a matrix diffusion",
                hint="give (d,) strengths, and let the decoder mix the components",
            )
        if (
            posterior == "gaussian"
            and not isinstance(strength, ConstantDiffusion)
            and self.sde.state_dependent
        ):
            raise InvalidInputError(
                "a Gaussian posterior needs a constant diffusion",
                got=f"diffusion={diffusion!r}",
                hint="diffusion='constant', or posterior='tight'",
            )
        if posterior == "matching":
            check_brownian(self.sde)
        mean = decoder if callable(decoder) else MLP((latent_dim, *decoder, obs_dim))
        self.decoder = GaussianDecoder(mean, obs_dim, obs_scale, learn_obs_scale)
        factor = noise.initial_factor(dtype=torch.get_default_dtype(), device=ts.device)
        self._past = 0 if factor is None else factor.shape[0]
        self.start_mean = nn.Parameter(torch.zeros(latent_dim))
        self.start_log_scale = nn.Parameter(torch.zeros(latent_dim))
        if posterior != "matching":  # which reads its start off its own marginals
            self.encoder = SeriesEncoder(obs_dim, context, span)
            self.start_head = nn.Linear(self.encoder.width, 2 * latent_dim * (1 + self._past))
            nn.init.zeros_(self.start_head.weight)
            nn.init.zeros_(self.start_head.bias)
        self.posterior = self._make_posterior(posterior, context, hidden, checkpoint or False)
        self.register_buffer("width", torch.ones(latent_dim * (1 + noise.num_states)))
        self._measure_width()

    def _make_posterior(
        self, posterior: str, context: int, hidden: Sequence[int], checkpoint: bool | int
    ) -> LatentPosterior:
        d, noise = self.dim, self.sde.noise
        if posterior == "matching":
            return MatchingPosterior(self.obs_dim, d, float(self.ts[-1] - self.ts[0]), context, hidden)
        innovations, seen = noise.num_innovations(self.ts), self.encoder.width
        if posterior == "gaussian":
            return AmortisedGaussianPosterior(d, innovations, noise.num_states, seen)
        size = d * (1 + noise.num_states)
        return ControlPosterior(size, d, innovations, seen, hidden, posterior == "tight", checkpoint)

    @torch.no_grad()
    def _measure_width(self) -> None:
        """Note the spread of the memory states under the prior, the scale in which networks see them."""
        states = self.sde.noise.num_states
        if not states:
            return
        steps = self.sde.noise.steps(self.ts, dtype=torch.get_default_dtype())
        variance = steps.load.new_zeros(states)
        total = torch.zeros_like(variance)
        for n in range(steps.load.shape[0]):
            variance = steps.decay[n] ** 2 * variance + (steps.load[n] ** 2 * steps.variance[n][:, None]).sum(
                0
            )
            total = total + variance
        factor = self.sde.noise.initial_factor(dtype=variance.dtype, device=variance.device)
        start = 0.0 if factor is None else factor.square().sum(0)
        spread = (total / steps.load.shape[0] + start).sqrt()
        self.width[self.dim :] = spread.repeat(self.dim)

    # --------------------------------------------------------------------------------------------- the prior

    @property
    def hurst(self) -> Tensor | None:
        """Hurst indices ``(d,)`` (of a :class:`MarkovNoise`), or None."""
        return self.sde.noise.hurst if isinstance(self.sde.noise, MarkovNoise) else None

    def noise_steps(self) -> NoiseSteps:
        """Return the steps of the noise on the grid."""
        return self.sde.noise.steps(self.ts, dtype=self.start_mean.dtype)

    def strength(self) -> Tensor:
        """Return the diffusion of each component at the origin ``(d,)``, which is the diffusion where it is constant."""
        point = self.start_mean
        return self.sde.diffusion(self.ts[0].to(point), point).apply(torch.ones_like(point))

    def increment_scale(self) -> Tensor:
        """Return prior standard deviations ``(N, d R)`` of the increments."""
        steps = self.noise_steps()
        return by_column(steps.variance.detach().sqrt()[:, None, :].expand(-1, self.dim, -1))

    def start_prior(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``(D,)`` of the start: the state, then the normals of the noise's past."""
        past = self.dim * self._past
        mean = torch.nn.functional.pad(self.start_mean, (0, past))
        return mean, torch.nn.functional.pad(self.start_log_scale.exp(), (0, past), value=1.0)

    def split_start(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return state ``(..., d)`` and memory ``(..., d, K)`` of a start ``(..., D)``."""
        if not self._past:
            return value, None
        factor = self.sde.noise.initial_factor(dtype=value.dtype, device=value.device)
        assert factor is not None
        return value[..., : self.dim], value[..., self.dim :].unflatten(-1, (self.dim, -1)) @ factor

    def log_likelihood(self, x: Tensor, series: Series) -> Tensor:
        """Return log densities ``(S, B)`` of the observations given paths ``(S, B, T, d)``."""
        return self.decoder.log_prob(interpolate(x.movedim(-2, 0), self.ts, series.times), series).sum(0)

    # --------------------------------------------------------------------------------------------- the bound

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate minus the bound, averaged over the series of the ``batch`` (a :class:`Series`)."""
        self._check(batch)
        bound = self.posterior.bound(self, batch, self.num_particles)
        loss = bound.divergence.mean() - bound.log_likelihood.mean()
        reported = bound.divergence if bound.log_ratio is None else -bound.log_ratio
        fit = bound.log_likelihood.detach().mean()
        terms = {
            "elbo": fit - reported.detach().mean(),
            "log_likelihood": fit,
            "kl": reported.detach().mean(),
        }
        return ObjectiveValue(loss, terms, "evidence_lower")

    def path_law(self, series: Series) -> LatentPathLaw:
        """Return the posterior law of the latent path of every series, with ``sample`` and ``marginal``.

        Args:
            series: the B series on which the paths are conditioned.

        Raises:
            InvalidInputError: if the series don't fit the model.
            TimeGridError: if they reach beyond its grid.
        """
        from stochdyn.fractional.latent.path_law import LatentPathLaw

        return LatentPathLaw(self, series)

    def _check(self, batch: Any) -> None:
        if not isinstance(batch, Series):
            raise InvalidInputError(
                "a LatentSDE takes a Series", got=type(batch).__name__, hint="Series.of, or Series.regular"
            )
        if batch.values.shape[-1] != self.obs_dim:
            raise InvalidInputError(
                "series have the wrong number of components",
                got=batch.values.shape[-1],
                expected=self.obs_dim,
            )
        batch.check_within(self.ts)
