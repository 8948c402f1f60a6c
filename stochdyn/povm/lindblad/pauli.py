"""Operators of many sites as sums of local ones, by expansion in products of a basis of single sites."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochdyn._caching import cached
from stochdyn.errors import LindbladianError, ShapeError, SystemSizeError
from stochdyn.povm.frames.operators import named_operator

__all__ = [
    "OperatorBasis",
    "local_basis",
    "local_parts",
    "pauli_coefficients",
    "product_coefficients",
    "split_jump",
]

LocalTerm = tuple[tuple[int, ...], Tensor]
_MAX_SIZE = 1 << 10
MAX_SUPPORT = 5
_MAX_JUMP_SUPPORT = 2


@cached(8)
def local_basis(dim: int) -> Tensor:
    r"""Return Hermitian matrices ``(d**2, d, d)`` that span the operators of a site, the first of them the identity.

    They are orthogonal, :math:`\operatorname{Tr}B_iB_j=d\,\delta_{ij}`: ``I X Y Z`` for two levels, and the
    Gell-Mann matrices to scale for more.
    """
    if dim == 2:
        return torch.stack([named_operator(name) for name in "IXYZ"])
    basis = [torch.eye(dim, dtype=torch.complex128)]
    for i in range(dim):
        for j in range(i):
            symmetric, skew = (torch.zeros(dim, dim, dtype=torch.complex128) for _ in range(2))
            # generalised Gell-Mann matrices with Tr B_s B_s' = d delta_ss'; for qubits X, Y and Z
            symmetric[i, j] = symmetric[j, i] = math.sqrt(dim / 2)
            skew.imag[j, i], skew.imag[i, j] = -math.sqrt(dim / 2), math.sqrt(dim / 2)
            basis += [symmetric, skew]
    for i in range(1, dim):
        diagonal = torch.zeros(dim, dtype=torch.complex128)
        diagonal[:i], diagonal[i] = 1, -i
        basis.append(torch.diag(diagonal) * math.sqrt(dim / (i * (i + 1))))
    return torch.stack(basis)


class OperatorBasis:
    r"""Orthonormal Hermitian operators of a site, in the place of a frame and of its dual.

    In it a local generator has the fewest entries: a product of Pauli matrices takes each other one to a single third.

    Args:
        dim: The number ``d`` of levels of a site.

    Attributes:
        effects: The operators ``(d**2, d, d)``, :math:`\operatorname{Tr}B_iB_j=\delta_{ij}`.
        dual: The same.
        num_outcomes: Their number ``d**2``.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.num_outcomes = dim, dim**2
        self.effects = self.dual = local_basis(dim) / math.sqrt(dim)
        self.name = "an operator basis"

    def at(self, site: int) -> OperatorBasis:
        """Return the basis of a site: this one on every site."""
        return self


def product_coefficients(operator: Tensor, dim: int) -> Tensor:
    r"""Return the coefficients of an operator of ``N`` sites in products of :func:`local_basis`.

    .. math:: O=\sum_{s}c_s\,B_{s_1}\otimes\dots\otimes B_{s_N},\qquad c_s=d^{-N}\operatorname{Tr}(B_sO)

    Args:
        operator: The operator ``(d**N, d**N)`` of the lattice.
        dim: The number ``d`` of levels of a site.

    Returns:
        complex128 tensor with ``N`` axes of ``d**2``.

    Raises:
        ShapeError: If the size isn't a power of ``d``.
        SystemSizeError: If the operator has over 1024 rows (ten qubits).
    """
    size = operator.shape[0]
    n = round(math.log(size, dim)) if size > 1 else 0
    if operator.shape != (size, size) or size != dim**n or n == 0:
        raise ShapeError(
            f"an operator of sites with {dim} levels is ({dim}**N, {dim}**N)", got=tuple(operator.shape)
        )
    if size > _MAX_SIZE:
        raise SystemSizeError(
            "the operator is too large to be taken apart",
            got=f"{n} sites of {dim} levels",
            expected=f"at most {_MAX_SIZE} rows (ten qubits)",
            hint="give local terms: (coefficient, operator, sites)",
        )
    # c_s = d^-N Tr(B_s O), one site after the other
    basis = local_basis(dim) / dim
    order = [axis for i in range(n) for axis in (i, n + i)]
    tensor = operator.to(torch.complex128).reshape([dim] * (2 * n)).permute(order)
    for _ in range(n):  # the leading pair of axes turns into a basis axis at the end
        tensor = torch.tensordot(tensor, basis, dims=([0, 1], [2, 1]))
    return tensor


def pauli_coefficients(operator: Tensor) -> Tensor:
    r"""Return the coefficients of an operator of ``N`` qubits in Pauli strings.

    .. math:: O=\sum_{s\in\{I,X,Y,Z\}^N}c_s\,s,\qquad c_s=2^{-N}\operatorname{Tr}(sO)

    Args:
        operator: The operator ``(2**N, 2**N)`` of the qubits.

    Returns:
        complex128 tensor with ``N`` axes of four, in the order ``I X Y Z``.

    Raises:
        ShapeError: If the size isn't a power of two.
        SystemSizeError: If there are over ten qubits.

    Example:
        >>> c = pauli_coefficients(named_operator("ZX"))
        >>> c.nonzero().tolist(), c[3, 1].real.item()
        ([[3, 1]], 1.0)
    """
    return product_coefficients(operator, 2)


def _supports(c: Tensor) -> dict[tuple[int, ...], list[list[int]]]:
    """Return the products with a coefficient that isn't zero, by the sites on which they differ from the identity."""
    largest = float(c.abs().max())
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for s in (c.abs() > 1e-12 * largest).nonzero().tolist():
        found.setdefault(tuple(i for i, p in enumerate(s) if p), []).append(s)
    return found


def _matrix_on(c: Tensor, strings: list[list[int]], sites: tuple[int, ...], dim: int) -> Tensor:
    """Add up products of basis matrices on some sites."""
    basis = local_basis(dim)
    matrix = torch.zeros(dim ** len(sites), dim ** len(sites), dtype=torch.complex128)
    for s in strings:
        product = torch.ones(1, 1, dtype=torch.complex128)
        for i in sites:
            product = torch.kron(product, basis[s[i]])
        matrix += c[tuple(s)] * product
    return matrix


def touched_sites(operator: Tensor, dim: int) -> tuple[int, ...]:
    """Return the sites on which an operator of the whole lattice differs from the identity; site 0 if on none."""
    supports = _supports(product_coefficients(operator, dim))
    return tuple(sorted({site for sites in supports for site in sites})) or (0,)


def local_parts(
    operator: Tensor, name: str = "operator", *, together: bool = False, dim: int = 2
) -> list[LocalTerm]:
    """Return an operator of the whole lattice as matrices on few sites, whose sum it is.

    Args:
        operator: The operator ``(d**N, d**N)`` of the lattice.
        name: The name that messages show.
        together: Whether to return a single matrix on all sites that the operator touches; otherwise one for each set
            of sites, and the multiple of the identity is left out.
        dim: The number ``d`` of levels of a site.

    Returns:
        Pairs of sites and a matrix on them, the first slowest.

    Raises:
        LindbladianError: If a part acts on over five sites.

    Example:
        >>> h = named_operator("ZZI") + 0.5 * named_operator("IXI")
        >>> [sites for sites, _ in local_parts(h)]
        [(1,), (0, 1)]
    """
    c = product_coefficients(operator, dim)
    supports = _supports(c)
    if together:
        union = tuple(sorted({i for sites in supports for i in sites})) or (0,)
        supports = {union: [s for strings in supports.values() for s in strings]}
    else:
        supports.pop((), None)
    largest = max(supports, key=len, default=())
    if len(largest) > MAX_SUPPORT:
        raise LindbladianError(
            f"{name} isn't local", got=f"a part on sites {largest}", expected=f"at most {MAX_SUPPORT} sites"
        )
    order = sorted(supports, key=lambda s: (len(s), s))
    return [(sites, _matrix_on(c, supports[sites], sites, dim)) for sites in order]


def split_jump(
    operator: Tensor, sites: tuple[int, ...], dim: int, name: str = "operator"
) -> tuple[tuple[Tensor, tuple[int, ...]], ...]:
    """Return a jump operator on many sites as the sum of operators on one or two of them each.

    Args:
        operator: The operator ``(d**k, d**k)`` of the jump.
        sites: The ``k`` sites that it acts on.
        dim: The number ``d`` of levels of a site.
        name: The name that messages show.

    Raises:
        LindbladianError: If a part acts on more than two sites.

    Example:
        >>> lowering = sum(named_operator(s) for s in ("- I I", "I - I", "I I -"))
        >>> [where for _, where in split_jump(lowering, (4, 5, 6), 2)]
        [(4,), (5,), (6,)]
    """
    c = product_coefficients(operator, dim)
    supports = _supports(c)
    constant = supports.pop((), None)
    largest = max(supports, key=len, default=())
    if len(largest) > _MAX_JUMP_SUPPORT:
        raise LindbladianError(
            f"{name} acts on {len(sites)} sites and isn't a sum of operators on one or two of them",
            got=f"a part on sites {tuple(sites[i] for i in largest)}",
        )
    parts = []
    for support in sorted(supports, key=lambda s: (len(s), s)):
        matrix = _matrix_on(c, supports[support], support, dim)
        parts.append((matrix, tuple(sites[i] for i in support)))
    if constant is not None:
        parts.append((complex(c[(0,) * c.ndim]) * torch.eye(dim, dtype=torch.complex128), (sites[0],)))
    return tuple(parts)
