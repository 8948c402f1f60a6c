"""A Magnus method of fourth order for linear equations whose coefficients move with time."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

__all__ = ["GAUSS", "magnus_weights"]

Number = TypeVar("Number", float, Tensor)

_A, _B = 0.25 + 3**0.5 / 6, 0.25 - 3**0.5 / 6
GAUSS = (0.5 - 3**0.5 / 6, 0.5 + 3**0.5 / 6)


def magnus_weights(first: Number, second: Number) -> tuple[Number, Number]:
    r"""Return the coefficients of the two halves of a step, in each of which the generator is constant.

    .. math:: e^{hL} \approx e^{h(BL_1+AL_2)}\,e^{h(AL_1+BL_2)},\qquad A,B=\tfrac14\pm\tfrac{\sqrt3}6,

    with :math:`L_1, L_2` at the Gauss points :math:`\tfrac12\mp\tfrac{\sqrt3}6` of the step; no commutators. Each
    exponential is that of half a step, of twice the coefficients in brackets.

    Args:
        first: The coefficient at the first Gauss point.
        second: The coefficient at the second Gauss point.

    Reference:
        Blanes and Moan, Appl. Numer. Math. 56, 1519 (2006).
    """
    return 2 * (_A * first + _B * second), 2 * (_B * first + _A * second)
