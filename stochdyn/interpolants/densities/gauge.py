"""Does it matter that a learned score is no gradient: gauge freedom, and the intrinsic dimension of data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_callable, check_nonempty, check_real
from stochdyn._transforms import recording
from stochdyn.core.forward.divergences import attach, divergence, pull_back
from stochdyn.core.forward.flow import as_time
from stochdyn.errors import InvalidInputError

__all__ = ["gauge_residual", "intrinsic_dimension"]

Field = Callable[[Tensor, Tensor], Tensor]


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
    x = as_tensor(x, "x", tuple(range(1, 12)), "(..., d)", finite=False)
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
    x = as_tensor(x, "x", 2, "(n, d)", finite=False)
    check_nonempty(x, "x")
    if not std > 0:
        raise InvalidInputError("std must be positive", got=std)
    time, d = as_time(t, x), x.shape[-1]
    with recording():
        y = attach(x.detach())
        value = score(time, y)
        rows = [pull_back(value[:, i], y, create_graph=False) for i in range(d)]
    jacobian = torch.stack(rows, -2).detach()
    # -sigma^2 J tends to the projector on the normal space: eigenvalues near 0 are tangent directions
    spectrum = torch.linalg.eigvalsh(-(std**2) * 0.5 * (jacobian + jacobian.mT))
    return (spectrum < drop).sum(-1)
