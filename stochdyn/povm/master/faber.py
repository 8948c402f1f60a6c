"""Faber series of the exponential on an ellipse: Chebyshev's for what oscillates, Taylor's for what does both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["Ellipse", "faber_coefficients"]

_ROUNDING = 2.0**-53


@dataclass(frozen=True)
class Ellipse:
    r"""An ellipse in the complex plane, with axes along the real and the imaginary one.

    .. math:: z = c + \gamma\zeta + \delta/\zeta,\qquad |\zeta| = 1

    Attributes:
        centre: The centre ``c``, real.
        gamma: Half the sum of the semi-axes.
        delta: Half of the real semi-axis less the imaginary one.
    """

    centre: float
    gamma: float
    delta: float

    @staticmethod
    def around(low: float, high: float, wide: float) -> Ellipse:
        """Return the ellipse of the least ``gamma`` around real parts in a range and imaginary ones up to a size.

        Args:
            low: The least real part.
            high: The largest real part.
            wide: The largest imaginary part, positive or negative.
        """
        half = (high - low) / 2
        # of all ellipses through the corner, (b/b')**2 + (a/a')**2 = 1, the one where a' + b' is least
        third, other = half ** (2 / 3), wide ** (2 / 3)
        root = math.sqrt(third + other)
        across, up = third * root, other * root
        return Ellipse((high + low) / 2, (across + up) / 2, (across - up) / 2)

    @property
    def top(self) -> float:
        """The largest real part."""
        return self.centre + self.gamma + self.delta

    def scaled(self, factor: float) -> Ellipse:
        """Return the ellipse of a multiple of the operator."""
        return Ellipse(factor * self.centre, factor * self.gamma, factor * self.delta)


def faber_coefficients(ellipse: Ellipse) -> np.ndarray:
    r"""Return the coefficients of the exponential in Faber polynomials of an ellipse, as many as there are above rounding.

    .. math::
        e^A = \sum_k c_kF_k(A),\qquad c_k = e^c\sum_j\frac{\gamma^{k+j}\delta^j}{(k+j)!\,j!},\qquad
        F_{k+1} = \frac{A-c}\gamma F_k-\frac\delta\gamma F_{k-1},\quad F_0 = 1,\
        F_1 = \frac{A-c}\gamma,\ F_2 = F_1^2-\frac{2\delta}\gamma

    If the ellipse holds the numerical range of ``A``, then :math:`\|F_k(A)\|\le2(1+\sqrt2)`, so that the error is at most a
    few times the sum of what is left out.

    Args:
        ellipse: The ellipse.

    Returns:
        The coefficients ``(K,)``.

    Reference:
        Crouzeix and Palencia, SIAM J. Matrix Anal. Appl. 38, 649 (2017); Moret and Novati, J. Comput. Appl. Math. 136,
        1 (2001).
    """
    from scipy.special import gammaln, iv, jv

    g, d = ellipse.gamma, ellipse.delta
    if g == 0:
        return np.array([math.exp(ellipse.centre)])
    k = np.arange(math.ceil(4 * g) + 40)
    if abs(g * d) < 1:
        j = np.arange(20)[:, None]
        # in logarithms, since powers and factorials overflow where their quotient doesn't
        powers = (k + j) * math.log(g) - gammaln(k + j + 1) - gammaln(j + 1) + ellipse.centre
        values = (np.exp(powers) * d**j).sum(0)
    else:
        # sum_j x^(k + 2 j) / (k + j)! j! = I_k(2 x), and J_k with alternating signs
        bessel = iv if d > 0 else jv
        values = np.exp(ellipse.centre + 0.5 * k * math.log(g / abs(d))) * bessel(
            k, 2 * math.sqrt(g * abs(d))
        )
    return values[: int(np.flatnonzero(np.abs(values) > _ROUNDING).max(initial=0)) + 1]
