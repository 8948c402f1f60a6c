"""A simulated population of cells that differentiate, divide and die, seen destructively on a few days."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_time_grid, check_positive, check_positive_int, check_real
from stochdyn.errors import DiffusionError, TimeGridError

__all__ = ["CellSnapshots", "branching_cells"]

_STEP = 0.02


class CellSnapshots(NamedTuple):
    """Cells on a few days.

    Attributes:
        times: The days ``(I,)``, float64.
        samples: The snapshots as ``I`` tensors ``(n, d)``, coordinates of cells as principal components would give
            them.
        fates: ``I`` tensors ``(n,)`` of integers: 0 while undecided, 1 and 2 for the branches; what an experiment
            can't see.
        masses: The size ``(I,)`` of the whole population relative to the first day.
        diffusion: The true strength of the noise, per root of day.
    """

    times: Tensor
    samples: list[Tensor]
    fates: list[Tensor]
    masses: Tensor
    diffusion: float


def branching_cells(
    num_cells: int = 300,
    times: Tensor | Sequence[float] | None = None,
    dim: int = 5,
    diffusion: float = 0.25,
    growth: float = 0.2,
    generator: torch.Generator | int | None = 0,
) -> CellSnapshots:
    r"""Simulate cells that mature along an axis and choose one of two fates on the way.

    In hidden coordinates, maturity :math:`m`, fate :math:`f` and ``dim - 2`` others :math:`r`,

    .. math::
        dm=(1-\tfrac15m)\,dt+\sigma\,dW,\qquad
        df=\big(2\,\tanh(2(m-1))\,f-f^3+0.03\big)dt+\sigma\,dW,\qquad
        dr=(c\,f^2-r)\,dt+\sigma\,dW .

    A fork opens at :math:`m=1`. Cells divide at the rate ``growth`` times one plus the tanh of their fate, and die at half of
    ``growth``; each day a random part of the population is seen and lost. The coordinates are turned by a fixed rotation, so
    that no axis is special.

    Args:
        num_cells: The number of cells seen on each day.
        times: The days ``(I,)``, none negative; 0, 1, 2, 3, 4 if None.
        dim: The number of components of a cell, at least 2.
        diffusion: The noise strength :math:`\sigma`, per root of day.
        growth: The rate of division of an undecided cell, per day; zero for neither divisions nor deaths.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Snapshots in float64.

    Raises:
        TimeGridError: If the times don't increase, or start before zero.
        InvalidInputError: For sizes that aren't positive.

    Example:
        >>> cells = branching_cells(num_cells=100)
        >>> len(cells.samples), tuple(cells.samples[-1].shape), bool((cells.fates[0] == 0).all())
        (5, (100, 5), True)
    """
    times = as_time_grid(
        range(5) if times is None else times, "times", 1, torch.empty((), dtype=torch.float64)
    ).double()
    if float(times[0]) < 0:
        raise TimeGridError("times must not start before zero", got=float(times[0]))
    check_positive_int(num_cells, "num_cells")
    check_positive_int(dim, "dim", 2)
    check_real(diffusion, "diffusion")
    check_positive(diffusion, "diffusion", DiffusionError)
    check_real(growth, "growth", minimum=0.0, below=10.0)
    source = as_generator(generator)
    cells = _normal((3 * num_cells, dim), source) * 0.15
    cells[:, 2:] *= 2.0
    rotation = _rotation(dim)
    samples, fates, masses, now, mass = [], [], [], 0.0, 1.0
    for time in times.tolist():
        num_steps = math.ceil((time - now) / _STEP - 1e-6)
        for dt in [(time - now) / max(num_steps, 1)] * num_steps:
            cells = cells + dt * _drift(cells) + diffusion * dt**0.5 * _normal(cells.shape, source)
            born = _divide(cells, growth, dt, source)
            mass *= born.shape[0] / cells.shape[0]
            cells = born
        now = time
        # The population is thinned to a constant size in memory; mass keeps its true size.
        cells = cells[torch.randint(cells.shape[0], (3 * num_cells,), generator=source)]
        seen = cells[torch.randperm(cells.shape[0], generator=source)[:num_cells]]
        samples.append(seen @ rotation)
        fates.append(_fate(seen))
        masses.append(mass)
    relative = torch.tensor(masses, dtype=torch.float64) / masses[0]
    return CellSnapshots(times, samples, fates, relative, diffusion)


def _drift(cells: Tensor) -> Tensor:
    maturity, fate, rest = cells[:, :1], cells[:, 1:2], cells[:, 2:]
    strength = torch.linspace(0.8, -0.8, max(rest.shape[1], 1), dtype=cells.dtype)[: rest.shape[1]]
    return torch.cat(
        (
            1.0 - 0.2 * maturity,
            2.0 * torch.tanh(2.0 * (maturity - 1.0)) * fate - fate**3 + 0.03,
            strength * fate**2 - rest,
        ),
        1,
    )


def _divide(cells: Tensor, growth: float, dt: float, generator: torch.Generator | None) -> Tensor:
    if growth == 0:
        return cells
    event = torch.rand(cells.shape[0], dtype=cells.dtype, generator=generator)
    division = growth * (1.0 + torch.tanh(cells[:, 1])) * dt
    death = 0.5 * growth * dt
    copies = 1 + (event < division).long() - (event > 1 - death).long()
    return cells.repeat_interleave(copies, 0)


def _fate(cells: Tensor) -> Tensor:
    decided = cells[:, 1].abs() > 0.6
    return torch.where(decided, torch.where(cells[:, 1] > 0, 1, 2), 0)


def _rotation(dim: int) -> Tensor:
    """An orthogonal matrix that is the same everywhere: reflections of the cosine basis."""
    k = torch.arange(dim, dtype=torch.float64)
    basis = torch.cos(torch.pi * (k[:, None] + 0.5) * k / dim)
    return (basis / basis.norm(dim=0)).mT.contiguous()


def _normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)
