"""Names of hidden states: draws of a posterior put in one order, since data can't tell one labelling from another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stochdyn._checks import as_tensor
from stochdyn.errors import ShapeError

__all__ = ["OrderedStates", "order_states"]


class OrderedStates(NamedTuple):
    """Draws whose states are numbered by increasing level.

    Attributes:
        levels: The levels in order, ``(*draws, S)``.
        others: What else was given, its states in the same order.
        relabelled: The share of draws whose states had another order than most draws: above zero, labels have switched
            between draws, and means of the draws as they were mean nothing.
    """

    levels: Tensor
    others: tuple[Tensor, ...]
    relabelled: float


def order_states(levels: object, *others: object) -> OrderedStates:
    """Number the hidden states of every draw by increasing level.

    The likelihood of a hidden process is the same for every labelling of its states. Chains of different starts end in different
    ones, and a chain may switch between them, so that draws are to be brought into one order before they are averaged.

    Args:
        levels: What tells the states apart, such as the level of each, ``(*draws, S)``.
        others: What else belongs to the states: numbers per state ``(*draws, S)``, such as the initial law, or per pair of states
            ``(*draws, S, S)``, such as rates.

    Raises:
        ShapeError: If something has the shape of neither.

    Example:
        >>> rates = torch.tensor([[[0.0, 1.0], [2.0, 0.0]], [[0.0, 2.1], [0.9, 0.0]]])
        >>> found = order_states([[0.1, 0.9], [1.1, 0.0]], rates)
        >>> found.others[0][:, 0, 1], found.relabelled
        (tensor([1.0000, 0.9000]), 0.5)
    """
    key = as_tensor(levels, "levels")
    if not key.ndim:
        raise ShapeError("levels must be (*draws, S)", got=())
    order = key.argsort(-1)
    moved = []
    for k, other in enumerate(others):
        value = as_tensor(other, f"others[{k}]")
        if value.shape == key.shape:
            moved.append(value.gather(-1, order))
        elif value.shape == (*key.shape, key.shape[-1]):
            rows = value.gather(-2, order[..., None].expand_as(value))
            moved.append(rows.gather(-1, order[..., None, :].expand_as(value)))
        else:
            raise ShapeError(
                f"others[{k}] must hold numbers per state or per pair of states of every draw",
                got=tuple(value.shape),
                expected=f"{tuple(key.shape)} or {(*key.shape, key.shape[-1])}",
            )
    counts = order.reshape(-1, key.shape[-1]).unique(dim=0, return_counts=True)[1]
    share = 1.0 - float(counts.max()) / float(counts.sum()) if counts.numel() else 0.0
    return OrderedStates(key.gather(-1, order), tuple(moved), share)
