"""The ways to take a step in time: each a method that owns its options, and a stepper that carries it out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_bool, check_choice, check_positive_int, check_real, check_type
from stochdyn.errors import InvalidInputError
from stochdyn.povm.dynamics.averages import Averages
from stochdyn.povm.dynamics.heun import controlled_step, plain_step
from stochdyn.povm.dynamics.target import target_step
from stochdyn.povm.dynamics.tdvp import Velocity, tdvp_velocity
from stochdyn.povm.dynamics.trapezoid import minimise, trapezoid_problem
from stochdyn.povm.master.schedule import Schedule

__all__ = ["TDVP", "Fit", "Method", "Step", "Stepper", "Trapezoid", "read_method"]

_STRIDE = 0x9E3779B1
_DEFAULT_DT = 0.05


@dataclass(frozen=True)
class Problem:
    """What a stepper works on.

    Attributes:
        averages: The state, the master equation, and what means are taken over.
        schedule: The output times, the breaks of the coefficients, and how far a step may reach.
        scale: The fastest rate of the model.
        seed: The seed of the run.
        time_dependent: Whether the master equation is to be told the time.
    """

    averages: Averages
    schedule: Schedule
    scale: float
    seed: int
    time_dependent: bool


class Method(ABC):
    """A way to take a step in time, with its options."""

    name: str
    stratified: bool

    @abstractmethod
    def stepper(self, problem: Problem) -> Stepper:
        """Return what carries the method out."""


@dataclass(frozen=True)
class TDVP(Method):
    r"""The time-dependent variational principle, :math:`S\dot\theta=F`, by Heun's method.

    When would I use this? To begin with, and nearly always: it is the cheapest by far.

    Args:
        tolerance: The error of a step in the Fisher metric, whose half square is a divergence; None for 1e-3 with full
            summation and 1e-2 with samples.
        dt: The length of fixed steps; None controls the length by the tolerance.
        first_step: The length to try first where it is controlled; None takes it from the rate of change.
        rcond: The relative cut of the eigenvalues of the metric; None for 1e-8 with full summation and 1e-5 with
            samples.
        min_snr: The ratio of signal to noise below which directions fade out: those whose force is less than so many
            times its sampling noise. 0 keeps all; None for 0 with more draws than parameters and 2 with fewer: many
            weak directions left out add up to a bias, but fewer draws can't do without.
        stratified: Whether to draw evenly, as in :meth:`~stochdyn.povm.Ansatz.sample`.

    Raises:
        InvalidInputError: If an option is out of range.

    Reference:
        Reh, Schmitt and Gärttner, Phys. Rev. Lett. 127, 230501 (2021).
    """

    tolerance: float | None = None
    dt: float | None = None
    first_step: float | None = None
    rcond: float | None = None
    min_snr: float | None = None
    stratified: bool = True
    name = "tdvp"

    def __post_init__(self) -> None:
        _check_positive(self, "tolerance", "dt", "first_step", "rcond")
        _check_min_snr(self.min_snr)
        check_bool(self.stratified, "stratified")
        for unused in ("tolerance", "first_step"):
            if self.dt is not None and getattr(self, unused) is not None:
                raise InvalidInputError(
                    f"{unused} controls the step, which dt fixes", hint="give one of them"
                )

    def stepper(self, problem: Problem) -> Stepper:
        """Return the stepper that carries these options out."""
        return TDVPStepper(self, problem)


@dataclass(frozen=True)
class Trapezoid(Method):
    """The forward-backward trapezoid method: every step a minimisation of the residual of an implicit rule.

    When would I use this? For comparison with the paper, and where very long steps are wanted.

    Args:
        dt: The length of a step (twice the ``dt`` of the reference code); None for 0.05 over the model's fastest rate.
        norm: The norm of the residual, ``"l1"`` or ``"l2"``.
        steps: The number of gradient steps for each time step.
        lr: The learning rate at the start of each time step.
        extrapolate: Whether to start each step from the parameters moved on as in the step before.
        stratified: Whether to draw evenly, as in :meth:`~stochdyn.povm.Ansatz.sample`.

    Raises:
        InvalidInputError: If an option is out of range.

    Reference:
        Luo, Chen, Carrasquilla and Clark, Phys. Rev. Lett. 128, 090501 (2022).
    """

    dt: float | None = None
    norm: str = "l1"
    steps: int = 120
    lr: float = 5e-3
    extrapolate: bool = True
    stratified: bool = True
    name = "trapezoid"

    def __post_init__(self) -> None:
        _check_positive(self, "dt", "lr")
        check_positive_int(self.steps, "steps")
        check_choice(self.norm, ("l1", "l2"), "norm")
        check_bool(self.extrapolate, "extrapolate")
        check_bool(self.stratified, "stratified")

    def stepper(self, problem: Problem) -> Stepper:
        """Return the stepper that carries these options out."""
        return TrapezoidStepper(self, problem)


@dataclass(frozen=True)
class Fit(Method):
    """Explicit steps of second order, each fitted to its target by a weighted divergence.

    When would I use this? Where directions of the variational principle are ill-conditioned: a fit is repeated until it
    no longer gains.

    Args:
        dt: The length of a step; None for 0.05 over the model's fastest rate.
        max_iterations: The largest number of natural-gradient steps of a fit.
        rcond: The relative cut of the eigenvalues of the metric; None for 1e-8 with full summation and 1e-5 with
            samples.
        min_snr: The least ratio of signal to noise, as in :class:`TDVP`.
        stratified: Whether to draw evenly, as in :meth:`~stochdyn.povm.Ansatz.sample`.

    Raises:
        InvalidInputError: If an option is out of range.
    """

    dt: float | None = None
    max_iterations: int = 4
    rcond: float | None = None
    min_snr: float | None = None
    stratified: bool = True
    name = "fit"

    def __post_init__(self) -> None:
        _check_positive(self, "dt", "rcond")
        check_positive_int(self.max_iterations, "max_iterations")
        _check_min_snr(self.min_snr)
        check_bool(self.stratified, "stratified")

    def stepper(self, problem: Problem) -> Stepper:
        """Return the stepper that carries these options out."""
        return FitStepper(self, problem)


METHODS: dict[str, type[Method]] = {"tdvp": TDVP, "trapezoid": Trapezoid, "fit": Fit}


def read_method(method: object) -> Method:
    """Return a method from an object, or from a name with its defaults.

    Raises:
        InvalidInputError: If it is neither.
    """
    if isinstance(method, str):
        check_choice(method, tuple(METHODS), "method")
        return METHODS[method]()
    check_type(method, Method, "method", hint="a name, or TDVP(...), Trapezoid(...) or Fit(...)")
    assert isinstance(method, Method)
    return method


def _check_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None:
            check_real(value, name, above=0.0)


def _check_min_snr(value: float | None) -> None:
    if value is not None:
        check_real(value, "min_snr", minimum=0.0)


# ---------------------------------------------------------------------- steppers


@dataclass(frozen=True)
class Step:
    """What a step did.

    Attributes:
        taken: The length of the step.
        residual: The residual of the step, whose meaning the stepper documents.
        report: The numbers by name that the record of the run keeps.
    """

    taken: float
    residual: float
    report: dict[str, float]


class Stepper(ABC):
    """Moves a state in time.

    Random numbers of step ``n`` follow from the seed and ``n`` alone, so a run continues to the same bits from its
    parameters, the number of the step and :meth:`state_dict`.

    Args:
        problem: The evolution that the steps are taken for.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.averages = problem, problem.averages
        self.net = problem.averages.net

    def generator(self, number: int) -> torch.Generator:
        """Return the source of randomness of a step."""
        seed = (self.problem.seed * _STRIDE + number) % 2**62
        return torch.Generator(device=self.net.device).manual_seed(seed)

    def time(self, t: float) -> float | None:
        """Return what the master equation is told."""
        return t if self.problem.time_dependent else None

    @abstractmethod
    def step(self, number: int, t: float, longest: float) -> Step:
        """Take step ``number`` from time ``t``, not longer than ``longest``."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept between steps besides the parameters."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        del state

    def _even(self, t: float, longest: float, dt: float | None) -> float:
        """Return the length that divides what is left into equal steps that aren't too long."""
        # the largest step not longer than wanted that divides the rest into equal parts
        wanted = dt if dt is not None else _DEFAULT_DT / max(self.problem.scale, 1e-300)
        wanted = min(wanted, self.problem.schedule.longest(t))
        return longest / max(1, math.ceil(longest / wanted * (1 - 1e-9)))

    def _regularisation(self, method: TDVP | Fit) -> tuple[float, float]:
        """Return the cut of eigenvalues and the least signal to noise: as chosen, or as the draws ask for."""
        draws = self.averages.num_samples
        rcond = method.rcond if method.rcond is not None else (1e-8 if draws is None else 1e-5)
        if method.min_snr is not None:
            return rcond, method.min_snr
        scarce = draws is not None and draws <= self.net.parameter_vector().numel()
        return rcond, 2.0 if scarce else 0.0


class TDVPStepper(Stepper):
    """Heun's method along the velocity of the variational principle.

    The residual is the part of the rate of change that the ansatz can't follow, between 0 and 1.
    """

    def __init__(self, method: TDVP, problem: Problem) -> None:
        super().__init__(problem)
        self.method = method
        self.rcond, self.min_snr = self._regularisation(method)
        exact = self.averages.num_samples is None
        self.tolerance = method.tolerance if method.tolerance is not None else (1e-3 if exact else 1e-2)
        self.proposed = method.first_step
        # kept in float64 also where the network isn't, so that small steps add up
        self.y = self.net.parameter_vector().double()

    def step(self, number: int, t: float, longest: float) -> Step:
        """Take one step of Heun's method; all velocities of a step use the same random numbers."""
        segment = self.problem.schedule.segment_of(t)

        def field(s: float, y: Tensor) -> Velocity:
            self.net.set_parameter_vector(y)
            return tdvp_velocity(
                self.averages,
                self.time(min(max(s, segment.start), segment.end)),
                generator=self.generator(number),
                rcond=self.rcond,
                min_snr=self.min_snr,
            )

        if self.method.dt is not None:
            done = plain_step(field, t, self.y, self._even(t, longest, self.method.dt))
        else:
            reach = min(longest, self.problem.schedule.longest(t))
            done = controlled_step(field, t, self.y, self.proposed, reach, self.tolerance)
        self.y, self.proposed = done.parameters, done.proposed
        self.net.set_parameter_vector(self.y)
        start = done.start
        report = {
            "rate": start.rate_norm,
            "mean_rate": start.mean_rate,
            "rank": start.rank,
            "left_out": start.left_out,
            "error": math.nan if done.error is None else done.error,
            "missed": float(done.error is not None and done.error > self.tolerance),
        }
        return Step(done.taken, start.residual, report)

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters in double precision and the length of the next step."""
        return {"y": self.y, "proposed": self.proposed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the parameters and the length of the next step."""
        self.y, self.proposed = state["y"].to(self.net.device), state["proposed"]
        self.net.set_parameter_vector(self.y)


class TrapezoidStepper(Stepper):
    """Minimises the residual of the implicit trapezoid rule; the residual is its norm at the best iterate."""

    def __init__(self, method: Trapezoid, problem: Problem) -> None:
        super().__init__(problem)
        self.method = method
        self.change: Tensor | None = None
        self.last = 0.0

    def step(self, number: int, t: float, longest: float) -> Step:
        """Take one step by minimising the residual of the trapezoid rule."""
        h = self._even(t, longest, self.method.dt)
        problem = trapezoid_problem(self.averages, self.time(t), h, self.method.norm)
        before = self.net.parameter_vector()
        if self.method.extrapolate and self.change is not None:
            self.net.set_parameter_vector(before + self.change * (h / self.last))
        best = minimise(problem, self.method.steps, self.method.lr, self.generator(number))
        self.change, self.last = self.net.parameter_vector() - before, h
        return Step(h, best.loss, {"first": best.losses[0]})

    def state_dict(self) -> dict[str, Any]:
        """Return the change of the parameters in the last step, and its length."""
        return {"change": self.change, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the change of the parameters in the last step."""
        change = state["change"]
        self.change, self.last = None if change is None else change.to(self.net.device), state["last"]


class FitStepper(Stepper):
    """Fits an explicit target of second order; the residual is the misfit, whose half square is a divergence."""

    def __init__(self, method: Fit, problem: Problem) -> None:
        super().__init__(problem)
        self.method = method
        self.rcond, self.min_snr = self._regularisation(method)

    def step(self, number: int, t: float, longest: float) -> Step:
        """Take one step by two fits to explicit targets."""
        h = self._even(t, longest, self.method.dt)
        options = (self.method.max_iterations, self.rcond, self.min_snr)
        done = target_step(self.averages, self.time(t), h, self.generator(number), *options)
        return Step(h, done.misfit, {"clipped": done.clipped, "iterations": float(done.iterations)})
