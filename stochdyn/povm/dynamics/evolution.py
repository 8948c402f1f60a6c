"""What an evolution leaves behind: expectations with errors, indicators, and the state at every time."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError
from stochdyn.povm.ansatz.base import Ansatz

__all__ = ["Evolution", "EvolutionInterrupted"]


@dataclass
class Evolution:
    """The result of :func:`stochdyn.povm.evolve`.

    Attributes:
        times: ``(T,)``.
        expect: for every observable its mean ``(T,)``.
        stderr: for every observable the standard error ``(T,)`` of that mean given the state; zero by full summation.
            It doesn't count what the state itself is off by.
        residual: ``(T,)`` the largest residual of the steps since the time before. By ``"tdvp"`` the part of the rate
            of change that the ansatz couldn't follow (0 to 1); by ``"trapezoid"`` the norm of what was left of the
            implicit equation; by ``"fit"`` the misfit to the target. Zero at the first time.
        parameters: ``(T, P)`` of the state.
        steps: numbers of single steps by name, each as long as there were steps: ``"t"`` where it ended,
            ``"residual"``, and what the method reports.
        net: the ansatz, in the state of the last time.
        method: by which it evolved.
        seconds: processor time.
    """

    times: Tensor
    expect: dict[str, Tensor]
    stderr: dict[str, Tensor]
    residual: Tensor
    parameters: Tensor
    steps: dict[str, Tensor]
    net: Ansatz
    method: str
    seconds: float = 0.0
    options: Any = field(default=None, repr=False)

    def state(self, index: int) -> Ansatz:
        """Return a copy of the ansatz in the state at ``times[index]``.

        Raises:
            InvalidInputError: if there is no such time.
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


class EvolutionInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped an evolution after a whole step; the checkpoint, if any, holds that step.

    Attributes:
        result: the :class:`Evolution` up to the last time that was reached.
    """

    def __init__(self, message: str, result: Evolution) -> None:
        super().__init__(message)
        self.result = result


class Record:
    """What an evolution has gathered so far, as plain data and tensors that a checkpoint can hold."""

    def __init__(self, names: list[str]) -> None:
        self.means: dict[str, list[float]] = {name: [] for name in names}
        self.errors: dict[str, list[float]] = {name: [] for name in names}
        self.residual: list[float] = []
        self.parameters: list[Tensor] = []
        self.steps: dict[str, list[float]] = {}
        self.seconds = 0.0

    def observe(self, values: dict[str, tuple[float, float]], residual: float, parameters: Tensor) -> None:
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
        state["parameters"] = torch.stack(self.parameters) if self.parameters else None
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.__dict__.update(state)
        self.parameters = [] if state["parameters"] is None else list(state["parameters"])

    def result(self, times: Tensor, net: Ansatz, method: str, options: Any) -> Evolution:
        """Return what was gathered."""
        done = len(self.residual)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)

        return Evolution(
            times[:done],
            {name: column(v) for name, v in self.means.items()},
            {name: column(v) for name, v in self.errors.items()},
            column(self.residual),
            torch.stack(self.parameters) if self.parameters else net.parameter_vector()[None][:0],
            {name: column(v) for name, v in self.steps.items()},
            net,
            method,
            self.seconds,
            options,
        )
