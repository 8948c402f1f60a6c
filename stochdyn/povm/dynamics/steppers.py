"""The three ways to take a step in time, behind one interface."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.dynamics.averages import Averages
from stochdyn.povm.dynamics.heun import controlled_step, plain_step
from stochdyn.povm.dynamics.options import FitOptions, TDVPOptions, TrapezoidOptions
from stochdyn.povm.dynamics.target import target_step
from stochdyn.povm.dynamics.tdvp import Velocity, tdvp_velocity
from stochdyn.povm.dynamics.trapezoid import minimise, trapezoid_problem

__all__ = ["Step", "Stepper", "make_stepper"]

_STRIDE = 0x9E3779B1


@dataclass(frozen=True)
class Step:
    """What a step did: its length, its residual (see the stepper), and numbers to report."""

    taken: float
    residual: float
    report: dict[str, float]


class Stepper(ABC):
    """Moves a state in time.

    Random numbers of step ``n`` follow from the seed and ``n`` alone, so a run continues to the same bits from its
    parameters, the number of the step and :meth:`state_dict`.

    Args:
        net: the state, moved in place.
        operator: the master equation.
        averages: what means are taken over.
        seed: of the run.
        time_dependent: whether the operator is to be told the time.
    """

    def __init__(
        self,
        net: Ansatz,
        operator: SparseMasterEquation,
        averages: Averages,
        seed: int,
        time_dependent: bool,
    ) -> None:
        self.net, self.operator, self.averages = net, operator, averages
        self.seed, self.time_dependent = seed, time_dependent

    def generator(self, number: int) -> torch.Generator:
        """Return the source of randomness of a step."""
        return torch.Generator(device=self.net.device).manual_seed((self.seed * _STRIDE + number) % 2**62)

    def time(self, t: float) -> float | None:
        """Return what the operator is told."""
        return t if self.time_dependent else None

    @abstractmethod
    def step(self, number: int, t: float, longest: float) -> Step:
        """Take step ``number`` from time ``t``, not longer than ``longest``."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept between steps besides the parameters."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        del state


def _even(longest: float, step: float) -> float:
    """Return the length that divides what is left into equal steps of at most ``step``."""
    return longest / max(1, math.ceil(longest / step - 1e-9))


def _min_snr(chosen: float | None, net: Ansatz, averages: Averages) -> float:
    """Return the least signal to noise: as chosen, or as the number of draws asks for."""
    if chosen is not None:
        return chosen
    draws = averages.num_samples
    return 2.0 if draws is not None and draws <= net.parameter_vector().numel() else 0.0


class TDVPStepper(Stepper):
    """Heun's method along the velocity of the variational principle.

    The residual is the part of the rate of change that the ansatz can't follow, between 0 and 1.
    """

    def __init__(self, options: TDVPOptions, *arguments: Any) -> None:
        super().__init__(*arguments)
        exact = self.averages.num_samples is None
        self.options = options
        self.rcond = options.rcond if options.rcond is not None else (1e-8 if exact else 1e-5)
        self.min_snr = _min_snr(options.min_snr, self.net, self.averages)
        self.tolerance = options.tolerance if options.tolerance is not None else (1e-3 if exact else 1e-2)
        self.proposed = options.first_step
        # kept in float64 also where the network isn't, so that small steps add up
        self.y = self.net.parameter_vector().double()

    def step(self, number: int, t: float, longest: float) -> Step:
        """See :meth:`Stepper.step`; all velocities of a step use the same random numbers."""

        def field(s: float, y: Tensor) -> Velocity:
            self.net.set_parameter_vector(y)
            return tdvp_velocity(
                self.net,
                self.operator,
                self.averages,
                self.time(s),
                generator=self.generator(number),
                rcond=self.rcond,
                min_snr=self.min_snr,
            )

        if self.options.step is not None:
            done = plain_step(field, t, self.y, _even(longest, self.options.step))
        else:
            done = controlled_step(field, t, self.y, self.proposed, longest, self.tolerance)
        self.y, self.proposed = done.parameters, done.proposed
        self.net.set_parameter_vector(self.y)
        start = done.start
        report = {
            "rate": start.rate_norm,
            "mean_rate": start.mean_rate,
            "rank": start.rank,
            "error": math.nan if done.error is None else done.error,
        }
        return Step(done.taken, start.residual, report)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Stepper.state_dict`."""
        return {"y": self.y, "proposed": self.proposed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Stepper.load_state_dict`."""
        self.y, self.proposed = state["y"].to(self.net.device), state["proposed"]
        self.net.set_parameter_vector(self.y)


class TrapezoidStepper(Stepper):
    """Minimises the residual of the implicit trapezoid rule; the residual is its norm at the best iterate."""

    def __init__(self, options: TrapezoidOptions, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.options = options
        self.change: Tensor | None = None
        self.last = 0.0

    def step(self, number: int, t: float, longest: float) -> Step:
        """See :meth:`Stepper.step`."""
        h = _even(longest, self.options.step)
        problem = trapezoid_problem(
            self.net, self.operator, self.averages, self.time(t), h, self.options.norm
        )
        before = self.net.parameter_vector()
        if self.options.extrapolate and self.change is not None:
            self.net.set_parameter_vector(before + self.change * (h / self.last))
        best = minimise(problem, self.options.iterations, self.options.lr, self.generator(number))
        self.change, self.last = self.net.parameter_vector() - before, h
        return Step(h, best.loss, {"first": best.losses[0]})

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Stepper.state_dict`."""
        return {"change": self.change, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Stepper.load_state_dict`."""
        change = state["change"]
        self.change, self.last = None if change is None else change.to(self.net.device), state["last"]


class FitStepper(Stepper):
    """Fits an explicit target of second order; the residual is the misfit, whose half square is a divergence."""

    def __init__(self, options: FitOptions, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.options = options
        exact = self.averages.num_samples is None
        self.rcond = options.rcond if options.rcond is not None else (1e-8 if exact else 1e-5)
        self.min_snr = _min_snr(options.min_snr, self.net, self.averages)

    def step(self, number: int, t: float, longest: float) -> Step:
        """See :meth:`Stepper.step`."""
        h = _even(longest, self.options.step)
        done = target_step(
            self.net,
            self.operator,
            self.averages,
            self.time(t),
            h,
            self.generator(number),
            self.options.iterations,
            self.rcond,
            self.min_snr,
        )
        return Step(h, done.misfit, {"clipped": done.clipped, "iterations": float(done.iterations)})


def make_stepper(options: TDVPOptions | TrapezoidOptions | FitOptions, *arguments: Any) -> Stepper:
    """Return the stepper that options belong to; the other arguments are those of :class:`Stepper`."""
    if isinstance(options, TDVPOptions):
        return TDVPStepper(options, *arguments)
    if isinstance(options, TrapezoidOptions):
        return TrapezoidStepper(options, *arguments)
    return FitStepper(options, *arguments)
