"""Driven steady states with known entropy production: bead chains, a gyrator, rings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from stochdyn._checks import DOUBLE, as_generator, as_tensor, check_positive_int, check_real
from stochdyn.core.sde.coefficients import Diagonal
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError

__all__ = [
    "DrivenSystem",
    "bead_chain",
    "brownian_gyrator",
    "driven_ring",
]


@dataclass(frozen=True)
class DrivenSystem:
    """A steady state that carries a current, with what is known of it exactly.

    Attributes:
        sde: The equation.
        entropy_production: The entropy production rate in 1/time, all components even; None where no exact number is known.
        score: The gradient of the steady log density, ``(..., d)`` to ``(..., d)``; None where it isn't known.
        base_score: A score that is right where nothing is driven, to start a network from; None for the linear systems.
        draw: A function of a number and a generator that draws independent states, ``(n, d)``.
        periods: The period of each component, ``(d,)``, zero where it has none.
    """

    sde: SDE
    entropy_production: float | None
    score: Callable[[Tensor], Tensor] | None
    base_score: Callable[[Tensor], Tensor] | None
    draw: Callable[[int, torch.Generator], Tensor]
    periods: Tensor

    def sample(self, num_samples: int, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw independent states, ``(num_samples, d)`` in double precision.

        Args:
            num_samples: The number of states.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        """
        check_positive_int(num_samples, "num_samples")
        source = as_generator(generator)
        return self.draw(num_samples, source if source is not None else torch.default_generator)


def _linear(a: Tensor, temperatures: Tensor) -> DrivenSystem:
    """Return the system ``dX = a X dt + sqrt(2 T) dW``."""
    c = torch.as_tensor(solve_continuous_lyapunov(a.numpy(), -2 * torch.diag(temperatures).numpy()))
    precision, root = torch.linalg.inv(c), torch.linalg.cholesky(c)
    # σ = tr(Aᵀ D⁻¹ A C) + tr A
    rate = float(torch.trace(a.mT @ (a / temperatures[:, None]) @ c) + torch.trace(a))

    def draw(n: int, source: torch.Generator) -> Tensor:
        return torch.randn(n, len(a), dtype=a.dtype, generator=source) @ root.mT

    def drift(t: Tensor, x: Tensor) -> Tensor:
        return x @ a.to(x).mT

    return DrivenSystem(
        SDE(drift, Diagonal((2 * temperatures).sqrt())), rate, lambda x: -x @ precision.to(x), None, draw,
        torch.zeros(len(a), dtype=a.dtype),
    )  # fmt: skip


def bead_chain(num_beads: int = 5, temperatures: Sequence[float] = (1.0, 10.0)) -> DrivenSystem:
    r"""Return a chain of beads between two walls, whose temperatures rise linearly from one end to the other.

    .. math:: dX_i=(X_{i-1}-2X_i+X_{i+1})\,dt+\sqrt{2T_i}\,dW_i,\qquad X_0=X_{N+1}=0

    Heat flows from the hot end to the cold one. With five beads and temperatures 1 and 10 the rate is 0.629817.

    Args:
        num_beads: The number of beads, two or more.
        temperatures: The temperatures of the first and of the last bead.

    Raises:
        InvalidInputError: If a temperature isn't positive.
    """
    check_positive_int(num_beads, "num_beads", 2)
    for value in temperatures:
        check_real(value, "temperatures", above=0.0)
    cold, hot = temperatures
    one = torch.ones(num_beads - 1, dtype=torch.float64)
    a = torch.diag(one, 1) + torch.diag(one, -1) - 2 * torch.eye(num_beads, dtype=torch.float64)
    return _linear(a, torch.linspace(float(cold), float(hot), num_beads, dtype=torch.float64))


def brownian_gyrator(
    stiffness: object = ((2.0, 1.0), (1.0, 2.0)), temperatures: Sequence[float] = (1.0, 3.0)
) -> DrivenSystem:
    r"""Return a particle in an anisotropic trap whose two directions have heat baths of their own.

    .. math:: dX=-KX\,dt+\mathrm{diag}(\sqrt{2T_1},\sqrt{2T_2})\,dW,\qquad
        \sigma=\frac{(T_1-T_2)^2K_{12}^2}{T_1T_2(K_{11}+K_{22})}

    Args:
        stiffness: The symmetric positive matrix K, ``(2, 2)``.
        temperatures: The temperatures of the two directions.

    Raises:
        InvalidInputError: If K isn't symmetric and positive, or a temperature isn't positive.
    """
    k = as_tensor(stiffness, "stiffness", 2, "(2, 2)", like=DOUBLE).double()
    if k.shape != (2, 2) or not torch.equal(k, k.mT) or float(torch.linalg.eigvalsh(k)[0]) <= 0:
        raise InvalidInputError("stiffness must be symmetric and positive", got=k.tolist())
    for value in temperatures:
        check_real(value, "temperatures", above=0.0)
    return _linear(-k, torch.tensor([float(v) for v in temperatures], dtype=torch.float64))


def driven_ring(force: float = 1.0, barrier: float = 1.0, modulation: float = 0.0) -> DrivenSystem:
    r"""Return a particle on a ring of length :math:`2\pi` under a constant force and a periodic potential.

    .. math:: dX=(f+D')\,dt+\sqrt{2D}\,dW,\qquad f(x)=f_0+V_0\sin x,\qquad D(x)=1+m\cos x

    The noise depends on the state where ``modulation`` isn't zero; :math:`f` is the drift of thermodynamics, and without a constant force
    there is no entropy production whatever the noise. Density, score and rate are exact, by quadrature.

    Args:
        force: The constant force :math:`f_0`.
        barrier: The amplitude :math:`V_0` of the periodic force.
        modulation: The amplitude :math:`m` of the noise's modulation, between -1 and 1.

    Raises:
        InvalidInputError: If the modulation isn't between -1 and 1.
    """
    check_real(force, "force")
    check_real(barrier, "barrier")
    check_real(modulation, "modulation", above=-1.0, below=1.0)
    f0, v0, m = float(force), float(barrier), float(modulation)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    z = torch.as_tensor(math.pi * (nodes + 1))
    w = torch.as_tensor(math.pi * weights)
    root = math.sqrt(1 - m * m)
    q = 0.0 if m == 0 else (1 - root) / m

    def potential(x: Tensor) -> Tensor:
        # Φ with Φ' = -f / D; the integral of 1 / (1 + m cos x) without its branch cuts.
        angle = (x - 2 * torch.atan2(q * x.sin(), 1 + q * x.cos())) / root
        periodic = v0 * x.cos() if m == 0 else v0 * torch.log1p(m * x.cos()) / m
        return periodic - f0 * angle

    drop = -2 * math.pi * f0 / root

    def unnormalised(x: Tensor) -> Tensor:
        # ∫ over one period of exp(Φ(x + z) - Φ(x)) / D(x + z)
        y = x.double()[..., None] + z
        return ((potential(y) - potential(x.double())[..., None]).exp() / (1 + m * y.cos()) * w).sum(-1)

    grid = torch.linspace(0, 2 * math.pi, 4097, dtype=torch.float64)
    density = unnormalised(grid)
    # The rule of rectangles is exact to rounding for smooth periodic functions.
    norm = float(density[:-1].mean()) * 2 * math.pi
    current = -math.expm1(drop) / norm

    rho = density / norm
    # From D ρ' = f ρ - J the slope is known as well: between the points of the grid the density is a cubic of Hermite's.
    slope = ((f0 + v0 * grid.sin()) * rho - current) / (1 + m * grid.cos())
    width = float(grid[1])

    def score(x: Tensor) -> Tensor:
        # D ∇log ρ = f - J / ρ
        place = torch.remainder(x.double(), 2 * math.pi) / width
        cell = place.detach().floor().long().clamp(0, len(grid) - 2)
        u = place - cell
        low, high = rho[cell], rho[cell + 1]
        rise, fall = width * slope[cell], width * slope[cell + 1]
        gap = high - low
        cubic = low + u * (rise + u * (3 * gap - 2 * rise - fall + u * (rise + fall - 2 * gap)))
        return ((f0 + v0 * x.sin() - (current / cubic).to(x)) / (1 + m * x.cos())).to(x)

    cumulative = torch.cat([grid.new_zeros(1), (0.5 * (density[1:] + density[:-1])).cumsum(0)])
    cumulative = cumulative / cumulative[-1]

    def draw(n: int, source: torch.Generator) -> Tensor:
        u = torch.rand(n, dtype=torch.float64, generator=source)
        place = torch.searchsorted(cumulative, u, right=True).clamp(1, len(grid) - 1)
        low, high = cumulative[place - 1], cumulative[place]
        return (grid[place - 1] + (u - low) / (high - low) * (grid[1] - grid[0]))[:, None]

    def drift(t: Tensor, x: Tensor) -> Tensor:
        return f0 + (v0 - m) * x.sin()

    def diffusion(t: Tensor, x: Tensor) -> Diagonal:
        return Diagonal((2 + 2 * m * x.cos()).sqrt())

    def base_score(x: Tensor) -> Tensor:
        return v0 * x.sin() / (1 + m * x.cos())

    sde = SDE(drift, math.sqrt(2.0) if m == 0 else diffusion)
    return DrivenSystem(
        sde, -current * drop, score, base_score, draw, torch.full((1,), 2 * math.pi, dtype=torch.float64)
    )
