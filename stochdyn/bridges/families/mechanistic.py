"""Drift families of mechanism: user's features, the repressilator, and vortices."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_sequence,
    as_tensor,
    check_finite,
    check_positive,
    check_positive_int,
)
from stochdyn.bridges.families.base import DriftFamily, LinearFamily, SharedFeatures
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["ComponentFeatures", "EllipticVortex", "FeatureDrift", "LambOseen", "Repressilator"]

Features = Callable[..., Tensor]


def _features(
    phi: Features, dim: int, event: str
) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]:
    """Let features of the state alone take a time too; return their shape at one point."""
    if not callable(phi):
        raise InvalidInputError(
            "phi must be a function", got=type(phi).__name__, expected="phi(x) or phi(t, x)"
        )
    call: Callable[[Tensor, Tensor], Tensor] = phi
    if _takes_state_only(phi):

        def call(t: Tensor, x: Tensor) -> Tensor:
            return phi(x)

    probe = torch.ones(3, dim)
    value = call(torch.zeros(()), probe)
    want = 2 if event == "(*batch, K)" else 3
    if not isinstance(value, Tensor) or value.ndim != want or value.shape[0] != 3:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            "phi returns the wrong shape", got=f"{got} for x {tuple(probe.shape)}", expected=event
        )
    return call, tuple(value.shape[1:])


def _takes_state_only(phi: Features) -> bool:
    try:
        parameters = inspect.signature(phi.forward if isinstance(phi, nn.Module) else phi).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters) == 1


class FeatureDrift(SharedFeatures):
    r"""Drifts that are linear in functions of the state, the same for every component.

    .. math:: b(t,x)=W\,\phi(t,x)

    Use it for polynomials and other bases that every component may combine as it likes; where parameters are shared by components
    there is :class:`ComponentFeatures`.

    Args:
        phi: The functions: ``phi(x)`` or ``phi(t, x)`` returns ``(*batch, K)`` for ``x (*batch, d)``. A constant is a feature
            of its own.
        dim: The number ``d`` of components of the state.

    Raises:
        ShapeError: If the features have another shape.

    Example:
        >>> family = FeatureDrift(lambda x: torch.cat((x, x**3), -1), 1)
        >>> family.weight.shape
        torch.Size([1, 2])
    """

    def __init__(self, phi: Features, dim: int) -> None:
        check_positive_int(dim, "dim")
        call, shape = _features(phi, dim, "(*batch, K)")
        super().__init__(dim, shape[0])
        self.phi = phi
        self._call = call

    def regressors(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the functions ``(*batch, K)`` that all components see."""
        return self._call(t, x)


class ComponentFeatures(LinearFamily):
    r"""Drifts that are linear in functions with values in the state space, so that parameters can be shared by components.

    .. math:: b(t,x)=\sum_k\theta_k\,\phi_k(t,x),\qquad \phi_k\in\mathbb R^d

    Use it for mechanisms that are linear in their parameters, such as mass-action kinetics with unknown rates.

    Args:
        phi: The functions: ``phi(x)`` or ``phi(t, x)`` returns ``(*batch, d, K)`` for ``x (*batch, d)``.
        dim: The number ``d`` of components of the state.
        names: The names of the parameters; ``theta_0`` and so on if None.

    Raises:
        ShapeError: If the features have another shape, or the names another number.

    Example:
        >>> turn = ComponentFeatures(lambda x: torch.stack((x[..., 1], -x[..., 0]), -1)[..., None], 2, ["speed"])
        >>> turn.named_values()
        {'speed': tensor(0.)}
    """

    def __init__(self, phi: Features, dim: int, names: Sequence[str] | None = None) -> None:
        check_positive_int(dim, "dim")
        call, shape = _features(phi, dim, "(*batch, d, K)")
        if shape[0] != dim:
            raise ShapeError("phi returns the wrong shape", got=shape, expected=f"({dim}, K) a point")
        chosen = (
            [f"theta_{k}" for k in range(shape[1])]
            if names is None
            else as_sequence(names, "names", "one name per feature")
        )
        if len(chosen) != shape[1]:
            raise ShapeError("there must be one name per feature", got=len(chosen), expected=shape[1])
        super().__init__(dim, chosen)
        self.phi = phi
        self._call = call

    def features(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the functions ``(*batch, d, K)`` that the parameters multiply."""
        return self._call(t, x)


class Repressilator(DriftFamily):
    r"""A ring of genes, each of which represses the next.

    .. math:: b_i(x)=\frac{\beta}{1+(x_{i-1}/k)^n}-\gamma x_i,\qquad x_0:=x_d

    with positive ``beta``, ``n``, ``k``, ``gamma``, kept as logarithms. Concentrations below zero, which additive noise can
    make, repress as zero does. Use it for oscillating gene circuits of this kind.

    Args:
        dim: The number of genes, at least 2.
        beta: The value that the maximal rate starts at, in units of concentration per time.
        n: The value that the Hill exponent starts at.
        k: The value that the concentration which halves the rate starts at.
        gamma: The value that the decay rate starts at, in 1/time.

    Example:
        >>> {name: round(value.item(), 3) for name, value in Repressilator().named_values().items()}
        {'beta': 2.0, 'n': 2.0, 'k': 1.0, 'gamma': 1.0}

    Reference: Elowitz & Leibler (2000), A synthetic oscillatory network of transcriptional regulators.
    """

    names = ("beta", "n", "k", "gamma")

    def __init__(
        self, dim: int = 3, beta: float = 2.0, n: float = 2.0, k: float = 1.0, gamma: float = 1.0
    ) -> None:
        check_positive_int(dim, "dim", 2)
        super().__init__(dim)
        for name, value in zip(self.names, (beta, n, k, gamma), strict=True):
            check_positive(value, name)
        self.log_theta = nn.Parameter(torch.tensor([beta, n, k, gamma]).log())

    def _ratio(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The repressor ``(*batch, d)``, kept positive, and the share ``1 / (1 + (x / k)^n)`` that it leaves."""
        repressor = x.roll(1, -1).clamp_min(1e-6)
        # 1 / (1 + (x / k)^n) as a logistic function of n (log x - log k), which neither overflows nor divides by zero
        exponent = self.log_theta[1].exp() * (repressor.log() - self.log_theta[2])
        return repressor, torch.sigmoid(-exponent)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        self._check(x)
        return self.log_theta[0].exp() * self._ratio(x)[1] - self.log_theta[3].exp() * x

    def linearise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drift ``(*batch, d)`` and its Jacobian ``(*batch, d, d)``, written out."""
        self._check(x)
        beta, hill, _, gamma = self.log_theta.exp().unbind()
        repressor, share = self._ratio(x)
        # d/dx of beta s(x) with s = 1 / (1 + (x / k)^n): -beta n s (1 - s) / x, zero where x is cut off
        slope = -beta * hill * share * (1 - share) / repressor * (x.roll(1, -1) > 1e-6)
        index = torch.arange(self.dim, device=x.device)
        jacobian = torch.zeros(*x.shape, self.dim, dtype=x.dtype, device=x.device)
        jacobian[..., index, (index - 1) % self.dim] = slope
        jacobian[..., index, index] = jacobian[..., index, index] - gamma
        return beta * share - gamma * x, jacobian

    def named_values(self) -> dict[str, Tensor]:
        """Return ``beta``, ``n``, ``k`` and ``gamma``."""
        return dict(zip(self.names, self.log_theta.detach().exp().unbind(), strict=True))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Multiply every parameter by a random factor around one."""
        with torch.no_grad():
            shape, like = self.log_theta.shape, self.log_theta
            noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
            self.log_theta.add_(noise, alpha=0.5)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.dim:
            raise ShapeError(
                "the state doesn't fit the genes", got=tuple(x.shape), expected=f"(*batch, {self.dim})"
            )


class EllipticVortex(LinearFamily):
    r"""A flow on ellipses around an unknown centre, linear in its parameters.

    .. math:: b(x)=\big(a\,x_2+p,\;-c\,x_1+q\big)

    ``centre`` is :math:`(q/c,-p/a)`; equal ``a`` and ``c`` are a rigid rotation. Use it for one eddy, seen within its core.

    Example:
        >>> list(EllipticVortex().named_values())
        ['a', 'p', 'c', 'q']
    """

    def __init__(self) -> None:
        super().__init__(2, ("a", "p", "c", "q"))

    def features(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the functions ``(*batch, d, K)`` that the parameters multiply."""
        _check_plane(x)
        one, zero = torch.ones_like(x[..., 0]), torch.zeros_like(x[..., 0])
        rows = (
            torch.stack((x[..., 1], one, zero, zero), -1),
            torch.stack((zero, zero, -x[..., 0], one), -1),
        )
        return torch.stack(rows, -2)

    @property
    def centre(self) -> Tensor:
        """``(2,)`` the point that doesn't move."""
        a, p, c, q = self.theta.detach().unbind()
        return torch.stack((q / c, -p / a))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the matrix ``(d, d)`` and the shift ``(d,)`` of the drift."""
        a, p, c, q = self.theta.unbind()
        zero = torch.zeros_like(a)
        return torch.stack((torch.stack((zero, a)), torch.stack((-c, zero)))), torch.stack((p, q))


class LambOseen(DriftFamily):
    r"""Viscous vortices in the plane, with a uniform current.

    .. math::
        b(x)=u+\sum_j\frac{\Gamma_j}{2\pi r_j^2}\Big(1-e^{-r_j^2/\rho_j^2}\Big)\,J(x-c_j),\qquad
        r_j=|x-c_j|,\quad J(x_1,x_2)=(-x_2,x_1)

    Inside the core :math:`\rho_j` the fluid turns as a solid body, outside the speed falls as :math:`1/r`. Use it for eddies that are
    seen beyond their cores.

    Args:
        num_vortices: The number of vortices: 1, or 2 for a twin.
        centres: The centres to start from, ``(num_vortices, 2)``; spread on the first axis around zero if None.
        core: The radius of the cores to start from, in units of the state.
        current: Whether there is a uniform current :math:`u`.

    Raises:
        ShapeError: If the centres don't fit.

    Example:
        >>> twin = LambOseen(2)
        >>> twin(torch.zeros(()), torch.tensor([[0.3, 0.1]])).tolist()  # at rest until it is refined
        [[0.0, 0.0]]

    Reference: Saffman (1992), Vortex Dynamics, section 13.
    """

    def __init__(
        self,
        num_vortices: int = 1,
        centres: Tensor | None = None,
        core: float = 0.5,
        current: bool = True,
    ) -> None:
        check_positive_int(num_vortices, "num_vortices")
        check_positive(core, "core")
        super().__init__(2)
        if centres is None:
            spread = torch.linspace(-0.5, 0.5, num_vortices) if num_vortices > 1 else torch.zeros(1)
            centres = torch.stack((spread, torch.zeros_like(spread)), -1)
        centres = as_tensor(centres, "centres")
        if centres.shape != (num_vortices, 2):
            raise ShapeError("centres don't fit", got=tuple(centres.shape), expected=(num_vortices, 2))
        check_finite(centres, "centres")
        self.circulation = nn.Parameter(centres.new_zeros(num_vortices))
        self.log_core = nn.Parameter(centres.new_full((num_vortices,), math.log(core)))
        self.centres = nn.Parameter(centres.clone())
        self.current = nn.Parameter(centres.new_zeros(2)) if current else None

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        _check_plane(x)
        away = x.unsqueeze(-2) - self.centres
        squared = away.square().sum(-1)
        # (1 - exp(-q)) / q is smooth at the centre, where expm1 alone would divide zero by zero
        scaled = squared * torch.exp(-2 * self.log_core)
        safe = scaled.clamp_min(1e-6)
        profile = torch.where(scaled < 1e-6, 1 - 0.5 * scaled, -torch.expm1(-safe) / safe)
        speed = self.circulation / (2 * math.pi) * torch.exp(-2 * self.log_core) * profile
        turn = torch.stack((-away[..., 1], away[..., 0]), -1)
        flow = (speed.unsqueeze(-1) * turn).sum(-2)
        return flow if self.current is None else flow + self.current

    def named_values(self) -> dict[str, Tensor]:
        """Return ``circulation``, ``core``, ``centres`` and ``current``."""
        values = {
            "circulation": self.circulation.detach().clone(),
            "core": self.log_core.detach().exp(),
            "centres": self.centres.detach().clone(),
        }
        return values if self.current is None else {**values, "current": self.current.detach().clone()}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Move the centres by about a core, and let the vortices turn either way."""
        with torch.no_grad():
            for value, size in ((self.centres, self.log_core.exp().mean()), (self.circulation, 1.0)):
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype, device=value.device)
                value.add_(size * noise)


def _check_plane(x: Tensor) -> None:
    if x.shape[-1] != 2:
        raise ShapeError("a vortex lives in the plane", got=tuple(x.shape), expected="(*batch, 2)")
