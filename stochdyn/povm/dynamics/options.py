"""What the methods of evolution may be told, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from stochdyn._checks import check_choice, check_positive, check_positive_int
from stochdyn.errors import InvalidInputError

__all__ = ["METHODS", "FitOptions", "TDVPOptions", "TrapezoidOptions", "read_options"]


@dataclass(frozen=True)
class TDVPOptions:
    r"""Options of the time-dependent variational principle.

    Args:
        tolerance: error of a step in the Fisher metric, whose half square is a divergence; None for 1e-3 with full
            summation and 1e-2 with samples.
        step: length of fixed steps; None controls the length by the tolerance.
        first_step: length to try first where it is controlled.
        rcond: relative cut of the eigenvalues of the metric; None for 1e-8 with full summation and 1e-5 with samples.
        min_snr: directions whose force is less than so many times its sampling noise fade out; 0 keeps all. None for 0
            with more draws than parameters and 2 with fewer: many weak directions left out add up to a bias, but fewer
            draws can't do without.
        stratified: draw evenly; see :meth:`Ansatz.sample`.
    """

    tolerance: float | None = None
    step: float | None = None
    first_step: float = 1e-2
    rcond: float | None = None
    min_snr: float | None = None
    stratified: bool = True

    def __post_init__(self) -> None:
        for name in ("tolerance", "step", "first_step", "rcond"):
            value = getattr(self, name)
            if value is not None:
                check_positive(value, name)
        if self.min_snr is not None and not self.min_snr >= 0:
            raise InvalidInputError("min_snr must not be negative", got=self.min_snr)


@dataclass(frozen=True)
class TrapezoidOptions:
    """Options of the forward-backward trapezoid method.

    Args:
        step: length of a step (twice the ``dt`` of the reference code).
        norm: ``"l1"`` or ``"l2"``.
        iterations: gradient steps a time step.
        lr: learning rate at the start of each.
        extrapolate: start each step from the parameters moved on as in the step before.
        stratified: draw evenly; see :meth:`Ansatz.sample`.
    """

    step: float = 0.05
    norm: str = "l1"
    iterations: int = 120
    lr: float = 5e-3
    extrapolate: bool = True
    stratified: bool = True

    def __post_init__(self) -> None:
        check_positive(self.step, "step")
        check_positive(self.lr, "lr")
        check_positive_int(self.iterations, "iterations")
        check_choice(self.norm, ("l1", "l2"), "norm")


@dataclass(frozen=True)
class FitOptions:
    """Options of fit-to-target steps.

    Args:
        step: length of a step.
        iterations: most natural-gradient steps a fit.
        rcond: relative cut of the eigenvalues of the metric; None for 1e-8 with full summation and 1e-5 with samples.
        min_snr: least ratio of signal to noise; see :class:`TDVPOptions`.
        stratified: draw evenly; see :meth:`Ansatz.sample`.
    """

    step: float = 0.05
    iterations: int = 4
    rcond: float | None = None
    min_snr: float | None = None
    stratified: bool = True

    def __post_init__(self) -> None:
        check_positive(self.step, "step")
        check_positive_int(self.iterations, "iterations")
        if self.rcond is not None:
            check_positive(self.rcond, "rcond")
        if self.min_snr is not None and not self.min_snr >= 0:
            raise InvalidInputError("min_snr must not be negative", got=self.min_snr)


METHODS: dict[str, type] = {"tdvp": TDVPOptions, "trapezoid": TrapezoidOptions, "fit": FitOptions}
Options = TDVPOptions | TrapezoidOptions | FitOptions


def read_options(method: str, given: dict[str, Any]) -> Any:
    """Return the options of a method.

    Raises:
        InvalidInputError: if the method or an option is unknown, or a value can't be.
    """
    check_choice(method, tuple(METHODS), "method")
    known = [f.name for f in fields(METHODS[method])]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InvalidInputError(f"method {method!r} has no option {unknown[0]!r}", expected=", ".join(known))
    return METHODS[method](**given)
