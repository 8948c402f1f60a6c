"""The memory states of fractional noise: their speeds, how they start, and what an exact step of them draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_choice, check_positive, check_positive_int
from stochdyn.core.sde.noise import NoiseProcess
from stochdyn.errors import InvalidInputError
from stochdyn.fractional.noise._steps import stationary_factor, step_factors
from stochdyn.fractional.noise.moments import Kind
from stochdyn.fractional.noise.spectral import (
    SpectralSolver,
    enough_states,
    plan_speeds,
    read_plan,
    spectral_solver,
)
from stochdyn.fractional.noise.weights import WeightSolver, weight_solver

__all__ = ["MemoryStates", "default_speeds"]

_DEFAULT_STEPS = 100


def default_speeds(
    num_states: int | None = None, horizon: float = 1.0, dt: float | None = None, kind: Kind = "II"
) -> Tensor:
    r"""Return the speeds that :class:`MarkovNoise` uses unless told otherwise.

    Most are spaced evenly on a logarithmic scale between :math:`0.1/T` and :math:`10/\Delta`. Where that leaves the
    ratio of neighbours below 4.6 the range is widened, and where above 10 it is narrowed a little. The last state is
    :math:`10^7` times faster than that: it stands for all that happens within a step. In type I, from six states on, the
    first two are a million times slower than the others: together they carry the remote past.

    Args:
        num_states: The number K of memory states; by default as many as the range from step to horizon asks for: for up to
            1000 steps 8 for type II and 10 for type I, and one more for each factor of 7.
        horizon: The length T of the time interval.
        dt: The typical time step, the smallest that matters; ``horizon / 100`` by default.
        kind: The type of the noise: ``"I"`` (stationary increments) or ``"II"`` (a fresh start).

    Returns:
        float64 ``(K,)``, increasing.

    Raises:
        InvalidInputError: For a number of states, a horizon or a step that isn't positive, or an unknown kind.

    Example:
        >>> [f"{s:.3g}" for s in default_speeds(5, 1.0, 0.01).tolist()]
        ['0.215', '2.15', '21.5', '215', '2.15e+09']
    """
    num_states, horizon, dt = _check_sizes(num_states, horizon, dt, kind)
    return torch.tensor(plan_speeds(num_states, dt / horizon, kind), dtype=torch.float64) / horizon


def _check_sizes(num_states: object, horizon: object, dt: object, kind: object) -> tuple[int, float, float]:
    check_choice(kind, ("I", "II"), "kind")
    if num_states is not None:
        check_positive_int(num_states, "num_states")
    check_positive(horizon, "horizon")
    if dt is None:
        dt = float(horizon) / _DEFAULT_STEPS  # type: ignore[arg-type]
    check_positive(dt, "dt")
    if num_states is None:
        num_states = enough_states(float(dt) / float(horizon), kind)  # type: ignore[arg-type]
    return int(num_states), float(horizon), float(dt)  # type: ignore[arg-type, call-overload]


class MemoryStates(NoiseProcess):
    """Noise carried by Ornstein-Uhlenbeck states of one Brownian motion per channel; subclasses say how they are weighted.

    Args:
        num_states: The number K of states, unless ``speeds`` are given.
        horizon: The length of the longest grid.
        dt: The typical time step; ``horizon / 100`` if None.
        kind: The type of the noise: ``"I"`` (stationary states at the start) or ``"II"`` (states that start at 0).
        speeds: The increasing speeds ``(K,)`` instead of :func:`default_speeds`.

    Raises:
        InvalidInputError: For speeds, sizes or a kind that make no sense, or a number of states that isn't that of the
            speeds.
    """

    def __init__(
        self,
        num_states: int | None,
        horizon: float,
        dt: float | None,
        kind: Kind,
        speeds: Tensor | Sequence[float] | None,
    ) -> None:
        super().__init__()
        sizes = _check_sizes(num_states, horizon, dt, kind)
        self.kind: Kind = kind
        self.horizon, self.dt = sizes[1], sizes[2]
        if speeds is None:
            self._speeds: tuple[float, ...] = tuple(default_speeds(*sizes, kind).tolist())
        else:
            given = as_tensor(speeds, "speeds", 1, "(K,)", like=torch.zeros((), dtype=torch.float64))
            given = given.detach().to("cpu", torch.float64)
            self._speeds = tuple(given.tolist())
            if num_states is not None and num_states != len(self._speeds):
                raise InvalidInputError(
                    "num_states and speeds disagree",
                    got=f"num_states={num_states} and {len(self._speeds)} speeds",
                    hint="give one of them",
                )
        self.num_states = len(self._speeds)
        self._solver()  # refuses speeds that make no sense

    def _solver(self) -> SpectralSolver | WeightSolver:
        """Return weights as a function of the Hurst index: for the default speeds by the law of increments, else by the path error."""
        plan = read_plan(self._speeds, self.horizon, self.kind)
        if plan is None:
            return weight_solver(self._speeds, self.horizon, self.kind)
        return spectral_solver(plan, self.horizon, self.kind)

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
