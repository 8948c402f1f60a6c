"""Whether jumps with negative rates are physical together, and the jumps with positive rates that they equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochdyn._checks import values_are_checked
from stochdyn.errors import LindbladianError
from stochdyn.povm.lindblad.coefficients import Coefficient
from stochdyn.povm.lindblad.pauli import local_basis, product_coefficients
from stochdyn.povm.lindblad.terms import CollectiveJump, Part, Term

__all__ = ["physical_jumps"]

Jump = Term | CollectiveJump
_Key = tuple[tuple[int, int], ...]


def physical_jumps(jumps: list[Jump], dim: int) -> tuple[list[Jump], list[Term]]:
    r"""Return jumps of positive rates that are the given ones together.

    In products ``B_s`` of a basis of traceless operators the constant jumps are

    .. math:: \sum_{ss'}C_{ss'}\Bigl(B_s\rho B_{s'}^\dagger-\tfrac12\{B_{s'}^\dagger B_s,\rho\}\Bigr),\qquad
        C=\sum_k\gamma_k\,v_kv_k^\dagger,

    which is completely positive where ``C`` is positive; its eigenvectors are jump operators. Multiples of the
    identity in a jump operator only shift the Hamiltonian.

    Args:
        jumps: The jumps as they were written.
        dim: The number of levels of a site.

    Returns:
        Jumps, the given ones unless a rate is negative, and terms that the Hamiltonian gains.

    Raises:
        LindbladianError: If they aren't completely positive together.

    Reference:
        Gorini, Kossakowski and Sudarshan, J. Math. Phys. 17, 821 (1976).
    """
    constant = [jump for jump in jumps if jump.coupling.is_constant]
    negative = [jump for jump in constant if jump.coupling.factor < 0]
    if not negative or not values_are_checked():
        return jumps, []
    vectors = [_expand(jump, dim) for jump in constant]
    keys = list(dict.fromkeys(key for vector in vectors for key in vector if key))
    matrix = torch.zeros(len(keys), len(keys), dtype=torch.complex128)
    shifts: list[Term] = []
    for jump, vector in zip(constant, vectors, strict=True):
        row = torch.tensor([vector.get(key, 0.0) for key in keys], dtype=torch.complex128)
        # C = sum_k gamma_k v_k v_k^dagger, with v_k the coefficients of jump k in products of basis matrices
        matrix += jump.coupling.factor * torch.outer(row, row.conj())
        shifts += _shift(jump, vector.get((), 0.0), dim)
    values, basis = torch.linalg.eigh(matrix)
    scale = float(values.abs().max()) if len(keys) else 0.0
    if len(keys) and float(values[0]) < -1e-10 * scale:
        worst = min(negative, key=lambda jump: jump.coupling.factor)
        raise LindbladianError(
            "a rate is negative, and all jumps together aren't completely positive",
            got=f"{worst.coupling.factor:g} on sites {worst.sites}",
            expected="at least 0",
            hint="a rate multiplies the dissipator, so the jump operator carries its square root",
        )
    made: list[Jump] = [jump for jump in jumps if not jump.coupling.is_constant]
    for value, column in zip(values.tolist(), basis.mT, strict=True):
        # eigenvectors of C are jump operators, their eigenvalues the rates
        if value > 1e-12 * scale:
            made.append(_combine(value, column, keys, dim))
    return made, shifts


def _expand(jump: Jump, dim: int) -> dict[_Key, complex]:
    """Return the coefficients of a jump operator by the basis matrices on its sites; the identity's key is empty."""
    found: dict[_Key, complex] = {}
    for matrix, sites in jump.parts:
        c = product_coefficients(matrix, dim)
        for s in c.nonzero().tolist():
            key = tuple(sorted((site, p) for site, p in zip(sites, s, strict=True) if p))
            found[key] = found.get(key, 0.0) + complex(c[tuple(s)])
    return found


def _shift(jump: Jump, constant: complex, dim: int) -> list[Term]:
    r"""Return what the Hamiltonian gains from a multiple of the identity, :math:`\tfrac{i\gamma}2(\alpha^*c-\alpha c^\dagger)`."""
    if abs(constant) == 0.0:
        return []
    terms = []
    for matrix, sites in jump.parts:
        h = 0.5j * (constant.conjugate() * matrix - constant * matrix.mH)
        h = h - h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
        if float(h.abs().max()) > 0:
            terms.append(Term(Coefficient(jump.coupling.factor), h, sites))
    return terms


def _combine(rate: float, column: Tensor, keys: list[_Key], dim: int) -> Jump:
    basis = local_basis(dim)
    parts: dict[tuple[int, ...], Tensor] = {}
    for weight, key in zip(column.tolist(), keys, strict=True):
        if abs(weight) < 1e-14:
            continue
        product = torch.ones(1, 1, dtype=torch.complex128)
        for _, p in key:
            product = torch.kron(product, basis[p])
        sites = tuple(site for site, _ in key)
        size = math.prod([dim] * len(sites))
        parts[sites] = parts.get(sites, torch.zeros(size, size, dtype=torch.complex128)) + weight * product
    made: list[Part] = [(matrix, sites) for sites, matrix in parts.items()]
    if len(made) == 1:
        return Term(Coefficient(rate), *made[0])
    return CollectiveJump(Coefficient(rate), tuple(made))
