"""Methods of the samplers, as objects that own their options: steps of flows and of SDEs with additive noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stochdyn._checks import check_choice, check_real
from stochdyn.core.sde.methods import Method
from stochdyn.errors import InvalidInputError

__all__ = [
    "FLOW_METHODS",
    "NOISY_METHODS",
    "Adaptive",
    "Euler",
    "FlowMethod",
    "Heun",
    "Midpoint",
    "Ralston",
    "RungeKutta4",
    "Strang",
    "as_method",
]

ADAPTIVE_NAMES = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")


@dataclass(frozen=True)
class FlowMethod:
    """A method for the probability flow.

    :class:`Ralston` (the default of flows) or :class:`Midpoint` for samples in ten to fifty steps; :class:`RungeKutta4` for densities;
    :class:`Adaptive` where an error is to be held below a bound, at a number of evaluations that isn't known before;
    :class:`Euler` for comparisons. SDEs take :class:`Heun`, or :class:`Strang` where steps are few or the noise is strong.
    """

    @property
    def order(self) -> int:
        """The order of convergence in the step."""
        return 1


@dataclass(frozen=True)
class _Noisy(FlowMethod):
    r"""A method for SDEs as well.

    Args:
        max_rate: The largest rate per step: in a step of length h, epsilon is held below ``max_rate`` times :math:`\gamma^2/h`. Where the data have
            features as sharp as the noise, a larger one would make explicit steps unstable; any epsilon leaves the marginals of
            an exact model as they are. The bound is active in few steps near the ends, and fewer the shorter they are;
            ``math.inf`` switches it off.
    """

    max_rate: float = 0.5

    def __post_init__(self) -> None:
        if self.max_rate != float("inf"):
            check_real(self.max_rate, "max_rate", above=0.0)


@dataclass(frozen=True)
class Euler(_Noisy):
    """Euler's method for flows and Euler-Maruyama for SDEs: order 1, one evaluation per step."""


@dataclass(frozen=True)
class Heun(_Noisy):
    """The trapezoidal rule for flows and SDEs: order 2, two evaluations per step. The default for SDEs."""

    @property
    def order(self) -> int:
        """The order of convergence in the step."""
        return 2


@dataclass(frozen=True)
class Strang(_Noisy):
    """Half a step of the flow, a step of Langevin dynamics, half a step of the flow: weak order 2, six evaluations per step.

    Use it where steps are few or noise is strong: its error is several times less than that of :class:`Heun`.
    """

    @property
    def order(self) -> int:
        """The order of convergence in the step."""
        return 2


@dataclass(frozen=True)
class Midpoint(FlowMethod):
    """The midpoint rule for flows: order 2, two evaluations per step."""

    @property
    def order(self) -> int:
        """The order of convergence in the step."""
        return 2


@dataclass(frozen=True)
class Ralston(FlowMethod):
    """Ralston's method for flows: order 2 with the least bound on its error, two evaluations per step. The default for flows.

    Its second slope is that at two thirds of the step, so it never looks at the end of a step, and its error on time alone is of order 3.
    """

    @property
    def order(self) -> int:
        """The order of convergence in the step."""
        return 2


@dataclass(frozen=True)
class RungeKutta4(FlowMethod):
    """The classical method of Runge and Kutta for flows: order 4, four evaluations per step. Use it for densities."""

    @property
    def order(self) -> int:
        """The order of convergence in the step."""
        return 4


@dataclass(frozen=True)
class Adaptive(FlowMethod):
    """An adaptive method of torchdiffeq for flows, which chooses its own steps.

    Args:
        name: The name of the method: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"adaptive_heun"`` or ``"fehlberg2"``.
        rtol: The relative tolerance of a step.
        atol: The absolute tolerance of a step, in units of the state; None takes ``rtol`` times the size of the states at the start
            and of what the velocity there would add to them.
    """

    name: str = "dopri5"
    rtol: float = 1e-5
    atol: float | None = None

    def __post_init__(self) -> None:
        check_choice(self.name, ADAPTIVE_NAMES, "name")
        check_real(self.rtol, "rtol", minimum=0.0)
        if self.atol is not None:
            check_real(self.atol, "atol", minimum=0.0)
        if self.rtol == 0 and not self.atol:
            raise InvalidInputError(
                "an adaptive method needs a tolerance", got=f"rtol=0 and atol={self.atol}"
            )

    @property
    def order(self) -> int:
        """The order of convergence in the step, as far as the ends are concerned."""
        return 4


NOISY_METHODS: Mapping[str, FlowMethod] = {"euler": Euler(), "heun": Heun(), "strang": Strang()}
FLOW_METHODS: Mapping[str, FlowMethod] = {
    "euler": Euler(),
    "midpoint": Midpoint(),
    "ralston": Ralston(),
    "heun": Heun(),
    "rk4": RungeKutta4(),
    **{name: Adaptive(name) for name in ADAPTIVE_NAMES},
}


def as_method(method: Any, choices: Mapping[str, FlowMethod], purpose: str) -> FlowMethod:
    """Return a method object from one or from its name.

    Raises:
        InvalidInputError: If there is no such method, or it isn't one for this ``purpose``.
    """
    if isinstance(method, Method):
        # a method of the core's equations, which has no options that would mean anything here
        method = method.name if method == type(method)() else method
    if isinstance(method, FlowMethod):
        if not isinstance(method, tuple({type(m) for m in choices.values()})):
            raise InvalidInputError(
                f"method isn't one for {purpose}",
                got=type(method).__name__,
                expected=" | ".join(sorted({type(m).__name__ for m in choices.values()})),
            )
        return method
    if not isinstance(method, str) or method not in choices:
        raise InvalidInputError(
            f"method isn't one for {purpose}", got=repr(method)[:60], expected=" | ".join(map(repr, choices))
        )
    return choices[method]
