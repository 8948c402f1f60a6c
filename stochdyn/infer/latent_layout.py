"""Which latent values of a model belong to which plates, and what each may depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LatentGroup", "latent_groups"]


@dataclass(frozen=True)
class LatentGroup:
    """The latent values that share their plates.

    Attributes:
        index: The positions in the latent vector ``(P, W)``: W values for each of the P members of the plates.
        parents: For each group that this one depends on, its number and the member ``(P,)`` of it that each member sees.
    """

    index: Tensor
    parents: tuple[tuple[int, Tensor], ...]

    @property
    def num_parents(self) -> int:
        """The number of groups that this one depends on."""
        return len(self.parents)


def latent_groups(trace: Any, shapes: dict[str, torch.Size]) -> list[LatentGroup]:
    """Group the values of a latent vector by plates; those in fewer plates come first.

    Values of a group may depend on all groups whose plates are some of their own. Members of a plate are independent of each
    other given those, as the model says by its plates.

    Args:
        trace: The trace of the model.
        shapes: The unconstrained shapes ``(*batch, *event)`` of the latent sites, in the order of the vector.
    """
    found: dict[tuple[tuple[int, int], ...], list[Tensor]] = {}
    position = 0
    for name, shape in shapes.items():
        site = trace.nodes[name]
        plates = sorted((f.dim, f.size) for f in site["cond_indep_stack"] if f.vectorized)
        index = position + torch.arange(shape.numel()).reshape(shape)
        position += shape.numel()
        batch = len(site["fn"].batch_shape)
        axes = [batch + dim for dim, _ in plates]
        rest = [a for a in range(len(shape)) if a not in axes]
        members = [shape[a] for a in axes]
        if members != [size for _, size in plates]:
            # A plate of size one in the trace that the site doesn't spread over: no plate of its own.
            plates, axes, rest = [], [], list(range(len(shape)))
        flat = index.permute((*axes, *rest)).reshape(*([1] if not axes else [_product(members)]), -1)
        found.setdefault(tuple(plates), []).append(flat)
    keys = sorted(found, key=len)
    groups: list[LatentGroup] = []
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    for key in keys:
        member = torch.arange(_product([size for _, size in key]))
        member = member.reshape([size for _, size in key]) if key else member
        parents = []
        for other in keys:
            if set(other) < set(key):
                seen = torch.zeros_like(member)
                for axis, (plate, size) in enumerate(key):
                    if (plate, size) in other:
                        lone = [size if a == axis else 1 for a in range(len(key))]
                        seen = seen * size + torch.arange(size).reshape(lone)
                parents.append((numbers[other], seen.expand(member.shape).reshape(-1)))
        index = torch.cat(found[key], -1)
        numbers[key] = len(groups)
        groups.append(LatentGroup(index, tuple(parents)))
    return groups


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
