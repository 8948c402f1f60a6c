"""What density matrices say: entropies, entanglement, fidelity, and the work that unitaries can extract."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_positive_int, check_real
from stochdyn.core._spectral import SpectralFunction, spectral_sum
from stochdyn.core._square_root import square_root
from stochdyn.errors import ConvergenceWarning, InvalidInputError, ShapeError
from stochdyn.povm.frames.embedding import full_operator, partial_trace
from stochdyn.povm.frames.operators import as_array
from stochdyn.povm.frames.products import sites_of
from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = [
    "capacity",
    "ergotropy",
    "fidelity",
    "mutual_information",
    "negativity",
    "renyi_entropy",
    "von_neumann_entropy",
]

_NEGATIVE = 0.02


def von_neumann_entropy(rho: Any) -> Tensor:
    r"""Return the entropy :math:`-\operatorname{Tr}\rho\log\rho` in nats.

    Args:
        rho: The density matrices ``(*batch, D, D)``, such as of :func:`~stochdyn.povm.reduced_density` or
            ``exact.evolve(..., keep_states=True).states``. Eigenvalues below zero, as sampled ones have, count as zero.

    Returns:
        ``(*batch)``, float64. Twice differentiable, where eigenvalues coincide too.

    Warns:
        ConvergenceWarning: If eigenvalues below zero weigh over 0.02.

    Example:
        >>> float(von_neumann_entropy(torch.eye(2) / 2).exp())
        2.0
    """
    matrices = _states(rho, "rho")
    total = spectral_sum(matrices, _WEIGHT)
    # with p = w / sum(w): -sum p log p = log sum(w) - sum(w log w) / sum(w)
    return total.log() - spectral_sum(matrices, _LOGARITHMIC) / total


def renyi_entropy(rho: Any, order: float = 2.0) -> Tensor:
    r"""Return the Rényi entropy :math:`\log\operatorname{Tr}\rho^\alpha/(1-\alpha)` in nats.

    Args:
        rho: The density matrices ``(*batch, D, D)``.
        order: The order :math:`\alpha>0`; 1 is the von Neumann entropy.

    Returns:
        ``(*batch)``, float64.

    Raises:
        InvalidInputError: If the order isn't positive.

    Example:
        >>> float(renyi_entropy(torch.eye(4) / 4).exp())
        4.0
    """
    check_real(order, "order", above=0.0)
    if abs(order - 1) < 1e-12:
        return von_neumann_entropy(rho)
    matrices = _states(rho, "rho")
    total = spectral_sum(matrices, _WEIGHT)
    return (spectral_sum(matrices, _power(order)).log() - order * total.log()) / (1 - order)


def mutual_information(rho: Any, sites: Sequence[int], *, dim: int = 2) -> Tensor:
    r"""Return the mutual information :math:`S_A+S_B-S_{AB}` of some sites with the others, in nats.

    Args:
        rho: The density matrices ``(*batch, d**k, d**k)`` of ``k`` sites.
        sites: The sites ``A``, numbered within the matrix.
        dim: The number ``d`` of levels of a site.

    Returns:
        ``(*batch)``, float64.

    Raises:
        LindbladianError: If a site doesn't exist, or comes twice.

    Example:
        >>> bell = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]) / 2
        >>> float(mutual_information(bell, [0]).exp())
        4.0
    """
    matrices, n, inside = _bipartition(rho, sites, dim)
    outside = [i for i in range(n) if i not in inside]
    parts = [partial_trace(matrices, part, dim) for part in (inside, outside) if part]
    return sum((von_neumann_entropy(part) for part in parts), -von_neumann_entropy(matrices))


def negativity(rho: Any, sites: Sequence[int], *, dim: int = 2) -> Tensor:
    r"""Return the negativity :math:`(\|\rho^{T_A}\|_1-1)/2`, which is zero where ``A`` and the rest aren't entangled.

    Args:
        rho: The density matrices ``(*batch, d**k, d**k)`` of ``k`` sites.
        sites: The sites ``A``, numbered within the matrix.
        dim: The number ``d`` of levels of a site.

    Returns:
        ``(*batch)``, float64.

    Raises:
        LindbladianError: If a site doesn't exist, or comes twice.

    Example:
        >>> bell = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]) / 2
        >>> round(float(negativity(bell, [0])), 6)
        0.5

    Reference:
        Vidal and Werner, Phys. Rev. A 65, 032314 (2002).
    """
    matrices, n, inside = _bipartition(rho, sites, dim)
    batch = matrices.shape[:-2]
    axes = list(range(1, 1 + 2 * n))
    for site in inside:
        axes[site], axes[n + site] = axes[n + site], axes[site]
    # rho^(T_A): rows and columns of the sites A change places
    turned = matrices.reshape(-1, *(dim,) * (2 * n)).permute(0, *axes).reshape(-1, dim**n, dim**n)
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).real
    return (spectral_sum(turned, _SIZE).reshape(batch) - trace) / 2


def fidelity(rho: Any, sigma: Any) -> Tensor:
    r"""Return the fidelity :math:`\bigl(\operatorname{Tr}\sqrt{\sqrt\rho\,\sigma\sqrt\rho}\bigr)^2`, 1 for equal states.

    Args:
        rho: The density matrices ``(*batch, D, D)``.
        sigma: The density matrices to compare with, which broadcast with them.

    Returns:
        ``(*batch)``, float64. Differentiable in both states, where eigenvalues coincide too; a change that a state without
        full rank can make on one side only counts as none.

    Raises:
        ShapeError: If the sizes differ.
        UnavailableError: If second derivatives are asked for at states without full rank.

    Example:
        >>> up, mixed = torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2) / 2
        >>> round(float(fidelity(up, mixed)), 6)
        0.5

    Reference:
        Jozsa, J. Mod. Opt. 41, 2315 (1994).
    """
    a, b = _states(rho, "rho"), _states(sigma, "sigma")
    if a.shape[-1] != b.shape[-1]:
        raise ShapeError("the states are of different size", got=b.shape[-1], expected=a.shape[-1])
    # the trace of sqrt(sqrt(rho) sigma sqrt(rho)), from roots whose derivatives survive equal eigenvalues
    root = square_root(a)
    inner = root @ b @ root
    return square_root((inner + inner.mH) / 2).diagonal(dim1=-2, dim2=-1).sum(-1).real.square()


def ergotropy(rho: Any, hamiltonian: Any) -> Tensor:
    r"""Return the largest work that unitaries extract, :math:`\operatorname{Tr}\rho H-\min_U\operatorname{Tr}U\rho U^\dagger H`.

    Args:
        rho: The density matrices ``(*batch, D, D)``.
        hamiltonian: The Hermitian matrix ``(D, D)`` of the energy, or a :class:`~stochdyn.povm.Lindbladian`, whose
            Hamiltonian counts.

    Returns:
        ``(*batch)``, float64, not negative.

    Raises:
        ShapeError: If the sizes differ.

    Example:
        >>> float(ergotropy(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([1.0, -1.0]))))
        2.0

    Reference:
        Allahverdyan, Balian and Nieuwenhuizen, Europhys. Lett. 67, 565 (2004).
    """
    matrices, h = _with_hamiltonian(rho, hamiltonian)
    energy = torch.einsum("...ij,ji->...", matrices, h).real
    # the passive state has its largest weights on the lowest levels
    passive = (torch.linalg.eigvalsh(matrices).flip(-1) * torch.linalg.eigvalsh(h)).sum(-1)
    return (energy - passive).clamp(min=0)


def capacity(rho: Any, hamiltonian: Any) -> Tensor:
    r"""Return the capacity as a battery, :math:`\max_U-\min_U` of :math:`\operatorname{Tr}U\rho U^\dagger H`.

    Args:
        rho: The density matrices ``(*batch, D, D)``.
        hamiltonian: The Hermitian matrix ``(D, D)`` of the energy, or a :class:`~stochdyn.povm.Lindbladian`, whose
            Hamiltonian counts.

    Returns:
        ``(*batch)``, float64, not negative.

    Raises:
        ShapeError: If the sizes differ.

    Example:
        >>> float(capacity(torch.eye(2) / 2, torch.diag(torch.tensor([1.0, -1.0]))))
        0.0

    Reference:
        Yang et al., Phys. Rev. Lett. 131, 030402 (2023).
    """
    matrices, h = _with_hamiltonian(rho, hamiltonian)
    # the most energy pairs large weights with high levels, the least with low ones: the difference of both
    # sums
    weights, levels = torch.linalg.eigvalsh(matrices), torch.linalg.eigvalsh(h)
    return ((weights - weights.flip(-1)) * levels).sum(-1)


def _matrices(value: Any, name: str) -> Tensor:
    """Return Hermitian matrices ``(*batch, D, D)`` as complex128."""
    matrices = as_array(value, name).to(torch.complex128)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2] or 0 in matrices.shape:
        raise ShapeError(f"{name} must be square matrices", got=f"shape {tuple(matrices.shape)}")
    deviation = float((matrices - matrices.mH).detach().abs().max())
    if not deviation <= 1e-6 * float(matrices.detach().abs().max()):
        raise InvalidInputError(f"{name} must be Hermitian and finite", got=f"a deviation of {deviation:.3g}")
    return (matrices + matrices.mH) / 2


def _states(value: Any, name: str) -> Tensor:
    """Return density matrices ``(*batch, D, D)`` as complex128, and say so if one isn't positive.

    Raises:
        InvalidInputError: If a trace isn't one.
    """
    rho = _matrices(value, name)
    off = float((rho.detach().diagonal(dim1=-2, dim2=-1).sum(-1).real - 1).abs().max())
    if not off <= 1e-4:
        raise InvalidInputError(f"{name} must have trace one", got=f"a trace off by {off:.3g}")
    missing = float(-torch.linalg.eigvalsh(rho.detach()).clamp(max=0).sum(-1).min())
    if missing > _NEGATIVE:
        warnings.warn(
            f"the density matrix isn't positive: eigenvalues below zero weigh {missing:.2g}",
            ConvergenceWarning,
            stacklevel=4,
        )
    return rho


def _where_positive(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let a function of probabilities be zero at eigenvalues that aren't positive, its derivatives too."""

    def of(p: Tensor) -> Tensor:
        return torch.where(p > 0, function(torch.where(p > 0, p, 1.0)), 0.0)

    return of


def _power(order: float) -> SpectralFunction:
    """Return the function p**order of probabilities."""
    return SpectralFunction(
        _where_positive(lambda p: p**order),
        _where_positive(lambda p: order * p ** (order - 1)),
        _where_positive(lambda p: order * (order - 1) * p ** (order - 2)),
    )


_WEIGHT = SpectralFunction(_where_positive(lambda p: p), _where_positive(torch.ones_like), torch.zeros_like)
_LOGARITHMIC = SpectralFunction(
    _where_positive(lambda p: p * p.log()),
    _where_positive(lambda p: p.log() + 1),
    _where_positive(lambda p: 1 / p),
)
_SIZE = SpectralFunction(torch.abs, torch.sign, torch.zeros_like)


def _bipartition(rho: Any, sites: Sequence[int], dim: int) -> tuple[Tensor, int, list[int]]:
    from stochdyn.povm.frames.lattice_observables import check_sites

    check_positive_int(dim, "dim", 2)
    matrices = _states(rho, "rho")
    n = sites_of(matrices[(0,) * (matrices.ndim - 2)], dim) if matrices.shape[-1] > 1 else 0
    if n == 0 or dim**n != matrices.shape[-1]:
        raise ShapeError(f"the size of rho must be a power of {dim}", got=matrices.shape[-1])
    check_sites(sites, n)
    return matrices, n, list(sites)


def _with_hamiltonian(rho: Any, hamiltonian: Any) -> tuple[Tensor, Tensor]:
    matrices = _states(rho, "rho")
    if isinstance(hamiltonian, Lindbladian):
        from stochdyn.povm.lindblad.coefficients import coefficient_value

        if any(term.coupling.uses_time for term in hamiltonian.hamiltonian):
            raise InvalidInputError(
                "hamiltonian depends on time",
                hint="pass the matrix of the energy, or a model without the drive",
            )
        n, d = hamiltonian.num_sites, hamiltonian.dim
        h = torch.zeros(d**n, d**n, dtype=torch.complex128)
        for term in hamiltonian.hamiltonian:
            full = full_operator(term.matrix, term.sites, n, d).toarray()
            h += coefficient_value(term.coupling, 0.0) * torch.from_numpy(full)
    else:
        h = _matrices(hamiltonian, "hamiltonian")
        if h.ndim != 2:
            raise ShapeError("hamiltonian must be one matrix", got=tuple(h.shape))
    if h.shape[-1] != matrices.shape[-1]:
        raise ShapeError("state and Hamiltonian differ in size", got=h.shape[-1], expected=matrices.shape[-1])
    if not math.isfinite(float(h.abs().max())):
        raise InvalidInputError("hamiltonian must be finite")
    return matrices, h
