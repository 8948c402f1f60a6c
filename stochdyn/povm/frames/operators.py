"""Operators and states on single sites: their names, and how users' input becomes matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_finite, check_type
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.povm.frames.sizes import check_size

__all__ = [
    "PAULI_NAMES",
    "STATE_NAMES",
    "as_matrix",
    "as_operator",
    "as_state",
    "named_operator",
    "operator_rank",
    "spin_matrices",
    "split_name",
]

C128 = torch.complex128
_STATE_TOLERANCE = 1e-6

PAULI_NAMES = ("I", "X", "Y", "Z")
_QUBIT: dict[str, list[list[complex]]] = {
    "X": [[0, 1], [1, 0]],
    "Y": [[0, -1j], [1j, 0]],
    "Z": [[1, 0], [0, -1]],
    "sigma+": [[0, 1], [0, 0]],
    "sigma-": [[0, 0], [1, 0]],
    "P0": [[1, 0], [0, 0]],
    "P1": [[0, 0], [0, 1]],
}
_ALIASES = {"sigmax": "X", "sigmay": "Y", "sigmaz": "Z", "+": "sigma+", "-": "sigma-", "1": "I"}
_STATES: dict[str, list[complex]] = {
    "z+": [1, 0],
    "z-": [0, 1],
    "x+": [math.sqrt(0.5), math.sqrt(0.5)],
    "x-": [math.sqrt(0.5), -math.sqrt(0.5)],
    "y+": [math.sqrt(0.5), 1j * math.sqrt(0.5)],
    "y-": [math.sqrt(0.5), -1j * math.sqrt(0.5)],
}
_STATE_ALIASES = {"up": "z+", "down": "z-", "0": "z+", "1": "z-"}
STATE_NAMES = ("up", "down", *_STATES, "mixed")


def spin_matrices(dim: int) -> dict[str, Tensor]:
    r"""Return the spin operators of spin :math:`(d-1)/2`: ``Sx``, ``Sy``, ``Sz``, ``S+``, ``S-``.

    The first basis state has the largest :math:`S^z`.

    Args:
        dim: The number ``d`` of levels.

    Returns:
        complex128 matrices ``(d, d)`` by name.

    Example:
        >>> spin_matrices(3)["Sz"].diagonal().real.tolist()
        [1.0, 0.0, -1.0]
    """
    check_size(dim, "dim", 1 << 10, 2)
    spin = (dim - 1) / 2
    m = spin - torch.arange(dim, dtype=torch.float64)
    raising = torch.diag((spin * (spin + 1) - m[1:] * (m[1:] + 1)).sqrt(), 1).to(C128)
    lowering = raising.mH
    return {
        "Sx": (raising + lowering) / 2,
        "Sy": (raising - lowering) / 2j,
        "Sz": torch.diag(m).to(C128),
        "S+": raising,
        "S-": lowering.resolve_conj().contiguous(),
    }


def split_name(name: str) -> list[str]:
    """Return the names of single sites in ``"ZZ"``, ``"sigma+ sigma-"`` or ``"sigma-"``."""
    check_type(name, str, "name")
    parts = name.replace("*", " ").split()
    if len(parts) > 1:
        return parts
    whole = name.strip()
    if re.fullmatch(r"[IXYZ]+\+[IXYZ]+(\+[IXYZ]+)*", whole):
        raise InvalidInputError(
            "an operator's name is a product, not a sum",
            got=repr(name),
            hint="write a term for each summand; a product with the raising operator is 'X sigma+'",
        )
    if re.fullmatch(r"[IXYZ]{2,}|[IXYZ+-]{2,}", whole):
        return list(whole)
    return [whole]


def operator_rank(name: str) -> int:
    """Return on how many sites a named operator acts.

    Example:
        >>> operator_rank("ZZ"), operator_rank("sigma-"), operator_rank("sigma+ sigma-")
        (2, 1, 2)
    """
    return len(split_name(name))


def named_operator(name: str, dim: int = 2) -> Tensor:
    """Return the matrix of a named operator, a Kronecker product for several sites.

    Qubits (the first basis state is up, ``Z`` of it +1): ``I X Y Z sigma+ sigma- P0 P1``; ``sigma-`` takes up to
    down. Any number of levels: ``I`` and the spin operators ``Sx Sy Sz S+ S-``. Several sites: ``"ZZ"``,
    ``"XYZ"``, ``"+-"`` or names parted by spaces, ``"sigma+ sigma-"``.

    Args:
        name: The name of an operator, or of one for each of several sites.
        dim: The number of levels of a site.

    Returns:
        ``(dim**k, dim**k)`` complex128.

    Raises:
        InvalidInputError: If a name is unknown.

    Example:
        >>> named_operator("sigma-").real.tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """
    known: dict[str, Tensor] = {"I": torch.eye(dim, dtype=C128), **spin_matrices(dim)}
    if dim == 2:
        known |= {key: torch.tensor(value, dtype=C128) for key, value in _QUBIT.items()}
    matrices = []
    for factor in split_name(name):
        key = _ALIASES.get(factor, factor)
        if key not in known:
            raise InvalidInputError(
                f"unknown operator on sites of {dim} levels",
                got=repr(factor) if factor == name else f"{factor!r} in {name!r}",
                expected=" ".join(known),
                hint="several sites are 'ZZ' or 'sigma+ sigma-'; anything else is a matrix",
            )
        matrices.append(known[key])
    return reduce(torch.kron, matrices)


def as_array(value: Any, name: str) -> Tensor:
    """Return numbers of any form as a tensor: torch, NumPy, SciPy's sparse, pandas, xarray, nested lists, a ``Qobj``, or a list of these.

    Raises:
        InvalidInputError: If it can't be made a tensor.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple):
        value = [_dense(one) for one in value]
    try:
        return torch.as_tensor(np.array(_dense(value)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"{name} must be numbers", got=type(value).__name__, expected="a tensor, an array or a Qobj"
        ) from error


def _dense(value: Any) -> Any:
    """Return what a ``Qobj`` or a sparse matrix of SciPy holds as an array, and anything else as it is."""
    for method in ("full", "toarray"):
        if callable(getattr(value, method, None)):
            return getattr(value, method)()
    return value


def as_matrix(value: Any, name: str) -> Tensor:
    """Return a square complex128 matrix from a tensor, an array, nested lists or a QuTiP ``Qobj``.

    Raises:
        ShapeError: If it isn't a square matrix.
        NonFiniteError: If it holds NaN or infinity.
        InvalidInputError: If it can't be made a matrix.
    """
    matrix = as_array(value, name).detach().to(C128)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"{name} must be a square matrix", got=f"shape {tuple(matrix.shape)}")
    check_finite(torch.view_as_real(matrix.resolve_conj()), name)
    return matrix


def as_operator(operator: Any, dim: int, num_sites: int | None = None, name: str = "operator") -> Tensor:
    """Return the matrix ``(dim**k, dim**k)`` of a name, a matrix, a ``Qobj`` or a list of these, one for each site.

    Raises:
        ShapeError: If the size isn't a power of ``dim``, or doesn't fit ``num_sites`` sites.
        InvalidInputError: If a name is unknown.
    """
    if isinstance(operator, str):
        matrix = named_operator(operator, dim)
    elif isinstance(operator, Sequence) and operator and not _is_row(operator[0]):
        matrix = reduce(torch.kron, [as_operator(factor, dim, 1, name) for factor in operator])
    else:
        matrix = as_matrix(operator, name)
    sites = round(math.log(matrix.shape[0], dim)) if matrix.shape[0] else 0
    if matrix.shape[0] != dim**sites or sites == 0:
        raise ShapeError(
            f"the size of {name} must be a power of the number of levels",
            got=f"{matrix.shape[0]} for {dim} levels",
        )
    if num_sites is not None and sites != num_sites:
        raise ShapeError(
            f"{name} doesn't fit its sites",
            got=f"an operator on {sites} site(s) for {num_sites}",
            hint="an operator on k sites of d levels is a (d**k, d**k) matrix",
        )
    return matrix


def _is_row(value: Any) -> bool:
    return isinstance(value, (int, float, complex)) or (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(x, (int, float, complex)) for x in value)
    )


def as_state(state: Any, dim: int, name: str = "state") -> Tensor:
    """Return the density matrix ``(dim**k, dim**k)`` of a named state, a vector, a density matrix or a ``Qobj``.

    Names on qubits: ``up`` (the first basis state, = ``z+``), ``down`` (= ``z-``), ``x+ x- y+ y-``; ``mixed``
    for any number of levels. Vectors are normalised.

    Raises:
        InvalidInputError: If the name is unknown, the trace isn't one, or the matrix isn't Hermitian and positive.
        ShapeError: If the size isn't a power of ``dim``.

    Example:
        >>> as_state("y+", 2).imag.round(decimals=3).tolist()
        [[0.0, -0.5], [0.5, 0.0]]
    """
    if isinstance(state, str):
        return _named_state(state, dim, name)
    value = as_array(state, name).detach().to(C128)
    if value.ndim == 2 and value.shape[1] == 1 and value.shape[0] > 1:
        value = value[:, 0]
    if value.ndim == 1:
        check_finite(torch.view_as_real(value.resolve_conj()), name)
        norm = value.abs().square().sum().sqrt()
        if not float(norm) > 0 or not math.isfinite(float(norm)):
            raise InvalidInputError(f"{name} has no direction", got=f"a vector of norm {float(norm):g}")
        value = value / norm
        value = torch.outer(value, value.conj())
    rho = as_operator(value, dim, name=name)
    # as near as single precision is, and then exactly
    deviation = float((rho - rho.mH).abs().max())
    if not deviation <= _STATE_TOLERANCE:
        raise InvalidInputError(f"{name} must be Hermitian", got=f"a deviation of {deviation:.3g}")
    rho = (rho + rho.mH) / 2
    trace = float(rho.diagonal().sum().real)
    if abs(trace - 1) > _STATE_TOLERANCE:
        raise InvalidInputError(f"{name} must have trace one", got=f"{trace:.9g}")
    lowest = float(torch.linalg.eigvalsh(rho)[0])
    if lowest < -_STATE_TOLERANCE:
        raise InvalidInputError(f"{name} must be positive", got=f"an eigenvalue of {lowest:.3g}")
    return rho / trace


def _named_state(state: str, dim: int, name: str) -> Tensor:
    if state == "mixed":
        return torch.eye(dim, dtype=C128) / dim
    key = _STATE_ALIASES.get(state, state)
    if dim != 2 or key not in _STATES:
        raise InvalidInputError(
            f"unknown {name} on sites of {dim} levels",
            got=repr(state),
            expected=" ".join(STATE_NAMES) if dim == 2 else "mixed",
            hint="any other state is a vector or a density matrix",
        )
    vector = torch.tensor(_STATES[key], dtype=C128)
    return torch.outer(vector, vector.conj())
