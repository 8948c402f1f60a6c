"""The affine drift, for which everything about a path is in closed form."""

from __future__ import annotations

from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_bool
from stochdyn.core.sde.affine_field import AffineField
from stochdyn.errors import ShapeError

__all__ = ["AffineDrift"]


class AffineDrift(AffineField):
    r"""The drift :math:`b(x)=Ax+a`, which the Gaussian posterior treats in closed form.

    Args:
        matrix: The matrix ``A (d, d)``, in 1 / time.
        offset: The offset ``a (d,)``, zero if None.
        learn: Whether both are parameters.

    Raises:
        ShapeError: If the shapes don't fit.

    Example:
        >>> import torch
        >>> AffineDrift(torch.tensor([[-1.0]]))(torch.tensor(0.0), torch.tensor([2.0]))
        tensor([-2.])
    """

    def __init__(self, matrix: Tensor, offset: Tensor | None = None, learn: bool = False) -> None:
        super().__init__()
        matrix = as_tensor(matrix, "matrix", 2, "(d, d)")
        check_bool(learn, "learn")
        if matrix.shape[0] != matrix.shape[1]:
            raise ShapeError("matrix must be square", got=tuple(matrix.shape), expected="(d, d)")
        if offset is None:
            offset = matrix.new_zeros(matrix.shape[0])
        offset = as_tensor(offset, "offset", 1, "(d,)", like=matrix)
        if offset.shape != matrix.shape[:1]:
            raise ShapeError("offset must fit matrix", got=tuple(offset.shape), expected=matrix.shape[:1])
        if learn:
            self.matrix = nn.Parameter(matrix.detach().clone())
            self.offset = nn.Parameter(offset.detach().clone())
        else:
            self.register_buffer("matrix", matrix)
            self.register_buffer("offset", offset)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return matrix and offset."""
        return self.matrix, self.offset
