"""What was observed of fields: places, components and noise, by groups of fields that were seen at the same places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import check_nonempty
from stochdyn.errors import EmptyDataError, InvalidInputError
from stochdyn.vectorfields.regression.sites import Sites

__all__ = ["Groups", "Observations", "by_condition", "by_pattern"]


class Observations:
    """What was observed: sites, components in their frames, and relative noise variances.

    Args:
        sites: The ``q`` places where the fields were observed.
        components: The observed components ``(B, q, m)`` of B fields, in the frames of the sites.
        relative: The noise variances ``(q,)`` up to the common factor.
    """

    def __init__(self, sites: Sites, components: Tensor, relative: Tensor) -> None:
        self.sites, self.components, self.relative = sites, components, relative

    @property
    def rows(self) -> int:
        """Number of components observed of one field."""
        return self.components.shape[1] * self.components.shape[2]

    def columns(self, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return values ``(N, B)`` and relative variances ``(N,)`` of the rows at some of the sites."""
        y = self.components[:, part].flatten(1).mT
        return y, self.relative[part].repeat_interleave(self.components.shape[2])


@dataclass(frozen=True)
class Groups:
    """Fields that share hyper-parameters, in groups that were observed at the same sites.

    Attributes:
        parts: The observations of each group.
        fields: The numbers of the fields of each group, which together are 0, 1, 2 ...
    """

    parts: list[Observations]
    fields: list[Tensor]

    @property
    def rows(self) -> int:
        """Number of components of the field of which most were observed."""
        return max(part.rows for part in self.parts)


def by_pattern(sites: Sites, components: Tensor, relative: Tensor, missing: Tensor) -> Groups:
    """Group fields by which of their vectors are missing.

    Args:
        sites: The ``q`` sites.
        components: The components ``(B, q, m)``, of any value where they are missing.
        relative: The relative noise variances ``(q,)``.
        missing: Which vectors are missing, ``(B, q)``.

    Raises:
        EmptyDataError: If all vectors of a field are missing.
    """
    empty = missing.all(1).nonzero()
    if len(empty):
        raise EmptyDataError(
            "every field needs a vector that isn't missing", got=f"none in field {int(empty[0])}"
        )
    patterns, member = torch.unique(missing, dim=0, return_inverse=True)
    parts, fields = [], []
    for number, pattern in enumerate(patterns):
        chosen, seen = (member == number).nonzero()[:, 0], ~pattern
        parts.append(Observations(sites.take(seen), components[chosen][:, seen], relative[seen]))
        fields.append(chosen)
    return Groups(parts, fields)


def by_condition(
    sites: Sites, components: Tensor, relative: Tensor, labels: Sequence[object]
) -> tuple[Groups, list[object]]:
    """Give the rows of every condition to a field of its own.

    Args:
        sites: The ``q`` sites.
        components: The components ``(1, q, m)``.
        relative: The relative noise variances ``(q,)``.
        labels: The condition of every row, ``q`` of them.

    Returns:
        The groups, one field each, and the conditions in the order in which they first appear.
    """
    names = list(dict.fromkeys(labels))
    number = {name: i for i, name in enumerate(names)}
    of = torch.tensor([number[label] for label in labels], device=components.device)
    parts = [
        Observations(sites.take(of == i), components[:, of == i], relative[of == i])
        for i in range(len(names))
    ]
    return Groups(parts, [torch.tensor([i]) for i in range(len(names))]), names


def as_labels(labels: Sequence[object], count: int, of: str) -> list[object]:
    """Return one label per item, or raise a typed error."""
    found = list(labels)
    check_nonempty(found, "labels")
    if len(found) != count:
        raise InvalidInputError(
            f"labels must name the condition of every {of}", got=len(found), expected=count
        )
    plain = [label.item() if isinstance(label, Tensor) else label for label in found]
    for label in plain:
        if label is None or label != label:
            raise InvalidInputError("labels must be comparable, such as text or numbers", got=repr(label))
    return plain
