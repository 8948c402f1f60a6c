r"""The noncentral chi-squared density in torch, differentiable in all its arguments.

With :math:`a=\nu/2-1` and :math:`z=\sqrt{\lambda u}`,

.. math:: f(u)=\tfrac12e^{-(u+\lambda)/2}(u/\lambda)^{a/2}I_a(z)=\sum_j\mathrm{Poisson}(j;\lambda/2)\,\chi^2_{\nu+2j}(u).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["noncentral_chi2_log_density"]

# Where sqrt(a^2 + z^2) is larger the uniform expansion holds to twelve digits; below, so many terms of the sum do.
_LARGE = 30.0
_TERMS = 80
_ORDERS = 8


def _expansion() -> list[list[float]]:
    r"""Return the coefficients of :math:`U_k(p)/p^k` in :math:`p^2`, k from 1 on.

    .. math:: U_{k+1}(p)=\tfrac12p^2(1-p^2)U_k'(p)+\tfrac18\int_0^p(1-5t^2)U_k(t)\,dt,\qquad U_0=1 .
    """
    square, found = np.polynomial.Polynomial([0.0, 0.0, 1.0]), []
    current = np.polynomial.Polynomial([1.0])
    for k in range(1, _ORDERS + 1):
        current = 0.5 * square * (1 - square) * current.deriv() + ((1 - 5 * square) * current).integ() / 8
        found.append(current.coef[k::2].tolist())
    return found


_COEFFICIENTS = _expansion()


def noncentral_chi2_log_density(u: Tensor, degrees: Tensor, noncentrality: Tensor) -> Tensor:
    r"""Return :math:`\log f(u)` of a noncentral chi-squared law; minus infinity for negative u.

    Args:
        u: The values, of any shape.
        degrees: The positive degrees of freedom :math:`\nu`, any real number; it broadcasts.
        noncentrality: The noncentrality :math:`\lambda\ge 0`; it broadcasts.

    Reference:
        NIST Digital Library of Mathematical Functions, section 10.41 (uniform expansions for large order).
    """
    dtype = u.dtype
    u, degrees, noncentrality = torch.broadcast_tensors(u.double(), degrees.double(), noncentrality.double())
    inside = u >= 0
    tiny = torch.finfo(torch.float64).tiny
    lam, value = noncentrality.clamp_min(tiny), torch.where(inside, u, torch.ones_like(u))
    a = 0.5 * degrees - 1.0
    large = (a.square() + lam * value).detach() > _LARGE**2
    one = torch.ones_like(value)

    def only(where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # the other branch sees numbers at which nothing is infinite
        return torch.where(where, value, one), torch.where(where, lam, one), torch.where(where, a, one)

    far, near = _uniform(*only(large)), _mixture(*only(~large))
    found = torch.where(large, far, near)
    return torch.where(inside, found, torch.full_like(found, -math.inf)).to(dtype)


def _uniform(u: Tensor, lam: Tensor, a: Tensor) -> Tensor:
    z = (lam * u).sqrt()
    r = (a.square() + lam * u).sqrt()
    ratio = (a / r).square()
    total = torch.zeros_like(r)
    for row in reversed(_COEFFICIENTS):
        inner = torch.zeros_like(r)
        for c in reversed(row):
            inner = inner * ratio + c
        total = (total + inner) / r
    # -(u + lam) / 2 + r without its cancellation, and the powers of u / lam and of the Bessel function together
    exponent = -0.5 * (u.sqrt() - lam.sqrt()).square() + a.square() / (r + z)
    return (
        exponent
        + a * (u.log() - (a + r).log())
        - 0.5 * (2 * math.pi * r).log()
        + torch.log1p(total)
        - math.log(2.0)
    )


def _mixture(u: Tensor, lam: Tensor, a: Tensor) -> Tensor:
    j = torch.arange(_TERMS, dtype=u.dtype, device=u.device)
    u, lam, a = (x.unsqueeze(-1) for x in (u, lam, a))
    terms = (
        torch.xlogy(j, 0.5 * lam)
        - torch.lgamma(j + 1)
        + torch.xlogy(a + j, 0.5 * u)
        - torch.lgamma(a + 1 + j)
    )
    return torch.logsumexp(terms, -1) - (0.5 * (u + lam)).squeeze(-1) - math.log(2.0)
