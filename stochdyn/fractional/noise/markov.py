"""Fractional Brownian motion as a sum of Ornstein-Uhlenbeck states driven by one Brownian motion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stochdyn._checks import as_time_grid, check_bool, check_hurst, check_time_grid, check_type
from stochdyn.core.sde.noise import NoiseSteps
from stochdyn.errors import InvalidInputError
from stochdyn.fractional.noise._steps import step_factors
from stochdyn.fractional.noise.covariance import markov_covariance
from stochdyn.fractional.noise.divergence import Divergence, divergence_on, warn_if_crude
from stochdyn.fractional.noise.memory import MemoryStates, default_speeds
from stochdyn.fractional.noise.moments import Kind

__all__ = ["MarkovNoise", "default_speeds"]


class MarkovNoise(MemoryStates):
    r"""Markov approximation of unit fractional Brownian motion, to drive an SDE: ``SDE(..., noise=...)``.

    .. math::
        \hat B(t)=\sum_{k=1}^K w_k\,[Y_k(t)-Y_k(0)],\qquad dY_k=-\gamma_kY_k\,dt+dW,

    with one Brownian motion W for all states of a channel. The target has variance :math:`t^{2H}` for both kinds, so
    that the Hurst index and the scale of the noise are separate parameters. Type II starts at :math:`Y(0)=0`; type I,
    the process with stationary increments, starts its states at their stationary law. Far from its start, unit type II
    has increments of variance :math:`(V_{\mathrm I}/V_{\mathrm{II}})h^{2H}`, see
    :func:`~stochdyn.fractional.variance_constant`. Take this noise wherever the equation isn't linear, or the Hurst
    index constant; for a linear equation :class:`~stochdyn.fractional.FractionalOU` needs no simulation.

    By default the weights give the increments on a grid of step ``dt`` the right law: their divergence from fractional
    Brownian motion, :meth:`divergence`, is below 0.05 nats per 100 steps for Hurst indices from 0.05 to 0.95
    and 100 to 1000 steps. For speeds without a state that stands for what happens within a step (one a million times faster
    than the others) they minimise the mean squared path error over ``[0, horizon]``
    (:func:`~stochdyn.fractional.optimal_weights`), the choice of the paper. Either way they follow from speeds and horizon.

    The states are stepped exactly for any step size and speed: besides :math:`\Delta W` each step draws the
    few further innovations that the joint law of the states needs, down to a relative variance of 1e-10 (the
    covariance of the path is then right to about 1e-9).
    Everything that depends on the Hurst index is computed in float64 and differentiable.

    Args:
        hurst: Hurst index in (0, 1): a float, or a tensor (a Pyro sample, say), possibly a batch ``(*batch)``
            that aligns with the batch axes of the state; gradients flow into it.
        num_states: The number K of memory states; by default, for up to 1000 steps, 8 for type II and 10 for type I, and one more for
            each factor of 7.
        horizon: The length of time T that the noise covers, at least the length of every grid that it will be used on.
        dt: The typical time step, the smallest that matters; with ``horizon`` it sets the speeds
            (:func:`~stochdyn.fractional.default_speeds`). By default ``horizon / 100``.
        kind: The type of the noise: ``"II"`` (Riemann-Liouville, starts afresh) or ``"I"`` (Mandelbrot-Van Ness, infinite past).
        learn_hurst: Whether the Hurst index becomes a parameter, ``hurst_logit``, that starts at ``hurst``.
        speeds: The increasing speeds ``(K,)`` instead of the default ones; 0 stands for Brownian motion itself,
            so ``MarkovNoise(0.5, speeds=[0.0])`` is exact.
        per_channel: Whether the last axis of ``hurst (*batch, m)`` counts noise channels (one Hurst index for each
            component of the state) instead of series.

    Attributes:
        kind, horizon, dt, num_states, per_channel: The options, as given.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).
        InvalidInputError: For speeds, sizes or a kind that make no sense.

    Warns:
        ApproximationWarning: If the divergence exceeds 1e-3 nats per step on some scale between ``dt`` and ``horizon``
            (not checked for tensors that require a gradient; ask :meth:`divergence`).

    Example:
        >>> noise = MarkovNoise(0.7, horizon=2.0, dt=0.02)
        >>> noise.speeds.shape, noise.divergence(torch.linspace(0, 2, 101)) < 0.02
        (torch.Size([8]), True)

    Reference:
        R. Daems, M. Opper, G. Crevecoeur and T. Birdal, Variational inference for SDEs driven by fractional
        noise, ICLR 2024.
    """

    def __init__(
        self,
        hurst: float | Tensor,
        num_states: int | None = None,
        horizon: float = 1.0,
        dt: float | None = None,
        kind: Kind = "II",
        learn_hurst: bool = False,
        speeds: Tensor | Sequence[float] | None = None,
        per_channel: bool = False,
    ) -> None:
        check_hurst(hurst)
        check_bool(learn_hurst, "learn_hurst")
        check_bool(per_channel, "per_channel")
        if per_channel and (not isinstance(hurst, Tensor) or hurst.ndim == 0):
            raise InvalidInputError(
                "per_channel needs one Hurst index per channel",
                got=repr(hurst),
                expected="a tensor (*batch, m)",
            )
        super().__init__(num_states, horizon, dt, kind, speeds)
        self.per_channel = per_channel
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
            warn_if_crude(self, self.hurst.detach(), stacklevel=3)

    @property
    def hurst(self) -> Tensor:
        """The Hurst index, ``(*batch)``; differentiable where it is learnt or was given with a gradient."""
        if self.hurst_logit is not None:
            return torch.sigmoid(self.hurst_logit)
        assert self._fixed is not None  # for the type checker: one of the two is always set
        return self._fixed

    def _solve(self) -> tuple[Tensor, Tensor]:
        return self._solver()(self.hurst.to(torch.float64))

    @property
    def weights(self) -> Tensor:
        """Weights of the memory states, float64 ``(*batch, K)``, differentiable in the Hurst index."""
        return self._solve()[0]

    @property
    def relative_error(self) -> float:
        """Relative L2 path error on ``[0, horizon]``, for one Brownian motion W behind both paths (the worst of a batch).

        It says how close paths are, and not how close their laws are, which is what inference sees: :meth:`divergence`.
        """
        with torch.no_grad():
            return float(self._solve()[1].max())

    @torch.no_grad()
    def divergence(self, ts: Tensor) -> Divergence:
        r"""Return the divergence of exact increments from approximate ones on a grid, in nats.

        .. math:: \mathrm{KL}\left(\mathrm{law}\,(B_{t_1}-B_{t_0},\dots)\,\|\,\mathrm{law}\,(\hat B_{t_1}-\hat B_{t_0},\dots)\right).

        Args:
            ts: The grid ``(T,)``; noise starts at ``ts[0]``. The cost grows with the cube of its length.

        Returns:
            A number, the nats per path (the worst of a batch of Hurst indices), with the attributes ``per_path``,
            ``per_step`` and ``num_steps``.

        Raises:
            TimeGridError: If the times don't increase, or span more than the horizon.

        Example:
            >>> found = MarkovNoise(0.1, horizon=1.0, dt=0.01).divergence(torch.linspace(0, 1, 101))
            >>> found < 0.02, found.per_step < 2e-4
            (True, True)
        """
        ts = as_time_grid(ts, "ts")
        step_factors(self._speeds, self.horizon, ts)  # refuses a grid beyond the horizon
        times = ts.to("cpu", torch.float64)
        times = times[1:] - times[0]
        hurst = self.hurst.detach().to("cpu", torch.float64)
        found = divergence_on(times, self.covariance(times).cpu(), hurst, self.kind)
        return Divergence(float(found.max()), len(times))

    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        """Return the exact steps of the memory states; ``ts`` may be irregular but not longer than the horizon."""
        check_type(dtype, torch.dtype, "dtype")
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
            ts: The times ``(T,)`` since the start of the noise, not negative and increasing.

        Returns:
            ``(*batch, T, T)`` in float64, differentiable in the Hurst index.

        Example:
            >>> noise = MarkovNoise(0.5, speeds=[0.0])
            >>> noise.covariance(torch.tensor([0.5, 1.0])).round(decimals=6).tolist()
            [[0.5, 0.5], [0.5, 1.0]]
        """
        check_time_grid(ts, min_points=1)
        return markov_covariance(ts.to(torch.float64), self.weights, self.speeds, self.kind)

    def extra_repr(self) -> str:
        """Show kind, sizes and range of speeds."""
        span = f"{self._speeds[0]:.3g}..{self._speeds[-1]:.3g}"
        return f"kind={self.kind!r}, num_states={self.num_states}, horizon={self.horizon:g}, speeds={span}"
