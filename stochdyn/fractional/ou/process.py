"""The fractional Ornstein-Uhlenbeck process as a linear-Gaussian law: moments, evidence, posterior."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Normal

from stochdyn._checks import (
    check_choice,
    check_event_size,
    check_finite,
    check_hurst,
    check_ndim,
    check_positive,
    check_time_grid,
)
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.errors import InvalidInputError, TimeGridError
from stochdyn.fractional.noise._augmented import (
    euler_step,
    exact_step,
    prior_state_covariance,
    stationary_covariance,
)
from stochdyn.fractional.noise.markov import MarkovNoise
from stochdyn.fractional.ou.posterior import FractionalOUPosterior, Problem, joint_covariance

__all__ = ["FractionalOU", "FractionalOUPosterior"]

_DEFAULT_STATES = 24
Start = Tensor | float | Normal | Literal["stationary"] | None


class FractionalOU:
    r"""The fractional Ornstein-Uhlenbeck process, through Markov-approximate fractional Brownian motion.

    .. math:: dX=-\theta(X-\mu)\,dt+\sigma\,dB^H.

    With memory states the process is linear and Gaussian, so its moments, the evidence of noisy observations
    and the posterior path are exact for the approximating process: the only error is that of the noise, which
    ``noise.relative_error`` measures. All results are differentiable in all parameters, computed in float64
    and returned in the dtype of the data.

    Args:
        rate: mean reversion :math:`\theta>0`, 1 / time.
        mean: level :math:`\mu`.
        scale: :math:`\sigma>0`, in units of X per unit time to the power H.
        hurst: Hurst index in (0, 1). Parameters are floats or tensors that broadcast to ``(*B)``.
        noise: the :class:`MarkovNoise` to use; its Hurst index must be ``hurst``. By default type I with 24
            states, built for the span of the times asked for.
        start: X at ``start_time``: a number or tensor, a ``Normal`` law, ``"stationary"`` (jointly with the
            memory states; type I only), or by default the mean.
        start_time: when process and noise start; no time may lie before it. By default the first time asked
            for if the start is stationary, otherwise 0.
        discretization: ``"exact"``, or ``"euler"`` for the law of the Euler scheme on the grid given (what
            :class:`~stochdyn.SDE` simulates there): the oracle for inference on such a grid.

    Raises:
        HurstRangeError: if ``hurst`` lies outside (0, 1).
        InvalidInputError: for a rate or scale that isn't positive, or noise that doesn't fit.

    Example:
        >>> ou = FractionalOU(rate=1.0, mean=0.0, scale=1.0, hurst=0.7)
        >>> ts = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
        >>> y = torch.tensor([0.3, -0.1, 0.4, 0.8, 0.5], dtype=torch.float64)
        >>> round(float(ou.log_evidence(ts, y, obs_scale=0.1)), 2)
        -2.35

    Reference:
        P. Cheridito, H. Kawaguchi and M. Maejima, Electron. J. Probab. 8, 2003; R. Daems et al., ICLR 2024.
    """

    def __init__(
        self,
        rate: Tensor | float,
        mean: Tensor | float,
        scale: Tensor | float,
        hurst: Tensor | float,
        noise: MarkovNoise | None = None,
        *,
        start: Start = None,
        start_time: float | None = None,
        discretization: Literal["exact", "euler"] = "exact",
    ) -> None:
        check_positive(rate, "rate")
        check_positive(scale, "scale")
        check_hurst(hurst)
        check_choice(discretization, ("exact", "euler"), "discretization")
        self.rate, self.mean, self.scale, self.hurst = (
            torch.as_tensor(v, dtype=torch.float64) for v in (rate, mean, scale, hurst)
        )
        check_finite(self.mean.detach(), "mean")
        self._given_hurst = hurst
        if noise is not None:
            if not isinstance(noise, MarkovNoise):
                raise InvalidInputError(
                    "noise must be a MarkovNoise",
                    got=type(noise).__name__,
                    hint="Brownian motion is MarkovNoise(0.5, speeds=[0.0])",
                )
            theirs = noise.hurst.detach().to(torch.float64)
            if theirs.numel() != self.hurst.numel() or not torch.allclose(
                theirs.flatten().cpu(), self.hurst.detach().flatten().cpu(), rtol=0.0, atol=1e-6
            ):
                raise InvalidInputError(
                    "hurst and the Hurst index of noise must agree",
                    got=f"{self.hurst.tolist()} and {noise.hurst.tolist()}",
                    hint="pass hurst=noise.hurst",
                )
        if start == "stationary" and noise is not None and noise.kind != "I":
            raise InvalidInputError(
                "a stationary start needs noise with stationary increments",
                got=f"noise of type {noise.kind}",
                hint="build it with kind='I'",
            )
        if isinstance(start, str):
            check_choice(start, ("stationary",), "start")
        self.noise = noise
        self.start = start
        self.start_time = start_time
        self.discretization = discretization
        self.batch_shape = torch.broadcast_shapes(
            self.rate.shape, self.mean.shape, self.scale.shape, self.hurst.shape
        )

    # ------------------------------------------------------------------------------------------ prior

    def moments(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of X at the times ``ts (T,)``, each ``(*B, T)``."""
        chain, skip = self._chain(ts)
        mean, cov = chain.moments()
        mean = mean[skip:, ..., 0].movedim(0, -1) + self._mean_on(ts.device)
        variance = cov[skip:, ..., 0, 0].movedim(0, -1).expand(mean.shape)
        return mean.to(ts.dtype), variance.to(ts.dtype)

    def covariance(self, ts: Tensor) -> Tensor:
        """Return the covariance of X at the times ``ts (T,)``, ``(*B, T, T)``."""
        chain, skip = self._chain(ts)
        return joint_covariance(chain)[..., skip:, skip:].to(ts.dtype)

    def sample(self, ts: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` paths at the times ``ts (T,)``: ``(n, *B, T)``, reparametrised."""
        chain, skip = self._chain(ts)
        path = chain.sample(n, generator)[:, skip:, ..., 0].movedim(1, -1) + self._mean_on(ts.device)
        return path.to(ts.dtype)

    # -------------------------------------------------------------------------------------- posterior

    def log_evidence(
        self, ts: Tensor, y: Tensor, obs_scale: Tensor | float, mask: Tensor | None = None
    ) -> Tensor:
        r"""Return the log density of observations :math:`y_i\sim N(X(t_i),s^2)`.

        Args:
            ts: ``(T,)`` increasing observation times.
            y: ``(*B, T)``; must be finite where observed.
            obs_scale: s, not negative; a number, or a tensor that broadcasts with ``y``.
            mask: ``(T,)`` or like ``y``, True where observed.

        Returns:
            ``(*B)``.

        Raises:
            NonFiniteError, ShapeError, TimeGridError: for data that don't fit.
        """
        p = self._problem(ts, y, obs_scale, mask, None)[0]
        value = p.chain.log_evidence(p.y, p.emission, p.obs_variance[..., None, None], p.mask)
        return value.to(y.dtype)

    def posterior(
        self,
        ts: Tensor,
        y: Tensor,
        obs_scale: Tensor | float,
        at: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> FractionalOUPosterior:
        """Return the law of X given observations, at the times ``at``; arguments as in :meth:`log_evidence`.

        Args:
            ts: ``(T,)``.
            y: ``(*B, T)``.
            obs_scale: observation noise.
            at: ``(T',)`` increasing times, between, before or after the observations; by default ``ts``.
            mask: True where observed.
        """
        p, index, times = self._problem(ts, y, obs_scale, mask, at)
        smooth = p.chain.smooth(p.y, p.emission, p.obs_variance[..., None, None], p.mask)
        mean = smooth.mean[..., 0].movedim(0, -1)[..., index] + self._mean_on(ts.device)
        variance = smooth.cov[..., 0, 0].movedim(0, -1)[..., index].expand(mean.shape)
        return FractionalOUPosterior(
            times, mean.to(y.dtype), variance.to(y.dtype), smooth.log_evidence.to(y.dtype), p, index
        )

    # --------------------------------------------------------------------------------------- machinery

    def _grid(self, ts: Tensor) -> tuple[Tensor, int]:
        """The grid in float64, with the start in front where it isn't yet, and how many points that adds."""
        check_time_grid(ts, min_points=1)
        t = ts.detach().to(torch.float64)
        stationary = isinstance(self.start, str)
        if self.start_time is None and stationary:
            return t, 0
        start = 0.0 if self.start_time is None else float(self.start_time)
        if t[0] < start:
            raise TimeGridError(
                "times must not lie before the start of the process",
                got=f"{t[0].item():g}",
                expected=f"at least start_time={start:g}",
                hint="set start_time, or start='stationary'",
            )
        if t[0] == start:
            return t, 0
        return torch.cat([t.new_full((1,), start), t]), 1

    def _mean_on(self, device: torch.device) -> Tensor:
        return self.mean.to(device)[..., None]

    def _noise(self, t: Tensor) -> MarkovNoise:
        if self.noise is not None:
            return self.noise
        span = float(t[-1] - t[0])
        gaps = t[1:] - t[:-1]
        step = min(float(gaps.min()), span / 1000)
        return MarkovNoise(self._given_hurst, _DEFAULT_STATES, span, step, kind="I")

    def _chain(self, ts: Tensor) -> tuple[GaussianChain, int]:
        t, skip = self._grid(ts)
        if t.shape[0] < 2:
            t = torch.cat([t, t + 1.0])  # a law at one time needs a noise, and no step
            chain = self._chain_on(t)
            none = slice(0, 0)
            return GaussianChain(
                chain.initial_mean,
                chain.initial_cov,
                chain.transition[none],
                chain.offset[none],
                chain.noise_cov[none],
            ), skip
        return self._chain_on(t), skip

    def _chain_on(self, t: Tensor) -> GaussianChain:
        noise = self._noise(t)
        steps = noise.steps(t, dtype=torch.float64)  # checks the grid against the horizon
        gamma, w = noise.speeds.to(t.device), noise.weights.to(t.device)
        batch = torch.broadcast_shapes(self.rate.shape, self.scale.shape, w.shape[:-1])
        theta, scale = self.rate.to(t.device).expand(batch), self.scale.to(t.device).expand(batch)
        w = w.expand(*batch, w.shape[-1])
        dt, inverse = torch.unique(t[1:] - t[:-1], return_inverse=True)
        if self.discretization == "exact":
            transition, noise_cov = exact_step(dt, theta, scale, gamma, w)
        else:
            first = torch.stack([(inverse == i).nonzero()[0, 0] for i in range(dt.shape[0])])
            gain, recall = (
                c[first].expand(dt.shape[0], *batch, c.shape[-1]) for c in (steps.gain, steps.recall)
            )
            transition, noise_cov = euler_step(dt, theta, scale, gamma, gain, recall, steps.load[first])
        transition, noise_cov = transition[inverse], noise_cov[inverse]
        mean, cov = self._initial(theta, scale, gamma, w, noise.kind)
        return GaussianChain(mean, cov, transition, torch.zeros_like(transition[..., 0]), noise_cov)

    def _initial(
        self, theta: Tensor, scale: Tensor, gamma: Tensor, w: Tensor, kind: str
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of (X - mean, scaled states) at the start."""
        k = gamma.shape[0]
        cov = gamma.new_zeros(k + 1, k + 1)
        if kind == "I":
            cov[1:, 1:] = prior_state_covariance(gamma)
        # the means carry all batch axes, so that series that share a covariance are still drawn independently
        mean = gamma.new_zeros(*self.batch_shape, k + 1)
        start = self.start
        if isinstance(start, str):
            return mean, stationary_covariance(theta, scale, gamma, w)
        if start is None:
            return mean, cov
        corner = gamma.new_zeros(k + 1)
        corner[0] = 1.0
        if isinstance(start, Normal):
            spread = start.scale.to(mean) ** 2
            cov = cov + spread[..., None, None] * torch.outer(corner, corner)
            start = start.loc
        offset = torch.as_tensor(start, dtype=mean.dtype, device=mean.device) - self.mean.to(mean.device)
        return mean + offset[..., None] * corner, cov

    def _problem(
        self,
        ts: Tensor,
        y: Tensor,
        obs_scale: Tensor | float,
        mask: Tensor | None,
        at: Tensor | None,
    ) -> tuple[Problem, Tensor, Tensor]:
        check_time_grid(ts, min_points=1)
        if y.ndim == 0:
            check_ndim(y, 1, "y", "(*B, T)")
        check_event_size(y, ts.shape[0], "y")
        if mask is not None and mask.dtype != torch.bool:
            raise InvalidInputError("mask must be boolean", got=mask.dtype)
        keep = torch.ones_like(ts, dtype=torch.bool) if mask is None else mask
        check_event_size(keep, ts.shape[0], "mask")
        y64 = torch.where(keep, y.to(torch.float64), torch.zeros((), dtype=torch.float64, device=y.device))
        check_finite(y64.detach(), "y")
        variance = torch.as_tensor(obs_scale, dtype=torch.float64, device=y.device) ** 2
        check_finite(variance.detach(), "obs_scale")
        if bool((torch.as_tensor(obs_scale) < 0).any()):
            raise InvalidInputError("obs_scale must not be negative", got=obs_scale)
        if at is None:
            union, times = ts, ts
        else:
            check_time_grid(at, "at", min_points=1)
            union, times = torch.unique(torch.cat([ts, at.to(ts)])), at.to(ts)
        chain, skip = self._chain(union)
        size = union.shape[0] + skip
        seen = torch.searchsorted(union, ts) + skip
        residual = (y64 - self.mean.to(y.device)[..., None]).movedim(-1, 0)
        filled = residual.new_zeros(size, *residual.shape[1:]).index_copy(0, seen, residual)
        keep_lead = keep.movedim(-1, 0)
        observed = torch.zeros(size, *keep_lead.shape[1:], dtype=torch.bool, device=y.device)
        observed = observed.index_copy(0, seen, keep_lead)
        if variance.ndim > 0 and variance.shape[-1] > 1:
            lead = variance.movedim(-1, 0)
            spread = lead.new_ones(size, *lead.shape[1:]).index_copy(0, seen, lead)
        else:
            spread = variance.reshape(variance.shape[:-1])[None] if variance.ndim else variance[None]
            spread = spread.expand(size, *spread.shape[1:])
        emission = torch.zeros(1, chain.state_dim, dtype=torch.float64, device=y.device)
        emission[0, 0] = 1.0
        problem = Problem(chain, self.mean.to(y.device), filled[..., None], observed, spread, emission)
        return problem, torch.searchsorted(union, times) + skip, times
