"""The Schrödinger bridge between two Gaussians under a linear reference, in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_event_size,
    check_finite,
    check_positive,
    check_same_dtype,
)
from stochdyn.bridges.laws._pinned_linear import PinnedLinear
from stochdyn.core.forward.flow import GaussianFlow, as_time
from stochdyn.core.forward.fokker_planck import FokkerPlanck
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.gaussian.small import psd_factor, symmetrise
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import GaussianMarginal, Generator, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path, PathSample
from stochdyn.core.sde.coefficients import Coefficient, as_coefficient
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError, SingularDiffusionError, TimeGridError

__all__ = ["GaussianBridge"]


class GaussianBridge(PathMeasure):
    r"""The law nearest in relative entropy to a linear reference, with given Gaussian ends.

    .. math::
        \min_Q\;\mathrm{KL}(Q\,\|\,R),\qquad R:\;dX=(AX+b)\,dt+G\,dW,\qquad
        Q_0=N(m_0,S_0),\quad Q_T=N(m_1,S_1)

    Everything is exact. In the coordinates :math:`u=L_Q^{-1}\Phi X_0` and :math:`v=L_Q^{-1}(X_T-c)`, where
    :math:`X_T|X_0\sim N(\Phi X_0+c,Q)` under the reference and :math:`Q=L_QL_Q^\top`, the coupling is

    .. math::
        \mathrm{Cov}(u,v)=L\,g(L^\top S_vL)\,L^\top S_v,\qquad g(M)=2\,(I+(I+4M)^{1/2})^{-1},\qquad S_u=LL^\top,

    which inverts no covariance, so that ends may be degenerate.

    Args:
        mean0: :math:`m_0`, ``(d,)``. Its precision and device are those of all answers.
        cov0: :math:`S_0`, ``(d, d)``, positive semi-definite; zero for a fixed start.
        mean1: :math:`m_1`, ``(d,)``.
        cov1: :math:`S_1`, ``(d, d)``.
        diffusion: :math:`G`: a positive number, ``(d,)``, ``(d, m)`` or a :class:`~stochdyn.core.sde.coefficients.Coefficient`, in
            units of state per root of time. With ``m < d`` the noise must reach every component through the
            drift.
        horizon: :math:`T`, positive.
        drift_matrix: :math:`A`, ``(d, d)`` in 1/time; None for zero (a Brownian reference).
        drift_offset: :math:`b`, ``(d,)``; None for zero.

    Raises:
        ShapeError, DtypeMismatchError, NonFiniteError, InvalidInputError: on arguments that don't fit.
        SingularDiffusionError: if the reference can't move some direction within the horizon.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> bridge = GaussianBridge(-0.1 * one[0], one, 0.1 * one[0], one, diffusion=1.0, horizon=1.0)
        >>> round(bridge.cross_covariance.item(), 6)  # (sqrt(5) - 1) / 2
        0.618034

    Reference: Janati, Muzellec, Peyré & Cuturi (2020), Entropic optimal transport between unbalanced Gaussian
    measures has a closed form; Bunne, Hsieh, Cuturi & Krause (2023), The Schrödinger bridge between Gaussian
    measures has a closed form, theorem 3.
    """

    def __init__(
        self,
        mean0: Tensor,
        cov0: Tensor,
        mean1: Tensor,
        cov1: Tensor,
        diffusion: Coefficient | Tensor | float,
        horizon: float,
        drift_matrix: Tensor | None = None,
        drift_offset: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_end(mean0, cov0, "0")
        _check_end(mean1, cov1, "1")
        check_same_dtype(mean0=mean0, cov0=cov0, mean1=mean1, cov1=cov1)
        check_event_size(mean1, mean0.shape[0], "mean1")
        check_positive(horizon, "horizon")
        dim = mean0.shape[0]
        ends = {"mean0": mean0, "cov0": symmetrise(cov0), "mean1": mean1, "cov1": symmetrise(cov1)}
        for name, value in ends.items():
            self.register_buffer(name, value)
        self.horizon, self.dim = float(horizon), dim
        matrix = mean0.new_zeros(dim, dim) if drift_matrix is None else drift_matrix
        offset = mean0.new_zeros(dim) if drift_offset is None else drift_offset
        self.register_buffer("drift_matrix", matrix)
        self.register_buffer("drift_offset", offset)
        #: the reference, a :class:`~stochdyn.core.gaussian.measure.LinearGaussianMeasure` that starts from the first end
        self.reference = LinearGaussianMeasure(
            self.drift_matrix, self.drift_offset, diffusion, mean0, self.cov0
        )
        self._coefficient = as_coefficient(diffusion)
        self.register_load_state_dict_post_hook(_refresh)
        self._refresh()

    @property
    def diffusion(self) -> Coefficient:
        """The noise of the reference and of the bridge."""
        return self._coefficient

    def _refresh(self) -> None:
        """Work out all that follows from ends and reference."""
        self._pinned = PinnedLinear(self.reference, self.horizon)
        self._phi, self._shift, self._factor = self._pinned.phi, self._pinned.shift, self._pinned.factor
        self._solve_ends()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianBridge:
        super()._apply(fn, recurse)
        self._refresh()
        return self

    def _solve_ends(self) -> None:
        white = torch.linalg.solve_triangular(self._factor, self._phi, upper=False)
        start = symmetrise(white @ self.cov0 @ white.mT)
        end = torch.linalg.solve_triangular(self._factor, self.cov1, upper=False)
        end = symmetrise(torch.linalg.solve_triangular(self._factor, end.mT, upper=False))
        before, after = _conditional(start, end), _conditional(end, start)
        self._cross = torch.linalg.solve(white, before @ end @ self._factor.mT)
        self._residual = symmetrise(self._factor @ after @ self._factor.mT)  # Var(X_T | X_0)
        # B = I - V Q^{-1}, by which the end's potential is pulled back without inverting V
        self._pull = torch.linalg.solve_triangular(
            self._factor, self._factor @ (torch.eye(self.dim).to(after) - after), upper=False, left=False
        )
        expected = (self._phi @ self.mean0) + self._shift
        self._aim = self.mean1 - expected + self._pull @ expected

    @property
    def cross_covariance(self) -> Tensor:
        r""":math:`\mathrm{Cov}(X_0,X_T)`, ``(d, d)``."""
        return self._cross

    @property
    def coupling(self) -> MultivariateNormal:
        """The law of :math:`(X_0,X_T)`, event ``(2d,)``.

        Raises:
            SingularDiffusionError: if an end is degenerate, so that there is no density.
        """
        cov = torch.cat((torch.cat((self.cov0, self._cross), -1), torch.cat((self._cross.mT, self.cov1), -1)))
        return _normal(torch.cat((self.mean0, self.mean1)), cov)

    def kl(self) -> Tensor:
        r"""Return :math:`\mathrm{KL}(Q\,\|\,R)` in nats, with the reference started from the first end.

        .. math:: \tfrac12\big[\log\det Q-\log\det V+\mathrm{tr}\,Q^{-1}(V+E\,\delta\delta^\top)-d\big],
            \qquad V=\mathrm{Var}(X_T|X_0),\quad\delta=E[X_T|X_0]-\Phi X_0-c .

        Infinite for a fixed end.
        """
        gap = self.mean1 - self._phi @ self.mean0 - self._shift
        # E of the squared residual X_T - Phi X_0 - c, of which V is a part
        second = (
            self.cov1
            - self._phi @ self._cross
            - (self._phi @ self._cross).mT
            + self._phi @ self.cov0 @ self._phi.mT
            + torch.outer(gap, gap)
        )
        trace = torch.cholesky_solve(second, self._factor).diagonal().sum()
        log_det = 2 * self._factor.diagonal().log().sum() - torch.linalg.slogdet(self._residual).logabsdet
        return 0.5 * (log_det + trace - self.dim)

    def mean(self, t: Tensor | float) -> Tensor:
        """Return the means ``(*s, d)`` at times ``t (*s,)`` of ``[0, horizon]``."""
        first, last, shift, _ = self._pinned.weights(self._clock(t))
        return first @ self.mean0 + last @ self.mean1 + shift

    def covariance(self, t: Tensor | float) -> Tensor:
        """Return the covariances ``(*s, d, d)`` at times ``t (*s,)`` of ``[0, horizon]``."""
        first, last, _, spread = self._pinned.weights(self._clock(t))
        mixed = first @ self._cross @ last.mT
        ends = first @ self.cov0 @ first.mT + last @ self.cov1 @ last.mT
        return symmetrise(ends + mixed + mixed.mT + spread)

    def marginal(self, t: Tensor | float) -> GaussianMarginal:
        """Return the law at times ``t (*s,)``, with batch shape ``(*s,)``; at a degenerate end it is singular.

        Raises:
            TimeGridError: outside ``[0, horizon]``.
        """
        return GaussianMarginal(self.mean(t), self.covariance(t))

    @property
    def flow(self) -> GaussianFlow:
        """The marginals as a :class:`~stochdyn.core.forward.flow.MarginalFlow`, with density, score and residual."""
        return GaussianFlow(self.mean, self.covariance)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the drift ``(..., d)`` of the bridge at ``x (..., d)``.

        .. math:: b_Q(t,x)=Ax+b+GG^\top\nabla\log h_t(x)

        Args:
            t: a number, or broadcastable to ``x[..., :1]``, of ``[0, horizon]``; before the end if that is
                degenerate.
            x: points.
        """
        check_event_size(x, self.dim, "x")
        check_same_dtype(x=x, mean0=self.mean0)
        time = as_time(t, x)
        flat = time[..., 0] if time.ndim else time
        slope, offset = self.affine_drift(flat)
        return (slope @ x.unsqueeze(-1)).squeeze(-1) + offset

    def affine_drift(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the drift's matrix ``(*s, d, d)`` and offset ``(*s, d)`` at times ``t (*s,)``."""
        clock = self._clock(t)
        phi, shift, noise = self._pinned.transition(clock, torch.full_like(clock, self.horizon))
        spread = self._residual + self._pull @ noise
        gain = torch.linalg.solve(spread.mT, phi).mT  # phi^T spread^{-1}
        strength = self._strength()
        slope = self.drift_matrix - strength @ gain @ self._pull @ phi
        lead = self._aim - (self._pull @ shift.unsqueeze(-1)).squeeze(-1)
        offset = self.drift_offset + (strength @ gain @ lead.unsqueeze(-1)).squeeze(-1)
        return slope, offset

    def forward(self) -> FokkerPlanck:
        """Return the forward operator of the bridge as a diffusion."""
        return FokkerPlanck(SDE(self.drift, self.diffusion))

    def as_diffusion(self) -> DiffusionMeasure:
        """Return the bridge as a :class:`~stochdyn.core.law.diffusion.DiffusionMeasure`, for control and Girsanov weights.

        Raises:
            SingularDiffusionError: if the first end is degenerate.
        """
        return DiffusionMeasure(_normal(self.mean0, self.cov0), SDE(self.drift, self.diffusion))

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        """Raise: paths are exact and come without increments; :meth:`as_diffusion` has a density on the paths that it draws."""
        self._refuse("log_rn", "its paths are exact and have no increments; use as_diffusion() on both sides")

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw exact paths at times ``ts (T,)`` of ``[0, horizon]``.

        Returns:
            Paths with ``x (*sample, T, d)``; what drove them isn't known, so ``dw`` is empty, ``(*sample, T-1, 0)``.
        """
        grid = as_time_grid(ts, min_points=1)
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.mean0.device)
        joint = self.joint_covariance(grid)
        noise = torch.randn(*shape, joint.shape[-1], dtype=joint.dtype, device=joint.device, generator=source)
        paths = (noise @ psd_factor(joint).mT).reshape(*shape, len(grid), self.dim)
        return PathSample(grid, self.mean(grid) + paths, paths.new_empty(*shape, len(grid) - 1, 0), {}, self)

    def joint_covariance(self, ts: Tensor) -> Tensor:
        """Return the covariance ``(T d, T d)`` of the values at ``ts (T,)``, flattened with time leading."""
        ts = as_time_grid(ts, min_points=1)
        ends, _, cov = self._pinned.joint(self._clock(ts))
        top = torch.cat((self.cov0, self._cross), -1)
        coupling = torch.cat((top, torch.cat((self._cross.mT, self.cov1), -1)))
        return symmetrise(ends @ coupling @ ends.mT + cov)

    def from_start(self, t: Tensor | float) -> Tensor:
        """Return the covariances ``(*s, d, d)`` of the first value (rows) with those at times ``t (*s,)`` of ``[0, horizon]``."""
        first, last, _, _ = self._pinned.weights(self._clock(t))
        return self.cov0 @ first.mT + self._cross @ last.mT

    def _strength(self) -> Tensor:
        matrix = self.reference.diffusion.constant
        assert matrix is not None
        return matrix @ matrix.mT

    def _clock(self, t: Tensor | float) -> Tensor:
        clock = as_tensor(t, "t", like=self.mean0).to(self.mean0)
        slack = 1e-6 * self.horizon
        if bool(((clock < -slack) | (clock > self.horizon + slack)).any()):
            raise TimeGridError(
                "t must lie inside the bridge",
                got=f"t from {float(clock.min()):g} to {float(clock.max()):g}",
                expected=f"[0, {self.horizon:g}]",
            )
        return clock.clamp(0.0, self.horizon)


def _refresh(bridge: GaussianBridge, keys: object) -> None:
    bridge._refresh()


def _conditional(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the conditional variance :math:`L g(L^\top bL)L^\top`, with :math:`a=LL^\top`, of an end of variance ``a``.

    The other end has variance ``b``, and the reference unit noise between them.
    """
    factor = psd_factor(a)
    values, vectors = torch.linalg.eigh(symmetrise(factor.mT @ b @ factor))
    basis = factor @ vectors
    return symmetrise((basis * (2 / (1 + (1 + 4 * values.clamp_min(0)).sqrt()))) @ basis.mT)


def _check_end(mean: Tensor, cov: Tensor, which: str) -> None:
    for name, x, ndim in ((f"mean{which}", mean, 1), (f"cov{which}", cov, 2)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != ndim:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(
                f"{name} must be a floating tensor", got=got, expected="(d,)" if ndim == 1 else "(d, d)"
            )
        check_finite(x.detach(), name)
    if cov.shape != (mean.shape[0], mean.shape[0]):
        raise ShapeError(
            f"cov{which} doesn't fit mean{which}", got=tuple(cov.shape), expected=(mean.shape[0],) * 2
        )
    scale = max(float(cov.detach().abs().max()), torch.finfo(cov.dtype).tiny)
    tolerance = 100 * cov.shape[0] * torch.finfo(cov.dtype).eps * scale
    if float((cov - cov.mT).detach().abs().max()) > tolerance:
        raise InvalidInputError(f"cov{which} must be symmetric")
    smallest = float(torch.linalg.eigvalsh(cov.detach())[0])
    if smallest < -tolerance:
        raise InvalidInputError(
            f"cov{which} must be positive semi-definite", got=f"smallest eigenvalue {smallest:.3g}"
        )


def _normal(mean: Tensor, cov: Tensor) -> MultivariateNormal:
    factor, info = torch.linalg.cholesky_ex(cov)
    if bool((info > 0).any()):
        raise SingularDiffusionError(
            "the covariance is singular, so there is no density",
            hint="mean, covariance and sample work all the same",
        )
    return MultivariateNormal(mean, scale_tril=factor)
