"""Integration methods as objects that own their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stochdyn._checks import check_bool, check_choice, check_positive_int
from stochdyn.errors import InvalidInputError

__all__ = ["METHODS", "SRA", "Euler", "Exact", "Heun", "Method", "Milstein", "as_method"]


@dataclass(frozen=True)
class Method:
    """A fixed-grid scheme for an Itô equation, and how its time loop runs.

    Attributes:
        checkpoint: The part of the loop that is stored for back-propagation. False stores every step; a whole number ``k``
            stores every ``k``-th and recomputes the steps between; True takes the square root of the number of steps.
        cuda_graph: Whether to capture the loop in a CUDA graph, so that all steps are one launch. It has no effect on a
            CPU.
    """

    checkpoint: bool | int = False
    cuda_graph: bool = False
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, bool):
            check_positive_int(self.checkpoint, "checkpoint")
        check_bool(self.cuda_graph, "cuda_graph")


@dataclass(frozen=True)
class Euler(Method):
    """The Euler-Maruyama scheme: strong order 1/2, and 1 for additive noise.

    Use it when in doubt: it is the cheapest, it takes any noise, and its steps have the Gaussian densities that ``log_prob``
    and ``log_rn`` are made of.

    Example:
        >>> Euler(checkpoint=True)
        Euler(checkpoint=True, cuda_graph=False)
    """

    name: ClassVar[str] = "euler"


@dataclass(frozen=True)
class Heun(Method):
    r"""Trapezoidal drift and noise on the Stratonovich form of the equation.

    The form is converted from Itô by :math:`-\tfrac12\sum_k (\partial G_k) G_k`. The scheme has weak order 2 in the drift for additive
    noise, and strong order 1 for commutative noise. Use it where the drift is smooth and steps are long.

    Example:
        >>> Heun().name
        'heun'
    """

    name: ClassVar[str] = "heun"


@dataclass(frozen=True)
class Milstein(Method):
    """The Milstein scheme: strong order 1 for commutative noise; other noise is refused.

    Use it where the diffusion depends on the state and single paths matter, as for geometric Brownian motion.

    Example:
        >>> Milstein().name
        'milstein'
    """

    name: ClassVar[str] = "milstein"


@dataclass(frozen=True)
class Exact(Method):
    r"""Exact steps of a linear equation with additive Brownian noise: on every grid the law is that of continuous time.

    .. math:: X_{n+1}=\Phi X_n+c+Q^{1/2}\,\Delta W_n/\sqrt\Delta,\qquad \Phi=e^{A\Delta},\quad
        Q=\int_0^\Delta e^{As}GG^\top e^{A^\top s}ds

    Use it where the drift says that it is affine (:class:`~stochdyn.core.AffineField`) and steps are long against its rates; path
    sites and filters of Pyro models then take it by themselves. A control is held over each step. Two laws can be compared on their
    paths only if they share drift and diffusion, since with other rates a step has other noise; their ``log_prob`` tell them apart.

    Example:
        >>> Exact().name
        'exact'
    """

    name: ClassVar[str] = "exact"


@dataclass(frozen=True)
class SRA(Method):
    r"""The stochastic Runge-Kutta scheme SRA1 for additive noise: strong order 3/2, two drifts a step.

    .. math:: H=x_n+\tfrac34f(t_n,x_n)\Delta+\tfrac32G\,I_n,\qquad
        x_{n+1}=x_n+\big(\tfrac13f(t_n,x_n)+\tfrac23f(t_n+\tfrac34\Delta,H)\big)\Delta+G_{n+1}\Delta W_n+(G_n-G_{n+1})I_n,

    with :math:`I_n=\frac1\Delta\int(W_s-W_{t_n})ds`. The noise may depend on time but not on the state, and the equation draws areas:
    ``SDE(..., noise=Brownian(areas=True))``. Use it where the drift is smooth and single paths must be right with long steps. A
    control acts as a constant drift of the noise in a step, so log weights stay exact on the grid.

    Example:
        >>> SRA().name
        'sra'

    Reference:
        Rößler, "Runge-Kutta methods for the strong approximation of solutions of stochastic differential equations", 2010.
    """

    name: ClassVar[str] = "sra"


_KINDS: dict[str, type[Method]] = {kind.name: kind for kind in (Euler, Heun, Milstein, SRA, Exact)}
#: The names of the methods.
METHODS = tuple(_KINDS)


def as_method(method: object, name: str = "method") -> Method:
    """Return a method, or the one that a string names with its defaults.

    Raises:
        InvalidInputError: For an unknown name or another type.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise InvalidInputError(
            f"{name} must be an integration method or the name of one",
            got=repr(method)[:60],
            expected="Euler() | Heun() | Milstein() | SRA() | Exact(), or 'euler' | 'heun' | 'milstein' | 'sra' | 'exact'",
        )
    check_choice(method, METHODS, name)
    return _KINDS[method]()
