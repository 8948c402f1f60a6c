"""Quantum trajectories: the Lindblad equation as the mean of a stochastic equation for state vectors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_bool
from stochdyn.core.law.path import Estimate
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import ConvergenceWarning, InvalidInputError, SystemSizeError, UnavailableError
from stochdyn.povm.frames.operators import as_state
from stochdyn.povm.frames.products import is_listing, site_states
from stochdyn.povm.frames.sizes import check_size
from stochdyn.povm.lindblad.coefficients import Coefficient, coefficient_value
from stochdyn.povm.lindblad.lindbladian import check_rate
from stochdyn.povm.master.arguments import as_times, check_model, read_observables
from stochdyn.povm.master.density import check_bound, flow_parts
from stochdyn.povm.master.magnus import GAUSS, magnus_weights
from stochdyn.povm.master.propagation import check_length
from stochdyn.povm.master.schedule import Schedule, Segment, make_schedule
from stochdyn.run.progress import progress_bar

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["TrajectoryEvolution", "diffusion_equation", "evolve"]

_MAX_LEVELS = 1 << 16
C128 = torch.complex128


@dataclass(frozen=True)
class TrajectoryEvolution:
    """Means over quantum trajectories.

    Attributes:
        times: The output times ``(T,)``.
        expect: The mean ``(T,)`` of every observable by name.
        stderr: The standard error ``(T,)`` of every mean by name; the error of time stepping is kept below it.
        num_trajectories: The number of trajectories.
        num_jumps: The mean number of jumps of a trajectory.
        step_error: The change of the no-jump evolution of the initial state when all steps are halved, the largest at
            any output time; rounding where coefficients are constant.
    """

    times: Tensor
    expect: dict[str, Tensor]
    stderr: dict[str, Tensor]
    num_trajectories: int
    num_jumps: float = 0.0
    step_error: float = 0.0


def diffusion_equation(model: Lindbladian) -> SDE:
    r"""Return the stochastic equation whose state vectors, averaged as :math:`|\psi\rangle\langle\psi|`, obey Lindblad's.

    .. math::
        d\psi = \Bigl(-iH-\tfrac12\sum_k(c_k^\dagger c_k-2r_kc_k+r_k^2)\Bigr)\psi\,dt+\sum_k(c_k-r_k)\psi\,dW_k,
        \qquad r_k=\operatorname{Re}\langle c_k\rangle

    Args:
        model: The Lindbladian, its parameters bound, constant in time, with at least one jump. Rates are part of
            :math:`c_k`.

    Returns:
        An Itô equation in ``2 d**N`` real numbers, the real parts first, driven by one Brownian motion for each jump.

    Raises:
        SystemSizeError: If there are over 2**16 levels.
        UnavailableError: If the model depends on time.

    Reference:
        Gisin and Percival, J. Phys. A 25, 5677 (1992); real noise as in Wiseman and Milburn, "Quantum measurement and
        control", 2009, equation 4.72 (homodyne detection).
    """
    check_model(model)
    check_bound(model)
    if model.is_time_dependent:
        raise UnavailableError("a diffusion of state vectors needs coefficients that are constant in time")
    if not model.jumps:
        raise InvalidInputError("a diffusion of state vectors needs at least one jump operator")
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

        # -iH - sum_k c_k^dagger c_k / 2, rates being part of c_k
        parts, jumps = flow_parts(model)
        flow = sum(coefficient_value(coupling, 0.0) * matrix for coupling, matrix in parts)
        roots = [coefficient_value(coupling, 0.0) ** 0.5 * matrix for coupling, matrix, _ in jumps]
        self.flow, self.jumps = as_torch(flow), as_torch(sparse.vstack(roots))

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
        # the drift of the docstring, with r_k the real mean of c_k
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
    ts: Tensor | Sequence[float],
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    num_trajectories: int = 200,
    max_step: float | None = None,
    breaks: Sequence[float] = (),
    generator: torch.Generator | int | None = None,
    progress: bool = True,
) -> TrajectoryEvolution:
    r"""Return means of observables over quantum trajectories with jumps, of a lattice of up to some 16 sites.

    A state vector follows :math:`\dot\psi=(-iH-\tfrac12\sum_k\gamma_kc_k^\dagger c_k)\psi` until its squared norm
    has fallen to a uniform random number; there it jumps, to :math:`c_k\psi` with a probability proportional to
    :math:`\gamma_k\|c_k\psi\|^2`. The flow between jumps is a Taylor series taken to rounding, and the times of jumps
    are found within it, so where coefficients are constant no step leaves an error; where they move with time, steps of
    a fourth-order Magnus method are halved until the flow no longer changes. When would I use this? Where state vectors
    fit the memory and density matrices don't; the error falls with the root of the number of trajectories.

    Args:
        model: The Lindbladian, its parameters bound.
        state: The initial state: the name or the state of one site, taken for all; a list with one for each site; or a
            state vector of the whole lattice.
        ts: The output times, increasing, the first being that of the initial state.
        observables: The observables, each as :func:`~stochdyn.povm.frames.lattice_observables.observable` takes it.
        num_trajectories: The number of trajectories.
        max_step: The longest step, for pulses shorter than 1/4096 of the span.
        breaks: The times where coefficients aren't smooth; jumps are found without.
        generator: The source of randomness of jumps and of mixed initial states.
        progress: Whether to show a progress bar.

    Raises:
        TimeGridError: If the times don't increase.
        SystemSizeError: If there are over 2**16 levels.
        LindbladianError: If a rate is negative at some time, or parameters aren't bound.

    Warns:
        ConvergenceWarning: If halving the steps would still change the result by more than its standard error.

    Example:
        >>> from stochdyn.povm import systems
        >>> run = evolve(systems.ising(3), "up", [0.0, 0.2], ["Z"], num_trajectories=10, generator=0, progress=False)
        >>> run.expect["Z"].shape, float(run.stderr["Z"][0])
        (torch.Size([2]), 0.0)

    Reference:
        Dalibard, Castin and Molmer, Phys. Rev. Lett. 68, 580 (1992); Blanes and Moan, Appl. Numer. Math. 56, 1519
        (2006) for the fourth-order method.
    """
    check_model(model)
    grid = as_times(ts)
    check_size(num_trajectories, "num_trajectories", 1 << 24, 2)
    check_bool(progress, "progress")
    source = as_generator(generator)
    check_bound(model)
    _check_levels(model.num_sites, model.dim)
    parsed = read_observables(model, observables)
    schedule = make_schedule(model, grid, max_step=max_step, breaks=breaks)
    if not model.is_time_dependent:
        check_length(model, schedule.span)
    psi = _draw_start(state, model.num_sites, model.dim, num_trajectories, source)
    walk = _Trajectories(model, schedule, psi, source)
    matrices = {name: (as_torch(o.sparse()), o.is_hermitian) for name, o in parsed.items()}
    values: dict[str, list[Tensor]] = {name: [] for name in parsed}

    def look() -> None:
        vectors = walk.normalised()
        for name, (matrix, hermitian) in matrices.items():
            mean = (vectors.conj() * (matrix @ vectors.mT).mT).sum(-1)
            values[name].append(mean.real if hermitian else mean)

    look()
    for segment in progress_bar(schedule.segments, "trajectories", progress):
        walk.cross(segment)
        if segment.output is not None:
            look()
    estimates = {name: Estimate.of(torch.stack(v, 1)) for name, v in values.items()}
    result = TrajectoryEvolution(
        grid,
        {name: e.mean for name, e in estimates.items()},
        {name: e.stderr for name, e in estimates.items()},
        num_trajectories,
        walk.num_jumps / num_trajectories,
        walk.step_error,
    )
    if walk.step_error > num_trajectories**-0.5:
        warnings.warn(
            f"the steps are too long: halving them changes the flow by {walk.step_error:.2g}; pass max_step",
            ConvergenceWarning,
            stacklevel=2,
        )
    return result


_DEGREE, _REACH = 24, 1.5
_MAX_HALVINGS, _STEP_TOLERANCE = 8, 1e-6


class _Trajectories:
    """State vectors of all trajectories under way, each with the squared norm at which it jumps."""

    def __init__(
        self, model: Lindbladian, schedule: Schedule, psi: Tensor, generator: torch.Generator | None
    ) -> None:
        self.schedule, self.psi, self.source = schedule, psi, generator
        self.num_jumps, self.step_error = 0, 0.0
        self.bar = self._uniform(len(psi))
        flow, jumps = flow_parts(model)
        self.groups = [(coupling, as_torch(matrix)) for coupling, matrix in flow]
        self.norms = [float(abs(matrix).sum(0).max()) for _, matrix in flow]
        self.jumps = [(coupling, as_torch(matrix), sites) for coupling, matrix, sites in jumps]
        self.moving = model.is_time_dependent
        self.reference = psi[:1].clone()

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.source, dtype=torch.float64)

    def normalised(self) -> Tensor:
        """Return the states with norm one."""
        return self.psi / self.psi.abs().square().sum(-1, keepdim=True).sqrt()

    def cross(self, segment: Segment) -> None:
        """Bring all trajectories to the end of a segment."""
        length = segment.end - segment.start
        if length <= 0:
            return
        count = 1
        if self.moving:
            longest = min(self.schedule.longest(segment.start + x * length / 8) for x in range(8))
            count = self._converged(segment, max(1, math.ceil(length / longest)))
        for start, span, weights in self._steps(segment, count):
            self._flow(start, span, weights)

    def _steps(self, segment: Segment, count: int) -> Iterator[tuple[float, float, list[float]]]:
        """Yield start, length and coefficients of pieces with a constant generator: two for each Magnus step."""
        h = (segment.end - segment.start) / count
        for i in range(count):
            start = segment.start + i * h
            if not self.moving:
                yield start, h, [1.0] * len(self.groups)
                continue
            first, second = ([self._value(c, segment, start + x * h) for c, _ in self.groups] for x in GAUSS)
            early, late = zip(*map(magnus_weights, first, second), strict=True)
            yield start, h / 2, list(early)
            yield start + h / 2, h / 2, list(late)

    @staticmethod
    def _value(coupling: Coefficient, segment: Segment, t: float) -> float:
        return (
            coefficient_value(coupling, min(max(t, segment.start), segment.end))
            if coupling.uses_time
            else 1.0
        )

    def _converged(self, segment: Segment, count: int) -> int:
        """Halve the steps until the flow of a state without jumps changes no more."""
        found = self._without_jumps(segment, count)
        for _ in range(_MAX_HALVINGS):
            finer = self._without_jumps(segment, 2 * count)
            change = float((finer - found).norm() / finer.norm().clamp(min=1e-300))
            if change <= _STEP_TOLERANCE:
                break
            found, count = finer, 2 * count
        self.step_error = max(self.step_error, change)
        self.reference = finer / finer.norm()
        return count

    def _without_jumps(self, segment: Segment, count: int) -> Tensor:
        psi = self.reference
        for _, span, weights in self._steps(segment, count):
            parts = self._parts(span, weights)
            for _ in range(parts):
                psi = sum(self._series(psi, weights, span / parts))  # type: ignore[assignment]
        return psi

    def _parts(self, span: float, weights: list[float]) -> int:
        size = sum(abs(w) * norm for w, norm in zip(weights, self.norms, strict=True))
        return max(1, math.ceil(size * span / _REACH))

    def _series(self, psi: Tensor, weights: list[float], span: float) -> list[Tensor]:
        """Return the terms of the Taylor series of the flow over a span; their sum is the state after it."""
        # exp(hG) psi = sum_k (hG)^k psi / k!; the terms serve for every time within the span
        terms = [psi]
        for k in range(1, _DEGREE):
            parts = (w * (m @ terms[-1].mT).mT for w, (_, m) in zip(weights, self.groups, strict=True))
            terms.append(sum(parts, torch.zeros_like(psi)) * (span / k))
        return terms

    def _flow(self, start: float, span: float, weights: list[float]) -> None:
        """Move all trajectories on by a span with a constant generator, with the jumps that happen on the way."""
        parts = self._parts(span, weights)
        h = span / parts
        for i in range(parts):
            rows = torch.arange(len(self.psi))
            left = torch.full((len(rows),), h, dtype=torch.float64)
            while len(rows):
                before = self.psi[rows]
                terms = torch.stack(self._series(before, weights, h))
                powers = (left / h)[None] ** torch.arange(_DEGREE, dtype=torch.float64)[:, None]
                after = (terms * powers[..., None]).sum(0)
                # a trajectory jumps where its squared norm has fallen to its random number
                jumping = after.abs().square().sum(-1) <= self.bar[rows]
                self.psi[rows[~jumping]] = after[~jumping]
                rows, left, terms = rows[jumping], left[jumping], terms[:, jumping]
                if not len(rows):
                    break
                when, states = self._crossing(terms, left / h, self.bar[rows])
                # the time of each jump: what it had left of this part, less what it has left after it
                self._jump(rows, states, start + i * h + h - left + when * h)
                left = left - when * h

    def _crossing(self, terms: Tensor, end: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
        """Find by bisection where the squared norm of a Taylor series has fallen to a bar; return places and states."""
        # |psi(s)|^2 is a polynomial in s, whose coefficients are sums of overlaps of the terms
        overlaps = torch.einsum("kmd,lmd->mkl", terms.conj(), terms).real
        low, high = torch.zeros_like(end), end.clone()
        exponents = torch.arange(_DEGREE, dtype=torch.float64)
        for _ in range(52):
            middle = (low + high) / 2
            powers = middle[:, None] ** exponents
            norm = torch.einsum("mk,mkl,ml->m", powers, overlaps, powers)
            fallen = norm <= bar
            high, low = torch.where(fallen, middle, high), torch.where(fallen, low, middle)
        powers = high[:, None] ** exponents
        return high, torch.einsum("kmd,mk->md", terms, powers.to(terms.dtype))

    def _jump(self, rows: Tensor, psi: Tensor, times: Tensor) -> None:
        """Let trajectories jump at times of their own, each by one of the operators, and draw the norms of the next jumps."""
        moved = []
        for coupling, c, sites in self.jumps:
            at = times.tolist() if coupling.uses_time else [0.0]
            rates = [coefficient_value(coupling, t) for t in at]
            for rate, t in zip(rates, at, strict=True):
                check_rate(rate, t, sites)
            moved.append(torch.tensor(rates, dtype=torch.float64)[:, None].sqrt() * (c @ psi.mT).mT)
        options = torch.stack(moved, 1)
        weights = options.abs().square().sum(-1)
        choice = torch.multinomial(weights / weights.sum(1, keepdim=True), 1, generator=self.source)[:, 0]
        chosen = options[torch.arange(len(rows)), choice]
        self.psi[rows] = chosen / chosen.abs().square().sum(-1, keepdim=True).sqrt()
        self.bar[rows] = self._uniform(len(rows))
        self.num_jumps += len(rows)


def as_torch(matrix: Any) -> Tensor:
    """Return a scipy sparse matrix as a sparse tensor."""
    coo = matrix.tocoo()
    places = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.complex128))
    return torch.sparse_coo_tensor(places, values, coo.shape, check_invariants=False).coalesce()


def _check_levels(num_sites: int, dim: int) -> None:
    if dim**num_sites > _MAX_LEVELS:
        raise SystemSizeError(
            "state vectors are too large for trajectories",
            got=f"{num_sites} sites of {dim} levels",
            expected=f"at most {_MAX_LEVELS} levels",
            hint="sample outcomes instead: stochdyn.povm.evolve with a network",
        )


def _draw_start(state: Any, n: int, dim: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw state vectors ``(M, d**N)`` whose average is the initial state."""
    vector = _whole_vector(state, dim**n)
    if vector is not None and n > 1:
        return vector.expand(count, -1).clone()
    if n > 1 and not isinstance(state, str) and not is_listing(state):
        rho = as_state(state, dim)
        if rho.shape[0] == dim**n:
            return _draw_vectors(rho, count, generator)
    psi = torch.ones(count, 1, dtype=C128)
    for s in site_states(state, n):
        rho = as_state(s, dim)
        if rho.shape[0] != dim:
            raise InvalidInputError(
                "trajectories start from a product of single sites, or from a state of all of them",
                got=f"a density matrix of {rho.shape[0]} levels",
            )
        vectors = _draw_vectors(rho, count, generator)
        psi = (psi[:, :, None] * vectors[:, None]).flatten(1)
    return psi


def _draw_vectors(rho: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw state vectors ``(count, D)`` whose average is a density matrix."""
    # a mixed state is the mean over its eigenvectors, drawn with their weights
    weights, vectors = torch.linalg.eigh(rho)
    pick = torch.multinomial(weights.clamp(min=0), count, True, generator=generator)
    return vectors.T[pick]


def _whole_vector(state: Any, size: int) -> Tensor | None:
    """Return the normalised vector of the whole lattice that a state is, or None if it is something else."""
    if isinstance(state, str) or is_listing(state):
        return None
    full = getattr(state, "full", None)
    given = full() if callable(full) else state
    value = given if isinstance(given, Tensor) else torch.as_tensor(np.array(given))
    if value.ndim == 2 and value.shape[1] == 1:
        value = value[:, 0]
    if value.shape != (size,):
        return None
    norm = value.abs().square().sum().sqrt()
    if not (math.isfinite(float(norm)) and float(norm) > 0):
        raise InvalidInputError("state must be a finite vector that isn't zero", got=f"norm {float(norm)}")
    return (value / norm).to(C128)
