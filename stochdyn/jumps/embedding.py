"""Which generators a transition matrix may come from: none, one, or several branches of its logarithm."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_real
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["other_generators", "transition_generator"]

#: Rates above minus this share of the largest one count as not negative, and imaginary parts below it as zero.
_SMALL = 1e-9


def transition_generator(matrix: object, dt: float) -> Tensor:
    r"""Return the generator :math:`\log P/\Delta` of a transition matrix, if it is one.

    Args:
        matrix: The transition probabilities over ``dt``, ``(S, S)``.
        dt: The time Δ between two observations.

    Raises:
        InvalidInputError: If no jump process has these transitions (P isn't embeddable), or none on the principal branch.

    Example:
        >>> transition_generator([[0.9, 0.1], [0.2, 0.8]], 1.0).round(decimals=3)
        tensor([[-0.1190,  0.1190],
                [ 0.2380, -0.2380]])
    """
    p = as_tensor(matrix, "matrix", 2, "(S, S)")
    check_real(dt, "dt", above=0.0, fixed=True)
    if p.shape[0] != p.shape[1]:
        raise ShapeError("matrix must be square", got=tuple(p.shape))
    if bool((p < 0).any()) or float((p.sum(-1) - 1).abs().max()) > 1e-6:
        raise InvalidInputError("the rows of matrix must be probabilities")
    values = np.linalg.eigvals(p.double().numpy())
    determinant = float(np.linalg.det(p.double().numpy()))
    if determinant <= 0 or np.any((values.real <= 0) & (np.abs(values.imag) < 1e-14)):
        raise InvalidInputError(
            "no jump process has these transition probabilities",
            got=f"determinant {determinant:.3g}",
            hint="a count matrix needs the likelihood (fit_rates), not the logarithm",
        )
    from scipy.linalg import logm

    log = np.asarray(logm(p.double().numpy())).real / dt
    bad = log - np.diag(np.diag(log))
    if bad.min() < -_SMALL * np.abs(log).max():
        i, j = np.unravel_index(bad.argmin(), bad.shape)
        raise InvalidInputError(
            "the logarithm of the transition matrix isn't a generator",
            got=f"a rate of {bad[i, j]:.3g} from {i} to {j}",
            hint="estimate rates by likelihood (fit_rates)",
        )
    return torch.as_tensor(log).to(p)


def other_generators(rates: Tensor, dt: float, branches: int = 2) -> list[Tensor]:
    """Return further generators with the same transition matrix over ``dt``.

    Complex pairs of eigenvalues may be moved by whole multiples of 2πi / dt; those moves are listed whose result has no
    negative rate.
    """
    q = rates.detach().double().cpu().numpy()
    values, vectors = np.linalg.eig(q)
    pairs = [
        (i, int(np.argmin(np.abs(values - values[i].conj()))))
        for i in np.flatnonzero(values.imag > 1e-12 * np.abs(values).max())
    ]
    if not pairs or np.linalg.cond(vectors) > 1e10:
        return []
    inverse = np.linalg.inv(vectors)
    found = []
    for shift in itertools.product(range(-branches, branches + 1), repeat=len(pairs)):
        if not any(shift):
            continue
        moved = values.astype(complex).copy()
        for (i, j), k in zip(pairs, shift, strict=True):
            moved[i] += 2j * math.pi * k / dt
            moved[j] -= 2j * math.pi * k / dt
        other = (vectors * moved) @ inverse
        if np.abs(other.imag).max() > 1e-8 * np.abs(other).max():
            continue
        off = other.real - np.diag(np.diag(other.real))
        if off.min() >= -_SMALL * np.abs(off).max() and np.abs(other.real - q).max() > 1e-8 * np.abs(q).max():
            found.append(
                torch.as_tensor(np.where(off < 0, 0.0, off) - np.diag(np.where(off < 0, 0.0, off).sum(1)))
            )
    return found
