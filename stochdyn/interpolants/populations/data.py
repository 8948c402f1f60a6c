"""Populations before and after: ragged samples as a data set of whole populations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stochdyn._checks import as_seed, as_tensor, check_event_size, check_nonempty, check_real
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["Populations"]


class Populations(Dataset[dict[str, Tensor]]):
    """Pairs of samples, one pair per population: patients before and after a treatment, say.

    As data of :func:`stochdyn.fit` an item is a whole population, so ``batch_size`` counts populations.

    Args:
        starts: A list of ``(n_i, d)``: the populations before.
        targets: A list of ``(m_i, d)``: the populations after. Where points are paired, row by row, ``m_i = n_i``.
        treatments: What was done to each of the M populations, ``(M, c)`` or a list of ``(c,)``; or None.
        subjects: Whose each of the M populations is, names or numbers: a patient under several treatments has several. None if each is a
            subject of its own.

    Raises:
        EmptyDataError: If there is no population, or one has no point.
        ShapeError: If dimensions or numbers don't fit together.
        NonFiniteError: If a value isn't finite.

    Example:
        >>> data = Populations([torch.randn(30, 2), torch.randn(50, 2)], [torch.randn(40, 2), torch.randn(20, 2)])
        >>> len(data), data.dim
        (2, 2)
    """

    def __init__(
        self, starts: Sequence[Any], targets: Sequence[Any], treatments: Any = None, subjects: Any = None
    ) -> None:
        self.starts = [_sample(x, f"starts[{i}]") for i, x in enumerate(_listed(starts, "starts"))]
        self.targets = [_sample(x, f"targets[{i}]") for i, x in enumerate(_listed(targets, "targets"))]
        if len(self.starts) != len(self.targets):
            raise ShapeError(
                "there must be one target per start",
                got=len(self.targets),
                expected=f"{len(self.starts)} populations",
            )
        self.dim = self.starts[0].shape[-1]
        for name, group in (("starts", self.starts), ("targets", self.targets)):
            for i, x in enumerate(group):
                check_event_size(x, self.dim, f"{name}[{i}]")
        self.treatments: Tensor | None = None
        if treatments is not None:
            like = self.starts[0]
            self.treatments = as_tensor(treatments, "treatments", 2, "(M, c)", like=like).to(like)
            if len(self.treatments) != len(self.starts):
                raise ShapeError(
                    "there must be one treatment per population",
                    got=len(self.treatments),
                    expected=len(self.starts),
                )
        self.subjects: list[Any] | None = None
        if subjects is not None:
            self.subjects = np.asarray(_listed(subjects, "subjects")).tolist()
            if len(self.subjects) != len(self.starts):
                raise ShapeError(
                    "there must be one subject per population",
                    got=len(self.subjects),
                    expected=len(self.starts),
                )

    @property
    def treatment_dim(self) -> int:
        """The number of components of a treatment, 0 for none."""
        return 0 if self.treatments is None else self.treatments.shape[-1]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Return population ``i``, its samples padded to the size of the largest, with their true sizes."""
        largest = [max(len(x) for x in group) for group in (self.starts, self.targets)]
        item = {
            "x0": _padded(self.starts[i], largest[0]),
            "x1": _padded(self.targets[i], largest[1]),
            "count0": torch.tensor(len(self.starts[i])),
            "count1": torch.tensor(len(self.targets[i])),
        }
        if self.treatments is not None:
            item["treatment"] = self.treatments[i]
        return item

    def split(self, share: float = 0.2, seed: int = 0) -> tuple[Populations, Populations]:
        """Return populations for training, and others that are held out; a subject is never on both sides.

        Two populations of one subject are no independent test of each other, so all of them are held out, or none.

        Args:
            share: The share of the subjects that is held out, between 0 and 1.
            seed: The seed that decides which.

        Raises:
            InvalidInputError: If there are too few subjects.
        """
        check_real(share, "share", above=0.0, below=1.0)
        owners = list(range(len(self))) if self.subjects is None else self.subjects
        names = list(dict.fromkeys(owners))
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(as_seed(seed))).tolist()
        held = max(1, round(share * len(names)))
        if held >= len(names):
            raise InvalidInputError("nothing would be left to train on", got=f"{len(names)} subjects")
        rows: dict[Any, list[int]] = {name: [] for name in names}
        for i, owner in enumerate(owners):
            rows[owner].append(i)
        train, test = ([i for j in part for i in rows[names[j]]] for part in (order[held:], order[:held]))
        return self._subset(train), self._subset(test)

    def _subset(self, index: list[int]) -> Populations:
        chosen = None if self.treatments is None else self.treatments[index]
        whose = None if self.subjects is None else [self.subjects[i] for i in index]
        return Populations([self.starts[i] for i in index], [self.targets[i] for i in index], chosen, whose)


def _listed(group: Any, name: str) -> list[Any]:
    if (
        isinstance(group, str | bytes | dict)
        or not hasattr(group, "__len__")
        or getattr(group, "ndim", 1) == 0
    ):
        raise InvalidInputError(f"{name} must be a list of samples", got=type(group).__name__)
    check_nonempty(group, name)
    return list(group)


def _sample(x: Any, name: str) -> Tensor:
    value = as_tensor(x, name, 2, "(n, d)")
    check_nonempty(value, name)
    return value


def _padded(x: Tensor, size: int) -> Tensor:
    return torch.cat([x, x.new_zeros(size - len(x), x.shape[-1])]) if len(x) < size else x
