"""Is a field a gradient: the antisymmetric part of its Jacobian, by random probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_callable,
    check_event_size,
    check_nonempty,
    check_positive_int,
)
from stochdyn._transforms import recording
from stochdyn.core.forward.divergences import attach, pull_back, sample_probes
from stochdyn.core.forward.flow import as_time
from stochdyn.core.law.path import Estimate

__all__ = ["Asymmetry", "conservativity"]

Field = Callable[[Tensor, Tensor], Tensor]


class Asymmetry(NamedTuple):
    """Mean squared entries of a Jacobian's antisymmetric part, and their share of those of the Jacobian."""

    antisymmetric: Estimate
    share: Tensor


def conservativity(
    score: Field,
    t: Tensor | float,
    x: Tensor,
    *,
    spread: Tensor | None = None,
    num_probes: int = 1,
    generator: torch.Generator | int | None = None,
) -> Asymmetry:
    r"""How far a score is from being the gradient of something, by random probes.

    .. math:: \tfrac14E\,|J-J^\top|_F^2,\qquad |J-J^\top|_F^2=E\big[(e_1^\top(J-J^\top)\,e_2)^2\big],\quad J=U\,(\partial_xs)\,U

    with two independent probes of unit covariance and the spreads U of the components. Zero for a potential's score. Neither sampling nor
    density needs it: see :func:`stochdyn.interpolants.gauge_residual` for what does matter there. The entropy production rate does
    need it: only an error that is a gradient leaves the mean of a current alone (:class:`stochdyn.nonequilibrium.SteadyScoreMatching`).

    Args:
        score: The score as a function ``score(t, x) -> (..., d)``.
        t: A time, or times that broadcast to ``x[..., :1]``.
        x: The points, ``(n, d)``.
        spread: The standard deviation of each component, ``(d,)``, in units of which the entries of the Jacobian are taken; None where all
            components are in one unit.
        num_probes: The number of pairs of probes per point.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Mean square of the antisymmetric part with its standard error over points, and its share of the mean square of
        the Jacobian, between 0 and 1.

    Raises:
        ShapeError, EmptyDataError: If ``x`` isn't ``(n, d)`` with points in it, or ``spread`` has another size.

    Example:
        >>> swirl = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> bool(conservativity(lambda t, x: x @ swirl, 0.0, torch.randn(200, 2), num_probes=4).share > 0.5)
        True

    Reference:
        Horvat and Pfister, "On gauge freedom, conservativity and intrinsic dimensionality estimation in diffusion models", 2024.
    """
    check_callable(score, "score", "a score, score(t, x)")
    x = as_tensor(x, "x", 2, "(n, d)", finite=False)
    check_nonempty(x, "x")
    generator = as_generator(generator, x.device)
    check_positive_int(num_probes, "num_probes")
    size = None
    if spread is not None:
        size = as_tensor(spread, "spread", 1, "(d,)", like=x).to(x)
        check_event_size(size, x.shape[-1], "spread")
    time = as_time(t, x)
    with recording():
        y = attach(x.detach())
        value = score(time, y)
        # for Gaussian probes u and v, E (v.J^T u - u.J^T v)^2 = |J - J^T|^2, and E |J^T u|^2 = |J|^2
        squares, sizes = [], []
        for e in sample_probes(x, 2 * num_probes, "gaussian", generator).split(2):
            rows = []  # U J^T U e
            for probe in e if size is None else e * size:
                row = pull_back(value, y, probe, create_graph=False)
                rows.append(row if size is None else row * size)
            squares.append(((rows[0] * e[1]).sum(-1) - (rows[1] * e[0]).sum(-1)).square())
            sizes.append(0.5 * (rows[0].square().sum(-1) + rows[1].square().sum(-1)))
    antisymmetric = 0.25 * torch.stack(squares).mean(0).detach()
    full = torch.stack(sizes).mean().detach()
    share = torch.where(full > 0, antisymmetric.mean() / full, 0.0)
    return Asymmetry(Estimate.of(antisymmetric), share.clamp(0, 1))
