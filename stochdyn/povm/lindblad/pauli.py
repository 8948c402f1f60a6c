"""Whole-lattice operators of qubits as sums of local terms, by expansion in Pauli strings."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.errors import LindbladianError, ShapeError, SystemSizeError
from stochdyn.povm.frames.operators import named_operator

__all__ = ["local_parts", "pauli_coefficients"]

LocalTerm = tuple[tuple[int, ...], Tensor]
_MAX_SITES = 10
_MAX_SUPPORT = 5


def pauli_coefficients(operator: Tensor) -> Tensor:
    r"""Return the coefficients of an operator of ``N`` qubits in Pauli strings.

    .. math:: O=\sum_{s\in\{I,X,Y,Z\}^N}c_s\,s,\qquad c_s=2^{-N}\operatorname{Tr}(sO)

    Args:
        operator: ``(2**N, 2**N)``.

    Returns:
        complex128 tensor with ``N`` axes of four, in the order ``I X Y Z``.

    Raises:
        ShapeError: if the size isn't a power of two.
        SystemSizeError: if there are over ten qubits.

    Example:
        >>> c = pauli_coefficients(named_operator("ZX"))
        >>> c.nonzero().tolist(), c[3, 1].real.item()
        ([[3, 1]], 1.0)
    """
    size = operator.shape[0]
    n = size.bit_length() - 1
    if operator.shape != (size, size) or size != 2**n or n == 0:
        raise ShapeError("an operator of qubits is (2**N, 2**N)", got=tuple(operator.shape))
    if n > _MAX_SITES:
        raise SystemSizeError(
            "the operator is too large to be taken apart",
            got=f"{n} qubits",
            expected=f"at most {_MAX_SITES}",
            hint="give local terms: (coefficient, operator, sites)",
        )
    basis = torch.stack([named_operator(name) for name in "IXYZ"]) / 2
    order = [axis for i in range(n) for axis in (i, n + i)]
    tensor = operator.to(torch.complex128).reshape([2] * (2 * n)).permute(order)
    for _ in range(n):  # the leading pair of axes turns into a Pauli axis at the end
        tensor = torch.tensordot(tensor, basis, dims=([0, 1], [2, 1]))
    return tensor


def local_parts(operator: Tensor, name: str = "operator", *, together: bool = False) -> list[LocalTerm]:
    """Return an operator of the whole lattice as matrices on few sites, whose sum it is.

    Args:
        operator: ``(2**N, 2**N)``.
        name: shown in messages.
        together: return a single matrix, as a jump operator needs it; otherwise one for each set of sites, and the
            multiple of the identity is left out.

    Returns:
        Pairs of sites and a matrix on them, the first slowest.

    Raises:
        LindbladianError: if a part acts on over five sites.

    Example:
        >>> h = named_operator("ZZI") + 0.5 * named_operator("IXI")
        >>> [sites for sites, _ in local_parts(h)]
        [(1,), (0, 1)]
    """
    c = pauli_coefficients(operator)
    strings = (c.abs() > 1e-12 * max(float(c.abs().max()), 1e-300)).nonzero().tolist()
    supports: dict[tuple[int, ...], list[list[int]]] = {}
    for s in strings:
        supports.setdefault(tuple(i for i, p in enumerate(s) if p), []).append(s)
    if together:
        union = tuple(sorted({i for sites in supports for i in sites})) or (0,)
        supports = {union: strings}
    else:
        supports.pop((), None)
    largest = max(supports, key=len, default=())
    if len(largest) > _MAX_SUPPORT:
        raise LindbladianError(
            f"{name} isn't local", got=f"a part on sites {largest}", expected=f"at most {_MAX_SUPPORT} sites"
        )
    parts = []
    for sites in sorted(supports, key=lambda s: (len(s), s)):
        matrix = torch.zeros(2 ** len(sites), 2 ** len(sites), dtype=torch.complex128)
        for s in supports[sites]:
            matrix += c[tuple(s)] * named_operator(" ".join("IXYZ"[s[i]] for i in sites))
        parts.append((sites, matrix))
    return parts
