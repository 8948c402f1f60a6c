"""The fractional Ornstein-Uhlenbeck process as a Gaussian law on paths."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from stochdyn._checks import (
    as_tensor,
    check_choice,
    check_finite,
    check_hurst,
    check_positive,
    check_real,
    check_type,
)
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.core.gaussian.law import GaussianPathMeasure
from stochdyn.core.gaussian.observations import Observations
from stochdyn.core.gaussian.recursion import broadcast_batches
from stochdyn.core.gaussian.transition import distinct_steps
from stochdyn.errors import (
    ApproximationWarning,
    DiffusionMismatchError,
    InvalidInputError,
    TimeGridError,
    UnavailableError,
)
from stochdyn.fractional.noise._augmented import (
    euler_step,
    exact_step,
    prior_state_covariance,
    stationary_covariance,
)
from stochdyn.fractional.noise.markov import MarkovNoise

__all__ = ["FractionalOU"]

# Of the default noise: speeds per decade, the decades that grids usually have between step and span, and the most decades beyond
# these on either side. With three a decade it changes the evidence by less than 1e-3 nats where in a decade they lie.
_PER_DECADE, _USUAL, _MOST = 3, 3, 14.0
Start = Tensor | float | Normal | Literal["stationary"] | None


class FractionalOU(GaussianPathMeasure):
    r"""The fractional Ornstein-Uhlenbeck process, through Markov-approximate fractional Brownian motion.

    .. math:: dX=-\theta(X-\mu)\,dt+\sigma\,dB^H.

    With memory states the process is linear and Gaussian, so its moments, the evidence of noisy observations
    and the posterior path are exact for the approximating process: the only error is that of the noise, which
    ``noise.relative_error`` measures. All results are differentiable in all parameters and in the times, computed in
    float64 and returned in the precision of the times.

    Observed series are ``y (*B, T)``, one value per time. A path has one component, ``x (*sample, *B, T, 1)``.

    Args:
        rate: The mean reversion :math:`\theta\ge0`, in 1/time; zero is fractional Brownian motion.
        mean: The level :math:`\mu`, in units of X.
        scale: The strength :math:`\sigma>0` of the noise, in units of X per unit time to the power H.
        hurst: Hurst index in (0, 1). Parameters are numbers or tensors that broadcast to ``(*B)``.
        noise: The :class:`MarkovNoise` to use; its Hurst index must be ``hurst``. By default type I, built for
            the powers of ten around span and shortest step of the times asked for, with three speeds per decade.
        initial: X at ``start_time``: a number or tensor, a ``Normal`` law, ``"stationary"`` (jointly with the
            memory states; type I and a positive rate only), or by default the mean.
        start_time: The time at which process and noise start; no time may lie before it. By default the first time asked
            for if the start is stationary, otherwise 0.
        method: How the process steps: ``"exact"``, or ``"euler"`` for the law of the Euler scheme on the grid given (what
            :class:`~stochdyn.SDE` simulates there): the oracle for inference on such a grid.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).
        InvalidInputError: For a negative rate, a scale that isn't positive, or noise that doesn't fit.

    Example:
        >>> ou = FractionalOU(rate=1.0, mean=0.0, scale=1.0, hurst=0.7)
        >>> times = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
        >>> y = torch.tensor([0.3, -0.1, 0.4, 0.8, 0.5], dtype=torch.float64)
        >>> round(float(ou.log_evidence(times, y, obs_scale=0.1)), 2)
        -2.35

    Reference:
        P. Cheridito, H. Kawaguchi and M. Maejima, Electron. J. Probab. 8, 2003; R. Daems et al., ICLR 2024.
    """

    _rate: Tensor
    _mean: Tensor
    _scale: Tensor
    _hurst: Tensor
    _initial_mean: Tensor | None
    _initial_scale: Tensor | None

    def __init__(
        self,
        rate: Tensor | float,
        mean: Tensor | float,
        scale: Tensor | float,
        hurst: Tensor | float,
        noise: MarkovNoise | None = None,
        *,
        initial: Start = None,
        start_time: float | None = None,
        method: Literal["exact", "euler"] = "exact",
    ) -> None:
        super().__init__()
        double = torch.zeros((), dtype=torch.float64)
        given = {"rate": rate, "mean": mean, "scale": scale, "hurst": hurst}
        values = {name: as_tensor(value, name, like=double) for name, value in given.items()}
        if bool((values["rate"].detach() < 0).any()):
            raise InvalidInputError("rate must not be negative", got=values["rate"].tolist())
        check_positive(values["scale"].detach(), "scale")
        check_hurst(values["hurst"])
        check_choice(method, ("exact", "euler"), "method")
        for name, value in values.items():
            # Noise that is given has its own Hurst index, which may be learnt.
            self._hold(name, value.detach() if name == "hurst" and noise is not None else value)
        if noise is not None:
            check_type(noise, MarkovNoise, "noise", "Brownian motion is MarkovNoise(0.5, speeds=[0.0])")
            theirs, mine = noise.hurst.detach().to(torch.float64), values["hurst"].detach().to(torch.float64)
            if theirs.numel() != mine.numel() or not torch.allclose(
                theirs.flatten().cpu(), mine.flatten().cpu(), rtol=0.0, atol=1e-6
            ):
                raise InvalidInputError(
                    "hurst and the Hurst index of noise must agree",
                    got=f"{values['hurst'].tolist()} and {noise.hurst.tolist()}",
                    hint="pass hurst=noise.hurst",
                )
        self.noise, self.method = noise, method
        self.stationary = isinstance(initial, str)
        self._take_initial(initial)
        if start_time is not None:
            check_real(start_time, "start_time", fixed=True)
        self.start_time = None if start_time is None else float(start_time)
        self.dim = 1
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        for name in ("initial_mean", "initial_scale"):
            value = getattr(self, f"_{name}")
            shapes[name] = () if value is None else tuple(value.shape)
        self.batch_shape = broadcast_batches(shapes)

    def _hold(self, name: str, value: Tensor | None) -> None:
        if isinstance(value, nn.Parameter):
            self.register_parameter(f"_{name}", value)
        else:
            copy = value if value is None or value.requires_grad else value.detach().clone()
            self.register_buffer(f"_{name}", copy)

    def _take_initial(self, initial: Start) -> None:
        """Check the start and keep its mean and standard deviation, None for the level and for a fixed one."""
        mean: Tensor | None = None
        spread: Tensor | None = None
        if isinstance(initial, str):
            check_choice(initial, ("stationary",), "initial")
            if self.noise is not None and self.noise.kind != "I":
                raise InvalidInputError(
                    "a stationary start needs noise with stationary increments",
                    got=f"noise of type {self.noise.kind}",
                    hint="build it with kind='I'",
                )
            check_positive(self._rate.detach(), "rate")
        elif isinstance(initial, Normal):
            mean, spread = initial.loc, initial.scale
        elif initial is not None:
            mean = as_tensor(initial, "initial", like=torch.zeros((), dtype=torch.float64))
        if mean is not None:
            check_finite(mean.detach(), "initial")
        self._hold("initial_mean", mean)
        self._hold("initial_scale", spread)

    @property
    def rate(self) -> Tensor:
        """The mean reversion, ``(*B)``."""
        return self._rate

    @property
    def level(self) -> Tensor:
        """The mean to which the process reverts, ``(*B)``."""
        return self._mean

    @property
    def scale(self) -> Tensor:
        """The strength of the noise, ``(*B)``."""
        return self._scale

    @property
    def hurst(self) -> Tensor:
        """The Hurst index, ``(*B)``."""
        return self._hurst if self.noise is None else self.noise.hurst

    @property
    def like(self) -> Tensor:
        """The rate, whose device the law lives on."""
        return self._rate

    def dtype_at(self, ts: Tensor) -> torch.dtype:
        """Return the precision of the times."""
        return ts.dtype

    def read(self) -> tuple[Tensor | None, Tensor | None]:
        """The path is the first state of the chain, beside the level."""
        states = self.noise.num_states if self.noise is not None else self._reach()[2]
        emission = torch.zeros(1, states + 1, dtype=torch.float64, device=self.like.device)
        emission[0, 0] = 1.0
        return emission, self._mean.to(torch.float64)[..., None]

    # ------------------------------------------------------------------------------------ the chain

    def chain(self, ts: Tensor) -> GaussianChain:
        """Return the chain of X less its level and of the memory states, scaled to variance one, at times ``ts (T,)``."""
        t = ts.to(torch.float64)
        origin = self._start(t)
        noise = self._noise(t, origin)
        if float(t[-1].detach()) - float(origin) > noise.horizon * (1 + 1e-9):
            raise TimeGridError(
                "ts is longer than the horizon of the noise",
                got=f"{float(t[-1].detach()) - float(origin):g}",
                expected=f"at most {noise.horizon:g}",
                hint="build the noise with a larger horizon",
            )
        mean, cov = self._initial(noise)
        if bool(t[0] > origin) or ts.requires_grad:
            # Up to the first time asked for.
            (first,), (spread,) = self._steps(noise, origin[None], t[:1])
            mean = (first @ mean.unsqueeze(-1)).squeeze(-1)
            cov = first @ cov @ first.mT + spread
        transition, noise_cov = self._steps(noise, t[:-1], t[1:])
        return GaussianChain(mean, cov, transition, torch.zeros_like(transition[..., 0]), noise_cov)

    def _start(self, t: Tensor) -> Tensor:
        """Return when the process starts, in float64."""
        if self.start_time is None and self.stationary:
            return t[0].detach()
        origin = t.new_full((), self.start_time or 0.0)
        if bool(t[0] < origin):
            raise TimeGridError(
                "times must not lie before the start of the process",
                got=f"{float(t[0].detach()):g}",
                expected=f"at least start_time={float(origin):g}",
                hint="set start_time, or initial='stationary'",
            )
        return origin

    def _noise(self, t: Tensor, origin: Tensor) -> MarkovNoise:
        if self.noise is not None:
            return self.noise
        gaps = torch.cat((t.detach()[:1] - origin, t.detach().diff()))
        gaps = gaps[gaps > 0]
        step, span = (1.0, 1.0) if not gaps.numel() else (float(gaps.min()), float(t[-1].detach() - origin))
        # Powers of ten, so that a few more times change nothing, and between them speeds are added at the ends and none moves.
        above, below = math.ceil(math.log10(span) - 1e-9), math.floor(math.log10(step) + 1e-9)
        slow, fast, count = self._reach()
        per_decade = min(_PER_DECADE, (count - 1) / ((slow + fast) / _PER_DECADE + above - below))
        lowest = -above - slow / _PER_DECADE
        speeds = 10.0 ** (lowest + torch.arange(count, dtype=torch.float64) / per_decade)
        with warnings.catch_warnings():
            # That many speeds are nearly dependent over the whole span; the shortest steps tell them apart.
            warnings.filterwarnings("ignore", "the speeds are nearly dependent", ApproximationWarning)
            return MarkovNoise(self._hurst, speeds=speeds, horizon=10.0**above, kind="I")

    def _reach(self) -> tuple[int, int, int]:
        """Return how many speeds lie below one per span and above one per step, and how many there are in all.

        What speeds beyond contribute falls off as the power 2H of the fast ones and 2 - 2H of the slow ones. The states step
        exactly, so fast ones cost no smaller steps.
        """
        hurst = self._hurst.detach()
        # Decades that leave 10^-2.5 of the variance, at either end.
        slow, fast = (
            math.ceil(_PER_DECADE * min(_MOST, 2.5 / max(share, 0.05)))
            for share in (1 - float(hurst.max()), float(hurst.min()))
        )
        return slow, fast, slow + fast + _PER_DECADE * _USUAL + 1

    def _parameters_of(self, noise: MarkovNoise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rate and scale ``(*b)``, speeds ``(K,)`` and weights ``(*b, K)``."""
        device = self.like.device
        gamma, w = noise.speeds.to(device), noise.weights.to(device)
        theta, scale = self._rate.to(torch.float64), self._scale.to(torch.float64)
        batch = torch.broadcast_shapes(theta.shape, scale.shape, w.shape[:-1])
        return theta.expand(batch), scale.expand(batch), gamma, w.expand(*batch, w.shape[-1])

    def _steps(self, noise: MarkovNoise, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """Return transition matrices and noise covariances of the steps, ``(N, *b, K+1, K+1)``."""
        theta, scale, gamma, w = self._parameters_of(noise)
        dt, where = distinct_steps(start, stop)
        if not dt.numel():
            none = w.new_zeros(0, *w.shape[:-1], w.shape[-1] + 1, w.shape[-1] + 1)
            return none, none
        if self.method == "exact":
            transition, noise_cov = exact_step(dt, theta, scale, gamma, w)
        else:
            grid = torch.cat((dt.new_zeros(1), dt.detach().cumsum(0)))
            steps = noise.steps(
                grid * (noise.horizon / max(float(grid[-1]), noise.horizon)), dtype=torch.float64
            )
            gain, recall = (
                c.expand(dt.shape[0], *w.shape[:-1], c.shape[-1]) for c in (steps.gain, steps.recall)
            )
            transition, noise_cov = euler_step(dt, theta, scale, gamma, gain, recall, steps.load)
        return (transition, noise_cov) if where is None else (transition[where], noise_cov[where])

    def _initial(self, noise: MarkovNoise) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of (X - level, scaled states) at the start."""
        theta, scale, gamma, w = self._parameters_of(noise)
        k = gamma.shape[0]
        # The means carry all batch axes, so that series that share a covariance are still drawn independently.
        mean = gamma.new_zeros(*self.batch_shape, k + 1)
        if self.stationary:
            return mean, stationary_covariance(theta, scale, gamma, w)
        # A given start is independent of the memory, which is zero (II) or stationary (I), and 1 / (g_i + g_j) is the covariance then.
        cov = gamma.new_zeros(k + 1, k + 1)
        if noise.kind == "I":
            cov[1:, 1:] = prior_state_covariance(gamma)
        corner = gamma.new_zeros(k + 1)
        corner[0] = 1.0
        if self._initial_scale is not None:
            cov = cov + self._initial_scale.to(mean).square()[..., None, None] * torch.outer(corner, corner)
        if self._initial_mean is not None:
            gap = self._initial_mean.to(mean) - self._mean.to(torch.float64)
            mean = mean + gap[..., None] * corner
        return mean, cov

    # ------------------------------------------------------------------------- what the law consumes

    def certain(self, chain: GaussianChain, ts: Tensor) -> Tensor:
        """Return ``(T, *b)``, True where X is known: at a fixed start."""
        fixed = chain.initial_cov[..., 0, 0] == 0
        out = torch.zeros(ts.shape[0], *fixed.shape, dtype=torch.bool, device=fixed.device)
        out[0] = fixed
        return out

    def observations(
        self, times: object, y: object, obs_scale: object, emission: object, mask: object
    ) -> Observations:
        """Take series ``y (*B, T)`` where no emission says otherwise, in any precision."""
        like = torch.zeros((), dtype=torch.float64, device=self.like.device)
        y = as_tensor(y, "y", like=like, finite=False).to(torch.float64)
        scale = as_tensor(obs_scale, "obs_scale", like=like).to(torch.float64)
        if emission is None:
            y = y.unsqueeze(-1)
            scale = scale.unsqueeze(-1) if scale.ndim else scale
        else:
            emission = as_tensor(emission, "emission", like=like).to(torch.float64)
        return super().observations(times, y, scale, emission, mask)

    def _state_like(self, times: object) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.like.device)

    def check_comparable(self, other: GaussianPathMeasure, ts: Tensor) -> None:
        """Raise unless the noises of both laws agree; see :meth:`GaussianPathMeasure.check_comparable`."""
        super().check_comparable(other, ts)
        if not isinstance(other, FractionalOU):
            raise UnavailableError("the density of a fractional process is known against another one alone")
        for name in ("scale", "hurst"):
            mine, theirs = (law.get_buffer_or_parameter(name).to(torch.float64) for law in (self, other))
            if bool(((mine - theirs).abs() > 1e-12 * mine.abs()).any()):
                raise DiffusionMismatchError(
                    f"the laws differ in their {name}, so they are mutually singular",
                    got=f"{mine.tolist()} and {theirs.tolist()}",
                )

    def get_buffer_or_parameter(self, name: str) -> Tensor:
        """Return the parameter of the process called ``name``."""
        value = getattr(self, f"_{name}")
        assert isinstance(value, Tensor)
        return value
