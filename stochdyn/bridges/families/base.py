"""Families of drifts that a reference process is chosen from, and what a refinement asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    check_bool,
    check_positive_int,
)
from stochdyn.errors import ShapeError

__all__ = [
    "DriftFamily",
    "LinearDrift",
    "LinearFamily",
    "LotkaVolterra",
    "SharedFeatures",
    "ZeroDrift",
]


class DriftFamily(nn.Module, ABC):
    r"""Drifts :math:`b_\theta(t, x)` with parameters :math:`\theta`, which are those of the module.

    A member is called as every drift is, ``forward(t, x)`` with ``x (*batch, d)`` and ``t`` of no axes or
    broadcastable to ``x[..., :1]``, and must treat points one by one. The other methods have defaults; override
    them where a family knows more.

    Args:
        dim: The number ``d`` of components of the state.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_positive_int(dim, "dim")
        self.dim = dim

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""

    def linearise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drift ``(*batch, d)`` and its Jacobian ``(*batch, d, d)`` (component, direction)."""
        columns = []
        for j in range(self.dim):
            direction = torch.zeros_like(x)
            direction[..., j] = 1.0
            columns.append(torch.func.jvp(lambda z: self(t, z), (x,), (direction,))[1])
        return self(t, x), torch.stack(columns, -1)

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Return matrix ``(d, d)`` and shift ``(d,)`` if the drift is :math:`Ax+c` now, else None."""
        return None

    def named_values(self) -> dict[str, Tensor]:
        """Return copies of the parameters under the names that a report uses."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    def log_prior(self) -> Tensor | None:
        """Return the log prior density of the parameters, a scalar with a gradient, or None if there is none."""
        return None

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw new starting values for a restart. By default parameters are perturbed by a tenth of their size."""
        with torch.no_grad():
            for value in self.parameters():
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype, device=value.device)
                value.add_(0.1 * noise * value.abs().clamp_min(value.abs().mean()))


class ZeroDrift(DriftFamily):
    """No drift: Brownian motion, a family without parameters. Use it where nothing is known of the motion."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        return torch.zeros_like(x)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return a zero matrix ``(d, d)`` and a zero shift ``(d,)``, in the default precision."""
        return torch.zeros(self.dim, self.dim), torch.zeros(self.dim)


class LinearFamily(DriftFamily):
    r"""A family that is linear in its parameters, so that its best member follows from least squares.

    .. math:: b_\theta(t,x)=b_0(t,x)+\sum_k\theta_k\,\phi_k(t,x)

    Args:
        dim: The number ``d`` of components of the state.
        names: The names of the parameters; ``K`` is their number.

    Attributes:
        theta: The parameters, ``(K,)``, zero at first.
    """

    def __init__(self, dim: int, names: Sequence[str]) -> None:
        super().__init__(dim)
        self.names = tuple(names)
        self.theta = nn.Parameter(torch.zeros(len(self.names)))

    @abstractmethod
    def features(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the functions ``(*batch, d, K)``."""

    def offset(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the part of the drift without parameters, ``(*batch, d)``."""
        return torch.zeros_like(x)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        return self.offset(t, x) + self.features(t, x) @ self.theta

    def named_values(self) -> dict[str, Tensor]:
        """Return one number per parameter."""
        return dict(zip(self.names, self.theta.detach().clone().unbind(), strict=True))


class SharedFeatures(DriftFamily):
    r"""A linear family whose components all see the same functions: :math:`b_\theta(t,x)=b_0(t,x)+W\psi(t,x)`.

    Args:
        dim: The number ``d`` of components of the state.
        num_features: The number ``K`` of functions in :math:`\psi`.

    Attributes:
        weight: The parameters :math:`W`, ``(d, K)``, zero at first.
    """

    def __init__(self, dim: int, num_features: int) -> None:
        super().__init__(dim)
        self.weight = nn.Parameter(torch.zeros(dim, num_features))

    @abstractmethod
    def regressors(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the functions ``(*batch, K)``."""

    def offset(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the part of the drift without parameters, ``(*batch, d)``."""
        return torch.zeros_like(x)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        return self.offset(t, x) + self.regressors(t, x) @ self.weight.mT


class LinearDrift(SharedFeatures):
    r"""Linear drifts, the family of multivariate Ornstein-Uhlenbeck processes.

    .. math:: b(x)=Ax+c

    Use it first: its transitions are exact, its projection is in closed form, and relaxation towards a mean is often all that snapshots show.

    Args:
        dim: The number ``d`` of components of the state.
        shift: Whether the drift has a constant part :math:`c`.

    Example:
        >>> family = LinearDrift(2)
        >>> {name: tuple(value.shape) for name, value in family.named_values().items()}
        {'matrix': (2, 2), 'shift': (2,)}
    """

    def __init__(self, dim: int, shift: bool = True) -> None:
        check_positive_int(dim, "dim")
        check_bool(shift, "shift")
        super().__init__(dim, dim + shift)
        self.has_shift = shift

    def regressors(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the state, and one."""
        return torch.cat((x, torch.ones_like(x[..., :1])), -1) if self.has_shift else x

    def linearise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drift ``(*batch, d)`` and its Jacobian ``(*batch, d, d)``, written out."""
        matrix, shift = self.affine()
        return x @ matrix.mT + shift, matrix.expand(*x.shape, self.dim)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the matrix ``(d, d)`` and the shift ``(d,)`` of the drift."""
        shift = self.weight[:, self.dim] if self.has_shift else self.weight.new_zeros(self.dim)
        return self.weight[:, : self.dim], shift

    def named_values(self) -> dict[str, Tensor]:
        """Return ``matrix (d, d)`` and ``shift (d,)``."""
        matrix, shift = (value.detach().clone() for value in self.affine())
        return {"matrix": matrix, "shift": shift} if self.has_shift else {"matrix": matrix}


class LotkaVolterra(LinearFamily):
    r"""Predators and their prey.

    .. math:: \dot x=\alpha x-\beta xy,\qquad \dot y=\delta xy-\gamma y

    with parameters ``alpha``, ``beta``, ``gamma``, ``delta``, in that order. Use it for two species of which one feeds on the other.

    Example:
        >>> LotkaVolterra().named_values()["alpha"]
        tensor(0.)
    """

    def __init__(self) -> None:
        super().__init__(2, ("alpha", "beta", "gamma", "delta"))

    def features(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the functions ``(*batch, d, K)`` that the parameters multiply."""
        self._check(x)
        prey, predators = x.unbind(-1)
        product, zero = prey * predators, torch.zeros_like(prey)
        return torch.stack(
            (
                torch.stack((prey, -product, zero, zero), -1),
                torch.stack((zero, zero, -predators, product), -1),
            ),
            -2,
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        self._check(x)
        alpha, beta, gamma, delta = self.theta.unbind()
        prey, predators = x.unbind(-1)
        return torch.stack((prey * (alpha - beta * predators), predators * (delta * prey - gamma)), -1)

    def linearise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drift ``(*batch, d)`` and its Jacobian ``(*batch, d, d)``, written out."""
        alpha, beta, gamma, delta = self.theta.unbind()
        prey, predators = x.unbind(-1)
        rows = (
            torch.stack((alpha - beta * predators, -beta * prey), -1),
            torch.stack((delta * predators, delta * prey - gamma), -1),
        )
        return self(t, x), torch.stack(rows, -2)

    @staticmethod
    def _check(x: Tensor) -> None:
        if x.shape[-1] != 2:
            raise ShapeError("Lotka-Volterra has two components", got=tuple(x.shape), expected="(*batch, 2)")
