"""What an evolution leaves behind: expectations with errors, indicators, and the state at every time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.dynamics.methods import Method
from stochdyn.povm.master.physicality import Positivity

__all__ = ["Evolution"]


@dataclass
class Evolution:
    """The result of :func:`stochdyn.povm.evolve`.

    Attributes:
        times: The output times ``(T,)``.
        expect: The mean ``(T,)`` of every observable by name, complex where it isn't Hermitian.
        stderr: The standard error ``(T,)`` of that mean given the state, for every observable; zero by full summation.
            It doesn't count what the state itself is off by.
        residual: The largest residual ``(T,)`` of the steps since the time before. By ``"tdvp"`` the part of the rate
            of change that the ansatz couldn't follow, from 0 to 1; by ``"trapezoid"`` the norm of what was left of the
            implicit equation; by ``"fit"`` the misfit to the target. Zero at the first time.
        parameters: The parameters ``(T, P)`` of the state.
        steps: The numbers that single steps reported, by name, each tensor as long as there were steps: ``"t"`` where
            the step ended, ``"residual"``, and what the method reports.
        net: The ansatz, in the state of the last time.
        method: The method by which it evolved, with its options.
        seconds: The wall-clock time of the run in seconds.
        positivity: The lowest eigenvalues of two-site density matrices at the last time, on the bonds of the model;
            None where it wasn't looked at.
    """

    times: Tensor
    expect: dict[str, Tensor]
    stderr: dict[str, Tensor]
    residual: Tensor
    parameters: Tensor
    steps: dict[str, Tensor]
    net: Ansatz
    method: Method
    seconds: float = 0.0
    positivity: Positivity | None = field(default=None, repr=False)

    def state(self, index: int) -> Ansatz:
        """Return a copy of the ansatz in the state at ``times[index]``.

        Raises:
            InvalidInputError: If there is no such time.
        """
        if not -len(self.times) <= index < len(self.times):
            raise InvalidInputError(
                "there is no such time", got=index, expected=f"less than {len(self.times)}"
            )
        net = copy.deepcopy(self.net)
        net.set_parameter_vector(self.parameters[index])
        return net

    def plot(self, exact: Any = None, axes: Any = None) -> Any:
        """Draw the observables and the residual over time; see :func:`stochdyn.povm.plot_evolution`."""
        from stochdyn.povm.plots import plot_evolution

        return plot_evolution(self, exact=exact, axes=axes)


class Record:
    """What an evolution has gathered so far, as plain data and tensors that a checkpoint can hold."""

    def __init__(self, names: list[str]) -> None:
        self.means: dict[str, list[complex]] = {name: [] for name in names}
        self.errors: dict[str, list[float]] = {name: [] for name in names}
        self.residual: list[float] = []
        self.parameters: list[Tensor] = []
        self.steps: dict[str, list[float]] = {}

    def observe(self, values: dict[str, tuple[complex, float]], residual: float, parameters: Tensor) -> None:
        """Add what was seen at one of the times."""
        for name, (mean, error) in values.items():
            self.means[name].append(mean)
            self.errors[name].append(error)
        self.residual.append(residual)
        self.parameters.append(parameters)

    def add_step(self, values: dict[str, float]) -> None:
        """Add the numbers of a step."""
        for name, value in values.items():
            self.steps.setdefault(name, []).append(value)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a checkpoint."""
        state = dict(self.__dict__)
        state["means"] = {name: column(values) for name, values in self.means.items()}
        state["parameters"] = torch.stack(self.parameters) if self.parameters else None
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.__dict__.update({k: v for k, v in state.items() if k not in ("means", "parameters")})
        # the record goes on growing: what the checkpoint holds must not grow with it
        self.errors = {name: list(values) for name, values in self.errors.items()}
        self.steps = {name: list(values) for name, values in self.steps.items()}
        self.residual = list(self.residual)
        self.means = {name: values.tolist() for name, values in state["means"].items()}
        self.parameters = [] if state["parameters"] is None else list(state["parameters"])

    def result(self, times: Tensor, net: Ansatz, method: Method, seconds: float) -> Evolution:
        """Return what was gathered."""
        done = len(self.residual)
        return Evolution(
            times[:done],
            {name: column(v) for name, v in self.means.items()},
            {name: column(v) for name, v in self.errors.items()},
            column(self.residual),
            torch.stack(self.parameters) if self.parameters else net.parameter_vector()[None][:0],
            {name: column(v) for name, v in self.steps.items()},
            net,
            method,
            seconds,
        )


def column(values: Sequence[complex]) -> Tensor:
    """Return numbers as float64, or complex128 if one is complex."""
    kind = torch.complex128 if any(isinstance(v, complex) for v in values) else torch.float64
    return torch.tensor(values, dtype=kind)
