"""Simulated snapshots of two oscillators with known parameters: Lotka-Volterra and the repressilator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_time_grid, check_positive, check_positive_int, check_real
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import DiffusionError, TimeGridError

__all__ = ["SimulatedSnapshots", "lotka_volterra", "repressilator"]


class SimulatedSnapshots(NamedTuple):
    """Fresh particles at every time, and what they were made from.

    Attributes:
        times: The times of data, ``(I,)``, float64.
        samples: The snapshots as ``I`` tensors ``(n, d)``.
        parameters: The true parameters by name.
        diffusion: The true strength of the noise, in units of state per root of time.
    """

    times: Tensor
    samples: list[Tensor]
    parameters: dict[str, float]
    diffusion: float


def lotka_volterra(
    num_particles: int = 50,
    times: Tensor | Sequence[float] | None = None,
    diffusion: float = 0.1,
    generator: torch.Generator | int | None = 0,
    *,
    dt: float = 0.01,
) -> SimulatedSnapshots:
    r"""Simulate snapshots of predators and their prey.

    .. math::
        dX=(\alpha X-\beta XY)\,dt+\sigma\,dW^1,\qquad dY=(\delta XY-\gamma Y)\,dt+\sigma\,dW^2

    with :math:`(\alpha,\beta,\gamma,\delta)=(1,0.4,0.4,0.1)`, :math:`X_0` uniform on :math:`[5,5.1]` and
    :math:`Y_0` on :math:`[4,4.1]`. Each snapshot has particles of its own, so nobody is seen twice.

    Args:
        num_particles: The number of particles of each snapshot.
        times: The times ``(I,)`` of the snapshots; 0, 1, ..., 8 if None.
        diffusion: The noise strength :math:`\sigma`, in units of state per root of time.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        dt: The largest time step of the Euler scheme.

    Returns:
        Snapshots in float64.

    Raises:
        TimeGridError: If the times don't increase, or start before zero.
        InvalidInputError: For sizes that aren't positive.

    Example:
        >>> data = lotka_volterra(num_particles=20)
        >>> len(data.samples), tuple(data.samples[0].shape), data.parameters["delta"]
        (9, (20, 2), 0.1)

    Reference: Shen, Berlinghieri & Broderick (2025), Multi-marginal Schrödinger bridges with iterative
    reference refinement, experiments.
    """
    parameters = {"alpha": 1.0, "beta": 0.4, "gamma": 0.4, "delta": 0.1}

    def drift(t: Tensor, x: Tensor) -> Tensor:
        prey, predators = x.unbind(-1)
        return torch.stack((prey * (1.0 - 0.4 * predators), predators * (0.1 * prey - 0.4)), -1)

    low = torch.tensor([5.0, 4.0], dtype=torch.float64)
    grid = torch.arange(9.0, dtype=torch.float64) if times is None else times
    return _simulate(
        drift, low, low + 0.1, grid, num_particles, diffusion, dt, as_generator(generator), parameters
    )


def repressilator(
    num_particles: int = 50,
    times: Tensor | Sequence[float] | None = None,
    diffusion: float = 0.1,
    generator: torch.Generator | int | None = 0,
    *,
    dt: float = 0.01,
) -> SimulatedSnapshots:
    r"""Simulate snapshots of three genes, each of which represses the next.

    .. math:: dX_i=\Big(\frac{\beta}{1+(X_{i-1}/k)^n}-\gamma X_i\Big)dt+\sigma\,dW_i,\qquad X_0:=X_3

    with :math:`(\beta,n,k,\gamma)=(10,3,1,1)`; the first two start uniformly on :math:`[1,1.1]`, the third on
    :math:`[2,2.1]`. Arguments, result and errors are those of :func:`lotka_volterra`; the default times are 0,
    0.75, ..., 7.5.

    Args:
        num_particles: The number of particles of each snapshot.
        times: The times ``(I,)`` of the snapshots; 0, 0.75, ..., 7.5 if None.
        diffusion: The noise strength :math:`\sigma`, in units of state per root of time.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        dt: The largest time step of the Euler scheme.

    Example:
        >>> data = repressilator(num_particles=5)
        >>> len(data.samples), tuple(data.samples[0].shape)
        (11, (5, 3))

    Reference: Elowitz & Leibler (2000), A synthetic oscillatory network of transcriptional regulators, in the
    form of Shen, Berlinghieri & Broderick (2025).
    """
    parameters = {"beta": 10.0, "n": 3.0, "k": 1.0, "gamma": 1.0}

    def drift(t: Tensor, x: Tensor) -> Tensor:
        return 10.0 / (1.0 + x.roll(1, -1).clamp_min(0.0) ** 3) - x

    low = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    grid = 0.75 * torch.arange(11.0, dtype=torch.float64) if times is None else times
    return _simulate(
        drift, low, low + 0.1, grid, num_particles, diffusion, dt, as_generator(generator), parameters
    )


def _simulate(
    drift: Callable[[Tensor, Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    times: object,
    num_particles: int,
    diffusion: float,
    dt: float,
    generator: torch.Generator | None,
    parameters: dict[str, float],
) -> SimulatedSnapshots:
    """Run independent particles from a uniform start at time zero and show each at one time only."""
    times = as_time_grid(times, "times", 1, torch.empty((), dtype=torch.float64)).double()
    if float(times[0]) < 0:
        raise TimeGridError("times must not start before zero", got=float(times[0]))
    check_positive_int(num_particles, "num_particles")
    check_real(diffusion, "diffusion")
    check_positive(diffusion, "diffusion", DiffusionError)
    check_real(dt, "dt", above=0.0)
    count = times.shape[0] * num_particles
    uniform = torch.rand(count, low.shape[0], dtype=low.dtype, generator=generator)
    x = low + (high - low) * uniform
    sde, samples, now = SDE(drift, diffusion), [], 0.0
    for time in times.tolist():
        if time > now:
            num_steps = max(1, math.ceil((time - now) / dt - 1e-6))
            grid = torch.linspace(now, time, num_steps + 1, dtype=torch.float64)
            x = DiffusionMeasure(x, sde).sample(grid, generator=generator).x[..., -1, :]
            now = time
        samples.append(x[:num_particles].clone())
        x = x[num_particles:]
    return SimulatedSnapshots(times, samples, parameters, diffusion)
