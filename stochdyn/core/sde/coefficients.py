"""Diffusion coefficients: how noise channels move the state, and how to undo it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_finite, check_ndim, check_positive, is_real
from stochdyn.errors import DiffusionError, InvalidInputError, ShapeError, SingularDiffusionError

__all__ = ["Coefficient", "Constant", "Diagonal", "Matrix", "Scalar", "as_coefficient"]


class Coefficient(ABC):
    r"""A diffusion coefficient :math:`G\in\mathbb R^{d\times m}`, possibly one per state in a batch.

    Leading axes of its value align from the right with the batch axes of the state, so one coefficient serves
    ``x`` of shape ``(*batch, d)`` and, with time leading, ``(time, *batch, d)``.
    """

    @abstractmethod
    def apply(self, dz: Tensor) -> Tensor:
        """Return ``G dz`` with ``dz (..., m)`` and the result ``(..., d)``."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """Return the shortest ``w (..., m)`` that brings ``G w`` as near to ``v (..., d)`` as possible."""

    @abstractmethod
    def log_det(self, dim: int) -> Tensor:
        """Return ``log |det G|`` (``...``) for a state of ``dim`` components.

        Raises:
            SingularDiffusionError: If ``G`` isn't square.
        """

    @abstractmethod
    def matrix(self, dim: int) -> Tensor:
        """Return the dense matrix ``(..., d, m)``."""

    @abstractmethod
    def noise_dim(self, dim: int) -> int:
        """Return ``m``, the number of noise channels, for a state of ``dim`` components."""

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The defining tensor."""

    @abstractmethod
    def check(self) -> None:
        """Raise a typed error unless the value is finite and, where it must be, positive."""

    def covariance(self, dim: int) -> Tensor:
        """Return ``G G^T (..., d, d)``."""
        g = self.matrix(dim)
        return g @ g.mT

    def check_dim(self, dim: int) -> None:  # noqa: B027, a scalar fits every state
        """Raise ShapeError unless the coefficient fits a state of ``dim`` components."""


class Scalar(Coefficient):
    r""":math:`G=\sigma I`: every component has its own channel with the common strength ``value (*batch,)``.

    Use it for noise of one strength in all components, or of one strength per series.

    Example:
        >>> Scalar(2.0).apply(torch.ones(3))
        tensor([2., 2., 2.])
    """

    def __init__(self, value: Tensor | float) -> None:
        if not isinstance(value, Tensor):
            value = (
                torch.tensor(float(value), dtype=torch.float64)
                if is_real(value)
                else as_tensor(value, "diffusion", finite=False)
            )
        self._value = value

    @property
    def value(self) -> Tensor:
        """``(*batch,)`` strength."""
        return self._value

    def _strength(self) -> Tensor:
        # Without axes the value takes part in no type promotion, so a number serves any precision.
        return self._value if self._value.ndim == 0 else self._value.unsqueeze(-1)

    def check(self) -> None:
        """Raise DiffusionError unless positive."""
        check_positive(self._value.detach(), "diffusion", DiffusionError)

    def apply(self, dz: Tensor) -> Tensor:
        """Return ``G dz`` with ``dz (..., m)`` and the result ``(..., d)``."""
        return self._strength() * dz

    def solve(self, v: Tensor) -> Tensor:
        """Return the shortest ``w (..., m)`` that brings ``G w`` as near to ``v (..., d)`` as possible."""
        return v / self._strength()

    def log_det(self, dim: int) -> Tensor:
        """Return ``log |det G|`` (``...``) for a state of ``dim`` components."""
        return dim * self._value.abs().log()

    def matrix(self, dim: int) -> Tensor:
        """Return the dense matrix ``(..., d, m)``."""
        eye = torch.eye(dim, dtype=self._value.dtype, device=self._value.device)
        return self._value[..., None, None] * eye

    def noise_dim(self, dim: int) -> int:
        """Return ``m``, the number of noise channels, for a state of ``dim`` components."""
        return dim


class Diagonal(Coefficient):
    r""":math:`G=\mathrm{diag}(g)`: one channel per component, with strengths ``values (*batch, d)``.

    Use it where components have noise of their own strengths.

    Example:
        >>> Diagonal(torch.tensor([1.0, 2.0])).solve(torch.tensor([1.0, 1.0]))
        tensor([1.0000, 0.5000])
    """

    def __init__(self, values: Tensor) -> None:
        values = values if isinstance(values, Tensor) else as_tensor(values, "diffusion", finite=False)
        check_ndim(values, tuple(range(1, 12)), "Diagonal", "(*batch, d)")
        self._value = values

    @property
    def value(self) -> Tensor:
        """``(*batch, d)`` strengths."""
        return self._value

    def check(self) -> None:
        """Raise DiffusionError unless positive."""
        check_positive(self._value.detach(), "diffusion", DiffusionError)

    def check_dim(self, dim: int) -> None:
        """Raise ShapeError unless the coefficient fits a state of ``dim`` components."""
        if self._value.shape[-1] not in (1, dim):
            raise ShapeError(
                "the diagonal diffusion doesn't fit the state",
                got=f"shape {tuple(self._value.shape)}",
                expected=f"(..., {dim})",
                hint="for one strength per series or particle use stochdyn.Scalar(value)",
            )

    def apply(self, dz: Tensor) -> Tensor:
        """Return ``G dz`` with ``dz (..., m)`` and the result ``(..., d)``."""
        return self._value * dz

    def solve(self, v: Tensor) -> Tensor:
        """Return ``v / g (..., d)``, zero where no noise acts: the shortest ``w`` with ``G w`` as near to ``v`` as possible."""
        still = self._value == 0
        return torch.where(still, 0.0, v / torch.where(still, 1.0, self._value))

    def log_det(self, dim: int) -> Tensor:
        """Return ``log |det G|`` (``...``) for a state of ``dim`` components."""
        return self._value.abs().log().expand(*self._value.shape[:-1], dim).sum(-1)

    def matrix(self, dim: int) -> Tensor:
        """Return the dense matrix ``(..., d, m)``."""
        return torch.diag_embed(self._value.expand(*self._value.shape[:-1], dim))

    def noise_dim(self, dim: int) -> int:
        """Return ``m``, the number of noise channels, for a state of ``dim`` components."""
        return dim


class Matrix(Coefficient):
    """A full coefficient ``matrix (*batch, d, m)``; with ``m < d`` noise reaches only some directions.

    Use it for noise that is correlated between components, or that reaches only some of them.

    Example:
        >>> Matrix(torch.tensor([[1.0], [0.0]])).apply(torch.tensor([3.0]))
        tensor([3., 0.])
    """

    def __init__(self, matrix: Tensor) -> None:
        matrix = matrix if isinstance(matrix, Tensor) else as_tensor(matrix, "diffusion", finite=False)
        check_ndim(matrix, tuple(range(2, 13)), "Matrix", "(*batch, d, m)")
        self._value = matrix

    @property
    def value(self) -> Tensor:
        """``(*batch, d, m)`` entries."""
        return self._value

    def check(self) -> None:
        """Raise NonFiniteError unless finite."""
        check_finite(self._value.detach(), "diffusion")

    def check_dim(self, dim: int) -> None:
        """Raise ShapeError unless the coefficient fits a state of ``dim`` components."""
        if self._value.shape[-2] != dim:
            raise ShapeError(
                "the diffusion matrix doesn't fit the state",
                got=f"shape {tuple(self._value.shape)}",
                expected=f"(..., {dim}, m)",
            )

    def apply(self, dz: Tensor) -> Tensor:
        """Return ``G dz`` with ``dz (..., m)`` and the result ``(..., d)``."""
        if self._value.ndim == 2:
            return dz @ self._value.mT
        return (self._value @ dz.unsqueeze(-1)).squeeze(-1)

    def solve(self, v: Tensor) -> Tensor:
        """Return the shortest ``w (..., m)`` that brings ``G w`` as near to ``v (..., d)`` as possible."""
        d, m = self._value.shape[-2:]
        inverse = torch.linalg.inv(self._value) if d == m else torch.linalg.pinv(self._value)
        return (inverse @ v.unsqueeze(-1)).squeeze(-1)

    def log_det(self, dim: int) -> Tensor:
        """Return ``log |det G|`` (``...``) for a state of ``dim`` components."""
        d, m = self._value.shape[-2:]
        if m < d:
            raise SingularDiffusionError(
                "the diffusion is singular, so paths have no density in state space",
                got=f"a {d} x {m} matrix",
                hint="work in noise space: log_rn, kl, or sample_path(..., noise_space=True) in a Pyro model",
            )
        if m > d:
            return 0.5 * torch.linalg.slogdet(self.covariance(dim)).logabsdet
        return torch.linalg.slogdet(self._value).logabsdet

    def matrix(self, dim: int) -> Tensor:
        """Return the dense matrix ``(..., d, m)``."""
        return self._value

    def noise_dim(self, dim: int) -> int:
        """Return ``m``, the number of noise channels, for a state of ``dim`` components."""
        return self._value.shape[-1]


def as_coefficient(value: Coefficient | Tensor | float, x: Tensor | None = None) -> Coefficient:
    """Turn what users write as a diffusion into a :class:`Coefficient`.

    A number or 0-d tensor is a :class:`Scalar`; a ``(d,)`` tensor a :class:`Diagonal`; a ``(d, m)`` tensor a
    :class:`Matrix`. Given the state ``x (*batch, d)``, the value is one per state: a tensor with an axis less than ``x`` is then a
    :class:`Scalar`, one with as many axes a :class:`Diagonal`, and one with an axis more a :class:`Matrix`.

    Raises:
        ShapeError: If the number of axes fits none of these.
    """
    if isinstance(value, Coefficient):
        return value
    if not isinstance(value, Tensor):
        if is_real(value):
            return Scalar(value if x is None else x.new_full((), float(value)))
        value = as_tensor(value, "diffusion", like=x, finite=False)
    if value.ndim == 0:
        return Scalar(value)
    if x is not None:
        kinds = {x.ndim - 1: Scalar, x.ndim: Diagonal, x.ndim + 1: Matrix}
        if value.ndim in kinds:
            return kinds[value.ndim](value)  # type: ignore[abstract]
        raise ShapeError(
            "the diffusion has axes that don't fit the state",
            got=f"shape {tuple(value.shape)} for states {tuple(x.shape)}",
            hint="say what it is with stochdyn.Scalar, stochdyn.Diagonal or stochdyn.Matrix",
        )
    if value.ndim == 1:
        return Diagonal(value)
    if value.ndim == 2:
        return Matrix(value)
    raise ShapeError(
        "the diffusion has too many axes to tell what it means",
        got=f"shape {tuple(value.shape)}",
        expected="a number, (d,) or (d, m)",
        hint="say which with stochdyn.Scalar, stochdyn.Diagonal or stochdyn.Matrix",
    )


class Constant(nn.Module):
    """A constant diffusion as a module: its tensor moves with the equation, and a learnt one is a parameter."""

    value: Tensor | float

    def __init__(self, diffusion: Coefficient | Tensor | float) -> None:
        super().__init__()
        if isinstance(diffusion, bool):
            raise InvalidInputError("diffusion must be a number or data", got=diffusion)
        if not isinstance(diffusion, Coefficient | Tensor) and not is_real(diffusion):
            diffusion = as_tensor(diffusion, "diffusion")
        coefficient = as_coefficient(diffusion)
        coefficient.check()
        self.kind = type(coefficient)
        if not isinstance(diffusion, Coefficient | Tensor):
            self.value = diffusion
        elif isinstance(coefficient.value, nn.Parameter):
            self.value = coefficient.value
        else:
            self.register_buffer(
                "value",
                coefficient.value if coefficient.value.requires_grad else coefficient.value.detach().clone(),
            )

    def coefficient(self) -> Coefficient:
        """Return the coefficient."""
        return self.kind(self.value)  # type: ignore[call-arg]

    def forward(self, t: Tensor, x: Tensor) -> Coefficient:
        """Return the coefficient at any time and state ``x (..., d)``."""
        return self.coefficient() if isinstance(self.value, Tensor) else as_coefficient(self.value, x)
