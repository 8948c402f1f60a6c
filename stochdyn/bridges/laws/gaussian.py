"""The Schrödinger bridge between two Gaussians under a linear reference, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from stochdyn._checks import as_tensor, check_event_size, check_finite, check_positive, check_same_dtype
from stochdyn.bridges.laws._conditional import conditional_share
from stochdyn.core.forward.flow import GaussianFlow
from stochdyn.core.gaussian.conditioning import EndPotential, TiltedMeasure, reachable
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.gaussian.small import psd_factor, symmetrise
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import InvalidInputError, ShapeError, SingularDiffusionError

__all__ = ["GaussianBridge"]


class GaussianBridge(TiltedMeasure):
    r"""The law nearest in relative entropy to a linear reference, with given Gaussian ends.

    .. math::
        \min_Q\;\mathrm{KL}(Q\,\|\,R),\qquad R:\;dX=(AX+b)\,dt+G\,dW,\qquad
        Q_0=N(m_0,S_0),\quad Q_T=N(m_1,S_1)

    Everything is exact. In the coordinates :math:`u=L_Q^{-1}\Phi X_0` and :math:`v=L_Q^{-1}(X_T-c)`, where
    :math:`X_T|X_0\sim N(\Phi X_0+c,Q)` under the reference and :math:`Q=L_QL_Q^\top`, the coupling is

    .. math::
        \mathrm{Cov}(u,v)=L\,g(L^\top S_vL)\,L^\top S_v,\qquad g(M)=2\,(I+(I+4M)^{1/2})^{-1},\qquad S_u=LL^\top,

    which inverts no covariance, so that ends may be degenerate.

    Use it for two ends that are known by their first two moments, and as the exact answer that other bridges are held against;
    for more than two there is :class:`GaussianChainBridge`.

    Args:
        mean0: The mean :math:`m_0` of the first end, ``(d,)``. Its precision and device are those of all answers.
        cov0: The covariance :math:`S_0` of the first end, ``(d, d)``, positive semi-definite; zero for a fixed start.
        mean1: The mean :math:`m_1` of the last end, ``(d,)``.
        cov1: The covariance :math:`S_1` of the last end, ``(d, d)``.
        diffusion: The noise :math:`G` of the reference: a positive number, ``(d,)``, ``(d, m)`` or a
            :class:`~stochdyn.core.sde.coefficients.Coefficient`, in units of state per root of time. With ``m < d`` the noise
            must reach every component through the drift.
        horizon: The time :math:`T` between the ends, positive.
        drift_matrix: The matrix :math:`A` of the reference's drift, ``(d, d)`` in 1/time; None for zero (a Brownian reference).
        drift_offset: The offset :math:`b` of the reference's drift, ``(d,)``; None for zero.

    Raises:
        ShapeError, DtypeMismatchError, NonFiniteError, InvalidInputError: If arguments don't fit one another, or a covariance
            isn't one.
        SingularDiffusionError: If the reference can't move some direction within the horizon.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> bridge = GaussianBridge(-0.1 * one[0], one, 0.1 * one[0], one, diffusion=1.0, horizon=1.0)
        >>> round(bridge.cross_covariance.item(), 6)  # (sqrt(5) - 1) / 2
        0.618034

    Reference: Janati, Muzellec, Peyré & Cuturi (2020), Entropic optimal transport between unbalanced Gaussian
    measures has a closed form; Bunne, Hsieh, Cuturi & Krause (2023), The Schrödinger bridge between Gaussian
    measures has a closed form, theorem 3.
    """

    mean1: Tensor
    cov1: Tensor
    _cross: Tensor

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
        mean0 = as_tensor(mean0, "mean0", 1, "(d,)")
        cov0, mean1, cov1 = (
            as_tensor(value, name, like=mean0)
            for name, value in {"cov0": cov0, "mean1": mean1, "cov1": cov1}.items()
        )
        _check_end(mean0, cov0, "0")
        _check_end(mean1, cov1, "1")
        check_same_dtype(mean0=mean0, cov0=cov0, mean1=mean1, cov1=cov1)
        check_event_size(mean1, mean0.shape[0], "mean1")
        check_positive(horizon, "horizon")
        dim = mean0.shape[0]
        matrix, offset = (
            mean0.new_zeros(shape) if value is None else as_tensor(value, name, len(shape), like=mean0)
            for name, value, shape in (
                ("drift_matrix", drift_matrix, (dim, dim)),
                ("drift_offset", drift_offset, (dim,)),
            )
        )
        reference = LinearGaussianMeasure(matrix, offset, diffusion, mean0, symmetrise(cov0))
        potential, cross = _couple(reference, float(horizon), mean0, cov0, mean1, cov1)
        super().__init__(reference, horizon, potential, mean0, symmetrise(cov0))
        for name, value in {"mean1": mean1, "cov1": symmetrise(cov1), "_cross": cross}.items():
            self.register_buffer(name, value if value.requires_grad else value.detach().clone())

    @property
    def mean0(self) -> Tensor:
        """The mean of the first end, ``(d,)``."""
        return self._initial_mean

    @property
    def cov0(self) -> Tensor:
        """The covariance of the first end, ``(d, d)``."""
        return self._initial_cov

    @property
    def cross_covariance(self) -> Tensor:
        r""":math:`\mathrm{Cov}(X_0,X_T)`, ``(d, d)``."""
        return self._cross

    @property
    def coupling(self) -> MultivariateNormal:
        """The law of :math:`(X_0,X_T)`, event ``(2d,)``.

        Raises:
            SingularDiffusionError: If an end is degenerate, so that there is no density.
        """
        cov = torch.cat((torch.cat((self.cov0, self._cross), -1), torch.cat((self._cross.mT, self.cov1), -1)))
        return _normal(torch.cat((self.mean0, self.mean1)), cov)

    def kl(self) -> Tensor:
        r"""Return :math:`\mathrm{KL}(Q\,\|\,R)` in nats, with the reference started from the first end.

        .. math:: \tfrac12\big[\log\det Q-\log\det V+\mathrm{tr}\,Q^{-1}(V+E\,\delta\delta^\top)-d\big],
            \qquad V=\mathrm{Var}(X_T|X_0),\quad\delta=E[X_T|X_0]-\Phi X_0-c .

        Infinite for a fixed end.
        """
        phi, shift, factor = _whole(self.reference, self.horizon)
        gap = self.mean1 - phi @ self.mean0 - shift
        # E of the squared residual X_T - Phi X_0 - c, of which V is a part
        second = (
            self.cov1
            - phi @ self._cross
            - (phi @ self._cross).mT
            + phi @ self.cov0 @ phi.mT
            + torch.outer(gap, gap)
        )
        trace = torch.cholesky_solve(second, factor).diagonal().sum()
        log_det = 2 * factor.diagonal().log().sum() - torch.linalg.slogdet(self._residual).logabsdet
        return 0.5 * (log_det + trace - self.dim)

    def mean(self, ts: Tensor | float) -> Tensor:
        """Return the means ``(*s, d)`` at times ``ts (*s,)`` of ``[0, horizon]``, in any order."""
        return self.moments_at(as_tensor(ts, "t", like=self.like))[0]

    def covariance(self, ts: Tensor | float) -> Tensor:
        """Return the covariances ``(*s, d, d)`` at times ``ts (*s,)`` of ``[0, horizon]``, in any order."""
        return self.moments_at(as_tensor(ts, "t", like=self.like))[1]

    @property
    def flow(self) -> GaussianFlow:
        """The marginals as a :class:`~stochdyn.core.forward.flow.MarginalFlow`, with density, score and residual."""
        return GaussianFlow(self.mean, self.covariance)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the drift ``(..., d)`` of the bridge at ``x (..., d)``.

        .. math:: b_Q(t,x)=Ax+b+GG^\top\nabla\log h_t(x)

        Args:
            t: The times, a number or broadcastable to ``x[..., :1]``, of ``[0, horizon]``; before the end if that is
                degenerate.
            x: The states, ``(..., d)``.
        """
        x = as_tensor(x, "x", like=self.mean0, finite=False)
        check_event_size(x, self.dim, "x")
        check_same_dtype(x=x, mean0=self.mean0)
        return super().drift(t, x)

    def affine_drift(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the drift's matrix ``(*s, d, d)`` and offset ``(*s, d)`` at times ``t (*s,)``."""
        return super().affine_drift(as_tensor(t, "t", like=self.like))

    def as_diffusion(self) -> DiffusionMeasure:
        """Return the bridge as a :class:`~stochdyn.core.law.diffusion.DiffusionMeasure`, for control and Girsanov weights.

        Raises:
            SingularDiffusionError: If the first end is degenerate.
        """
        return DiffusionMeasure(_normal(self.mean0, self.cov0), self.to_sde(), start_time=0.0)


def _whole(reference: LinearGaussianMeasure, horizon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return matrix, shift and factor of the noise of the reference over the horizon."""
    ends = reference.like.new_tensor([0.0, horizon])
    phi, shift, _ = (x[0] for x in reference.transition(ends[:1], ends[1:]))
    return phi, shift, reachable(reference, horizon)


def _couple(
    reference: LinearGaussianMeasure, horizon: float, mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor
) -> tuple[EndPotential, Tensor]:
    """Return the end's potential and the covariance of both ends."""
    phi, shift, factor = _whole(reference, horizon)
    # both ends in coordinates u, v where the reference adds standard noise between them; there the coupling is in closed form
    white = torch.linalg.solve_triangular(factor, phi, upper=False)
    start = symmetrise(white @ cov0 @ white.mT)
    end = torch.linalg.solve_triangular(factor, cov1, upper=False)
    end = symmetrise(torch.linalg.solve_triangular(factor, end.mT, upper=False))
    before, after = _conditional(start, end), _conditional(end, start)
    cross = torch.linalg.solve(white, before @ end @ factor.mT)
    residual = symmetrise(factor @ after @ factor.mT)  # Var(X_T | X_0)
    # C = I - V Q^{-1}, by which the end's potential is pulled back without inverting V
    eye = torch.eye(len(mean0)).to(after)
    pull = torch.linalg.solve_triangular(factor, factor @ (eye - after), upper=False, left=False)
    expected = phi @ mean0 + shift
    return EndPotential(residual, pull, mean1 - expected + pull @ expected), cross


def _conditional(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the conditional variance :math:`L g(L^\top bL)L^\top`, with :math:`a=LL^\top`, of an end of variance ``a``.

    The other end has variance ``b``, and the reference unit noise between them.
    """
    factor = psd_factor(a)
    return symmetrise(factor @ conditional_share(symmetrise(factor.mT @ b @ factor)) @ factor.mT)


def _check_end(mean: Tensor, cov: Tensor, which: str) -> None:
    for name, x, ndim in ((f"mean{which}", mean, 1), (f"cov{which}", cov, 2)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.ndim != ndim:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(
                f"{name} must be a tensor in float32 or float64",
                got=got,
                expected="(d,)" if ndim == 1 else "(d, d)",
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
