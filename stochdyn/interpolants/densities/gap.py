"""How far the two laws of one learned score are apart, and what sampling alone would make of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_bool,
    check_event_size,
    check_finite,
    check_nonempty,
    check_positive_int,
    check_type,
)
from stochdyn.diagnostics.metrics import emd
from stochdyn.errors import InvalidInputError
from stochdyn.interpolants.sampling.reverse import ReverseDiffusion

__all__ = ["Gap", "histogram_w2", "ode_sde_gap"]


class Gap(NamedTuple):
    """A distance and its Monte Carlo floor.

    Attributes:
        distance: The distance between the samples of the two laws.
        floor: Between two independent samples of one law (the SDE's), of the same size: what a vanishing gap looks
            like.
        corrected: The square root of the excess of the squared distance over the mean squared floor of both laws,
            at least 0.
    """

    distance: float
    floor: float
    corrected: float


def ode_sde_gap(
    rev: ReverseDiffusion,
    num_samples: int = 2000,
    *,
    num_steps: int = 200,
    details: bool = False,
    generator: torch.Generator | int | None = None,
    **sampling: Any,
) -> float | Gap:
    r"""Wasserstein distance between the laws of the probability-flow ODE and of the reverse SDE.

    .. math:: W_2(o, q),\qquad o=\text{law of the ODE},\quad q=\text{law of the SDE}

    from ``num_samples`` points of each, by exact optimal transport (cubic in their number beyond one dimension, so a few thousand).

    Args:
        rev: The generative model.
        num_samples: The number of points of each law.
        num_steps: The number of steps of the integrators.
        details: Whether to sample each law a second time, and return the floor too.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        sampling: Other options of :meth:`ReverseDiffusion.sample`.

    Returns:
        The distance, or a :class:`Gap`.

    Raises:
        InvalidInputError: If a number isn't positive.

    Example:
        >>> from stochdyn.interpolants import OU
        >>> ode_sde_gap(ReverseDiffusion(OU(), lambda t, x: -2 * x, 1), 500, num_steps=20) < 0.2
        True

    Reference:
        Deveney et al., "Closing the ODE-SDE gap in score-based diffusion models through the Fokker-Planck equation", 2025.
    """
    check_positive_int(num_samples, "num_samples", 2)
    check_type(rev, ReverseDiffusion, "rev")
    check_bool(details, "details")
    source = as_generator(generator)

    def draw(method: Any) -> Tensor:
        return rev.sample(num_samples, method, num_steps, generator=source, **sampling)

    ode, sde = draw("ode"), draw("sde")
    distance = emd(ode, sde)
    if not details:
        return distance
    floor, other = emd(sde, draw("sde")), emd(ode, draw("ode"))
    # two samples of one law are apart as well, by a squared distance that adds to that of the laws
    excess = distance**2 - 0.5 * (floor**2 + other**2)
    return Gap(distance, floor, math.sqrt(max(excess, 0.0)))


def histogram_w2(x: Tensor, y: Tensor, bound: float = 3.5, bins: int = 64) -> float:
    r"""Wasserstein distance between two samples in the plane, binned on a square.

    Makes samples of any size comparable at the cost of one transport problem between ``bins ** 2`` cells. Points outside
    the square don't count.

    Args:
        x: The first sample, ``(n, 2)``.
        y: The second sample, ``(m, 2)``.
        bound: Half the side of the square ``[-bound, bound]^2`` that is binned.
        bins: The number of bins per side of the square.

    Returns:
        The distance, in the units of ``x``.

    Raises:
        ShapeError, EmptyDataError, NonFiniteError: If a sample isn't ``(n, 2)``, is empty or isn't finite.
        InvalidInputError: If no point lies in the square.

    Example:
        >>> round(histogram_w2(torch.zeros(5, 2), torch.ones(5, 2), bins=7), 3)
        1.414
    """
    check_positive_int(bins, "bins", 2)
    if not bound > 0:
        raise InvalidInputError("bound must be positive", got=bound)
    edges = torch.linspace(-bound, bound, bins + 1, dtype=torch.float64)
    middle = 0.5 * (edges[1:] + edges[:-1])
    cells = torch.cartesian_prod(middle, middle)
    counts = [_count(sample, edges, name) for sample, name in ((x, "x"), (y, "y"))]
    used = [c > 0 for c in counts]
    return emd(cells[used[0]], cells[used[1]], 2, counts[0][used[0]], counts[1][used[1]])


def _count(x: Tensor, edges: Tensor, name: str) -> Tensor:
    x = as_tensor(x, name, 2, "(n, 2)", finite=False)
    check_nonempty(x, name)
    check_event_size(x, 2, name)
    check_finite(x, name)
    counts = torch.histogramdd(x.detach().double().cpu(), [edges, edges]).hist.flatten()
    if not bool(counts.sum() > 0):
        raise InvalidInputError(f"no point of {name} lies in the square", hint="raise bound")
    return counts
