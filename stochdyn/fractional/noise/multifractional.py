"""Fractional noise whose Hurst index changes in time, in both definitions, and a learnable curve for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from scipy.special import hyp2f1
from torch import Tensor, nn

from stochdyn._checks import (
    as_tensor,
    check_choice,
    check_hurst,
    check_no_gradient,
    check_positive_int,
    check_real,
    check_time_grid,
    check_type,
)
from stochdyn.core.sde.noise import NoiseSteps
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.fractional.noise._steps import step_factors
from stochdyn.fractional.noise.divergence import warn_if_crude
from stochdyn.fractional.noise.memory import MemoryStates
from stochdyn.fractional.noise.moments import Kind

__all__ = ["HurstCurve", "MultifractionalNoise", "multifractional_covariance"]

_PROBES = 33


class HurstCurve(nn.Module):
    r"""A Hurst index that varies in time: linear between knots on the logit scale.

    .. math:: \operatorname{logit}H(t)=\sum_jh_j\,\Lambda_j(t),

    with :math:`\Lambda_j` the hat functions of equally spaced knots.

    Args:
        knots: The number of knots, or the logits ``(*batch, J)`` at them (a Pyro sample, say); their batch stands left of t in the result.
        horizon: The last knot; the first is at ``start``.
        hurst: The index at which the parameters begin if ``knots`` is a number.
        start: The time of the first knot.

    Raises:
        HurstRangeError: For a Hurst index outside (0, 1).
        InvalidInputError: For fewer than two knots.

    Example:
        >>> curve = HurstCurve(torch.tensor([-1.0, 1.0]), horizon=2.0)
        >>> [round(h, 4) for h in curve(torch.tensor([0.0, 1.0, 2.0])).tolist()]
        [0.2689, 0.5, 0.7311]
    """

    def __init__(self, knots: int | Tensor, horizon: float, hurst: float = 0.5, start: float = 0.0) -> None:
        super().__init__()
        check_real(start, "start", fixed=True)
        check_real(horizon, "horizon", above=float(start), fixed=True)
        self.start, self.horizon = float(start), float(horizon)
        if isinstance(knots, Tensor):
            if knots.ndim == 0 or knots.shape[-1] < 2:
                raise ShapeError(
                    "a curve needs two knots or more", got=tuple(knots.shape), expected="(*batch, J)"
                )
            self.logits = knots
        else:
            check_positive_int(knots, "knots", 2)
            check_hurst(hurst)
            self.logits = nn.Parameter(torch.logit(torch.full((knots,), float(hurst), dtype=torch.float64)))

    def forward(self, t: Tensor) -> Tensor:
        """Return ``H (T, *batch)`` at times ``t (T,)``; constant outside the knots."""
        count = self.logits.shape[-1]
        place = (t - self.start) / (self.horizon - self.start) * (count - 1)
        place = place.to(self.logits).clamp(0, count - 1)
        left = place.floor().long().clamp_max(count - 2)
        logits = torch.lerp(self.logits[..., left], self.logits[..., left + 1], place - left)
        return torch.sigmoid(logits).movedim(-1, 0)

    def roughness(self) -> Tensor:
        r"""Return :math:`\sum_j(h_{j+1}-h_j)^2`, the exponent of a random-walk prior up to its scale, ``(*batch)``."""
        return self.logits.diff(dim=-1).square().sum(-1)


class MultifractionalNoise(MemoryStates):
    r"""Markov-approximate noise with a Hurst index that depends on time.

    The memory states are those of :class:`MarkovNoise`; their optimal weights follow :math:`H(t)`. Two definitions
    are in use, which agree for a constant index:

    - ``"process"``: :math:`\hat B(t)=\sum_kw_k(H(t))\,Y_k(t)`, multifractional Brownian motion of type II
      (Riemann-Liouville). Its variance is :math:`t^{2H(t)}`, and a change of H moves the level of the path:
      :math:`d\hat B=\sum_kw_k\,dY_k+H'\sum_kw_k'(H)\,Y_k\,dt`.
    - ``"increments"``: :math:`d\hat B=\sum_kw_k(H(t))\,dY_k`. The past keeps the index it had; only the increments change
      their character.

    Steps are exact given H at the grid points (for ``"increments"``, H is that at the start of each step).

    Args:
        hurst: A function from times ``(T,)`` to indices ``(T, *batch)`` in (0, 1): a callable or a module, such as
            :class:`HurstCurve`. Gradients flow into it.
        num_states: The number K of memory states; by default, for up to 1000 steps, 8 for type II and 10 for type I, and one more for
            each factor of 7.
        horizon: The length of time covered, at least that of every grid; grids begin at the start of the noise.
        dt: The typical time step, by default ``horizon / 100``.
        definition: Which of the two definitions above is meant.
        kind: The type of the noise: ``"II"``, or, for ``definition="increments"``, ``"I"`` too.
        speeds: The speeds ``(K,)`` instead of the default ones.
        per_channel: Whether the last axis of H counts noise channels instead of series.

    Raises:
        HurstRangeError: If H leaves (0, 1).
        InvalidInputError: For ``"process"`` with type I, whose value at the start would have to be remembered.

    Warns:
        ApproximationWarning: If the divergence for the smallest or largest H(t), held constant, exceeds 1e-3 nats per
            step.

    Example:
        >>> noise = MultifractionalNoise(HurstCurve(2, horizon=1.0, hurst=0.7), 8, horizon=1.0)
        >>> noise.steps(torch.linspace(0, 1, 11), dtype=torch.float32).recall.shape
        torch.Size([10, 8])

    Reference:
        R. F. Peltier and J. Lévy Véhel, Multifractional Brownian motion, INRIA 2645, 1995; R. Daems et al., ICLR
        2024, for the Markov approximation.
    """

    def __init__(
        self,
        hurst: Callable[[Tensor], Tensor],
        num_states: int | None = None,
        horizon: float = 1.0,
        dt: float | None = None,
        definition: Literal["process", "increments"] = "process",
        kind: Kind = "II",
        speeds: Tensor | Sequence[float] | None = None,
        per_channel: bool = False,
    ) -> None:
        if not callable(hurst):
            raise InvalidInputError(
                "hurst must be a function of time", got=type(hurst).__name__, hint="a constant is MarkovNoise"
            )
        check_choice(definition, ("process", "increments"), "definition")
        if definition == "process" and kind == "I":
            raise InvalidInputError(
                "multifractional Brownian motion as a process is of type II here",
                hint="take kind='II', or definition='increments'",
            )
        super().__init__(num_states, horizon, dt, kind, speeds)
        self.hurst = hurst
        self.definition, self.per_channel = definition, per_channel
        with torch.no_grad():
            warn_if_crude(self, self._probe(), stacklevel=2)

    def _probe(self) -> Tensor:
        """The Hurst index on a regular grid of the horizon, ``(T, *batch)``."""
        grid = torch.linspace(0, self.horizon, _PROBES, dtype=torch.float64)
        return self._checked(grid)

    @property
    def relative_error(self) -> float:
        """Largest relative path error of a constant index along ``H(t)``."""
        with torch.no_grad():
            return float(self._solver()(self._probe())[1].max())

    def _checked(self, t: Tensor) -> Tensor:
        hurst = self.hurst(t)
        check_hurst(hurst)
        if hurst.ndim == 0 or hurst.shape[0] != t.shape[0]:
            raise ShapeError(
                "hurst must return one index per time",
                got=tuple(hurst.shape),
                expected=f"({t.shape[0]}, *batch)",
            )
        return hurst.to(torch.float64)

    def weights(self, t: Tensor) -> Tensor:
        """Return the weights at times ``t (T,)`` since the start, float64 ``(T, *batch, K)``."""
        return self._solver()(self._checked(t))[0]

    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        """Return the exact steps of the memory states with the weights of each time; see :meth:`NoiseProcess.steps`."""
        check_type(dtype, torch.dtype, "dtype")
        grid = step_factors(self._speeds, self.horizon, ts)
        w = self.weights((ts - ts[0]).to(torch.float64)).to(ts.device)
        before, after = w[:-1], w[1:]
        loss, decay = (_beside(x, before.ndim) for x in (grid.loss, grid.decay))
        if self.definition == "increments":
            recall, reach = before * loss, before
        else:
            # w' decay - w, written so that a constant index loses no digits
            recall, reach = before * loss + (after - before) * decay, after
        gain = torch.einsum("nrk,n...k->n...r", grid.load, reach)
        variance = grid.dt[:, None].expand(-1, grid.load.shape[1])
        return NoiseSteps(variance, gain, recall, grid.decay, grid.load, self.per_channel).to(dtype)


def multifractional_covariance(ts: Tensor, hurst: Tensor) -> Tensor:
    r"""Return the exact covariance of unit multifractional Brownian motion of type II (``"process"``).

    .. math::
        E[B(s)B(t)]=2\sqrt{H_sH_t}\int_0^s(s-u)^{H_s-1/2}(t-u)^{H_t-1/2}du
        =\frac{2\sqrt{H_sH_t}}{a}\,s^{a}\,t^{\beta}\,{}_2F_1\!\left(-\beta,1;a+1;\tfrac st\right),

    :math:`s\le t`, :math:`a=H_s+\tfrac12`, :math:`\beta=H_t-\tfrac12`.

    Args:
        ts: The positive times ``(T,)``.
        hurst: The index ``(T,)`` at these times; a constant gives fractional Brownian motion of type II.

    Returns:
        float64 ``(T, T)``.

    Raises:
        HurstRangeError: For an index outside (0, 1).
        TimeGridError: For times that don't increase.
        InvalidInputError: If a gradient is wanted of times or indices.

    Example:
        >>> multifractional_covariance(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.5])).tolist()
        [[0.5, 0.5], [0.5, 1.0]]
    """
    check_time_grid(ts, min_points=1)
    check_hurst(hurst)
    h = as_tensor(hurst, "hurst", (0, 1), "(T,)", like=ts).to(torch.float64)
    if h.ndim and h.shape != ts.shape:
        raise ShapeError("hurst must have a value per time", got=tuple(h.shape), expected=tuple(ts.shape))
    for name, value in (("ts", ts), ("hurst", h)):
        check_no_gradient(value, name, "this covariance", "MultifractionalNoise has gradients")
    device = ts.device
    t, h = ts.to("cpu", torch.float64), h.cpu().expand(ts.shape)
    low, high = torch.minimum(t[:, None], t[None, :]), torch.maximum(t[:, None], t[None, :])
    earlier = t[:, None] <= t[None, :]
    first = torch.where(earlier, h[:, None], h[None, :]) + 0.5
    beta = torch.where(earlier, h[None, :], h[:, None]) - 0.5
    ratio = (low / high).fill_diagonal_(0.0)
    # Int_0^s (s-u)^(H_s - 1/2) (t-u)^(H_t - 1/2) du by Euler's integral of 2F1, for each pair with s the earlier time.
    series = torch.from_numpy(hyp2f1(-beta.numpy(), 1.0, (first + 1).numpy(), ratio.numpy()))
    cov = 2 * (h[:, None] * h[None, :]).sqrt() / first * low**first * high**beta * series
    return cov.diagonal_scatter(t ** (2 * h)).to(device)


def _beside(x: Tensor, ndim: int) -> Tensor:
    """Give ``x (N, K)`` batch axes between time and states until it has ``ndim`` axes."""
    return x.reshape(x.shape[0], *(1,) * (ndim - 2), x.shape[1])
