"""Strings of discrete outcomes: enumeration, numbering and duplicates."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._checks import check_positive_int, check_type

__all__ = ["all_configurations", "decode", "encode", "unique_rows"]


def all_configurations(num_sites: int, num_outcomes: int, device: torch.device | str | None = None) -> Tensor:
    """Return all strings ``(q**N, N)``, the first site slowest.

    Example:
        >>> all_configurations(2, 2).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    check_positive_int(num_sites, "num_sites")
    check_positive_int(num_outcomes, "num_outcomes")
    return decode(torch.arange(num_outcomes**num_sites, device=device), num_sites, num_outcomes)


def _place_values(num_sites: int, num_outcomes: int, device: torch.device) -> Tensor:
    return num_outcomes ** torch.arange(num_sites - 1, -1, -1, device=device)


def encode(a: Tensor, num_outcomes: int) -> Tensor:
    """Return the number ``(...)`` of every string ``(..., N)``; ``q**N`` must fit 63 bits.

    Example:
        >>> encode(torch.tensor([1, 0, 1]), 2)
        tensor(5)
    """
    check_type(a, Tensor, "a")
    check_positive_int(num_outcomes, "num_outcomes")
    return (a.long() * _place_values(a.shape[-1], num_outcomes, a.device)).sum(-1)


def decode(code: Tensor, num_sites: int, num_outcomes: int) -> Tensor:
    """Return the string ``(..., N)`` of every number ``(...)``; the inverse of :func:`encode`."""
    return code[..., None] // _place_values(num_sites, num_outcomes, code.device) % num_outcomes


def unique_rows(a: Tensor, num_outcomes: int) -> tuple[Tensor, Tensor]:
    """Return the distinct strings among ``(n, N)`` and, for every row, its place among them ``(n,)``."""
    sites = a.shape[-1]
    if num_outcomes**sites < 2**62:
        code, index = torch.unique(encode(a, num_outcomes), return_inverse=True)
        return decode(code, sites, num_outcomes), index
    unique, index = torch.unique(a, dim=0, return_inverse=True)
    return unique, index
