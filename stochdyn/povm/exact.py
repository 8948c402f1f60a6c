"""Exact answers for small lattices: density-matrix evolution, steady states, and outcome probabilities."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import check_bool, check_choice, check_positive, check_real
from stochdyn.errors import ConvergenceWarning, InvalidInputError
from stochdyn.povm.frames.frame import QutritSIC, Tetrahedral
from stochdyn.povm.master.arguments import as_times, check_model, read_observables
from stochdyn.povm.master.density import DensityGenerator, check_bound, initial_density
from stochdyn.povm.master.propagation import check_length, propagate, stationary_probabilities
from stochdyn.povm.master.schedule import Schedule, Segment, make_schedule

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["ExactEvolution", "ExactSteadyState", "evolve", "propagate", "steady_state"]

_MAX_DIRECT, _APART = 4096, 1e-3


@dataclass(frozen=True)
class ExactEvolution:
    """An exact evolution.

    Attributes:
        times: The output times ``(T,)``.
        expect: The mean ``(T,)`` of every observable by name.
        stderr: Zeros ``(T,)`` for every observable, so that the result can stand where a sampled run does.
        states: The density matrices ``(T, D, D)``, or None.
        backend: The backend that was used, ``"qutip"`` or ``"matrix"``.
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
        expect: The mean of every observable by name.
        state: The density matrix ``(D, D)`` of the steady state.
        residual: The largest element of the rate of change of that matrix.
    """

    expect: dict[str, Tensor]
    state: Tensor
    residual: float


def evolve(
    model: Lindbladian,
    state: Any,
    ts: Tensor | Sequence[float],
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    backend: str = "auto",
    rtol: float = 1e-11,
    atol: float = 1e-13,
    max_step: float | None = None,
    breaks: Sequence[float] = (),
    keep_states: bool = False,
) -> ExactEvolution:
    """Evolve the density matrix of a small lattice and return means of observables.

    When would I use this? For up to ten qubits or so, where nothing else is a match for it; beyond, trajectories reach
    some sixteen, and networks more.

    Coefficients that depend on time are looked at before the integration, so that steps end where they jump and none
    passes over a pulse longer than 1/4096 of the span.

    Args:
        model: The Lindbladian, its parameters bound.
        state: The initial state: the name or the state of one site, taken for all; a list with one for each site; or a
            state of the whole lattice.
        ts: The output times, increasing, the first being that of the initial state.
        observables: The observables, each as :func:`~stochdyn.povm.frames.lattice_observables.observable` takes it; a
            name on two sites is averaged over the bonds of the model.
        backend: The solver: ``"qutip"``, ``"matrix"`` (our own, by scipy), or ``"auto"``: QuTiP where it is installed.
        rtol: The relative tolerance of a step.
        atol: The absolute tolerance of a step.
        max_step: The longest step, for pulses shorter than 1/4096 of the span.
        breaks: The times where coefficients aren't smooth; jumps are found without.
        keep_states: Whether to return the density matrices too.

    Raises:
        TimeGridError: If the times don't increase.
        SystemSizeError: If the density matrix would be too large.
        LindbladianError: If an observable is on a missing site, parameters aren't bound, or a rate becomes negative at
            any time.
        MissingDependencyError: If QuTiP is asked for and not installed.

    Example:
        >>> from stochdyn.povm import Lindbladian
        >>> run = evolve(Lindbladian(1, [], [(1.0, "sigma-", 0)]), "up", [0.0, 1.0], ["Z"], backend="matrix")
        >>> run.expect["Z"].round(decimals=4)
        tensor([ 1.0000, -0.2642], dtype=torch.float64)
    """
    check_model(model)
    check_choice(backend, ("auto", "qutip", "matrix"), "backend")
    grid = as_times(ts)
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    check_bool(keep_states, "keep_states")
    check_bound(model)
    parsed = read_observables(model, observables)
    rho = initial_density(state, model.num_sites, model.dim)
    schedule = make_schedule(model, grid, max_step=max_step, breaks=breaks)
    if not model.is_time_dependent:
        check_length(model, schedule.span)
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
        from stochdyn.povm.lindblad.qutip_operators import integrate

        integrate(model, rho, schedule, visit, rtol, atol)
    else:
        DensityGenerator(model).integrate(rho, schedule, visit, rtol, atol)
    expect = {name: torch.stack(values) for name, values in means.items()}
    stderr = {name: torch.zeros_like(values) for name, values in expect.items()}
    return ExactEvolution(grid, expect, stderr, torch.stack(states) if keep_states else None, backend)


def steady_state(
    model: Lindbladian,
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    tolerance: float = 1e-9,
    horizon: float | None = None,
) -> ExactSteadyState:
    """Return the steady state of a small lattice.

    Up to 4096 outcomes (six qubits, three qutrits) by a linear solve of the master equation, beyond by evolution from the
    maximally mixed state until the state stands still, and from a state without symmetries beside it: where these end in
    different states, the steady state isn't unique.

    Args:
        model: The Lindbladian, constant in time.
        observables: The observables, each as :func:`~stochdyn.povm.frames.lattice_observables.observable` takes it.
        tolerance: The largest element of the rate of change at which the state counts as steady, relative to the
            fastest rate of the model.
        horizon: The length of the evolution, which then takes the place of a solve at any size; if None a solve, or 200
            over the least jump rate at a site.

    Raises:
        SystemSizeError: If the density matrix would be too large.
        InvalidInputError: If the model depends on time, or its steady state isn't unique.
        LindbladianError: If parameters aren't bound.

    Warns:
        ConvergenceWarning: If the residual is larger than the tolerance at ``horizon``, or the state still depends on
            where the evolution began.

    Example:
        >>> from stochdyn.povm import Lindbladian
        >>> float(steady_state(Lindbladian(1, [], [(1.0, "sigma-", 0)]), ["Z"]).expect["Z"].round(decimals=9))
        -1.0
    """
    check_model(model)
    check_real(tolerance, "tolerance", above=0.0)
    if horizon is not None:
        check_real(horizon, "horizon", above=0.0)
    check_bound(model)
    if model.is_time_dependent:
        raise InvalidInputError("a model that depends on time has no steady state", hint="use evolve")
    parsed = read_observables(model, observables)
    generator = DensityGenerator(model)
    scale = model.rate_scale()
    if scale == 0 or not model.jumps:
        raise InvalidInputError("the steady state isn't unique", hint="add jumps")
    outcomes = model.dim ** (2 * model.num_sites)
    if outcomes <= _MAX_DIRECT and model.dim in (2, 3) and horizon is None:
        frame = Tetrahedral() if model.dim == 2 else QutritSIC()
        rho = frame.reconstruct(stationary_probabilities(model.master_operator(frame)))
    else:
        rho = _evolve_to_rest(generator, model, tolerance * scale, horizon)
    residual = _speed(generator, rho)
    if residual > tolerance * scale:
        warnings.warn(
            f"the steady state isn't reached: its largest rate of change is {residual / scale:.2g} of the fastest "
            "rate; pass a longer horizon",
            ConvergenceWarning,
            stacklevel=2,
        )
    return ExactSteadyState({name: o.expectation(rho) for name, o in parsed.items()}, rho, residual)


def _evolve_to_rest(
    generator: DensityGenerator, model: Lindbladian, tolerance: float, horizon: float | None
) -> Tensor:
    """Evolve two states until they stand still, and see that they have become one.

    Raises:
        InvalidInputError: If they stand still apart.
    """
    end = horizon if horizon is not None else 200 / model.relaxation_rate()
    check_length(model, end)
    grid = torch.linspace(0, end, 41, dtype=torch.float64).tolist()
    n, d = model.num_sites, model.dim
    rest, still = initial_density("mixed", n, d), max(tolerance, 1e-6 * model.rate_scale())
    # no two sites alike, no two levels alike, and phases between them
    turn = torch.arange(n * d, dtype=torch.float64).reshape(n, d)
    vectors = (1 + 0.5 * torch.sin(1.7 * turn)) * torch.exp(1j * (0.9 * turn + 0.3 * turn**2))
    other = initial_density(list(vectors), n, d)
    for span in itertools.pairwise(grid):
        rest = _moved(generator, rest, span, 1e-9)
        other = _moved(generator, other, span, 1e-7)
        joined = float((rest - other).abs().max()) < 1e-2 * _APART
        if _speed(generator, rest) <= tolerance and (joined or _speed(generator, other) <= still):
            break
    apart = float(torch.linalg.eigvalsh(rest - other).abs().sum()) / 2
    if apart > _APART:
        if _speed(generator, other) <= still:
            raise InvalidInputError(
                "the steady state isn't unique",
                got=f"two at a trace distance of {apart:.2g}",
                hint="add a jump that mixes what the Hamiltonian keeps apart",
            )
        if _speed(generator, rest) > tolerance:
            return rest  # which the residual says
        warnings.warn(
            f"another initial state is still at a trace distance of {apart:.2g}: pass a smaller tolerance or a longer horizon",
            ConvergenceWarning,
            stacklevel=3,
        )
    return rest


def _moved(generator: DensityGenerator, rho: Tensor, span: tuple[float, float], rtol: float) -> Tensor:
    """Return a state after a span of time."""
    seen = [rho]
    generator.integrate(
        rho, Schedule(span, [Segment(*span, 1)]), lambda _, now: seen.append(now), rtol, 1e-3 * rtol
    )
    return seen[-1]


def _speed(generator: DensityGenerator, rho: Tensor) -> float:
    """Return the largest element of the rate of change of a state."""
    return float(abs(generator(0.0, rho.resolve_conj().numpy())).max())
