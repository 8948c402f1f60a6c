"""Products of frames over several sites: effects, duals, probabilities and estimators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError

__all__ = [
    "Effects",
    "Expansion",
    "coefficients_of",
    "density_of",
    "is_listing",
    "probabilities_of",
    "product_dual",
    "product_effects",
    "site_states",
    "sites_of",
]

C128 = torch.complex128


class Effects(Protocol):
    """What has operators to take traces with: a measurement, or a basis."""

    @property
    def effects(self) -> Tensor:
        """The operators ``(K, d, d)``."""


class Expansion(Effects, Protocol):
    """What expands states: a frame, or a basis."""

    @property
    def num_outcomes(self) -> int:
        """The number ``K`` of operators."""

    @property
    def dim(self) -> int:
        """The number ``d`` of levels."""

    @property
    def dual(self) -> Tensor:
        """The operators ``(K, d, d)`` of which a state is made."""


def product_effects(frames: Sequence[Effects]) -> Tensor:
    """Return the effects ``(K**k, d**k, d**k)`` of several sites, the first slowest."""
    return _kron([frame.effects for frame in frames])


def product_dual(frames: Sequence[Expansion]) -> Tensor:
    """Return the dual frame ``(K**k, d**k, d**k)`` of several sites, the first slowest."""
    return _kron([frame.dual for frame in frames])


def probabilities_of(rho: Tensor, frames: Sequence[Effects]) -> Tensor:
    """Return the outcome probabilities ``(prod K,)`` of a density matrix, site by site without large products."""
    return _contract(rho, [frame.effects for frame in frames]).real.contiguous()


def coefficients_of(operator: Tensor, frames: Sequence[Expansion]) -> Tensor:
    """Return the estimator ``(prod K,)`` of an operator on several sites; real if it is Hermitian."""
    values = _contract(operator, [frame.dual for frame in frames])
    scale = float(operator.abs().max())
    if float((operator - operator.mH).abs().max()) <= 1e-12 * max(scale, 1e-300):
        return values.real.contiguous()
    return values


def density_of(p: Tensor, frames: Sequence[Expansion]) -> Tensor:
    """Return the density matrix that outcome probabilities ``(prod K,)`` describe."""
    k = len(frames)
    tensor = p.to(C128).reshape([frame.num_outcomes for frame in frames])
    for frame in frames:  # the leading outcome axis turns into a pair of axes at the end
        tensor = torch.tensordot(tensor, frame.dual, dims=([0], [0]))
    order = [*range(0, 2 * k, 2), *range(1, 2 * k, 2)]
    size = math.prod(frame.dim for frame in frames)
    return tensor.permute(order).reshape(size, size)


def sites_of(matrix: Tensor, dim: int) -> int:
    """Return on how many sites of ``dim`` levels a matrix acts."""
    return round(math.log(matrix.shape[0], dim))


def _contract(operator: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Traces of an operator with all products of one matrix for each site."""
    k = len(matrices)
    dims = [m.shape[-1] for m in matrices]
    order = [axis for i in range(k) for axis in (i, k + i)]
    tensor = operator.reshape(dims + dims).permute(order)
    for m in matrices:  # the leading pair of axes turns into an outcome axis at the end
        tensor = torch.tensordot(tensor, m, dims=([0, 1], [2, 1]))
    return tensor.reshape(-1)


def _kron(stacks: Sequence[Tensor]) -> Tensor:
    out = stacks[0]
    for m in stacks[1:]:
        size = out.shape[-1] * m.shape[-1]
        out = torch.einsum("aij,bkl->abikjl", out, m).reshape(out.shape[0] * m.shape[0], size, size)
    return out


def site_states(state: Any, num_sites: int) -> list[Any]:
    """Return the state of each site from one state for all of them, or a list with one for each.

    Raises:
        InvalidInputError: If a list has another length.
    """
    if not is_listing(state):
        return [state] * num_sites
    if len(state) != num_sites:
        raise InvalidInputError(
            "a product state needs one state for each site", got=len(state), expected=num_sites
        )
    return list(state)


def is_listing(state: Any) -> bool:
    """Whether a state is a list with one state for each site, and not a vector or a matrix."""
    return isinstance(state, list | tuple) and any(isinstance(s, str) or hasattr(s, "shape") for s in state)
