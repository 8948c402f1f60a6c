"""Linear steady states, in closed form: covariance, current, entropy production."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg import matrix_balance, solve_continuous_lyapunov
from torch import Tensor

from stochdyn._checks import DOUBLE, as_generator, as_sample_shape, as_tensor, check_event_size, check_real
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.law.path import as_parity
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError, SingularDiffusionError, UnavailableError
from stochdyn.nonequilibrium._noise import HalfCovariance
from stochdyn.nonequilibrium.current import Groups, as_points, check_reached, group_parts

__all__ = ["LinearSteadyState", "Split"]


@dataclass(frozen=True)
class Split:
    """How a drift matrix behaves under time reversal.

    Attributes:
        irreversible: The part that dissipates, ``(d, d)``.
        reversible: The part that doesn't, ``(d, d)``.
    """

    irreversible: Tensor
    reversible: Tensor


class LinearSteadyState:
    r"""The steady state of :math:`dX=AX\,dt+G\,dW`, exactly.

    .. math:: AC+CA^\top+2D=0,\qquad v(x)=(A_{irr}+DC^{-1})x,\qquad \sigma=\mathrm{tr}(V^\top D^+VC)

    Args:
        drift_matrix: The matrix A, ``(d, d)`` in 1/time; its eigenvalues must have negative real parts.
        diffusion: The matrix G, ``(d, m)``.
        parity: The sign of each component under time reversal, ``(d,)``, -1 for momenta; all are even if None.

    Attributes:
        covariance: The covariance C of the state, ``(d, d)``.
        rate: The entropy production rate σ in 1/time.
        component_rates: The part of each component in it, ``(d,)``.
        split: The irreversible and the reversible part of A.

    Raises:
        InvalidInputError: If there is no steady state.
        UnavailableError: If the coefficients have derivatives, which would be lost.
        DiffusionMismatchError: If the rate is infinite, because the irreversible drift acts where there is no noise.

    Example:
        >>> gyrator = LinearSteadyState([[-2.0, -1.0], [-1.0, -2.0]], torch.tensor([[2.0, 0.0], [0.0, 6.0]]).sqrt())
        >>> round(gyrator.rate, 6)
        0.333333
    """

    def __init__(self, drift_matrix: object, diffusion: object, parity: object = None) -> None:
        a = as_tensor(drift_matrix, "drift_matrix", 2, "(d, d)", like=DOUBLE).double()
        g = as_tensor(diffusion, "diffusion", 2, "(d, m)", like=DOUBLE).double()
        if a.shape[0] != a.shape[1] or g.shape[0] != a.shape[0]:
            raise ShapeError(
                "drift_matrix and diffusion don't fit", got=f"{tuple(a.shape)} and {tuple(g.shape)}"
            )
        if torch.is_grad_enabled() and (a.requires_grad or g.requires_grad):
            raise UnavailableError(
                "a steady state has no derivatives in its coefficients", hint="pass them with .detach()"
            )
        a, g = a.detach(), g.detach()
        if not bool((g != 0).any()):
            raise SingularDiffusionError("without noise the steady state is a point")
        if float(torch.linalg.eigvals(a).real.max()) >= 0:
            raise InvalidInputError("there is no steady state: a mode of the drift doesn't decay")
        signs = torch.ones(len(a), dtype=a.dtype) if parity is None else as_parity(parity, a)
        self.drift_matrix, self.diffusion, self.parity = a, g, signs
        spread = g @ g.mT  # 2 D
        unit = spread.diagonal().sqrt()
        flip = signs[:, None] * signs[None, :]
        if bool(((flip * spread - spread).abs() > 1e-9 * unit[:, None] * unit[None, :]).any()):
            raise InvalidInputError("noise must not couple components of different parity")
        # The equation is solved twice: in units that balance the drift, and then in units of the standard deviations that
        # this gives, so that components may be in any units.
        unit = torch.as_tensor(matrix_balance(a.numpy(), permute=False, separate=True)[1][0])
        for _ in range(2):
            scaled = torch.as_tensor(
                solve_continuous_lyapunov(
                    (a * unit / unit[:, None]).numpy(), -(spread / unit / unit[:, None]).numpy()
                )
            )
            self.covariance = scaled * unit * unit[:, None]
            unit = self.covariance.diagonal().sqrt()
        correlation = self.covariance / unit / unit[:, None]
        self._precision = torch.linalg.inv(correlation) / unit / unit[:, None]
        self.split = Split(0.5 * (a + flip * a), 0.5 * (a - flip * a))
        self._noise = HalfCovariance(Matrix(g), len(a))
        irreversible = self.split.irreversible
        check_reached(self._noise, irreversible.mT, a.abs().mT)
        # V = A_irr + D C⁻¹; D acts on the rows of the symmetric C⁻¹.
        self._velocity = irreversible + self._noise.times(self._precision).mT
        self._dual = self._noise.against(self._velocity.mT).mT
        self.component_rates = (self._velocity @ self.covariance * self._dual).sum(1)
        self.rate = float(self.component_rates.sum())

    def smallest_stderr(self, horizon: float) -> float:
        r"""Return the Cramér-Rao bound: what an unbiased estimate of the rate from one long trajectory scatters at least.

        Of a trajectory of length T the noise is known exactly, and the drift matrix has the Fisher information
        :math:`T\,C\otimes(2D)^{-1}`. With the derivative of :math:`\sigma=\mathrm{tr}(A^\top D^{-1}AC)+\mathrm{tr}A` along A, in which C moves
        as well,

        .. math::
            \mathrm{Var}\,\hat\sigma\ge\frac2T\,\mathrm{tr}(D\,\Gamma C^{-1}\Gamma^\top),\qquad
            \Gamma=\frac{\partial\sigma}{\partial A}=1+2(D^{-1}A+\Lambda)C,\qquad A^\top\Lambda+\Lambda A=-A^\top D^{-1}A .

        Steps of finite length and measured states hold less. Invert it for the length of a recording: an error of a tenth of the rate takes
        at least ``(10 * state.smallest_stderr(1.0) / state.rate) ** 2``.

        Args:
            horizon: The length T of the trajectory, much longer than the relaxation.

        Raises:
            UnavailableError: If a component is odd under time reversal: its drift has entries that are known, and the bound isn't this one.

        Example:
            >>> turn = LinearSteadyState([[-1.0, 1.5], [-1.5, -1.0]], 2.0**0.5 * torch.eye(2))
            >>> round(turn.smallest_stderr(100.0), 4)
            0.6

        Reference:
            Y. A. Kutoyants, "Statistical inference for ergodic diffusion processes", 2004.
        """
        check_real(horizon, "horizon", above=0.0)
        if bool((self.parity < 0).any()):
            raise UnavailableError("the bound is that of components that are even under time reversal")
        # In units of the standard deviations, in which the rate is the same.
        unit = self.covariance.diagonal().sqrt()
        a = self.drift_matrix * unit / unit[:, None]
        covariance, precision = (
            self.covariance / unit / unit[:, None],
            self._precision * unit * unit[:, None],
        )
        noise = HalfCovariance(Matrix(self.diffusion / unit[:, None]), len(a))
        # D⁺ acts on the rows of a transposed matrix.
        pushed = noise.against(a.mT).mT
        adjoint = torch.as_tensor(solve_continuous_lyapunov(a.mT.numpy(), -(a.mT @ pushed).numpy()))
        slope = torch.eye(len(a), dtype=a.dtype) + 2 * (pushed + adjoint) @ covariance
        return float(2 / float(horizon) * (noise.times(slope.mT).mT * (slope @ precision)).sum()) ** 0.5

    @property
    def sde(self) -> SDE:
        """The equation of the state."""
        a = self.drift_matrix
        return SDE(lambda t, x: x @ a.to(x).mT, Matrix(self.diffusion))

    @property
    def law(self) -> LinearGaussianMeasure:
        """The law of stationary paths, exact on any grid."""
        zero = torch.zeros_like(self.covariance[0])
        return LinearGaussianMeasure(self.drift_matrix, zero, self.diffusion, zero, self.covariance)

    def sample(
        self, sample_shape: int | tuple[int, ...] = (), generator: torch.Generator | int | None = None
    ) -> Tensor:
        """Draw independent states, ``(*sample_shape, d)`` in double precision.

        Args:
            sample_shape: The shape of the draws, an integer or a tuple.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        """
        unit = self.covariance.diagonal().sqrt()
        root = unit[:, None] * torch.linalg.cholesky(self.covariance / unit / unit[:, None])
        shape = (*as_sample_shape(sample_shape), len(root))
        return torch.randn(shape, dtype=root.dtype, generator=as_generator(generator)) @ root.mT

    def velocity(self, x: Tensor) -> Tensor:
        """Return the irreversible velocity ``(..., d)`` of the current at ``x (..., d)``."""
        return self._states(x) @ self._velocity.mT

    def _states(self, x: object) -> Tensor:
        points = as_points(x, like=DOUBLE)
        check_event_size(points, len(self.drift_matrix), "x")
        return points.double()

    def local(self, x: Tensor, by: Groups | None = None) -> Tensor | dict[str, Tensor]:
        """Return the local rate ``(...)`` of entropy production at ``x (..., d)``; its mean is :attr:`rate`.

        Args:
            x: The states, ``(..., d)``.
            by: Named groups of components, whose parts are then returned by name.
        """
        states = self._states(x)
        terms = (states @ self._velocity.mT) * (states @ self._dual.mT)
        return terms.sum(-1) if by is None else group_parts(terms, by)

    def score(self, x: Tensor) -> Tensor:
        """Return the gradient of the steady log density, ``(..., d)``."""
        return -self._states(x) @ self._precision
