"""Predictions that need no training: what a model of populations has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_event_size, check_nonempty, check_type
from stochdyn.errors import EmptyDataError, InvalidInputError
from stochdyn.interpolants.populations.data import Populations

__all__ = ["population_baselines"]


def population_baselines(data: Populations, x0: Any, treatment: Any = None) -> dict[str, Tensor]:
    """Return trivial predictions of what becomes of a population, by name.

    Elaborate models often predict no better than these, so compare with them first. A fourth baseline is a flow that is blind
    to populations: train :class:`PopulationRegression` with ``encoder=None``.

    Args:
        data: The populations of the training.
        x0: The points of another population, before, ``(n, d)``.
        treatment: ``(c,)``: what is done to it. Only training populations with the same treatment count then.

    Returns:
        ``"identity"``: the points as they are. ``"mean shift"``: the points moved by the mean change of the training populations.
        ``"nearest"``: the targets of the training population whose starts are nearest in mean and covariance.

    Raises:
        InvalidInputError: If a treatment is given and the data have none, or the other way round.
        EmptyDataError: If no training population had this treatment.

    Example:
        >>> starts = [torch.randn(50, 2) + i for i in range(3)]
        >>> data = Populations(starts, [x + 1 for x in starts])
        >>> found = population_baselines(data, torch.randn(40, 2) + 2)
        >>> sorted(found), round(float((found["nearest"] - starts[2]).mean()), 3)
        (['identity', 'mean shift', 'nearest'], 1.0)
    """
    check_type(data, Populations, "data")
    x = as_tensor(x0, "x0", 2, "(n, d)", like=data.starts[0]).to(data.starts[0])
    check_nonempty(x, "x0")
    check_event_size(x, data.dim, "x0")
    if (treatment is None) != (data.treatments is None):
        raise InvalidInputError(
            "the populations had treatments" if treatment is None else "the populations had no treatments",
            got="no treatment" if treatment is None else "a treatment",
        )
    members = list(range(len(data)))
    if data.treatments is not None:
        given = as_tensor(treatment, "treatment", 1, "(c,)", like=x).to(data.treatments)
        members = (data.treatments == given).all(-1).nonzero().squeeze(-1).tolist()
        if not members:
            raise EmptyDataError("no population of the training had this treatment", got=given.tolist())
    change = torch.stack([data.targets[i].mean(0) - data.starts[i].mean(0) for i in members]).mean(0)
    own = _moments(x)
    far = [_distance(own, _moments(data.starts[i])) for i in members]
    nearest = members[int(torch.stack(far).argmin())]
    return {"identity": x, "mean shift": x + change, "nearest": data.targets[nearest]}


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance in double precision."""
    x = x.double()
    centred = x - x.mean(0)
    return x.mean(0), centred.mT @ centred / len(x)


def _distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    r"""Return the squared transport distance between Gaussians with these moments.

    :math:`|m_a-m_b|^2+\mathrm{tr}(A+B)-2\,\mathrm{tr}(A^{1/2}BA^{1/2})^{1/2}`
    """
    (m, cov), (n, other) = a, b
    root = _root(cov)
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return (m - n).square().sum() + cov.trace() + other.trace() - 2 * cross


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.mT
