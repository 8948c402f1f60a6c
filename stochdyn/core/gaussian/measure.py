"""Linear-Gaussian measures in continuous time: exact moments, evidence, posterior, samples, divergences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._checks import (
    check_finite,
    check_nonempty,
    check_positive,
    check_positive_int,
    check_same_device,
    check_same_dtype,
    check_time_grid,
)
from stochdyn.core.gaussian import _linear_density
from stochdyn.core.gaussian._batching import broadcast_batches
from stochdyn.core.gaussian._linear_coefficients import TimeFunction, as_diffusion, as_time_value
from stochdyn.core.gaussian._linear_observations import LinearGaussianPosterior, gather_observations
from stochdyn.core.gaussian._linear_transition import Transition, grid_transition, varying_transition
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import ShapeError, TimeGridError

if TYPE_CHECKING:
    from stochdyn.core.law.diffusion import DiffusionMeasure
    from stochdyn.core.sde.equation import SDE

__all__ = ["LinearGaussianMeasure", "LinearGaussianPosterior"]


class LinearGaussianMeasure:
    r"""The law of a linear equation with a Gaussian start, in closed form.

    .. math:: dX_t=(A(t)X_t+b(t))\,dt+G(t)\,dW_t,\qquad X_{t_0}\sim N(m_0,P_0).

    Transitions between any two times are exact for constant coefficients, and accurate to ``tolerance`` for
    coefficients that vary in time. All answers are differentiable in all tensors, also in the times.

    Args:
        drift_matrix: :math:`A`, ``(*B, d, d)`` in 1/time, or a function of times ``(n,)`` that returns
            ``(n, *B, d, d)``.
        drift_offset: :math:`b`, ``(*B, d)``, or a function that returns ``(n, *B, d)``.
        diffusion: :math:`G`: a positive number, ``(d,)``, ``(*B, d, m)``, a :class:`Coefficient`, or a
            function that returns ``(n, *B, d, m)``.
        initial_mean: :math:`m_0`, ``(*B, d)``. Its dtype and device are those of all answers.
        initial_cov: :math:`P_0`, ``(*B, d, d)``; None or zero for a fixed start.
        initial_time: :math:`t_0`. Times may start there or later.
        tolerance: relative accuracy of time-varying transitions (default 1e-10, in float32 1e-5).

    Raises:
        ShapeError, DtypeMismatchError, DeviceMismatchError, NonFiniteError, DiffusionError: on arguments that
            don't fit.

    Example:
        >>> ou = LinearGaussianMeasure.ornstein_uhlenbeck(rate=1.0, scale=2.0, start=torch.zeros(1))
        >>> ou.covariance(torch.tensor([0.0, 1.0])).flatten()
        tensor([0.0000, 1.7293])

    Reference: Särkkä & Solin (2019), Applied Stochastic Differential Equations, chapters 6 and 10.
    """

    def __init__(
        self,
        drift_matrix: Tensor | TimeFunction,
        drift_offset: Tensor | TimeFunction,
        diffusion: Coefficient | Tensor | float | TimeFunction,
        initial_mean: Tensor,
        initial_cov: Tensor | None = None,
        *,
        initial_time: float = 0.0,
        tolerance: float | None = None,
    ) -> None:
        if (
            not isinstance(initial_mean, Tensor)
            or initial_mean.ndim < 1
            or not initial_mean.is_floating_point()
        ):
            raise ShapeError(
                "initial_mean must be a floating tensor (*B, d)", got=type(initial_mean).__name__
            )
        check_nonempty(initial_mean, "initial_mean")
        check_finite(initial_mean.detach(), "initial_mean")
        dim = initial_mean.shape[-1]
        self.fixed_start = initial_cov is None or not bool((initial_cov != 0).any())
        if initial_cov is None:
            initial_cov = torch.zeros(dim, dim, dtype=initial_mean.dtype, device=initial_mean.device)
        if initial_cov.ndim < 2 or initial_cov.shape[-2:] != (dim, dim):
            raise ShapeError(
                "initial_cov has the wrong shape",
                got=tuple(initial_cov.shape),
                expected=f"(*B, {dim}, {dim})",
            )
        check_finite(initial_cov.detach(), "initial_cov")
        self.drift_matrix = as_time_value(drift_matrix, "drift_matrix", (dim, dim))
        self.drift_offset = as_time_value(drift_offset, "drift_offset", (dim,))
        self.diffusion = as_diffusion(diffusion, initial_mean)
        self._values = (self.drift_matrix, self.drift_offset, self.diffusion)
        given = {v.name: v.constant for v in self._values}
        check_same_device(initial_mean=initial_mean, initial_cov=initial_cov, **given)
        check_same_dtype(initial_mean=initial_mean, initial_cov=initial_cov, **given)
        self.initial_mean, self.initial_cov = initial_mean, initial_cov
        self.initial_time, self.tolerance, self.dim = float(initial_time), tolerance, dim
        probe = initial_mean.new_full((1,), self.initial_time)
        self.batch_shape = broadcast_batches(
            {
                "initial_mean": tuple(initial_mean.shape[:-1]),
                "initial_cov": tuple(initial_cov.shape[:-2]),
                **{v.name: v.batch(probe) for v in self._values},
            }
        )

    @classmethod
    def brownian(
        cls,
        dim: int = 1,
        scale: Tensor | float = 1.0,
        *,
        start: Tensor | None = None,
        start_cov: Tensor | None = None,
        initial_time: float = 0.0,
    ) -> LinearGaussianMeasure:
        """Return Brownian motion of ``dim`` components from ``start (*B, d)`` (zero if None).

        Example:
            >>> LinearGaussianMeasure.brownian(scale=2.0).covariance(torch.tensor([3.0])).item()
            12.0
        """
        check_positive_int(dim, "dim")
        if start is None:
            like = scale if isinstance(scale, Tensor) else torch.zeros(())
            start = torch.zeros(dim, dtype=like.dtype, device=like.device)
        zero = torch.zeros(start.shape[-1], dtype=start.dtype, device=start.device)
        return cls(torch.diag(zero), zero, scale, start, start_cov, initial_time=initial_time)

    @classmethod
    def ornstein_uhlenbeck(
        cls,
        rate: Tensor | float,
        mean: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        *,
        start: Tensor | None = None,
        start_cov: Tensor | None = None,
        initial_time: float = 0.0,
    ) -> LinearGaussianMeasure:
        r"""Return :math:`dX=\theta(\mu-X)dt+\sigma dW`, components independent.

        Args:
            rate: :math:`\theta`, a number or ``(*B, d)``, in 1/time.
            mean: :math:`\mu`, likewise.
            scale: :math:`\sigma`, likewise, positive.
            start: ``(*B, d)``, the mean of the start; None for the stationary law (of positive rate).
            start_cov: ``(*B, d, d)``; None for a fixed start.
            initial_time: time of the start.

        Example:
            >>> ou = LinearGaussianMeasure.ornstein_uhlenbeck(2.0, mean=1.0)
            >>> ou.covariance(torch.tensor([0.0, 5.0])).flatten()
            tensor([0.2500, 0.2500])
        """
        given = [x for x in (rate, mean, scale, start) if isinstance(x, Tensor)]
        check_same_dtype(**{str(i): x for i, x in enumerate(given)})
        like = given[0] if given else torch.zeros(())
        parts = [torch.as_tensor(x, dtype=None if isinstance(x, Tensor) else like.dtype, device=like.device)
                 for x in (rate, mean, scale)]  # fmt: skip
        shapes = {n: tuple(x.shape) for n, x in zip(("rate", "mean", "scale"), parts, strict=True)}
        shape = broadcast_batches({**shapes, "vector": (1 if start is None else start.shape[-1],)})
        theta, mu, sigma = (x.expand(shape) for x in parts)
        check_positive(sigma.detach(), "scale")
        if start is None:
            check_positive(theta.detach(), "rate")
            start, start_cov = mu, torch.diag_embed(sigma.square() / (2 * theta))
        diffusion = torch.diag_embed(sigma)
        return cls(
            torch.diag_embed(-theta), theta * mu, diffusion, start, start_cov, initial_time=initial_time
        )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``A (n, *B, d, d)``, ``b (n, *B, d)`` and ``G G^T (n, *B, d, d)`` at times ``t (n,)``."""
        a, b, g = (v.at(t) for v in self._values)
        batch = broadcast_batches(
            {"A": tuple(a.shape[1:-2]), "b": tuple(b.shape[1:-1]), "G": tuple(g.shape[1:-2])}
        )
        lift = [
            x.reshape(x.shape[0], *(1,) * (len(batch) - (x.ndim - 1 - e)), *x.shape[1:])
            for x, e in ((a, 2), (b, 1), (g, 2))
        ]
        return lift[0], lift[1], lift[2] @ lift[2].mT

    def transition(self, start: Tensor, stop: Tensor) -> Transition:
        r"""Return :math:`\Phi, c, Q` of :math:`X_{stop}\mid X_{start}\sim N(\Phi X_{start}+c, Q)`.

        Args:
            start: ``(N,)``.
            stop: ``(N,)``, none before its start.

        Returns:
            ``(N, *B, d, d)``, ``(N, *B, d)``, ``(N, *B, d, d)``; batch axes of size one may be missing.

        Raises:
            TimeGridError: if a transition ends before its start.
        """
        if bool((stop < start).any()):
            raise TimeGridError("a transition must not end before its start", got=f"{(stop - start).min():g}")
        dtype = self.initial_mean.dtype
        if any(v.constant is None for v in self._values):
            dt = (stop - start).to(dtype)
            return varying_transition(self.coefficients, start.to(dtype), dt, self.tolerance)
        a, b, s = (x[0] for x in self.coefficients(start.new_zeros(1).to(dtype)))
        return grid_transition(a, b, s, start, stop)

    def chain(self, ts: Tensor) -> GaussianChain:
        """Return the discrete chain of the law at times ``ts (T,)``."""
        check_time_grid(ts, min_points=1)
        check_same_device(ts=ts, initial_mean=self.initial_mean)
        if float(ts[0].detach()) < self.initial_time:
            raise TimeGridError(
                "ts starts before the initial law",
                got=float(ts[0].detach()),
                expected=f">= {self.initial_time}",
            )
        phi, c, q = self.transition(ts[:-1], ts[1:])
        mean, cov = self.initial_mean, self.initial_cov
        if float(ts[0].detach()) > self.initial_time or ts.requires_grad:
            origin = ts.new_full((1,), self.initial_time)
            a0, c0, q0 = (x[0] for x in self.transition(origin, ts[:1]))
            mean = (a0 @ mean[..., None]).squeeze(-1) + c0
            cov = a0 @ cov @ a0.mT + q0
        return GaussianChain(mean, cov, phi, c, q)

    def mean(self, ts: Tensor) -> Tensor:
        """Return the means ``(*B, T, d)`` at times ``ts (T,)``."""
        return self.chain(ts).moments()[0].movedim(0, -2)

    def covariance(self, ts: Tensor) -> Tensor:
        """Return the marginal covariances ``(*B, T, d, d)`` at times ``ts (T,)``."""
        return self.chain(ts).moments()[1].movedim(0, -3)

    def joint_covariance(self, ts: Tensor) -> Tensor:
        """Return the covariance ``(*B, T d, T d)`` of the path, flattened with time leading."""
        return _linear_density.joint_covariance(self.chain(ts))

    def sample(self, ts: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` exact paths, ``(n, *B, T, d)``, reparametrised."""
        return self.chain(ts).sample(n, generator).movedim(1, -2)

    def log_prob(self, ts: Tensor, x: Tensor) -> Tensor:
        """Return the exact log density of values ``x (*sample, *B, T, d)`` at times ``ts (T,)``.

        A fixed start on the grid is not part of the event: the density is then that of the later points given
        the first.

        Raises:
            SingularDiffusionError: if a transition has no density.
        """
        check_same_dtype(x=x, initial_mean=self.initial_mean)
        check_same_device(x=x, initial_mean=self.initial_mean)
        if x.ndim < 2 or x.shape[-2:] != (ts.shape[0], self.dim):
            expected = f"(*sample, *B, {ts.shape[0]}, {self.dim})"
            raise ShapeError("x has the wrong shape", got=tuple(x.shape), expected=expected)
        check_finite(x.detach(), "x")
        conditional = self.fixed_start and float(ts[0].detach()) == self.initial_time
        return _linear_density.chain_log_prob(self.chain(ts), x, conditional)

    def log_evidence(
        self,
        obs_ts: Tensor,
        y: Tensor,
        obs_scale: Tensor | float,
        emission: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        r"""Return the ``(*B,)`` log density of observations :math:`y_i=HX_{t_i}+\sigma_i\epsilon_i`.

        Args:
            obs_ts: ``(T,)`` strictly increasing, none before the initial time.
            y: ``(*B, T, p)``; anything, NaN included, where the mask is False.
            obs_scale: standard deviation of the noise: a number, ``(p,)``, ``(T, p)`` or ``(*B, T, p)``;
                zero for exact observations.
            emission: :math:`H`, ``(p, d)`` or ``(*B, T, p, d)``; None for the identity.
            mask: True where observed: ``(T,)``, ``(*B, T)`` or, with as many axes as ``y``, ``(*B, T, p)``.

        Raises:
            TimeGridError, ShapeError, NonFiniteError, InvalidInputError: on arguments that don't fit.
            SingularDiffusionError: if the observations have no density.

        Example:
            >>> ts, y = torch.tensor([1.0, 2.0]), torch.tensor([[0.3], [0.1]])
            >>> LinearGaussianMeasure.brownian().log_evidence(ts, y, obs_scale=0.1)
            tensor(-1.9163)
        """
        nodes, data, _ = gather_observations(self, obs_ts, y, obs_scale, emission, mask, at=None)
        return self.chain(nodes).log_evidence(**data)

    def posterior(
        self,
        obs_ts: Tensor,
        y: Tensor,
        obs_scale: Tensor | float,
        at: Tensor | None = None,
        emission: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LinearGaussianPosterior:
        """Condition on observations; the other arguments are those of :meth:`log_evidence`.

        Args:
            obs_ts: times of the observations.
            y: observations.
            obs_scale: standard deviation of their noise.
            at: ``(S,)`` times at which the posterior is wanted, before, between or after the observations;
                the times of the observations if None.
            emission: how the state is observed.
            mask: which values are observed.
        """
        nodes, data, where = gather_observations(self, obs_ts, y, obs_scale, emission, mask, at=at)
        chain = self.chain(nodes)
        smoothed = chain.smooth(**data)
        return LinearGaussianPosterior(
            ts=obs_ts if at is None else at,
            mean=smoothed.mean.index_select(0, where).movedim(0, -2),
            covariance=smoothed.cov.index_select(0, where).movedim(0, -3),
            log_evidence=smoothed.log_evidence,
            _chain=chain,
            _observations=data,
            _where=where,
        )

    def kl(self, other: LinearGaussianMeasure, ts: Tensor) -> Tensor:
        """Return the exact divergence ``(*B,)`` of the laws of the values at ``ts (T,)``.

        Raises:
            SingularDiffusionError: if a transition of either law has no density.
            DiffusionMismatchError: if the laws start from different fixed points.
        """
        return _linear_density.grid_kl(self, other, ts)

    def path_kl(self, other: LinearGaussianMeasure, ts: Tensor) -> Tensor:
        r"""Return the exact divergence ``(*B,)`` of the laws of the whole paths over the span of ``ts (T,)``.

        .. math:: KL=KL(\rho_{t_1}\|\rho'_{t_1})
            +\tfrac12\int E\,|G^+((A-A')X+b-b')|^2\,dt ,

        by Gauss quadrature of exact moments, refined until it stops changing.

        Raises:
            DiffusionMismatchError: if the diffusions differ, or the drifts differ where no noise acts.
        """
        return _linear_density.path_kl(self, other, ts)

    def to_sde(self) -> SDE:
        """Return the equation of this law, for simulation and control."""
        from stochdyn.core.gaussian._linear_sde import to_sde

        return to_sde(self)

    def as_measure(self) -> DiffusionMeasure:
        """Return this law as a :class:`DiffusionMeasure`, which starts at the first point of any grid.

        Raises:
            SingularDiffusionError: if the start is neither fixed nor of full rank.
        """
        from stochdyn.core.gaussian._linear_sde import as_measure

        return as_measure(self)
