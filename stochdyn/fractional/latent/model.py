"""LatentSDE: series explained by a latent neural SDE with fractional noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stochdyn._checks import as_time_grid, check_choice, check_positive, check_positive_int
from stochdyn.core.gaussian.affine import by_column
from stochdyn.core.networks import MLP
from stochdyn.core.sde.coefficients import Coefficient, Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.noise import NoiseProcess, NoiseSteps
from stochdyn.errors import InvalidInputError
from stochdyn.fractional.latent.methods import PosteriorMethod, as_posterior_method
from stochdyn.fractional.latent.networks import (
    ConstantDiffusion,
    GaussianDecoder,
    StateDiffusion,
    StateDrift,
    interpolate,
)
from stochdyn.fractional.latent.series import Series
from stochdyn.fractional.latent.units import DataUnits, InDataUnits
from stochdyn.fractional.noise.choice import FractionalNoise, as_noise
from stochdyn.fractional.noise.markov import MarkovNoise
from stochdyn.objectives.base import Objective, ObjectiveValue

if TYPE_CHECKING:
    from stochdyn.fractional.latent.path_law import LatentPathLaw

__all__ = ["LatentSDE"]

Drift = Callable[[Tensor, Tensor], Tensor]
_DIFFUSIONS = {"constant": ConstantDiffusion, "state": StateDiffusion}
_OBS_SCALE = 0.1


class LatentSDE(Objective):
    r"""Series as noisy functions of a latent path with a learnt equation.

    .. math::
        dX=b(X)\,dt+\sigma(X)\,dB^H,\qquad X_{t_0}\sim N(\mu_0,\sigma_0^2),\qquad y_i\sim N(f(X_{t_i}),s^2).

    What is learnt counts time in lengths of the grid and observations in standard deviations from their mean, so that neither the unit
    of time nor that of the data matters. The mean and the deviation of each component are taken from the first series that the model sees
    and stored with it. A decoder that is given as a function has states in units of its own: there it is best that the states have a
    scale of one.

    As an objective its loss is minus the evidence lower bound, averaged over the series of a :class:`Series`
    batch: ``sd.fit(model, series, batch_size=32)`` trains equation, decoder, Hurst indices and posterior together.

    Args:
        obs_dim: The number p of components of an observation.
        latent_dim: The number d of components of the path; each has noise of its own.
        ts: The grid ``(T,)`` of the latent path. All series must lie on it.
        noise: What drives the path: ``"fractional"``, with Hurst indices that are learnt from 1/2 on, one per component;
            ``"brownian"``; a :class:`FractionalNoise` with options of its own; or any noise process, such as
            :class:`MultifractionalNoise`.
        drift: The hidden widths of the drift network, or a function ``(t, x)``.
        diffusion: The strength of the noise: ``"constant"`` or ``"state"`` (each component sees its own state), both learnt; or anything that
            :class:`~stochdyn.SDE` takes.
        decoder: The hidden widths of the network f (empty for a linear map), a function from ``(..., d)`` to ``(..., p)``, or a
            :class:`GaussianDecoder` with an observation noise of its own.
        obs_scale: The standard deviation s at the start of training, in units of the observations; by default a tenth of their standard
            deviation. Not beside a :class:`GaussianDecoder`, which has its own.
        posterior: The family of posteriors, by name or as an object with its options: ``"tight"`` or :class:`TightMethod` when in doubt,
            ``"gaussian"`` or :class:`GaussianMethod` for speed where the diffusion is constant, ``"linearised"`` or
            :class:`LinearisedMethod` where the drift is nearly linear and indices matter, ``"matching"`` or :class:`MatchingMethod` for
            Brownian noise and long series, ``"control"`` or :class:`ControlMethod` to compare with published results.

    Attributes:
        sde: The equation.
        constant_diffusion: Whether the diffusion is the same at all states.
        ts: The grid.
        span: Its length, the unit of time of what is learnt.
        units: The units in which observations are counted.
        decoder: The law of the observations given the state.
        posterior: The posterior, with its encoder.

    Raises:
        InvalidInputError: If parts don't fit each other.
        TimeGridError: If the grid isn't one, or in use if a series reaches beyond it.
        HurstRangeError: If a Hurst index lies outside (0, 1).

    Example:
        >>> from stochdyn.fractional import FractionalNoise, TightMethod
        >>> ts = torch.linspace(0, 1, 21)
        >>> model = LatentSDE(
        ...     1, 2, ts, noise=FractionalNoise(0.7), drift=(8,), posterior=TightMethod(hidden=(8,), context=8)
        ... )
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
        noise: Literal["fractional", "brownian"] | FractionalNoise | NoiseProcess = "fractional",
        drift: Sequence[int] | Drift = (64, 64),
        diffusion: str | float | Tensor | Coefficient | Callable[..., Any] = "constant",
        decoder: Sequence[int] | Callable[[Tensor], Tensor] | GaussianDecoder = (),
        obs_scale: float | None = None,
        posterior: Literal["control", "tight", "gaussian", "linearised", "matching"]
        | PosteriorMethod = "tight",
    ) -> None:
        super().__init__()
        check_positive_int(obs_dim, "obs_dim")
        check_positive_int(latent_dim, "latent_dim")
        ts = as_time_grid(ts)
        method = as_posterior_method(posterior)
        for name, given in (("drift", drift), ("decoder", decoder)):
            if not callable(given) and not isinstance(given, tuple | list | GaussianDecoder):
                raise InvalidInputError(f"{name} must be hidden widths or a function", got=repr(given)[:60])
        self.dim, self.obs_dim = latent_dim, obs_dim
        self.register_buffer("ts", ts)
        # Short steps matter for the speeds of the memory; a single one that is far shorter than the others doesn't.
        dt = float((ts[1:] - ts[:-1]).double().quantile(0.1))
        self.span = float(ts[-1] - ts[0])
        process = as_noise(noise, self.span, dt, latent_dim)
        field = drift if callable(drift) else StateDrift(latent_dim, drift, self.span)
        if isinstance(diffusion, str):
            check_choice(diffusion, tuple(_DIFFUSIONS), "diffusion")
        strength: Any = diffusion
        if isinstance(diffusion, str):
            strength = _DIFFUSIONS[diffusion](latent_dim, noise=process, span=self.span)
        self.sde = SDE(field, strength, process)
        self.constant_diffusion = isinstance(strength, ConstantDiffusion) or not self.sde.state_dependent
        point = torch.zeros(latent_dim)
        if isinstance(self.sde.diffusion(ts[0].to(point), point), Matrix):
            raise InvalidInputError(
                "each latent component has noise of its own",
                got="a matrix diffusion",
                hint="give (d,) strengths, and let the decoder mix the components",
            )
        self.units = DataUnits(obs_dim)
        self.decoder = _as_decoder(decoder, latent_dim, obs_dim, obs_scale, self.units)
        factor = process.initial_factor(dtype=torch.get_default_dtype(), device=ts.device)
        self._past = 0 if factor is None else factor.shape[0]
        self.start_mean = nn.Parameter(torch.zeros(latent_dim))
        self.start_log_scale = nn.Parameter(torch.zeros(latent_dim))
        self.posterior = method.build(self)
        self.register_buffer("width", torch.ones(latent_dim * (1 + process.num_states)))
        self._measure_width()

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

    @property
    def start_size(self) -> int:
        """The number D of components of a start: the state, and normals that stand for the past of the noise."""
        return self.dim * (1 + self._past)

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
        self._admit(batch)
        bound = self.posterior.bound(self, batch)
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
            series: The B series on which the paths are conditioned.

        Raises:
            InvalidInputError: If the series don't fit the model.
            TimeGridError: If they reach beyond its grid.
        """
        from stochdyn.fractional.latent.path_law import LatentPathLaw

        return LatentPathLaw(self, series)

    def _admit(self, batch: Any) -> None:
        """Check series, and take the units of the data from the first ones."""
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
        self.units.observe(batch)


def _as_decoder(
    decoder: object, latent_dim: int, obs_dim: int, obs_scale: float | None, units: DataUnits
) -> GaussianDecoder:
    """Return the law of observations that hidden widths, a function or a decoder stand for."""
    if isinstance(decoder, GaussianDecoder):
        if obs_scale is not None:
            raise InvalidInputError(
                "obs_scale has no effect beside a GaussianDecoder", hint="give it to the decoder"
            )
        if decoder.obs_dim != obs_dim:
            raise InvalidInputError(
                "the decoder has the wrong number of components", got=decoder.obs_dim, expected=obs_dim
            )
        return decoder
    if obs_scale is not None:
        check_positive(obs_scale, "obs_scale")
    mean: Callable[[Tensor], Tensor]
    if callable(decoder):
        mean = decoder
    else:
        mean = InDataUnits(MLP((latent_dim, *decoder, obs_dim)), units)  # type: ignore[misc]
    made = GaussianDecoder(mean, obs_dim, _OBS_SCALE if obs_scale is None else obs_scale)
    if obs_scale is None:
        made.units = units
    return made
