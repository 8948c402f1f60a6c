"""Three chaotic systems given by formulas, and what a noisy instrument with gaps sees of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_positive_int, check_real
from stochdyn.errors import UnavailableError

__all__ = ["ChaoticSeries", "lorenz63", "lorenz96", "rossler"]

# Relative and absolute tolerance of the integrator, far below what an observation could tell.
_TOLERANCE = 1e-8


@dataclass(frozen=True)
class ChaoticSeries:
    """A long path on an attractor.

    Attributes:
        times: The times ``(n,)``, in float64, from zero on.
        x: The states ``(n, d)`` at these times, in float64.
        velocity: The function from states ``(..., d)`` to their rates of change ``(..., d)``.
    """

    times: Tensor
    x: Tensor
    velocity: Callable[[Tensor], Tensor]

    def observe(
        self, obs_scale: float = 0.1, share: float = 1.0, generator: torch.Generator | int | None = 0
    ) -> Tensor:
        """Return what an instrument reads: states with errors, and NaN where a value wasn't read.

        Args:
            obs_scale: The standard deviation of the errors, in standard deviations of each component.
            share: The share of the values that are read, each for itself.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            ``(n, d)``, in the units of ``x``.

        Raises:
            InvalidInputError: If ``obs_scale`` is negative, or ``share`` isn't between 0 and 1.
        """
        check_real(obs_scale, "obs_scale", minimum=0.0)
        check_real(share, "share", above=0.0, maximum=1.0)
        source = as_generator(generator)
        error = torch.randn(self.x.shape, dtype=self.x.dtype, generator=source)
        read = torch.rand(self.x.shape, dtype=self.x.dtype, generator=source) < share
        values = self.x + obs_scale * self.x.std(0) * error
        return torch.where(read, values, torch.full_like(values, torch.nan))


def lorenz63(
    num_points: int = 10_000, dt: float = 0.04, generator: torch.Generator | int | None = 0
) -> ChaoticSeries:
    r"""Return a path of Lorenz' convection model, whose two wings are visited in an order that can't be foretold.

    .. math:: \dot x=10(y-x),\qquad\dot y=x(28-z)-y,\qquad\dot z=xy-\tfrac83z

    Args:
        num_points: The number of times.
        dt: The time between two of them.
        generator: The source of randomness for the start: a ``torch.Generator``, a seed, or None for torch's global one.

    Raises:
        InvalidInputError: If the number or the time isn't positive.

    Example:
        >>> series = lorenz63(100)
        >>> series.x.shape, series.observe(0.05, share=0.5).isnan().any().item()
        (torch.Size([100, 3]), True)

    Reference:
        E. N. Lorenz, Deterministic nonperiodic flow, J. Atmos. Sci. 20, 1963.
    """

    def rates(x: Any) -> list[Any]:
        a, b, c = x[..., 0], x[..., 1], x[..., 2]
        return [10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c]

    return _simulate(rates, torch.tensor([0.0, 0.0, 25.0]), 20.0, num_points, dt, generator)


def rossler(
    num_points: int = 10_000, dt: float = 0.2, generator: torch.Generator | int | None = 0
) -> ChaoticSeries:
    r"""Return a path of Rössler's spiral, which grows in a plane until a short spike out of it folds it back.

    .. math:: \dot x=-y-z,\qquad\dot y=x+0.2\,y,\qquad\dot z=0.2+z(x-5.7)

    Args:
        num_points: The number of times.
        dt: The time between two of them.
        generator: The source of randomness for the start: a ``torch.Generator``, a seed, or None for torch's global one.

    Raises:
        InvalidInputError: If the number or the time isn't positive.

    Example:
        >>> rossler(100).x.shape
        torch.Size([100, 3])

    Reference:
        O. E. Rössler, An equation for continuous chaos, Phys. Lett. A 57, 1976.
    """

    def rates(x: Any) -> list[Any]:
        a, b, c = x[..., 0], x[..., 1], x[..., 2]
        return [-b - c, a + 0.2 * b, 0.2 + c * (a - 5.7)]

    return _simulate(rates, torch.zeros(3), 100.0, num_points, dt, generator)


def lorenz96(
    num_points: int = 10_000,
    dt: float = 0.05,
    dim: int = 10,
    force: float = 8.0,
    generator: torch.Generator | int | None = 0,
) -> ChaoticSeries:
    r"""Return a path of Lorenz' model of the weather on a circle of latitude, chaotic in all of its places.

    .. math:: \dot x_i=(x_{i+1}-x_{i-2})\,x_{i-1}-x_i+F,\qquad x_{i+d}=x_i

    Args:
        num_points: The number of times.
        dt: The time between two of them; 0.05 stands for six hours.
        dim: The number d of places, four or more.
        force: The force F; the motion is chaotic at 8.
        generator: The source of randomness for the start: a ``torch.Generator``, a seed, or None for torch's global one.

    Raises:
        InvalidInputError: If a number or the time isn't positive.

    Example:
        >>> lorenz96(100).x.shape
        torch.Size([100, 10])

    Reference:
        E. N. Lorenz, Predictability: a problem partly solved, ECMWF Seminar on Predictability, 1996.
    """
    check_positive_int(dim, "dim", 4)
    check_real(force, "force")

    after, before, second = ([(i + k) % dim for i in range(dim)] for k in (1, -1, -2))

    def rates(x: Any) -> list[Any]:
        change = (x[..., after] - x[..., second]) * x[..., before] - x + force
        return [change[..., i] for i in range(dim)]

    return _simulate(rates, torch.full((dim,), float(force)), 20.0, num_points, dt, generator)


def _simulate(
    rates: Callable[[Any], list[Any]],
    center: Tensor,
    lead: float,
    num_points: int,
    dt: float,
    generator: torch.Generator | int | None,
) -> ChaoticSeries:
    """Integrate from near ``center``; the time ``lead`` in which the path reaches the attractor is left out.

    ``rates`` takes arrays as well as tensors: small arrays are several times faster, and the integrator asks often.
    """
    from scipy.integrate import solve_ivp

    check_positive_int(num_points, "num_points", 2)
    check_real(dt, "dt", above=0.0)
    x0 = center.double() + torch.randn(center.shape, dtype=torch.float64, generator=as_generator(generator))
    times = dt * torch.arange(num_points, dtype=torch.float64)

    end = lead + float(times[-1])
    found = solve_ivp(
        lambda t, x: np.array(rates(x)), (0.0, end), x0.numpy(), "DOP853", np.minimum(lead + times.numpy(), end),
        rtol=_TOLERANCE, atol=_TOLERANCE,
    )  # fmt: skip
    if not found.success:
        raise UnavailableError("the path couldn't be integrated", got=found.message)
    states = torch.from_numpy(np.ascontiguousarray(found.y.T))
    return ChaoticSeries(times, states, lambda x: torch.stack(rates(x), -1))
