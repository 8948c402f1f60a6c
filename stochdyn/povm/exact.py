"""Exact answers for small lattices: density-matrix evolution, steady states, and outcome probabilities."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_time_grid
from stochdyn.errors import ConvergenceWarning, MissingDependencyError
from stochdyn.povm.frames.frame import Tetrahedral
from stochdyn.povm.frames.lattice_observables import Observable, observables
from stochdyn.povm.master.density import DensityGenerator, initial_density
from stochdyn.povm.master.propagation import propagate, stationary_probabilities

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["ExactEvolution", "ExactSteadyState", "evolve", "propagate", "steady_state"]

_MAX_DIRECT = 4096


@dataclass(frozen=True)
class ExactEvolution:
    """An exact evolution.

    Attributes:
        times: ``(T,)``.
        expect: by name, ``(T,)`` means of the observables.
        stderr: by name, ``(T,)`` zeros, so that it can stand where a sampled run does.
        states: ``(T, D, D)`` density matrices, or None.
        backend: ``"qutip"`` or ``"matrix"``.
    """

    times: Tensor
    expect: dict[str, Tensor]
    stderr: dict[str, Tensor]
    states: Tensor | None
    backend: str


@dataclass(frozen=True)
class ExactSteadyState:
    """An exact steady state.

    Attributes:
        expect: by name, the means of the observables.
        state: ``(D, D)`` density matrix.
        residual: largest element of its rate of change.
    """

    expect: dict[str, Tensor]
    state: Tensor
    residual: float


def evolve(
    model: Lindbladian,
    state: Any,
    times: Tensor | Sequence[float],
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    backend: str = "auto",
    rtol: float = 1e-11,
    atol: float = 1e-13,
    keep_states: bool = False,
) -> ExactEvolution:
    """Evolve the density matrix of a small lattice and return means of observables.

    Args:
        model: with its parameters bound.
        state: name or state of one site, taken for all; a list with one a site; or a state of the lattice.
        times: increasing, the first being that of the initial state.
        observables: see :func:`~stochdyn.povm.frames.lattice_observables.observable`; a name on two sites is averaged over the bonds of the model.
        backend: ``"qutip"``, ``"matrix"`` (our own, by scipy), or ``"auto"``: QuTiP where it is installed.
        rtol: relative tolerance of the integration.
        atol: absolute tolerance.
        keep_states: return the density matrices too.

    Raises:
        TimeGridError: if times don't increase.
        SystemSizeError: if the density matrix would be too large.
        LindbladianError: if an observable is on a missing site, parameters aren't bound, or a rate becomes negative.
        MissingDependencyError: if QuTiP is asked for and not installed.

    Example:
        >>> from stochdyn.povm import Lindbladian
        >>> run = evolve(Lindbladian(1, [], [(1.0, "sigma-", 0)]), "up", [0.0, 1.0], ["Z"], backend="matrix")
        >>> run.expect["Z"].round(decimals=4)
        tensor([ 1.0000, -0.2642], dtype=torch.float64)
    """
    check_choice(backend, ("auto", "qutip", "matrix"), "backend")
    grid = as_times(times)
    model.check_rates(grid.tolist())
    parsed = _observables(model, observables)
    rho = initial_density(state, model.num_sites, model.dim)
    if backend == "auto":
        backend = "qutip" if importlib.util.find_spec("qutip") else "matrix"
    means: dict[str, list[Tensor]] = {name: [] for name in parsed}
    states: list[Tensor] = []

    def visit(_: int, rho: Tensor) -> None:
        for name, o in parsed.items():
            means[name].append(o.expectation(rho))
        if keep_states:
            states.append(rho)

    if backend == "qutip":
        if not importlib.util.find_spec("qutip"):
            raise MissingDependencyError("QuTiP isn't installed", hint="pip install 'stochdyn[quantum]'")
        from stochdyn.povm.lindblad.qutip_operators import integrate

        integrate(model, rho, grid.tolist(), visit, rtol, atol)
    else:
        DensityGenerator(model).integrate(rho, grid.tolist(), visit, rtol, atol)
    expect = {name: torch.stack(values) for name, values in means.items()}
    stderr = {name: torch.zeros_like(values) for name, values in expect.items()}
    return ExactEvolution(grid, expect, stderr, torch.stack(states) if keep_states else None, backend)


def steady_state(
    model: Lindbladian,
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    tolerance: float = 1e-9,
    max_time: float = 200.0,
) -> ExactSteadyState:
    """Return the steady state of a small lattice.

    Up to 4096 outcomes (six qubits) by a linear solve of the master equation, beyond by evolution from the maximally
    mixed state until the state stands still. Where there are several steady states, the first fails and the second
    gives that of the mixed state.

    Args:
        model: constant in time.
        observables: see :func:`~stochdyn.povm.frames.lattice_observables.observable`.
        tolerance: on the largest element of the rate of change.
        max_time: end of the evolution.

    Raises:
        SystemSizeError: if the density matrix would be too large.
        InvalidInputError: if the model depends on time, or its steady state isn't unique.

    Warns:
        ConvergenceWarning: if the residual is larger than the tolerance at ``max_time``.

    Example:
        >>> from stochdyn.povm import Lindbladian
        >>> float(steady_state(Lindbladian(1, [], [(1.0, "sigma-", 0)]), ["Z"]).expect["Z"].round(decimals=9))
        -1.0
    """
    import warnings

    parsed = _observables(model, observables)
    generator = DensityGenerator(model)
    outcomes = model.dim ** (2 * model.num_sites)
    if outcomes <= _MAX_DIRECT and model.dim == 2:
        frame = Tetrahedral()
        rho = frame.reconstruct(stationary_probabilities(model.master_operator(frame)))
    else:
        rho = _evolve_to_rest(generator, model, tolerance, max_time)
    residual = float(abs(generator(0.0, rho.resolve_conj().numpy())).max())
    if residual > tolerance:
        warnings.warn(
            f"the steady state isn't reached: its rate of change is {residual:.2g} after time {max_time:g}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return ExactSteadyState({name: o.expectation(rho) for name, o in parsed.items()}, rho, residual)


def as_times(times: Tensor | Sequence[float], name: str = "times") -> Tensor:
    """Return times as a float64 tensor.

    Raises:
        TimeGridError: if they don't increase.
    """
    grid = torch.as_tensor(times, dtype=torch.float64)
    check_time_grid(grid, name, min_points=1)
    return grid


def _observables(model: Lindbladian, specs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Observable]:
    return observables(specs, model.num_sites, dim=model.dim, bonds=model.bonds)


def _evolve_to_rest(
    generator: DensityGenerator, model: Lindbladian, tolerance: float, max_time: float
) -> Tensor:
    rho = initial_density("mixed", model.num_sites, model.dim)
    last: list[Tensor] = [rho]
    elapsed, span = 0.0, 5.0
    while elapsed < max_time:
        generator.integrate(
            last[0], [0.0, span], lambda _, state: last.__setitem__(0, state), rtol=1e-9, atol=1e-12
        )
        elapsed += span
        if float(abs(generator(0.0, last[0].resolve_conj().numpy())).max()) <= tolerance:
            break
    return last[0]
