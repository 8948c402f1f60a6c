"""The matrix function of couplings of Gaussians, with derivatives where eigenvalues coincide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochdyn.core._square_root import solve_sylvester

__all__ = ["conditional_share"]


def conditional_share(matrix: Tensor) -> Tensor:
    r"""Return :math:`g(M)=2\big(I+(I+4M)^{1/2}\big)^{-1}` of a positive semi-definite matrix ``(d, d)``.

    Its derivatives need differences of eigenvalues nowhere, so that equal ones, as of isotropic clouds, do no harm.

    Args:
        matrix: The symmetric matrix M, ``(d, d)``.
    """
    share: Tensor = _Share.apply(matrix)
    return share


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        roots = (1 + 4 * values.clamp_min(0)).sqrt()
        share = (vectors * (2 / (1 + roots))) @ vectors.mT
        ctx.save_for_backward(share, (vectors * roots) @ vectors.mT)
        return share

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        share, root = ctx.saved_tensors
        # derivatives of the derivative may be wanted: the root as a function of the output
        if torch.is_grad_enabled():
            root = 2 * torch.linalg.inv(share) - torch.eye(len(share)).to(share)
        # dg = -2 (I + S)^{-1} dS (I + S)^{-1} with S dS + dS S = 4 dM, and 2 (I + S)^{-1} = g
        inner = share @ (0.5 * (slope + slope.mT)) @ share
        return -2.0 * solve_sylvester(root, inner)
