r"""Changes of variables: what a transform does to points and densities, and to an equation.

With :math:`x=g(z)` and :math:`z` in the new coordinates, Itô's formula for :math:`dX=b\,dt+G\,dW` reads

.. math:: g'(z)\,h=G,\qquad g'(z)\,a=b-\tfrac12\sum_kg''(z)[h_k,h_k],\qquad dZ=a\,dt+h\,dW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import transforms
from torch.distributions.transforms import Transform

from stochdyn._transforms import as_leaf, recording
from stochdyn.core.sde.coefficients import Coefficient, Diagonal, Matrix
from stochdyn.errors import InvalidInputError, ShapeError

if TYPE_CHECKING:
    from stochdyn.core.sde.control import Field
    from stochdyn.core.sde.equation import SDE

__all__ = ["ChangedEquation", "Coordinates", "Moved", "as_transform", "check_transform", "log_jacobian"]


def _named() -> dict[str, Transform]:
    exp, sigmoid = transforms.ExpTransform(), transforms.SigmoidTransform()
    return {
        "log": exp.inv,
        "exp": exp,
        "logit": sigmoid.inv,
        "sigmoid": sigmoid,
        "sqrt": transforms.PowerTransform(torch.tensor(0.5)),
        "square": transforms.PowerTransform(torch.tensor(2.0)),
        "identity": transforms.identity_transform,
    }


def as_transform(transform: object, name: str = "transform") -> Transform:
    """Return a transform of states: one that a string names, torch's or Pyro's own, or one for each component.

    Raises:
        InvalidInputError: If it is nothing of these, isn't invertible, or acts on more than vectors.
    """
    if isinstance(transform, str):
        named = _named()
        if transform not in named:
            raise InvalidInputError(
                f"{name} must name a change of variables", got=repr(transform), expected=" | ".join(named)
            )
        return named[transform]
    if isinstance(transform, Sequence):
        if not transform:
            raise InvalidInputError(f"{name} must have one transform per component", got="none")
        parts = [as_transform(part, name) for part in transform]
        if any(part.domain.event_dim or part.codomain.event_dim for part in parts):
            raise InvalidInputError(f"every {name} of a list must act on one component")
        return transforms.CatTransform(parts, dim=-1, lengths=[1] * len(parts))
    if not isinstance(transform, Transform):
        raise InvalidInputError(
            f"{name} must be a change of variables",
            got=type(transform).__name__,
            expected="'log', 'logit', a torch.distributions transform, or a list with one per component",
        )
    if not transform.bijective:
        raise InvalidInputError(f"{name} must be invertible", got=type(transform).__name__)
    if max(transform.domain.event_dim, transform.codomain.event_dim) > 1:
        raise InvalidInputError(f"{name} must act on vectors", got=type(transform).__name__)
    return transform


def check_transform(transform: Transform, dim: int, name: str = "transform") -> None:
    """Raise ShapeError unless a transform takes vectors of ``dim`` components to vectors of as many."""
    lengths = getattr(transform, "lengths", None) or getattr(transform.inv, "lengths", None)
    if lengths is not None and sum(lengths) != dim:
        raise ShapeError(
            f"{name} has one transform per component", got=f"{sum(lengths)}", expected=f"{dim} of them"
        )
    if transform.forward_shape(torch.Size((dim,))) != torch.Size((dim,)):
        raise ShapeError(f"{name} must leave the number of components as it is", got=type(transform).__name__)


def log_jacobian(transform: Transform, x: Tensor, y: Tensor) -> Tensor:
    """Return ``log |det dy/dx|`` ``(...)`` of a transform that takes ``x (..., d)`` to ``y``."""
    value = transform.log_abs_det_jacobian(x, y)
    return value.expand_as(x).sum(-1) if transform.domain.event_dim == 0 else value


def slopes(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values of an elementwise transform and its first and second derivatives, in closed form where there is one."""
    inverse = transform.inv
    if isinstance(transform, transforms.ExpTransform):
        y = x.exp()
        return y, y, y
    if isinstance(inverse, transforms.ExpTransform):
        return x.log(), 1 / x, -1 / x.square()
    if isinstance(transform, transforms.SigmoidTransform):
        # 1 - s is taken as the sigmoid of -x, which keeps its digits where s is one.
        y, rest = x.sigmoid(), (-x).sigmoid()
        return y, y * rest, y * rest * (rest - y)
    if isinstance(inverse, transforms.SigmoidTransform):
        product = x * (1 - x)
        return x.log() - (-x).log1p(), 1 / product, (2 * x - 1) / product.square()
    if isinstance(transform, transforms.AffineTransform):
        return transform(x), torch.ones_like(x) * transform.scale, torch.zeros_like(x)
    if isinstance(inverse, transforms.AffineTransform):
        return transform(x), torch.ones_like(x) / inverse.scale, torch.zeros_like(x)
    if isinstance(transform, transforms.PowerTransform):
        p = transform.exponent
        return x**p, p * x ** (p - 1), p * (p - 1) * x ** (p - 2)
    if isinstance(inverse, transforms.PowerTransform):
        return slopes(transforms.PowerTransform(1 / inverse.exponent), x)
    if isinstance(transform, transforms.ComposeTransform):
        y, first, second = x, torch.ones_like(x), torch.zeros_like(x)
        for part in transform.parts:
            # (f o y)' = f' y',  (f o y)'' = f'' y'^2 + f' y''.
            y, slope, bend = slopes(part, y)
            first, second = slope * first, bend * first.square() + slope * second
        return y, first, second
    if isinstance(transform, transforms.CatTransform):
        return _by_component(transform.transforms, transform.lengths, x)
    if isinstance(inverse, transforms.CatTransform):
        return _by_component([part.inv for part in inverse.transforms], inverse.lengths, x)
    keep = _is_recorded(transform, x)
    with recording():
        point = x if x.requires_grad else as_leaf(x)
        y = transform(point)
        (first,) = torch.autograd.grad(y.sum(), point, create_graph=True)
        second = _slope(first, point, keep)
    parts = (y, first, second)
    return parts if keep else tuple(part.detach() for part in parts)  # type: ignore[return-value]


def _by_component(
    parts: Sequence[Transform], lengths: Sequence[int], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found = [slopes(part, piece) for part, piece in zip(parts, x.split(list(lengths), -1), strict=True)]
    y, first, second = (torch.cat(pieces, -1) for pieces in zip(*found, strict=True))
    return y, first, second


def matrices(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values ``(..., d)`` of a transform of vectors, its Jacobian ``(..., d, d)`` and its Hessian ``(..., d, d, d)``."""
    keep, dim = _is_recorded(transform, x), x.shape[-1]
    with recording():
        point = x if x.requires_grad else as_leaf(x)
        y = transform(point)
        jacobian = torch.stack([_slope(y[..., i], point, True) for i in range(dim)], -2)
        hessian = torch.stack(
            [
                torch.stack([_slope(jacobian[..., i, j], point, keep) for j in range(dim)], -2)
                for i in range(dim)
            ],
            -3,
        )
    parts = (y, jacobian, hessian)
    return parts if keep else tuple(part.detach() for part in parts)  # type: ignore[return-value]


def _is_recorded(transform: Transform, x: Tensor) -> bool:
    """Return whether what a transform does to ``x`` belongs to a graph."""
    return torch.is_grad_enabled() and (x.requires_grad or transform(x).requires_grad)


def _slope(value: Tensor, x: Tensor, keep: bool) -> Tensor:
    """Return the gradient of ``value (...)`` in ``x (..., d)``, point by point; zero where it doesn't depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(value.sum(), x, create_graph=keep, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


class Coordinates(nn.Module):
    """A transform that moves, is copied and is stored with what it belongs to, which torch's own are not.

    Args:
        transform: The transform.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self._set(transform)

    def _set(self, transform: Transform) -> None:
        # A module is registered as one, or its parameters would stay behind.
        inner = transform if isinstance(transform, nn.Module) else transform.inv
        self.module = inner if isinstance(inner, nn.Module) else None
        self._held = (transform,)

    @property
    def transform(self) -> Transform:
        """The transform."""
        return self._held[0]

    @property
    def elementwise(self) -> bool:
        """Whether every component is transformed by itself."""
        return self.transform.domain.event_dim == 0

    def _apply(self, fn: Any, recurse: bool = True) -> Coordinates:
        super()._apply(fn, recurse)
        self._held = (_decoded(_encoded(self.transform, fn)),)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": _encoded(self.transform)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held = (_decoded(state["_held"]),)


def _encoded(transform: Transform, fn: Any = None) -> tuple[str, Any]:
    """Return a transform as parts that can be copied; ``fn`` is applied to the tensors of affine ones."""
    if isinstance(transform, transforms.AffineTransform) and fn is not None:
        loc, scale = (fn(v) if isinstance(v, Tensor) else v for v in (transform.loc, transform.scale))
        return "itself", transforms.AffineTransform(loc, scale, transform.event_dim)
    if isinstance(transform, transforms.ComposeTransform):
        return "compose", [_encoded(part, fn) for part in transform.parts]
    if isinstance(transform, transforms.CatTransform):
        return "cat", (
            [_encoded(part, fn) for part in transform.transforms],
            transform.dim,
            transform.lengths,
        )
    # An inverse is known by its class alone, which is private; it is the one that computes by another's inverse.
    if type(transform) is type(transforms.ExpTransform().inv):
        return "inverse", _encoded(transform.inv, fn)
    return "itself", transform


def _decoded(code: tuple[str, Any]) -> Transform:
    kind, content = code
    if kind == "compose":
        return transforms.ComposeTransform([_decoded(part) for part in content])
    if kind == "cat":
        parts, dim, lengths = content
        return transforms.CatTransform([_decoded(part) for part in parts], dim, lengths)
    if kind == "inverse":
        return _decoded(content).inv
    whole: Transform = content
    return whole


class ChangedEquation(nn.Module):
    """An equation in the coordinates that a transform takes its state to: a drift, and the diffusion that goes with it.

    Args:
        sde: The equation in the old coordinates, without control.
        transform: The transform from old to new coordinates.
    """

    def __init__(self, sde: SDE, transform: Transform) -> None:
        super().__init__()
        self.sde = sde
        self.coordinates = Coordinates(transform)

    def _parts(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Coefficient, Tensor]:
        """Return old states ``x``, the slope ``g'`` there, the new diffusion ``h``, and ``1/2 sum_k g''[h_k, h_k]``."""
        back = self.coordinates.transform.inv
        check_transform(back, z.shape[-1])
        if self.coordinates.elementwise:
            x, first, second = slopes(back, z)
            g = self.sde.diffusion(t, x)
            if isinstance(g, Matrix):
                spread = g.value / first.unsqueeze(-1)
                return x, first, Matrix(spread), 0.5 * second * spread.square().sum(-1)
            scale = g.apply(torch.ones_like(x)) / first
            return x, first, Diagonal(scale), 0.5 * second * scale.square()
        x, jacobian, hessian = matrices(back, z)
        matrix = self.sde.diffusion(t, x).matrix(z.shape[-1]).to(z)
        spread = torch.linalg.solve(jacobian, matrix.expand(*z.shape, matrix.shape[-1]))
        bend = 0.5 * torch.einsum("...ijk,...jm,...km->...i", hessian, spread, spread)
        return x, jacobian, Matrix(spread), bend

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the drift ``a (..., d)`` of the new coordinates."""
        x, slope, _, bend = self._parts(t, z)
        rest = self.sde.drift(t, x) - bend
        if self.coordinates.elementwise:
            return rest / slope
        return torch.linalg.solve(slope, rest.unsqueeze(-1)).squeeze(-1)

    def diffusion(self, t: Tensor, z: Tensor) -> Coefficient:
        """Return the diffusion ``h`` of the new coordinates."""
        return self._parts(t, z)[2]


class Moved(nn.Module):
    """A function of time and state, read at states that a transform takes to its own coordinates."""

    def __init__(self, field: Field, transform: Transform) -> None:
        super().__init__()
        self.field, self.coordinates = field, Coordinates(transform)

    def forward(self, t: Tensor, x: Tensor) -> Any:
        """Return what the function gives at ``t`` and the transformed state."""
        return self.field(t, self.coordinates.transform(x))
