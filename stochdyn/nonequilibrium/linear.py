"""Linear steady states, in closed form: covariance, current, entropy production."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from stochdyn._checks import as_tensor, check_event_size, check_nonempty, check_points
from stochdyn.errors import DiffusionMismatchError, InvalidInputError, ShapeError

__all__ = ["LinearSteadyState", "Split"]


@dataclass(frozen=True)
class Split:
    """How a drift matrix behaves under time reversal.

    Attributes:
        irreversible: ``(d, d)`` the part that dissipates.
        reversible: ``(d, d)`` the part that doesn't.
    """

    irreversible: Tensor
    reversible: Tensor


def check_parity(parity: object, dim: int, like: Tensor) -> Tensor:
    """Return the sign of each component under time reversal, ``(d,)`` of 1 and -1."""
    if parity is None:
        return torch.ones(dim, dtype=like.dtype, device=like.device)
    signs = as_tensor(parity, "parity", 1, "(d,)", like=like).to(like)
    if signs.shape != (dim,) or bool((signs.abs() != 1).any()):
        raise InvalidInputError(
            "parity must hold 1 or -1 per component", got=signs.tolist()[:8], expected=f"{dim} signs"
        )
    return signs


def as_points(x: object) -> Tensor:
    """Return states ``x (..., d)`` as a tensor in single or double precision, whose values are numbers."""
    points = as_tensor(x, "x", finite=False)
    check_points(points)
    if points.ndim == 0:
        raise ShapeError("x must hold states", got="a number", expected="(..., d)")
    check_nonempty(points, "x")
    return points


class LinearSteadyState:
    r"""The steady state of :math:`dX=AX\,dt+G\,dW`, exactly.

    .. math:: AC+CA^\top+2D=0,\qquad v(x)=(A_{irr}+DC^{-1})x,\qquad \sigma=\mathrm{tr}(V^\top D^+VC)

    Args:
        drift_matrix: A, ``(d, d)`` in 1/time; its eigenvalues must have negative real parts.
        diffusion: G, ``(d, m)``.
        parity: ``(d,)`` the sign of each component under time reversal, -1 for momenta; all even if None.

    Attributes:
        covariance: C, ``(d, d)``.
        rate: σ, the entropy production rate in 1/time.
        split: the irreversible and the reversible part of A.

    Raises:
        InvalidInputError: if there is no steady state.
        DiffusionMismatchError: if the rate is infinite, because the irreversible drift acts where there is no noise.

    Example:
        >>> gyrator = LinearSteadyState([[-2.0, -1.0], [-1.0, -2.0]], torch.tensor([[2.0, 0.0], [0.0, 6.0]]).sqrt())
        >>> round(gyrator.rate, 6)
        0.333333
    """

    def __init__(self, drift_matrix: object, diffusion: object, parity: object = None) -> None:
        a = as_tensor(drift_matrix, "drift_matrix", 2, "(d, d)").double()
        g = as_tensor(diffusion, "diffusion", 2, "(d, m)").double()
        if a.shape[0] != a.shape[1] or g.shape[0] != a.shape[0]:
            raise ShapeError(
                "drift_matrix and diffusion don't fit", got=f"{tuple(a.shape)} and {tuple(g.shape)}"
            )
        if float(torch.linalg.eigvals(a).real.max()) >= 0:
            raise InvalidInputError("there is no steady state: a mode of the drift doesn't decay")
        dim = len(a)
        signs = check_parity(parity, dim, a)
        self.drift_matrix, self.diffusion, self.parity = a, g, signs
        spread = g @ g.mT  # 2 D
        flip = signs[:, None] * signs[None, :]
        if not torch.allclose(flip * spread, spread, rtol=1e-9, atol=0):
            raise InvalidInputError("noise must not couple components of different parity")
        self.covariance = torch.as_tensor(solve_continuous_lyapunov(a.numpy(), -spread.numpy()))
        reversed_a = flip * a
        self.split = Split(0.5 * (a + reversed_a), 0.5 * (a - reversed_a))
        d = 0.5 * spread
        self._pinv = torch.linalg.pinv(d, rtol=1e-12, hermitian=True)
        irreversible = self.split.irreversible
        outside = irreversible - d @ self._pinv @ irreversible
        if float(outside.abs().max()) > 1e-9 * float(a.abs().max()):
            raise DiffusionMismatchError(
                "the entropy production rate is infinite: an irreversible drift acts where there is no noise",
                hint="momenta are odd under time reversal: give parity=..., -1 for each of them",
            )
        self._velocity = irreversible + d @ torch.linalg.inv(self.covariance)
        self.rate = float(torch.trace(self._velocity.mT @ self._pinv @ self._velocity @ self.covariance))

    def velocity(self, x: Tensor) -> Tensor:
        """Return the irreversible velocity ``(..., d)`` of the current at ``x (..., d)``."""
        return self._states(x) @ (self._on_noise() @ self._velocity).mT

    def _states(self, x: object) -> Tensor:
        points = as_points(x)
        check_event_size(points, len(self.drift_matrix), "x")
        return points.double()

    def _on_noise(self) -> Tensor:
        """Return the projection on the directions that noise reaches."""
        return 0.5 * self.diffusion @ self.diffusion.mT @ self._pinv

    def local(self, x: Tensor) -> Tensor:
        """Return the local rate ``(...)`` of entropy production at ``x (..., d)``; its mean is :attr:`rate`."""
        v = self.velocity(x)
        return (v * (v @ self._pinv)).sum(-1)

    def score(self, x: Tensor) -> Tensor:
        """Return the gradient of the steady log density, ``(..., d)``."""
        return -torch.linalg.solve(self.covariance, self._states(x)[..., None])[..., 0]
