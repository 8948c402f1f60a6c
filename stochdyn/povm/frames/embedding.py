"""Operators on a few sites of a lattice as operators of the whole, and states of the whole on a few sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_finite, check_positive_int
from stochdyn.errors import ShapeError
from stochdyn.povm.frames.operators import as_array

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


def partial_trace(rho: Any, sites: Sequence[int], dim: int = 2) -> Tensor:
    r"""Return the reduced density matrices on some sites, in their order.

    .. math:: \rho_A=\operatorname{Tr}_{\bar A}\rho

    Args:
        rho: The density matrices ``(*batch, d**N, d**N)`` of the lattice.
        sites: The ``k`` sites that are kept.
        dim: The number ``d`` of levels of a site.

    Returns:
        ``(*batch, d**k, d**k)``.

    Raises:
        ShapeError: If the size of the matrices isn't a power of ``d``.
        NonFiniteError: If they hold NaN or infinity.
        LindbladianError: If a site doesn't exist, or comes twice.

    Example:
        >>> bell = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]) / 2
        >>> partial_trace(bell, [1])
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    from stochdyn.povm.frames.lattice_observables import check_sites

    check_positive_int(dim, "dim", 2)
    rho = as_array(rho, "rho")
    size = rho.shape[-1] if rho.ndim >= 2 and rho.shape[-1] == rho.shape[-2] else 0
    n = round(math.log(size, dim)) if size > 1 else 0
    if n == 0 or dim**n != size:
        raise ShapeError(f"rho must be square, its size a power of {dim}", got=tuple(rho.shape))
    check_finite(torch.view_as_real(rho.resolve_conj()) if rho.is_complex() else rho, "rho")
    check_sites(sites, n)
    kept_sites = [int(s) for s in sites]
    rest = [i for i in range(n) if i not in kept_sites]
    # Tr_rest rho: rows and columns of the kept sites first, then the diagonal of the rest is summed
    tensor = rho.reshape(-1, *(dim,) * (2 * n))
    rows, columns = [1 + i for i in (*kept_sites, *rest)], [1 + n + i for i in (*kept_sites, *rest)]
    kept, gone = dim ** len(kept_sites), dim ** len(rest)
    tensor = tensor.permute(0, *rows, *columns).reshape(-1, kept, gone, kept, gone)
    return torch.einsum("nigjg->nij", tensor).reshape(*rho.shape[:-2], kept, kept)
