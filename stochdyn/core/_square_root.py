"""Square roots of positive matrices, with derivatives of any order also where eigenvalues coincide or vanish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import UnavailableError

__all__ = ["solve_sylvester", "square_root"]


def square_root(matrix: Tensor) -> Tensor:
    r"""Return the square root of positive semi-definite Hermitian matrices ``(*B, d, d)``.

    Its derivative solves :math:`R\,dR+dR\,R=dA` and needs no differences of eigenvalues. Eigenvalues below rounding count as
    zero; a derivative in a direction that leaves the range, where the root has none, counts as zero too.
    """
    root: Tensor = _SquareRoot.apply(matrix)
    return root


def solve_sylvester(s: Tensor, y: Tensor) -> Tensor:
    """Return the least solution X of ``S X + X S = Y`` for positive semi-definite Hermitian S, ``(*B, d, d)``.

    Where S has zeros its derivative raises an UnavailableError: the solution has none.
    """
    x: Tensor = _Sylvester.apply(s, y)
    return x


class _SquareRoot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        # what is rounding of an eigenvalue isn't of its root
        values = torch.where(values > _rounding(values), values, 0).sqrt()
        root = (vectors * values[..., None, :]) @ vectors.mH
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return solve_sylvester(root, 0.5 * (slope + slope.mH))


class _Sylvester(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, y: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(0.5 * (s + s.mH))
        sums = values[..., :, None] + values[..., None, :]
        inverse = torch.where(sums > _rounding(values)[..., None], 1 / sums, 0)
        x = vectors @ (inverse * (vectors.mH @ y @ vectors)) @ vectors.mH
        ctx.save_for_backward(s, x)
        return x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        s, x = ctx.saved_tensors
        values = torch.linalg.eigvalsh(s)
        if bool((values <= _rounding(values)).any()):
            raise UnavailableError(
                "a square root has no second derivative at a matrix with eigenvalues of zero",
                hint="mix a little of the identity into it",
            )
        # dX solves S dX + dX S = dY - dS X - X dS
        z = solve_sylvester(s, slope)
        return -(z @ x.mH + x.mH @ z), z


def _rounding(values: Tensor) -> Tensor:
    """What eigenvalues ``(*B, d)`` are known to, ``(*B, 1)``."""
    return 4 * values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True).clamp_min(0)
