"""Self-propelled particles that repel each other: two on a ring, solved, and many in a trap."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_positive_int, check_real
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.methods import Heun
from stochdyn.datasets.driven import DrivenSystem

__all__ = ["swimmer_pair", "trapped_swimmers"]

# Propulsion, repulsion and friction of the swimmers, in the units of the published simulations.
_RELAXATION = 0.1
_MOBILITY = 0.1
_STIFFNESS = 2.5
_SHARPNESS = 7.5
_DIAMETER = 2.0
_RING = 16.0
_TRAP = 0.05
# Points of the ring and polynomials of the propulsion in the series of the pair's density.
_POINTS = 257
_ORDERS = 48
# Pairs of particles in the trap that are simulated at once.
_PAIRS = 2**17


def _repulsion(x: Tensor) -> Tensor:
    """Return the force between two swimmers on the ring."""
    place = torch.remainder(x, _RING)
    gap = torch.minimum(place, _RING - place)
    push = _STIFFNESS * torch.nn.functional.softplus(_SHARPNESS * (_DIAMETER - gap)) / _SHARPNESS
    return torch.where(place < 0.5 * _RING, push, -push)


@dataclass(frozen=True)
class _PairDensity:
    r"""The steady density of the pair, :math:`\rho(x,g)=N(g)\sum_nc_n(x)\,h_n(g)`, with the Hermite polynomials of unit norm.

    The stationary equation links neighbouring orders only,

    .. math:: -(\varphi c_n)'+\epsilon c_n''-\gamma nc_n=v_0\big(\sqrt n\,c_{n-1}'+\sqrt{n+1}\,c_{n+1}'\big),

    and is solved from the highest one down, with derivatives of trigonometric series.

    Attributes:
        rate: The entropy production rate :math:`v_0^2/\epsilon+(v_0/\epsilon)E[g\varphi]`.
        waves: The Fourier coefficients of the :math:`c_n`: of cosines and, below, of sines, ``(2 K, N)``.
    """

    rate: float
    waves: Tensor

    def orders(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients and their derivatives at places ``(n,)``, ``(n, N)`` each."""
        waves = self.waves.to(x.device)
        k = 2 * math.pi / _RING * torch.arange(len(waves) // 2, dtype=x.dtype, device=x.device)
        angle = x.unsqueeze(-1) * k
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, sin], -1) @ waves, torch.cat([-k * sin, k * cos], -1) @ waves

    def log_slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the density over the propulsion's normal density, and the score, at states ``(n, 2)``."""
        x, g = z.unbind(-1)
        value, slope = self.orders(x)
        h = _hermite(g, value.shape[-1])
        order = torch.arange(1, value.shape[-1], dtype=z.dtype, device=z.device).sqrt()
        total = (value * h).sum(-1)
        # h_n' = sqrt(n) h_{n-1}
        along = (slope * h).sum(-1)
        across = (value[..., 1:] * order * h[..., :-1]).sum(-1)
        return total, torch.stack([along / total, across / total - g], -1)

    def draw(self, n: int, source: torch.Generator) -> Tensor:
        """Draw independent states ``(n, 2)``: the place from its marginal, and then the propulsion, by their distribution functions."""
        grid = torch.linspace(0, _RING, 8193, dtype=torch.float64)
        density = self.orders(grid)[0][:, 0].clamp(min=0)
        cumulative = torch.cat([grid.new_zeros(1), (0.5 * (density[1:] + density[:-1])).cumsum(0)])
        u = torch.rand(2, n, dtype=torch.float64, generator=source)
        level = u[0] * cumulative[-1]
        cell = torch.searchsorted(cumulative, level, right=True).clamp(1, len(grid) - 1)
        low, high = cumulative[cell - 1], cumulative[cell]
        x = grid[cell - 1] + (level - low) / (high - low) * grid[1]
        value = self.orders(x)[0]
        order = torch.arange(1, value.shape[-1], dtype=torch.float64).sqrt()
        weight = value[:, 1:] / value[:, :1] / order
        # P(g < a | x) = Phi(a) - N(a) sum_n c_n h_{n-1}(a) / (c_0 sqrt n), by bisection
        left, right = torch.full_like(x, -9.0), torch.full_like(x, 9.0)
        for _ in range(50):
            a = 0.5 * (left + right)
            normal = torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
            below = torch.special.ndtr(a) - normal * (weight * _hermite(a, len(order))).sum(-1)
            left, right = torch.where(below < u[1], a, left), torch.where(below < u[1], right, a)
        return torch.stack([x, 0.5 * (left + right)], -1)


def _hermite(g: Tensor, number: int) -> Tensor:
    """Return the first Hermite polynomials that are orthonormal under the standard normal law, ``(..., number)``."""
    values = [torch.ones_like(g), g]
    for n in range(1, number - 1):
        values.append((g * values[n] - math.sqrt(n) * values[n - 1]) / math.sqrt(n + 1))
    return torch.stack(values[:number], -1)


@functools.lru_cache(maxsize=8)
def _pair_density(speed: float) -> _PairDensity:
    """Solve the stationary Fokker-Planck equation of the pair."""
    size = _POINTS
    x = _RING * np.arange(size) / size
    force = _repulsion(torch.as_tensor(x)).numpy()
    # The derivative of a trigonometric series through an odd number of points.
    apart = np.subtract.outer(np.arange(size), np.arange(size))
    sine = np.where(apart == 0, 1.0, np.sin(np.pi * apart / size))
    slope = np.where(apart == 0, 0.0, np.pi / _RING * (-1.0) ** apart / sine)
    here = _MOBILITY * slope @ slope - slope * force
    up = np.zeros_like(slope)
    ratios = []  # c_n = up c_{n-1}
    for n in range(_ORDERS, 0, -1):
        own = here - _RELAXATION * n * np.eye(size) - speed * math.sqrt(n + 1) * slope @ up
        up = np.linalg.solve(own, speed * math.sqrt(n) * slope)
        ratios.append(up)
    # The lowest order has a conserved sum: the equation with the norm added to every row.
    coefficients = [np.linalg.solve(here - speed * slope @ up + 1 / size, np.full(size, 1 / _RING))]
    for up in reversed(ratios):
        coefficients.append(up @ coefficients[-1])
    c = np.stack(coefficients, -1)
    rate = speed**2 / _MOBILITY + speed / _MOBILITY * float(c[:, 1] @ force) * _RING / size
    series = np.fft.rfft(c, axis=0) / size
    series[1:] *= 2
    return _PairDensity(rate, torch.as_tensor(np.concatenate([series.real, -series.imag])))


def swimmer_pair(speed: float = 0.25) -> DrivenSystem:
    r"""Return the distance of two self-propelled particles on a ring, and the difference of their propulsions.

    .. math:: dx=(v_0g+\varphi(x))\,dt+\sqrt{2\epsilon}\,dW,\qquad dg=-\gamma g\,dt+\sqrt{2\gamma}\,dW'

    with a soft repulsion :math:`\varphi` below a distance of 2, a ring of length 16 and :math:`\epsilon=\gamma=0.1`. The propulsion is taken
    as even under time reversal. Density, score, draws and rate are those of a series in Fourier modes and Hermite polynomials: the rate is right
    to 1e-7 up to speeds of .5, and to 1e-4 at 1, where the two begin to pass through each other.

    Args:
        speed: The speed :math:`v_0`, between -1 and 1.

    Raises:
        InvalidInputError: If the speed isn't between -1 and 1.

    Reference:
        N. M. Boffi and E. Vanden-Eijnden, "Deep learning probability flows and entropy production rates in active matter", 2024.
    """
    check_real(speed, "speed", minimum=-1.0, maximum=1.0)
    v0 = float(speed)
    density = _pair_density(v0)
    diffusion = torch.tensor([2 * _MOBILITY, 2 * _RELAXATION], dtype=torch.float64).sqrt()

    def drift(t: Tensor, z: Tensor) -> Tensor:
        x, g = z.unbind(-1)
        return torch.stack([v0 * g + _repulsion(x), -_RELAXATION * g], -1)

    def base_score(z: Tensor) -> Tensor:
        x, g = z.unbind(-1)
        return torch.stack([_repulsion(x) / _MOBILITY, -g], -1)

    def score(z: Tensor) -> Tensor:
        flat = z.reshape(-1, 2).double()
        total, slopes = density.log_slopes(flat)
        # Where the density is below the error of its series, deep in contact, the force decides.
        safe = (total > 1e-9).unsqueeze(-1)
        return torch.where(safe, slopes, base_score(flat)).reshape(z.shape).to(z)

    return DrivenSystem(
        SDE(drift, diffusion), density.rate, score, base_score, density.draw,
        torch.tensor([_RING, 0.0], dtype=torch.float64),
    )  # fmt: skip


def trapped_swimmers(num_particles: int = 16, speed: float = 0.2) -> DrivenSystem:
    r"""Return self-propelled particles in the plane that repel each other in a harmonic trap.

    .. math::
        dr_i=(v_0g_i+F_i(r))\,dt+\sqrt{2\epsilon}\,dW_i,\qquad dg_i=-\gamma g_i\,dt+\sqrt{2\gamma}\,dW_i'

    A state holds particle after particle, position before propulsion, ``(..., 4 N)``. There is no exact rate;
    :func:`stochdyn.nonequilibrium.sum_rule` gives it from draws.

    Args:
        num_particles: The number N of particles.
        speed: The speed :math:`v_0`.

    Reference:
        N. M. Boffi and E. Vanden-Eijnden, "Deep learning probability flows and entropy production rates in active matter", 2024.
    """
    check_positive_int(num_particles, "num_particles")
    check_real(speed, "speed")
    v0 = float(speed)
    scale = torch.tensor([2 * _MOBILITY] * 2 + [2 * _RELAXATION] * 2, dtype=torch.float64).sqrt()
    diffusion = scale.repeat(num_particles)

    def force(r: Tensor) -> Tensor:
        # One component of the distances at a time: an axis of two entries at the end would halve the speed.
        x, y = r.unbind(-1)
        square = (x.unsqueeze(-1) - x.unsqueeze(-2)).square() + (y.unsqueeze(-1) - y.unsqueeze(-2)).square()
        # A particle doesn't repel itself, and the direction between two at one place is left at zero.
        apart = square > 0
        distance = torch.where(apart, square, 1.0).sqrt()
        push = _STIFFNESS * torch.nn.functional.softplus(_SHARPNESS * (_DIAMETER - distance)) / _SHARPNESS
        pull = torch.where(apart, push / distance, 0.0)
        # F_i = sum_j w_ij (r_i - r_j) - A r_i
        return (pull.sum(-1, keepdim=True) - _TRAP) * r - pull @ r

    def drift(t: Tensor, z: Tensor) -> Tensor:
        r, g = z.unflatten(-1, (-1, 2, 2)).unbind(-2)
        return torch.stack([v0 * g + force(r), -_RELAXATION * g], -2).flatten(-3)

    def base_score(z: Tensor) -> Tensor:
        r, g = z.unflatten(-1, (-1, 2, 2)).unbind(-2)
        return torch.stack([force(r) / _MOBILITY, -g], -2).flatten(-3)

    sde = SDE(drift, diffusion)

    def draw(n: int, source: torch.Generator) -> Tensor:
        # From the law of a free swimmer, wider by the room that the others take; what that gets wrong is gone by a factor exp(-6) at the end.
        lag = v0 / (_TRAP + _RELAXATION)
        width = math.sqrt(_MOBILITY / _TRAP + v0 * lag / _TRAP + 0.19 * num_particles)
        z, g = torch.randn(2, n, num_particles, 2, dtype=torch.float64, generator=source)
        r = lag * g + math.sqrt(width**2 - lag**2) * z
        start = torch.stack([r, g], -2).flatten(1)
        # In pieces whose pairs stay in the processor's memory: all at once would take twice the time.
        pieces = start.split(max(1, _PAIRS // num_particles**2))
        return torch.cat([_settle(sde, piece, 60.0, 0.025, source) for piece in pieces])

    return DrivenSystem(
        sde, None, None, base_score, draw, torch.zeros(4 * num_particles, dtype=torch.float64)
    )


def _settle(sde: SDE, x: Tensor, horizon: float, dt: float, source: torch.Generator) -> Tensor:
    """Return where states are after ``horizon``, keeping only the end of each stretch of steps.

    The steps are Heun's. Euler's would draw from another law, whose spread under a force of stiffness k is too large by k dt / 2: little
    in itself, but the sum rule of entropy production multiplies it by k for each stiff direction.
    """
    stretch = 100
    ts = dt * torch.arange(stretch + 1, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(math.ceil(horizon / (stretch * dt))):
            x = DiffusionMeasure(x, sde, method=Heun()).sample(ts, generator=source).x[..., -1, :]
    return x
