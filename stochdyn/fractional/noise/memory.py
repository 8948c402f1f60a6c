"""The memory states of fractional noise: their speeds, how they start, and what an exact step of them draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_finite, check_ndim, check_positive, check_positive_int
from stochdyn.core.sde.noise import NoiseProcess
from stochdyn.fractional.noise._steps import stationary_factor, step_factors
from stochdyn.fractional.noise.moments import Kind
from stochdyn.fractional.noise.weights import geometric_speeds

__all__ = ["MemoryStates", "default_speeds"]


def default_speeds(num_states: int, horizon: float, step: float, kind: Kind = "II") -> Tensor:
    r"""Return the log-spaced speeds that :class:`MarkovNoise` uses unless told otherwise.

    Type II: :math:`0.1/T` to :math:`10/\Delta`, the ratio of neighbours kept between 2.5 (below, the states
    are numerically dependent) and 10 (above, gaps cost more than range gains), but the fastest never under
    :math:`1/\Delta`. Type I: the infinite past asks for far slower states, so from
    the fastest the speeds go down by factors of :math:`3+60/K`, to :math:`10^{-3}/T` or less.

    Args:
        num_states: K.
        horizon: T, length of the time interval.
        step: typical time step.
        kind: ``"I"`` or ``"II"``.

    Returns:
        float64 ``(K,)``, increasing.

    Example:
        >>> [round(s, 3) for s in default_speeds(3, 1.0, 0.1).tolist()]
        [0.1, 1.0, 10.0]
    """
    gaps = max(num_states - 1, 1)
    if kind == "I":
        fastest = (10.0 if num_states >= 12 else 1.0) / step
        ratio = 3.0 + 60.0 / num_states
        slowest = min(max(fastest * ratio**-gaps, 1e-20 / horizon), 1e-3 / horizon)
    else:
        slowest = 0.1 / horizon
        fastest = max(min(10.0 / step, slowest * 10.0**gaps), 1.0 / step, slowest * 2.5**gaps)
    return geometric_speeds(num_states, slowest, fastest)


class MemoryStates(NoiseProcess):
    """Noise carried by Ornstein-Uhlenbeck states of one Brownian motion a channel; subclasses say how they are weighted.

    Args:
        num_states: K, unless ``speeds`` are given.
        horizon: length of the longest grid.
        step: typical time step; ``horizon / 100`` if None.
        kind: ``"I"`` (stationary states at the start) or ``"II"`` (states that start at 0).
        speeds: ``(K,)`` increasing speeds instead of :func:`default_speeds`.

    Raises:
        InvalidInputError: for speeds, sizes or a kind that make no sense.
    """

    def __init__(
        self,
        num_states: int,
        horizon: float,
        step: float | None,
        kind: Kind,
        speeds: Tensor | Sequence[float] | None,
    ) -> None:
        super().__init__()
        check_positive_int(num_states, "num_states")
        check_positive(horizon, "horizon")
        check_choice(kind, ("I", "II"), "kind")
        if step is not None:
            check_positive(step, "step")
        self.kind: Kind = kind
        self.horizon = float(horizon)
        if speeds is None:
            speeds = default_speeds(num_states, self.horizon, float(step or horizon / 100), kind)
        else:
            speeds = torch.as_tensor(speeds, dtype=torch.float64).detach().cpu()
            check_ndim(speeds, 1, "speeds", "(K,)")
            check_finite(speeds, "speeds")
        self._speeds: tuple[float, ...] = tuple(speeds.tolist())
        self.num_states = len(self._speeds)

    @property
    def speeds(self) -> Tensor:
        """Mean-reversion speeds of the memory states, float64 ``(K,)``, 1 / time."""
        return torch.tensor(self._speeds, dtype=torch.float64)

    def num_innovations(self, ts: Tensor) -> int:
        """Return ``R``: the Brownian increment and the further innovations of exact steps on this grid."""
        return step_factors(self._speeds, self.horizon, ts).load.shape[1]

    def initial_factor(self, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        r"""Return a factor of :math:`P_{ij}=1/(\gamma_i+\gamma_j)` for type I; None for type II."""
        if self.kind == "II":
            return None
        return stationary_factor(self._speeds).to(device=device, dtype=dtype)
