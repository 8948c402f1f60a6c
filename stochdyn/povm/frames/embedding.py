"""Operators on a few sites of a lattice as operators of the whole, and states of the whole on a few sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy import sparse

__all__ = ["full_operator", "partial_trace"]


def full_operator(matrix: Tensor, sites: Sequence[int], num_sites: int, dim: int) -> sparse.csr_matrix:
    """Return an operator on some sites as a sparse matrix ``(d**N, d**N)`` on all."""
    from scipy import sparse

    k = len(sites)
    digits = np.arange(dim**num_sites)
    strides = [dim ** (num_sites - 1 - s) for s in sites]
    # the number that the digits of the sites make, and what is left of the whole number without them
    local = sum((digits // stride % dim) * dim ** (k - 1 - j) for j, stride in enumerate(strides))
    rest = digits - sum((digits // stride % dim) * stride for stride in strides)
    offsets = sum(
        (np.arange(dim**k) // dim ** (k - 1 - j) % dim) * stride for j, stride in enumerate(strides)
    )
    entries = matrix.resolve_conj().numpy()
    rows, columns, values = [], [], []
    for target in range(dim**k):
        weights = entries[target, local]
        alive = np.nonzero(weights)[0]
        rows.append(rest[alive] + offsets[target])
        columns.append(alive)
        values.append(weights[alive])
    shape = (dim**num_sites, dim**num_sites)
    data = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_matrix(data, shape=shape)


def partial_trace(rho: Tensor, sites: Sequence[int], num_sites: int, dim: int) -> Tensor:
    """Return the reduced density matrices ``(*batch, d**k, d**k)`` on some sites, in their order.

    Args:
        rho: The density matrices ``(*batch, d**N, d**N)`` of the lattice.
        sites: The ``k`` sites that are kept.
        num_sites: The number ``N`` of sites.
        dim: The number ``d`` of levels of a site.
    """
    batch, n = rho.shape[:-2], num_sites
    rest = [i for i in range(n) if i not in sites]
    # Tr_rest rho: rows and columns of the kept sites first, then the diagonal of the rest is summed
    tensor = rho.reshape(-1, *(dim,) * (2 * n))
    rows, columns = [1 + i for i in (*sites, *rest)], [1 + n + i for i in (*sites, *rest)]
    kept, gone = dim ** len(sites), dim ** len(rest)
    tensor = tensor.permute(0, *rows, *columns).reshape(-1, kept, gone, kept, gone)
    return torch.einsum("nigjg->nij", tensor).reshape(*batch, kept, kept)
