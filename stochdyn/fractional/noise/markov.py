"""Fractional Brownian motion as a sum of Ornstein-Uhlenbeck states driven by one Brownian motion."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    check_hurst,
    check_time_grid,
)
from stochdyn.core.sde.noise import NoiseSteps
from stochdyn.errors import ApproximationWarning, InvalidInputError
from stochdyn.fractional.noise._quadrature import relative_exponential_mean
from stochdyn.fractional.noise._steps import step_factors
from stochdyn.fractional.noise.memory import MemoryStates, default_speeds
from stochdyn.fractional.noise.moments import Kind, entire_1
from stochdyn.fractional.noise.weights import weight_solver

__all__ = ["MarkovNoise", "default_speeds"]

_WARN_ERROR = 0.1


class MarkovNoise(MemoryStates):
    r"""Markov approximation of unit fractional Brownian motion, to drive an SDE: ``SDE(..., noise=...)``.

    .. math::
        \hat B(t)=\sum_{k=1}^K w_k\,[Y_k(t)-Y_k(0)],\qquad dY_k=-\gamma_kY_k\,dt+dW,

    with one Brownian motion W for all states of a channel and weights that minimise the mean squared path
    error over ``[0, horizon]``. The target has variance :math:`t^{2H}` for both kinds, so that the Hurst
    index and the scale of the noise are separate parameters. Type II starts at :math:`Y(0)=0`; type I, the
    process with stationary increments, starts its states at their stationary law. Far from its start, unit
    type II has increments of variance :math:`(V_{\mathrm I}/V_{\mathrm{II}})h^{2H}`, see
    :func:`~stochdyn.fractional.variance_constant`.

    The states are stepped exactly for any step size and speed: besides :math:`\Delta W` each step draws the
    few further innovations that the joint law of the states needs, down to a relative variance of 1e-10 (the
    covariance of the path is then right to about 1e-9).
    Everything that depends on the Hurst index is computed in float64 and differentiable.

    Args:
        hurst: Hurst index in (0, 1): a float, or a tensor (a Pyro sample, say), possibly a batch ``(*batch)``
            that aligns with the batch axes of the state; gradients flow into it.
        num_states: K. For type I take 12 or more.
        horizon: T, at least the length of every grid that the noise will be used on.
        step: typical time step; with ``horizon`` it sets the speeds (:func:`default_speeds`). By default
            ``horizon / 100``.
        kind: ``"II"`` (Riemann-Liouville, starts afresh) or ``"I"`` (Mandelbrot-Van Ness, infinite past).
        learn_hurst: make the Hurst index a parameter, ``hurst_logit``, that starts at ``hurst``.
        speeds: ``(K,)`` increasing speeds instead of the default ones; 0 stands for Brownian motion itself,
            so ``MarkovNoise(0.5, speeds=[0.0])`` is exact.
        per_channel: the last axis of ``hurst (*batch, m)`` counts noise channels (one Hurst index for each
            component of the state) instead of series.

    Attributes:
        kind, horizon, num_states, per_channel: as given.

    Raises:
        HurstRangeError: if ``hurst`` lies outside (0, 1).
        InvalidInputError: for speeds, sizes or a kind that make no sense.

    Warns:
        ApproximationWarning: if the relative path error exceeds 0.1 (not checked for tensors that require a
            gradient; read :attr:`relative_error`).

    Example:
        >>> noise = MarkovNoise(0.7, num_states=5, horizon=2.0, step=0.02)
        >>> noise.speeds.shape, noise.relative_error < 0.01
        (torch.Size([5]), True)

    Reference:
        R. Daems, M. Opper, G. Crevecoeur and T. Birdal, Variational inference for SDEs driven by fractional
        noise, ICLR 2024.
    """

    def __init__(
        self,
        hurst: float | Tensor,
        num_states: int = 8,
        horizon: float = 1.0,
        step: float | None = None,
        kind: Kind = "II",
        learn_hurst: bool = False,
        speeds: Tensor | Sequence[float] | None = None,
        per_channel: bool = False,
    ) -> None:
        check_hurst(hurst)
        if per_channel and (not isinstance(hurst, Tensor) or hurst.ndim == 0):
            raise InvalidInputError(
                "per_channel needs one Hurst index a channel",
                got=repr(hurst),
                expected="a tensor (*batch, m)",
            )
        super().__init__(num_states, horizon, step, kind, speeds)
        self.per_channel = per_channel
        weight_solver(self._speeds, self.horizon, kind)
        self._fixed: Tensor | None = None
        self.hurst_logit: nn.Parameter | None
        if learn_hurst:
            start = torch.as_tensor(hurst, dtype=torch.float64).detach()
            dtype = hurst.dtype if isinstance(hurst, Tensor) else torch.get_default_dtype()
            self.hurst_logit = nn.Parameter(torch.logit(start).to(dtype))
        else:
            self.register_parameter("hurst_logit", None)
            self._fixed = (
                hurst if isinstance(hurst, Tensor) else torch.tensor(float(hurst), dtype=torch.float64)
            )
        if learn_hurst or not (isinstance(hurst, Tensor) and hurst.requires_grad):
            self._warn_if_crude()

    def _warn_if_crude(self) -> None:
        error = self.relative_error
        if error > _WARN_ERROR:
            cure = (
                "slower speeds and more states (num_states of 16 to 24) help type I for hurst > 1/2, "
                "faster speeds (a smaller step) for hurst < 1/2"
                if self.kind == "I"
                else "faster speeds (a smaller step, or speeds=) and more states help"
            )
            warnings.warn(
                f"the Markov approximation of fractional noise has a relative path error of {error:.3f} "
                f"(type {self.kind}, {self.num_states} states, speeds {self._speeds[0]:.3g} to "
                f"{self._speeds[-1]:.3g}, horizon {self.horizon:g}); {cure}",
                ApproximationWarning,
                stacklevel=3,
            )

    @property
    def hurst(self) -> Tensor:
        """The Hurst index, ``(*batch)``; differentiable where it is learnt or was given with a gradient."""
        if self.hurst_logit is not None:
            return torch.sigmoid(self.hurst_logit)
        assert self._fixed is not None  # for the type checker: one of the two is always set
        return self._fixed

    def _solve(self) -> tuple[Tensor, Tensor]:
        return weight_solver(self._speeds, self.horizon, self.kind)(self.hurst.to(torch.float64))

    @property
    def weights(self) -> Tensor:
        """Weights of the memory states, float64 ``(*batch, K)``, differentiable in the Hurst index."""
        return self._solve()[0]

    @property
    def relative_error(self) -> float:
        """Relative L2 path error on ``[0, horizon]`` (the worst of a batch)."""
        with torch.no_grad():
            return float(self._solve()[1].max())

    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        """See :meth:`NoiseProcess.steps`; ``ts`` may be irregular but not longer than the horizon."""
        grid = step_factors(self._speeds, self.horizon, ts)
        w = self.weights.to(ts.device)
        # float64 until here: large weights of slow states cancel in the gain
        gain = torch.einsum("nrk,...k->n...r", grid.load, w)
        recall = torch.einsum("nk,...k->n...k", grid.loss, w)
        variance = grid.dt[:, None].expand(-1, grid.load.shape[1])
        return NoiseSteps(variance, gain, recall, grid.decay, grid.load, self.per_channel).to(dtype)

    def covariance(self, ts: Tensor) -> Tensor:
        r"""Return the covariance :math:`E[\hat B(s)\hat B(t)]`, in closed form.

        Args:
            ts: ``(T,)`` times since the start of the noise, not negative, increasing.

        Returns:
            ``(*batch, T, T)`` in float64, differentiable in the Hurst index.

        Example:
            >>> noise = MarkovNoise(0.5, speeds=[0.0])
            >>> noise.covariance(torch.tensor([0.5, 1.0])).round(decimals=6).tolist()
            [[0.5, 0.5], [0.5, 1.0]]
        """
        check_time_grid(ts, min_points=1)
        t = ts.to(torch.float64)
        w = self.weights.to(t.device)
        g = self.speeds.to(t.device)
        total = g[:, None] + g[None, :]
        safe = torch.where(total == 0, torch.ones_like(total), total)
        if self.kind == "I":
            return _stationary_increment_covariance(t, w, g, safe)
        low, gap = torch.minimum(t[:, None], t[None, :]), (t[:, None] - t[None, :]).abs()
        out = torch.zeros((), dtype=t.dtype, device=t.device)
        for j in range(self.num_states):
            mixed = low[..., None] * relative_exponential_mean(total[j] * low[..., None])
            out = out + torch.einsum("stk,...k->...st", mixed, w * w[..., j, None]) * torch.exp(-g[j] * gap)
        return out

    def extra_repr(self) -> str:
        """Show kind, sizes and range of speeds."""
        span = f"{self._speeds[0]:.3g}..{self._speeds[-1]:.3g}"
        return f"kind={self.kind!r}, num_states={self.num_states}, horizon={self.horizon:g}, speeds={span}"


def _stationary_increment_covariance(t: Tensor, w: Tensor, g: Tensor, total: Tensor) -> Tensor:
    """Type I: (v(s) + v(t) - v(|t-s|)) / 2 from Y_k(t) - Y_k(0) = W(t) + phi_k(t), stable for slow states."""
    volatility = w.sum(-1)
    pair = w[..., :, None] * w[..., None, :] * (g[:, None] * g[None, :] / total)
    coefficient = pair.sum(-1) - volatility[..., None] * w * g

    def half_variogram(lag: Tensor) -> Tensor:
        memory = lag[..., None] ** 2 * entire_1(g * lag[..., None])
        shape = (*volatility.shape, *([1] * lag.ndim))
        smooth = torch.einsum("...k,tk->...t", coefficient, memory.reshape(-1, memory.shape[-1])).reshape(
            *volatility.shape, *lag.shape
        )
        return 0.5 * (volatility**2).reshape(shape) * lag + smooth

    f = half_variogram(t)
    return f[..., :, None] + f[..., None, :] - half_variogram((t[:, None] - t[None, :]).abs())
