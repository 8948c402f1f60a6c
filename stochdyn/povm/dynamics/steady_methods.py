"""The ways to find a steady state, each with options of its own."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field

from stochdyn._checks import check_choice, check_positive_int, check_real, check_type
from stochdyn.povm.dynamics.methods import TDVP

__all__ = ["Combined", "Descent", "Newton", "Relaxation", "SteadyMethod", "read_steady_method"]


class SteadyMethod(ABC):
    """A way to find a steady state, with its options."""

    name: str


@dataclass(frozen=True)
class Relaxation(SteadyMethod):
    r"""Evolution by the variational principle until the state stands still.

    When would I use this? For long chains by sampling, and to see the relaxation itself.

    Args:
        horizon: The length of the evolution; None for 20 over the least jump rate at a site.
        tolerance: The rate of change :math:`\sqrt{E\ell^2}` at which the evolution stops, relative to the model's
            fastest rate.
        evolution: The options of the steps of the evolution.

    Raises:
        InvalidInputError: If an option is out of range.
    """

    horizon: float | None = None
    tolerance: float = 1e-6
    evolution: TDVP = field(default_factory=TDVP)
    name = "tdvp"

    def __post_init__(self) -> None:
        if self.horizon is not None:
            check_real(self.horizon, "horizon", above=0.0)
        check_real(self.tolerance, "tolerance", above=0.0)
        check_type(self.evolution, TDVP, "evolution")


@dataclass(frozen=True)
class Newton(SteadyMethod):
    r"""Damped Gauss-Newton steps on :math:`E\ell^2`.

    When would I use this? For up to some ten sites: from a product state it usually needs 20 to 30 steps, hundreds of
    times fewer than gradient descent.

    Args:
        max_iterations: The largest number of steps.
        tolerance: The rate of change :math:`\sqrt{E\ell^2}` at which the steps end, relative to the model's fastest
            rate.

    Raises:
        InvalidInputError: If an option is out of range.
    """

    max_iterations: int = 30
    tolerance: float = 1e-6
    name = "newton"

    def __post_init__(self) -> None:
        check_positive_int(self.max_iterations, "max_iterations")
        check_real(self.tolerance, "tolerance", above=0.0)


@dataclass(frozen=True)
class Combined(SteadyMethod):
    """A short evolution, from which Gauss-Newton steps can't miss, and then those.

    When would I use this? To begin with.

    Args:
        relaxation: The options of the evolution; None for one over the least jump rate at a site.
        newton: The options of the Gauss-Newton steps after it.

    Raises:
        InvalidInputError: If an option has the wrong type.
    """

    relaxation: Relaxation | None = None
    newton: Newton = field(default_factory=Newton)
    name = "combined"

    def __post_init__(self) -> None:
        if self.relaxation is not None:
            check_type(self.relaxation, Relaxation, "relaxation")
        check_type(self.newton, Newton, "newton")


@dataclass(frozen=True)
class Descent(SteadyMethod):
    r"""Gradient descent (:func:`stochdyn.fit` with Adam) on the stationary residual :math:`\|LP\|`.

    When would I use this? For comparison with the paper, and where a state has too many parameters for Newton steps. The
    best iterate is kept.

    Args:
        norm: The norm of the residual, ``"l1"`` or ``"l2"``.
        steps: The number of gradient steps.
        lr: The learning rate at the start, which falls along a cosine.

    Raises:
        InvalidInputError: If an option is out of range.
    """

    norm: str = "l1"
    steps: int = 600
    lr: float = 5e-3
    name = "trapezoid"

    def __post_init__(self) -> None:
        check_choice(self.norm, ("l1", "l2"), "norm")
        check_positive_int(self.steps, "steps")
        check_real(self.lr, "lr", above=0.0)


METHODS: dict[str, type[SteadyMethod]] = {
    "combined": Combined,
    "tdvp": Relaxation,
    "newton": Newton,
    "trapezoid": Descent,
}


def read_steady_method(method: object) -> SteadyMethod:
    """Return a method from an object, or from a name with its defaults; ``TDVP(...)`` is an evolution by it.

    Raises:
        InvalidInputError: If it is neither.
    """
    if isinstance(method, str):
        check_choice(method, tuple(METHODS), "method")
        return METHODS[method]()
    if isinstance(method, TDVP):
        return Relaxation(evolution=method)
    check_type(
        method,
        SteadyMethod,
        "method",
        hint="a name, or Relaxation(...), Newton(...), Combined(...) or Descent(...)",
    )
    assert isinstance(method, SteadyMethod)
    return method
