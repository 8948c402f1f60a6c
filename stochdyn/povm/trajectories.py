"""Quantum trajectories: the Lindblad equation as the mean of a stochastic equation for state vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_positive, check_positive_int, check_time_grid
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.path import Estimate
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, SystemSizeError, UnavailableError
from stochdyn.povm.frames.lattice_observables import Observable, observables
from stochdyn.povm.frames.operators import as_state
from stochdyn.povm.lindblad.terms import coupling_value
from stochdyn.povm.master.density import full_operator

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["TrajectoryEvolution", "diffusion_equation", "evolve"]

_MAX_LEVELS = 1 << 16
C128 = torch.complex128


@dataclass(frozen=True)
class TrajectoryEvolution:
    """Means over quantum trajectories.

    Attributes:
        times: ``(T,)``.
        expect: by name, ``(T,)`` means of the observables.
        stderr: by name, ``(T,)`` standard errors; they leave out the bias of the step, of its first order.
        num_trajectories: how many.
    """

    times: Tensor
    expect: dict[str, Tensor]
    stderr: dict[str, Tensor]
    num_trajectories: int


def diffusion_equation(model: Lindbladian) -> SDE:
    r"""Return the stochastic equation whose state vectors, averaged as :math:`|\psi\rangle\langle\psi|`, obey Lindblad's.

    .. math::
        d\psi = \Bigl(-iH-\tfrac12\sum_k(c_k^\dagger c_k-2r_kc_k+r_k^2)\Bigr)\psi\,dt+\sum_k(c_k-r_k)\psi\,dW_k,
        \qquad r_k=\operatorname{Re}\langle c_k\rangle

    Args:
        model: its parameters bound, constant in time, with at least one jump. Rates are part of :math:`c_k`.

    Returns:
        An Itô equation in ``2 d**N`` real numbers, the real parts first, driven by one Brownian motion a jump.

    Raises:
        SystemSizeError: if there are over 2**16 levels.
        UnavailableError: if the model depends on time.

    Reference:
        Gisin and Percival, J. Phys. A 25, 5677 (1992); real noise as in Wiseman and Milburn, "Quantum measurement and
        control", 2009, equation 4.72 (homodyne detection).
    """
    if model.is_time_dependent:
        raise UnavailableError("trajectories need coefficients that are constant in time")
    if not model.jumps:
        raise InvalidInputError("trajectories need at least one jump operator")
    drift = _TrajectoryDrift(model)
    return SDE(drift, drift.spread)


class _TrajectoryDrift(torch.nn.Module):
    """Drift and diffusion of :func:`diffusion_equation`, with all jump operators stacked into one sparse matrix."""

    def __init__(self, model: Lindbladian) -> None:
        super().__init__()
        n, d = model.num_sites, model.dim
        _check_levels(n, d)
        self.levels, self.num_jumps = d**n, len(model.jumps)
        from scipy import sparse

        flow = sparse.csr_matrix((self.levels, self.levels), dtype=np.complex128)
        for term in model.hamiltonian:
            flow = flow - 1j * coupling_value(term.coupling, 0.0) * full_operator(
                term.matrix, term.sites, n, d
            )
        jumps = []
        for term in model.jumps:
            c = coupling_value(term.coupling, 0.0) ** 0.5 * full_operator(term.matrix, term.sites, n, d)
            flow = flow - 0.5 * (c.conj().T @ c)
            jumps.append(c)
        self.flow, self.jumps = as_torch(flow), as_torch(sparse.vstack(jumps))

    def _act(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states ``(M, D)``, jumps on them ``(M, J, D)`` and their means ``(M, J)``."""
        psi = torch.complex(x[..., : self.levels], x[..., self.levels :]).reshape(-1, self.levels)
        acted = (self.jumps @ psi.mT).reshape(self.num_jumps, self.levels, -1).permute(2, 0, 1)
        norm = psi.abs().square().sum(-1)
        mean = torch.einsum("md,mjd->mj", psi.conj(), acted).real / norm[:, None]
        return psi, acted, mean

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift like ``x``."""
        psi, acted, mean = self._act(x)
        out = (self.flow @ psi.mT).mT + torch.einsum("mj,mjd->md", mean.to(psi.dtype), acted)
        out = out - 0.5 * mean.square().sum(-1, keepdim=True) * psi
        return torch.cat([out.real, out.imag], -1).reshape(x.shape)

    def spread(self, t: Tensor, x: Tensor) -> Matrix:
        """Return the diffusion ``(..., 2 D, J)``."""
        psi, acted, mean = self._act(x)
        columns = acted - mean[..., None] * psi[:, None]
        real = torch.cat([columns.real, columns.imag], -1).mT
        return Matrix(real.reshape(*x.shape, self.num_jumps))


def evolve(
    model: Lindbladian,
    state: Any,
    times: Tensor | Sequence[float],
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    num_trajectories: int = 200,
    step: float = 0.01,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TrajectoryEvolution:
    """Return means of observables over quantum trajectories of a lattice of some ten sites.

    A baseline that keeps state vectors only, so it reaches twice as many sites as the density matrix, with an error that
    falls with the root of the number of trajectories.

    Args:
        model: its parameters bound, constant in time, with at least one jump.
        state: name or state of one site, taken for all, or a list with one a site.
        times: increasing, the first being that of the initial state.
        observables: see :func:`~stochdyn.povm.frames.lattice_observables.observable`.
        num_trajectories: how many.
        step: largest step of Euler's method.
        generator: of the noise and of mixed initial states.
        progress: show a progress bar.

    Raises:
        TimeGridError: if times don't increase.
        SystemSizeError: if there are over 2**16 levels.

    Example:
        >>> from stochdyn.povm import systems
        >>> generator = torch.Generator().manual_seed(0)
        >>> run = evolve(systems.ising(3), "up", [0.0, 0.2], ["Z"], num_trajectories=10, generator=generator)
        >>> run.expect["Z"].shape, float(run.stderr["Z"][0])
        (torch.Size([2]), 0.0)
    """
    grid = torch.as_tensor(times, dtype=torch.float64)
    check_time_grid(grid, "times", min_points=1)
    check_positive_int(num_trajectories, "num_trajectories", 2)
    check_positive(step, "step")
    parsed = _parse(model, observables)
    law = DiffusionMeasure(torch.zeros(1, dtype=torch.float64), diffusion_equation(model))
    psi = _draw_start(state, model.num_sites, model.dim, num_trajectories, generator)
    x = torch.cat([psi.real, psi.imag], -1)
    matrices = {name: as_torch(_matrix(o)) for name, o in parsed.items()}
    values: dict[str, list[Tensor]] = {name: [] for name in parsed}

    def look(x: Tensor) -> None:
        psi = torch.complex(*x.chunk(2, -1))
        norm = psi.abs().square().sum(-1)
        for name, matrix in matrices.items():
            values[name].append(((matrix @ psi.mT).mT * psi.conj()).sum(-1).real / norm)

    look(x)
    spans: Iterable[tuple[float, float]] = list(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True))
    if progress:
        from tqdm.auto import tqdm

        spans = tqdm(spans, desc="trajectories")
    for start, end in spans:
        count = max(1, int(np.ceil((end - start) / step - 1e-9)))
        ts = torch.linspace(start, end, count + 1, dtype=torch.float64)
        noise = torch.randn(
            count, num_trajectories, len(model.jumps), generator=generator, dtype=torch.float64
        )
        with torch.no_grad():
            x = law.drive(ts, x, noise * ((end - start) / count) ** 0.5).x[..., -1, :]
        psi = torch.complex(*x.chunk(2, -1))
        x = x / psi.abs().square().sum(-1, keepdim=True).sqrt()
        look(x)
    estimates = {name: Estimate.of(torch.stack(v, 1)) for name, v in values.items()}
    return TrajectoryEvolution(
        grid,
        {name: e.mean for name, e in estimates.items()},
        {name: e.stderr for name, e in estimates.items()},
        num_trajectories,
    )


def as_torch(matrix: Any) -> Tensor:
    """Return a scipy sparse matrix as a sparse tensor."""
    coo = matrix.tocoo()
    places = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.complex128))
    return torch.sparse_coo_tensor(places, values, coo.shape, check_invariants=False).coalesce()


def _parse(model: Lindbladian, specs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Observable]:
    return observables(specs, model.num_sites, dim=model.dim, bonds=model.bonds)


def _matrix(observable: Observable) -> Any:
    operator = reduce(torch.kron, observable.factors)
    parts = [full_operator(operator, p, observable.num_sites, observable.dim) for p in observable.places]
    return sum(parts[1:], parts[0]) / len(parts)


def _check_levels(num_sites: int, dim: int) -> None:
    if dim**num_sites > _MAX_LEVELS:
        raise SystemSizeError(
            "state vectors are too large for trajectories",
            got=f"{num_sites} sites of {dim} levels",
            expected=f"at most {_MAX_LEVELS} levels",
            hint="sample outcomes instead: stochdyn.povm.evolve with a network",
        )


def _draw_start(state: Any, n: int, dim: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw state vectors ``(M, d**N)`` whose average is a product state."""
    _check_levels(n, dim)
    states = list(state) if isinstance(state, (list, tuple)) else [state] * n
    if len(states) != n:
        raise InvalidInputError("a product state needs one state a site", got=len(states), expected=n)
    psi = torch.ones(count, 1, dtype=C128)
    for s in states:
        rho = as_state(s, dim)
        if rho.shape[0] != dim:
            raise InvalidInputError("trajectories start from a product of single sites")
        weights, vectors = torch.linalg.eigh(rho)
        pick = torch.multinomial(weights.clamp(min=0), count, True, generator=generator)
        psi = (psi[:, :, None] * vectors.T[pick][:, None]).flatten(1)
    return psi
