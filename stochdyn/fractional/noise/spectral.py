"""Weights of memory states that give the increments the right law: a least-squares fit of the relative spectrum."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._caching import cached
from stochdyn.fractional.noise.moments import Kind, variance_constant
from stochdyn.fractional.noise.weights import WeightSolver, geometric_speeds

__all__ = ["SpectralSolver", "SpeedPlan", "enough_states", "plan_speeds", "read_plan", "spectral_solver"]

# Ranges of speeds, in units of 1/T and 1/dt, and how far beyond them the spectrum is fitted.
_SLOWEST, _FASTEST, _BEYOND = 0.1, 10.0, 3.0
# Ratios of neighbouring speeds: below the first, a wider range gains more than a denser one; above the second, a
# narrower one does.
_DENSE, _SPARSE = 4.6, 10.0
# The default number of states keeps the ratio below this.
_AMPLE = 7.0
# Widest range, in the same units: what lies outside is left to the lumped states.
_WIDEST = 1e6
# The lumped states are this much slower and faster than the others: they see neither horizon nor step.
_SLOWER, _FASTER = 1e-6, 1e7
_NODES_PER_E_FOLD = 8
_RIDGE = 1e-12
# Weight of the path error in type II, less where speeds are too sparse to serve both ends (ratio of neighbours above this).
_PATH_WEIGHT, _PATH_RATIO = 300.0, 4.7
_SMALLEST_LUMP = 1e-6  # relative to the variance of an increment
_PAIRED_FROM = 6  # states of type I from which two are spent on the remote past


class SpeedPlan(NamedTuple):
    """Speeds at horizon 1, and which of them are lumped."""

    speeds: tuple[float, ...]
    paired: (
        bool  # the two slowest carry the remote past (type I); the fastest carries what happens within a step
    )
    low: float  # the band of frequencies that is fitted
    high: float


def enough_states(resolution: float, kind: Kind) -> int:
    """Return the default number of states for steps of length ``resolution`` at horizon 1."""
    base = _FASTEST / (_SLOWEST * min(resolution, 1.0))
    return (0 if kind == "II" else 2) + max(8, 2 + math.ceil(math.log(base) / math.log(_AMPLE)))


def plan_speeds(num_states: int, resolution: float, kind: Kind) -> tuple[float, ...]:
    """Return the default speeds for horizon 1 and steps of length ``resolution`` (:func:`default_speeds`)."""
    steps = 1.0 / min(resolution, 1.0)
    paired = kind == "I" and num_states >= _PAIRED_FROM
    lumped = num_states >= 2
    count = num_states - 2 * paired - lumped
    base = _FASTEST * steps / _SLOWEST
    slowest, fastest = _SLOWEST, _FASTEST * steps
    gaps = count - 1
    if gaps > 0 and base < _DENSE**gaps:
        wider = min(math.exp(0.5 * (gaps * math.log(_DENSE) - math.log(base))), _WIDEST)
        slowest, fastest = slowest / wider, fastest * wider
    elif base > _SPARSE**gaps:
        narrower = min((base / _SPARSE**gaps) ** (2 / 3), 10.0)
        slowest, fastest = slowest * narrower**0.5, fastest / narrower
    middle = geometric_speeds(count, slowest, fastest).tolist()
    past = [_SLOWER * slowest, 2 * _SLOWER * slowest] if paired else []
    within = [_FASTER * fastest] if lumped else []
    return (*past, *middle, *within)


def read_plan(speeds: tuple[float, ...], horizon: float, kind: Kind) -> SpeedPlan | None:
    """Return what speeds are for, at horizon 1; None if no state is so fast that it stands for what happens within a step."""
    x = tuple(s * horizon for s in speeds)
    if len(x) < 2 or x[-2] <= 0 or x[-1] < 0.1 * _FASTER * x[-2]:
        return None
    paired = (
        kind == "I"
        and len(x) >= _PAIRED_FROM
        and x[0] > 0
        and math.isclose(x[1], 2 * x[0], rel_tol=1e-6)
        and x[1] < 10 * _SLOWER * x[2]
    )
    slowest = x[2 * paired]
    return SpeedPlan(x, paired, (10.0 if paired else _BEYOND) * slowest, _BEYOND * x[-2])


class SpectralSolver:
    r"""Weights that make the spectrum of the approximation right in relative terms, at every frequency that a grid sees.

    Fractional Brownian motion has the transfer function :math:`V^{-1/2}(i\omega)^{-a}`, :math:`a=H+\tfrac12`, and the
    approximation :math:`\sum_kw_k/(\gamma_k+i\omega)`. The divergence of Gaussian increments depends on the ratio of
    their spectra, equally at each frequency, so the weights minimise

    .. math::
        \int_{\omega_0}^{\omega_1}\Big|1-V^{1/2}(i\omega)^a\sum_k\frac{w_k}{\gamma_k+i\omega}\Big|^2
        q(\omega)\,\frac{d\omega}{\omega},

    with :math:`q=1` but for more weight next to the inverse step. For type II the squared relative path error is added, times
    :math:`\lambda_0(2H)^2`: within the horizon low frequencies count by the level of the path alone, which that fixes, and rough
    paths can't be followed within a step whatever the weights. What remains is lumped. Above :math:`\omega_1` lies
    what happens within a step: on the grid it is white noise in the level of the path, and a state much faster than the
    step carries its variance

    .. math:: v=\frac1\pi\int_{\omega_1}^\infty\Big(\tfrac1V\omega^{-2a}-|\cdot|^2\Big)d\omega,\qquad w^2=2\gamma v.

    Below :math:`\omega_0` lies the remote past of type I, which gives the whole path a random slope: the difference of
    two states much slower than the horizon carries the variance of that.

    Args:
        plan: The speeds at horizon 1, and what they are for.
        horizon: T.
        kind: The type of the noise: ``"I"`` (stationary increments) or ``"II"`` (a fresh start).
    """

    def __init__(self, plan: SpeedPlan, horizon: float, kind: Kind) -> None:
        self.plan, self.horizon, self.kind = plan, horizon, kind
        speeds = torch.tensor(plan.speeds, dtype=torch.float64)
        self.middle = speeds[2 * plan.paired : -1]
        self.path = WeightSolver(plan.speeds, 1.0, kind)
        log_low, log_high = math.log(plan.low), math.log(plan.high)
        count = max(32, math.ceil((log_high - log_low) * _NODES_PER_E_FOLD))
        self.log_frequency = torch.linspace(log_low, log_high, count, dtype=torch.float64)
        frequency = self.log_frequency.exp()
        # in units of the inverse step: the last decade counts a little more, as it has most of the frequencies
        unit = frequency * _BEYOND * _FASTEST / plan.high
        importance = 1 + unit / (1 + (unit / 3) ** 2)
        squared = self.middle**2 + frequency[:, None] ** 2
        rows = torch.stack([self.middle / squared, -frequency[:, None] / squared])  # real and imaginary parts
        density = importance * (log_high - log_low) / count
        self.root = density.sqrt()
        self.rows = rows * self.root[:, None]
        # squares of the path error: |half' (A w - b)|^2 = w'Aw - 2b'w + const with inverse(A) = half half'
        self.pull = 0.0
        if kind == "II":
            self.level = WeightSolver(tuple(self.middle.tolist()), 1.0, kind)
            self.level_rows = self.level.half.T @ self.level.gram
            ratio = float((self.middle[-1] / self.middle[0]) ** (1 / max(len(self.middle) - 1, 1)))
            self.pull = _PATH_WEIGHT * min(1.0, (_PATH_RATIO / ratio) ** 4) if len(self.middle) > 1 else 0.0

    def __call__(self, hurst: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights ``(*batch, K)`` and relative path errors ``(*batch)`` for float64 ``hurst (*batch)``."""
        middle = self._fit(hurst)
        parts = [middle, (2 * self.plan.speeds[-1] * self._within_step(hurst, middle)).sqrt()[..., None]]
        if self.plan.paired:
            slow = self.plan.speeds[0]
            # Var(slope) = w^2 slow / 6 for w [Y_slow - Y_2slow] at its stationary law
            pair = (6 / slow * self._remote_past(hurst, middle)).sqrt()[..., None]
            parts = [pair, -pair, *parts]
        w = torch.cat(parts, -1)
        with torch.no_grad():
            error = self.path.error_of(w, hurst)
        return w * torch.exp((hurst - 0.5) * math.log(self.horizon))[..., None], error

    def _fit(self, hurst: Tensor) -> Tensor:
        """Least squares for the states in between, ``(*batch, k)``: QR of the scaled rows, with a ridge below them."""
        device = hurst.device
        rows, log_frequency, root = (x.to(device) for x in (self.rows, self.log_frequency, self.root))
        a = (hurst + 0.5)[..., None]
        gain = torch.exp(a * log_frequency + 0.5 * variance_constant(hurst, self.kind).log()[..., None])
        # columns have the phase of (i omega)^a taken off, so that the target is its conjugate phase
        matrix = torch.cat([gain[..., None] * rows[0], gain[..., None] * rows[1]], -2)
        phase = 0.5 * math.pi * a
        target = torch.cat([root * torch.cos(phase), -root * torch.sin(phase)], -1)
        if self.pull:
            share = (2 * hurst) * (self.pull * (2 * hurst + 1)).sqrt()  # over the mean variance 1 / (2H + 1)
            matrix = torch.cat([matrix, share[..., None, None] * self.level_rows.to(device)], -2)
            moments = self.level.moments(hurst) @ self.level.half.to(device)
            target = torch.cat([target, share[..., None] * moments], -1)
        # Columns of norm one, so that the ridge means the same for every state.
        scale = matrix.square().sum(-2).rsqrt()
        count = scale.shape[-1]
        ridge = math.sqrt(_RIDGE) * torch.eye(count, dtype=torch.float64, device=device)
        matrix = torch.cat([matrix * scale[..., None, :], ridge.expand(*scale.shape, count)], -2)
        target = torch.nn.functional.pad(target, (0, count))
        q, r = torch.linalg.qr(matrix)
        solution = torch.linalg.solve_triangular(r, q.mT @ target[..., None], upper=True)
        return solution[..., 0] * scale

    def _within_step(self, hurst: Tensor, w: Tensor) -> Tensor:
        """Variance of the level above the fitted band, positive, ``(*batch)``."""
        high, g = self.plan.high, self.middle.to(hurst.device)
        # The integral of |sum_k w_k / (g_k + i omega)|^2 from omega_1 on: pairs give (atan(g_i/omega_1) + atan(g_j/omega_1)) / (g_i + g_j).
        angle = torch.atan(g / high)
        total = (angle[:, None] + angle) / (g[:, None] + g)
        found = ((w @ total) * w).sum(-1)
        exact = high ** (-2 * hurst) / (2 * hurst * variance_constant(hurst, self.kind))
        return _positive((exact - found) / math.pi, (_BEYOND * _FASTEST / high) ** (2 * hurst))

    def _remote_past(self, hurst: Tensor, w: Tensor) -> Tensor:
        """Variance of the slope below the fitted band, positive, ``(*batch)``."""
        low, g = self.plan.low, self.middle.to(hurst.device)
        # The same of omega^2 |.|^2 below omega_0, since a slope has omega^2 times the spectrum of a level.
        part = g * (low - g * torch.atan(low / g))
        total = (part[:, None] + part) / (g[:, None] + g)
        found = ((w @ total) * w).sum(-1)
        exact = low ** (2 - 2 * hurst) / ((2 - 2 * hurst) * variance_constant(hurst, "I"))
        return _positive((exact - found) / math.pi, torch.ones_like(hurst))


def _positive(value: Tensor, unit: Tensor) -> Tensor:
    """Return a smooth positive part, at least about 1e-6 units where ``value`` is negative."""
    floor = _SMALLEST_LUMP * unit
    return 0.5 * (value + (value.square() + floor.square()).sqrt())


@cached(64)
def spectral_solver(plan: SpeedPlan, horizon: float, kind: Kind) -> SpectralSolver:
    """Return the (cached) :class:`SpectralSolver` of a plan."""
    return SpectralSolver(plan, horizon, kind)
