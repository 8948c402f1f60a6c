"""Is a learned score a gradient, and does it matter: conservativity, gauge freedom and intrinsic dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    check_callable,
    check_ndim,
    check_nonempty,
    check_positive_int,
    check_real,
)
from stochdyn.core.forward.divergences import (
    attach,
    divergence,
    pull_back,
    sample_probes,
)
from stochdyn.core.forward.flow import as_time
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError

__all__ = ["Asymmetry", "conservativity", "gauge_residual", "intrinsic_dimension"]

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
    num_probes: int = 1,
    generator: torch.Generator | int | None = None,
) -> Asymmetry:
    r"""How far a score is from being the gradient of something, by random probes.

    .. math:: \tfrac14E\,|J-J^\top|_F^2,\qquad |J-J^\top|_F^2=E\big[(e_1^\top(J-J^\top)\,e_2)^2\big],\quad J=\partial_xs

    with two independent probes of unit covariance. Zero for a potential's score. Neither sampling nor density needs
    it: see :func:`gauge_residual` for what does matter.

    Args:
        score: The score as a function ``score(t, x) -> (..., d)``.
        t: A time, or times that broadcast to ``x[..., :1]``.
        x: The points, ``(n, d)``.
        num_probes: The number of pairs of probes per point.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Mean square of the antisymmetric part with its standard error over points, and its share of the mean square of
        the Jacobian, between 0 and 1.

    Raises:
        ShapeError, EmptyDataError: If ``x`` isn't ``(n, d)`` with points in it.

    Example:
        >>> swirl = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> bool(conservativity(lambda t, x: x @ swirl, 0.0, torch.randn(200, 2), num_probes=4).share > 0.5)
        True

    Reference:
        Horvat and Pfister, "On gauge freedom, conservativity and intrinsic dimensionality estimation in diffusion models", 2024.
    """
    check_callable(score, "score", "a score, score(t, x)")
    _check_cloud(x)
    generator = as_generator(generator, x.device)
    check_positive_int(num_probes, "num_probes")
    time = as_time(t, x)
    with torch.enable_grad():
        y = attach(x.detach())
        value = score(time, y)
        # for Gaussian probes u and v, E (v.J^T u - u.J^T v)^2 = |J - J^T|^2, and E |J^T u|^2 = |J|^2
        squares, sizes = [], []
        for e in sample_probes(x, 2 * num_probes, "gaussian", generator).split(2):
            rows = [pull_back(value, y, probe, create_graph=False) for probe in e]  # J^T e
            squares.append(((rows[0] * e[1]).sum(-1) - (rows[1] * e[0]).sum(-1)).square())
            sizes.append(0.5 * (rows[0].square().sum(-1) + rows[1].square().sum(-1)))
    antisymmetric = 0.25 * torch.stack(squares).mean(0).detach()
    size = torch.stack(sizes).mean().detach()
    return Asymmetry(Estimate.of(antisymmetric), (antisymmetric.mean() / size).clamp(0, 1))


def gauge_residual(score: Field, truth: Field, t: Tensor | float, x: Tensor) -> Tensor:
    r"""How much of the error of a score changes the densities that it transports, at every point.

    .. math:: r=s_\theta-\nabla\log p,\qquad \nabla\cdot r+r\cdot\nabla\log p=\frac{\nabla\cdot(pr)}{p}

    An error with a vanishing residual is a gauge: the probability-flow ODE keeps its marginals in spite of it.

    Args:
        score: The score as a function ``score(t, x) -> (..., d)``.
        truth: The true score as a function of the same form.
        t: A time, or times that broadcast to ``x[..., :1]``.
        x: The points, ``(..., d)``.

    Returns:
        ``(...)``.

    Example:
        >>> swirl = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> gauge_residual(lambda t, x: x @ swirl - x, lambda t, x: -x, 0.0, torch.ones(1, 2))
        tensor([0.])

    Reference:
        Horvat and Pfister, 2024, theorem 1.
    """
    check_callable(score, "score", "a score, score(t, x)")
    check_ndim(x, tuple(range(1, 12)), "x", "(..., d)")
    check_callable(truth, "truth", "a score, score(t, x)")
    time = as_time(t, x)

    def error(y: Tensor) -> Tensor:
        return score(time, y) - truth(time, y)

    # div(p r) / p = div r + r . grad log p: where it vanishes, the error moves no density
    return divergence(error, x) + (error(x) * truth(time, x)).sum(-1)


def intrinsic_dimension(score: Field, t: Tensor | float, x: Tensor, std: float, drop: float = 0.5) -> Tensor:
    r"""Dimension of the manifold that data lie on, seen from the Jacobian of the score at little noise.

    .. math:: \sigma^2J\ \to\ -P_\perp\quad(\sigma\to0)

    with the projection on the normal space: eigenvalues near -1 are normal directions and the rest tangent ones. For a
    field that isn't conservative its symmetric part is taken.

    Args:
        score: The score as a function ``score(t, x) -> (..., d)``.
        t: A small time.
        x: The noised points, ``(n, d)``.
        std: The standard deviation :math:`\sigma` of the noise at that time.
        drop: The least eigenvalue of :math:`-\sigma^2J` of a direction that counts as normal to the data.

    Returns:
        ``(n,)`` integers.

    Raises:
        ShapeError, EmptyDataError: If ``x`` isn't ``(n, d)`` with points in it.

    Example:
        >>> flat = lambda t, x: torch.stack([-x[:, 0], -x[:, 1] / 0.01], -1)  # a line in the plane
        >>> intrinsic_dimension(flat, 0.0, torch.randn(3, 2), 0.1)
        tensor([1, 1, 1])

    Reference:
        Stanczuk et al., "Your diffusion model secretly knows the dimension of the data manifold", 2024.
    """
    check_callable(score, "score", "a score, score(t, x)")
    check_real(std, "std", above=0.0)
    check_real(drop, "drop", above=0.0, below=1.0)
    _check_cloud(x)
    if not std > 0:
        raise InvalidInputError("std must be positive", got=std)
    time, d = as_time(t, x), x.shape[-1]
    with torch.enable_grad():
        y = attach(x.detach())
        value = score(time, y)
        rows = [pull_back(value[:, i], y, create_graph=False) for i in range(d)]
    jacobian = torch.stack(rows, -2).detach()
    # -sigma^2 J tends to the projector on the normal space: eigenvalues near 0 are tangent directions
    spectrum = torch.linalg.eigvalsh(-(std**2) * 0.5 * (jacobian + jacobian.mT))
    return (spectrum < drop).sum(-1)


def _check_cloud(x: Tensor) -> None:
    check_ndim(x, 2, "x", "(n, d)")
    check_nonempty(x, "x")
