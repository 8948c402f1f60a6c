"""Linear-Gaussian measures in continuous time: exact moments, evidence, posterior, samples, divergences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stochdyn._checks import (
    as_tensor,
    check_event_size,
    check_nonempty,
    check_positive,
    check_positive_int,
    check_real,
    check_same_device,
    check_same_dtype,
    check_type,
)
from stochdyn.core.forward.flow import as_time
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.core.gaussian.constant_steps import Transition
from stochdyn.core.gaussian.density import grid_kl, path_kl
from stochdyn.core.gaussian.law import GaussianPathMeasure
from stochdyn.core.gaussian.recursion import align, broadcast_batches
from stochdyn.core.gaussian.transition import (
    Coefficients,
    TimeFunction,
    TimeValue,
    as_noise_matrix,
    as_time_value,
    grid_transition,
    varying_transition,
)
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.sde.coefficients import Coefficient, Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import ShapeError, SingularDiffusionError, TimeGridError

__all__ = ["LinearGaussianMeasure"]


class LinearGaussianMeasure(GaussianPathMeasure):
    r"""The law of a linear equation with a Gaussian start, in closed form.

    .. math:: dX_t=(A(t)X_t+b(t))\,dt+G(t)\,dW_t,\qquad X_{t_0}\sim N(m_0,P_0).

    Grids are ``ts (T,)``, or ``(*B, T)`` where every series has times of its own. Transitions between any two times are
    exact for constant coefficients, and accurate to ``tolerance`` for coefficients that vary in time.
    All answers are differentiable in all tensors, also in the times.

    Use it where drift and noise don't depend on the state but linearly: nothing is simulated. A
    :class:`~stochdyn.DiffusionMeasure` takes any drift, by steps; :meth:`as_diffusion` turns this law into one.

    Args:
        drift_matrix: The matrix of a linear drift, :math:`A`, ``(*B, d, d)`` in 1/time, or a function of times ``(n,)``
            that returns ``(n, *B, d, d)``.
        drift_offset: The constant part of a linear drift, :math:`b`, ``(*B, d)``, or a function that returns
            ``(n, *B, d)``.
        diffusion: The noise strength :math:`G`: a positive number, ``(d,)``, ``(*B, d, m)``, a :class:`Coefficient`, or
            a function that returns ``(n, *B, d, m)``.
        initial_mean: The mean of a Gaussian start, :math:`m_0`, ``(*B, d)``. Its dtype and device are those of all
            answers.
        initial_cov: The covariance of a Gaussian start, :math:`P_0`, ``(*B, d, d)``; None or zero for a fixed start, of
            single members of a batch too.
        initial_time: The time :math:`t_0` of the start. Times may start there or later.
        tolerance: The relative accuracy of time-varying transitions (default 1e-10, in float32 1e-5), of every
            component of every member of a batch in its own scale.

    Raises:
        ShapeError, DtypeMismatchError, DeviceMismatchError, NonFiniteError, DiffusionError: On arguments that
            don't fit.

    Example:
        >>> ou = LinearGaussianMeasure.ornstein_uhlenbeck(rate=1.0, diffusion=2.0, initial_mean=torch.zeros(1))
        >>> ou.covariance(torch.tensor([0.0, 1.0])).flatten()
        tensor([0.0000, 1.7293])

    Reference: Särkkä & Solin (2019), Applied Stochastic Differential Equations, chapters 6 and 10.
    """

    def __init__(
        self,
        drift_matrix: Tensor | TimeFunction | TimeValue,
        drift_offset: Tensor | TimeFunction | TimeValue,
        diffusion: Coefficient | Tensor | float | TimeFunction | TimeValue,
        initial_mean: Tensor | TimeValue,
        initial_cov: Tensor | TimeValue | None = None,
        *,
        initial_time: float = 0.0,
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        made = initial_mean if isinstance(initial_mean, TimeValue) else None
        initial_mean = _as_start(initial_mean if made is None else made.constant, None)
        check_real(initial_time, "initial_time", fixed=True)
        if tolerance is not None:
            check_real(tolerance, "tolerance", above=0.0, below=1.0)
        dim = initial_mean.shape[-1]
        if initial_cov is None:
            initial_cov = torch.zeros(dim, dim, dtype=initial_mean.dtype, device=initial_mean.device)
        self._initial_mean = made or as_time_value(initial_mean, "initial_mean", (dim,), initial_mean)
        self._initial_cov = as_time_value(initial_cov, "initial_cov", (dim, dim), initial_mean)
        self.drift_matrix = as_time_value(drift_matrix, "drift_matrix", (dim, dim), initial_mean)
        self.drift_offset = as_time_value(drift_offset, "drift_offset", (dim,), initial_mean)
        self.diffusion = as_noise_matrix(diffusion, initial_mean)
        given = {v.name: v.constant for v in (self._initial_mean, self._initial_cov, *self._values)}
        check_same_device(**given)
        check_same_dtype(**given)
        self.initial_time, self.tolerance, self.dim = float(initial_time), tolerance, dim
        probe = initial_mean.new_full((1,), self.initial_time)
        self.batch_shape = broadcast_batches(
            {v.name: v.batch(probe) for v in (self._initial_mean, self._initial_cov, *self._values)}
        )

    series_grids = True

    @property
    def _values(self) -> tuple[TimeValue, TimeValue, TimeValue]:
        return self.drift_matrix, self.drift_offset, self.diffusion

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device of the law."""
        return self.initial_mean

    @property
    def initial_mean(self) -> Tensor:
        """The mean of the start, ``(*B, d)``."""
        value = self._initial_mean.constant
        assert value is not None
        return value

    @property
    def initial_cov(self) -> Tensor:
        """The covariance of the start, ``(*B, d, d)``, zero if it is fixed."""
        value = self._initial_cov.constant
        assert value is not None
        return value

    @classmethod
    def brownian(
        cls,
        dim: int = 1,
        diffusion: Tensor | float = 1.0,
        *,
        initial_mean: Tensor | None = None,
        initial_cov: Tensor | None = None,
        initial_time: float = 0.0,
    ) -> LinearGaussianMeasure:
        """Return Brownian motion of ``dim`` components from ``initial_mean (*B, d)`` (zero if None).

        Example:
            >>> LinearGaussianMeasure.brownian(diffusion=2.0).covariance(torch.tensor([3.0])).item()
            12.0
        """
        check_positive_int(dim, "dim")
        if initial_mean is None:
            like = diffusion if isinstance(diffusion, Tensor) else torch.zeros(())
            initial_mean = torch.zeros(dim, dtype=like.dtype, device=like.device)
        initial_mean = _as_start(initial_mean, None)
        zero = torch.zeros(initial_mean.shape[-1], dtype=initial_mean.dtype, device=initial_mean.device)
        return cls(torch.diag(zero), zero, diffusion, initial_mean, initial_cov, initial_time=initial_time)

    @classmethod
    def ornstein_uhlenbeck(
        cls,
        rate: Tensor | float,
        mean: Tensor | float = 0.0,
        diffusion: Tensor | float = 1.0,
        *,
        initial_mean: Tensor | None = None,
        initial_cov: Tensor | None = None,
        initial_time: float = 0.0,
    ) -> LinearGaussianMeasure:
        r"""Return :math:`dX=\theta(\mu-X)dt+\sigma dW`, components independent.

        Args:
            rate: The rate :math:`\theta`, a number or ``(*B, d)``, in 1/time.
            mean: The mean :math:`\mu`, likewise, in units of the state.
            diffusion: The noise strength :math:`\sigma`, likewise, positive, in units of the state per root of time.
            initial_mean: The mean ``(*B, d)`` of the start; None for the stationary law (of positive rate).
            initial_cov: The covariance of a Gaussian start, ``(*B, d, d)``; None for a fixed start.
            initial_time: The time of the start.

        Example:
            >>> ou = LinearGaussianMeasure.ornstein_uhlenbeck(2.0, mean=1.0)
            >>> ou.covariance(torch.tensor([0.0, 5.0])).flatten()
            tensor([0.2500, 0.2500])
        """
        named = {"rate": rate, "mean": mean, "diffusion": diffusion}
        given = [x for x in (rate, mean, diffusion, initial_mean) if isinstance(x, Tensor)]
        check_same_dtype(**{str(i): x for i, x in enumerate(given)})
        like = given[0] if given else torch.zeros(())
        theta, mu, sigma = (as_tensor(x, name, like=like) for name, x in named.items())
        start: Tensor | TimeValue
        if initial_mean is not None:
            start = initial_mean = _as_start(initial_mean, like)
        shapes = {n: tuple(x.shape) for n, x in zip(named, (theta, mu, sigma), strict=True)}
        size = 1 if initial_mean is None else initial_mean.shape[-1]
        shape = broadcast_batches({**shapes, "vector": (size,)})
        check_positive(sigma.detach(), "diffusion")
        zero = torch.zeros(shape[-1], dtype=theta.dtype, device=theta.device)
        dim = shape[-1]
        covariance: Tensor | TimeValue | None = initial_cov
        if initial_mean is None:
            check_positive(theta.detach(), "rate")
            start = TimeValue("initial_mean", (dim,), (mu, zero.expand(shape)), torch.add)
            covariance = TimeValue("initial_cov", (dim, dim), (theta, sigma, zero), _stationary_covariance)
        # The coefficients are made of the parameters whenever they are asked for, so that these may be learnt.
        return cls(
            TimeValue("drift_matrix", (dim, dim), (theta, zero), _relaxation),
            TimeValue("drift_offset", (dim,), (theta, mu, zero), _restoring),
            TimeValue("diffusion", (dim, None), (sigma, zero), _strengths),
            start,
            covariance,
            initial_time=initial_time,
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
            start: The time before each step ``(N,)``, or ``(N, *B)`` where every series has its own.
            stop: The last time of each interval, likewise, none before its start.

        Returns:
            ``(N, *B, d, d)``, ``(N, *B, d)``, ``(N, *B, d, d)``; batch axes of size one may be missing.

        Raises:
            TimeGridError: If a transition ends before its start.
        """
        start, stop = torch.broadcast_tensors(start, stop)
        if bool((stop < start).any()):
            raise TimeGridError("a transition must not end before its start", got=f"{(stop - start).min():g}")
        dtype = self.initial_mean.dtype
        if any(v.constant is None for v in self._values):
            dt = (stop - start).to(dtype)
            if start.ndim > 1:
                return self._varying_by_series(start.to(dtype), dt)
            return varying_transition(self.coefficients, start.to(dtype), dt, self.tolerance)
        a, b, s = (x[0] for x in self.coefficients(start.new_zeros(1).to(dtype)))
        return grid_transition(a, b, s, start, stop)

    def _varying_by_series(self, start: Tensor, dt: Tensor) -> Transition:
        """Return transitions over steps ``(N, *G)`` of series that each have their own times."""
        flat = start[0].numel()

        def of(series: int) -> Coefficients:
            def coefficients(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                a, b, s = self.coefficients(t)
                if a.ndim == 3:
                    return a, b, s
                whole = (
                    align(x, 1, e, start.shape[1:]).flatten(1, start.ndim - 1)
                    for x, e in ((a, 2), (b, 1), (s, 2))
                )
                one, two, three = (x[:, series] for x in whole)
                return one, two, three

            return coefficients

        starts, steps = start.reshape(start.shape[0], flat), dt.reshape(dt.shape[0], flat)
        parts = [varying_transition(of(g), starts[:, g], steps[:, g], self.tolerance) for g in range(flat)]
        phi, c, q = (torch.stack(x, 1).unflatten(1, start.shape[1:]) for x in zip(*parts, strict=True))
        return phi, c, q

    def chain(self, ts: Tensor) -> GaussianChain:
        """Return the discrete chain of the law at times ``ts (T,)``, or ``(*B, T)`` where every series has its own."""
        check_same_device(ts=ts, initial_mean=self.initial_mean)
        ts = ts.movedim(-1, 0)
        origin = torch.full_like(ts[:1], self.initial_time)
        if bool((ts[:1] < origin).any()):
            raise TimeGridError(
                "ts starts before the initial law",
                got=float(ts[0].detach().min()),
                expected=f">= {self.initial_time}",
            )
        mean, cov = self.initial_mean, self.initial_cov
        starts_later = bool((ts[:1] > origin).any()) or ts.requires_grad
        # One call for all steps, the one from the start of the law among them.
        nodes = torch.cat([origin, ts]) if starts_later else ts
        phi, c, q = self.transition(nodes[:-1], nodes[1:])
        if starts_later:
            (a0, phi), (c0, c), (q0, q) = (x.tensor_split([1]) for x in (phi, c, q))
            a0, c0, q0 = a0[0], c0[0], q0[0]
            mean = (a0 @ mean[..., None]).squeeze(-1) + c0
            cov = a0 @ cov @ a0.mT + q0
        return GaussianChain(mean, cov, phi, c, q)

    def covariance_rate(self, t: Tensor) -> Tensor:
        r"""Return :math:`GG^\top (n, *B, d, d)` at times ``t (n,)``."""
        return self.coefficients(t.to(self.like.dtype))[2]

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``A x + b (..., d)`` at ``x (..., *B, d)``; ``t`` is a number or broadcastable to ``x[..., :1]``."""
        time = as_time(t, x)
        check_event_size(x, self.dim, "x")
        check_same_dtype(x=x, law=self.like)
        return _drift(self, time, x)

    def kl(self, other: LinearGaussianMeasure, ts: Tensor) -> Tensor:
        """Return the exact divergence ``(*B,)`` of the laws of the values at ``ts (T,)``.

        Raises:
            SingularDiffusionError: If a transition of either law has no density.
            DiffusionMismatchError: If the laws start from different fixed points.
        """
        check_type(
            other,
            LinearGaussianMeasure,
            "other",
            "other laws have Monte Carlo estimates, by as_diffusion().kl(...)",
        )
        return grid_kl(self, other, ts)

    def path_kl(self, other: LinearGaussianMeasure, ts: Tensor) -> Tensor:
        r"""Return the exact divergence ``(*B,)`` of the laws of the whole paths over the span of ``ts (T,)``.

        .. math:: KL=KL(\rho_{t_1}\|\rho'_{t_1})
            +\tfrac12\int E\,|G^+((A-A')X+b-b')|^2\,dt ,

        by Gauss quadrature of exact moments, refined until it stops changing.

        Raises:
            DiffusionMismatchError: If the diffusions differ, or the drifts differ where no noise acts.
        """
        check_type(other, LinearGaussianMeasure, "other")
        return path_kl(self, other, ts)

    def with_integral(self, emission: Tensor) -> LinearGaussianMeasure:
        r"""Return the law of the state followed by integrals :math:`I_t=\int_{t_0}^tCX_s\,ds`, again linear and exact.

        Data over intervals are differences of them: :class:`~stochdyn.infer.LinearObservations` with ``increments=True``.

        Args:
            emission: The matrix C ``(q, d)`` of what is integrated.

        Raises:
            ShapeError: If the matrix doesn't fit the state.

        Example:
            >>> walk = LinearGaussianMeasure.brownian().with_integral(torch.ones(1, 1))
            >>> walk.covariance(torch.tensor([3.0]))[0]  # t, t^2 / 2, t^3 / 3
            tensor([[3.0000, 4.5000],
                    [4.5000, 9.0000]])
        """
        c = as_tensor(emission, "emission", 2, "(q, d)", like=self.like)
        check_event_size(c, self.dim, "emission")
        count = c.shape[0]

        def matrix(a: Tensor) -> Tensor:
            rows = torch.cat([a, c.expand(*a.shape[:-2], count, self.dim)], -2)
            return pad(rows, (0, count))

        return LinearGaussianMeasure(
            _widened(self.drift_matrix, matrix),
            _widened(self.drift_offset, lambda b: pad(b, (0, count))),
            _widened(self.diffusion, lambda g: pad(g, (0, 0, 0, count))),
            pad(self.initial_mean, (0, count)),
            pad(self.initial_cov, (0, count, 0, count)),
            initial_time=self.initial_time,
            tolerance=self.tolerance,
        )

    def to_sde(self) -> SDE:
        """Return the equation of this law, for simulation and control."""
        constant = self.diffusion.constant
        return SDE(_LinearDrift(self), _LinearDiffusion(self) if constant is None else Matrix(constant))

    def as_diffusion(self) -> DiffusionMeasure:
        """Return this law as a :class:`~stochdyn.DiffusionMeasure`, which is simulated step by step from ``initial_time`` on.

        Raises:
            SingularDiffusionError: If the start is neither fixed nor of full rank.
        """
        mean, cov = self.initial_mean.expand(*self.batch_shape, self.dim), self.initial_cov
        if not bool((cov != 0).any()):
            return DiffusionMeasure(mean, self.to_sde(), start_time=self.initial_time)
        factor, info = torch.linalg.cholesky_ex(cov)
        if bool((info != 0).any()):
            raise SingularDiffusionError(
                "the initial covariance is singular but not zero, so the start has no density"
            )
        return DiffusionMeasure(
            torch.distributions.MultivariateNormal(mean, scale_tril=factor), self.to_sde()
        )


def _widened(value: TimeValue, change: Callable[[Tensor], Tensor]) -> Tensor | TimeFunction:
    """Return a coefficient, constant or not, of a wider state."""
    constant = value.constant
    return change(constant) if constant is not None else lambda t: change(value.at(t))


def _as_start(value: object, like: Tensor | None) -> Tensor:
    start = as_tensor(value, "initial_mean", like=like)
    if start.ndim < 1:
        raise ShapeError("initial_mean must be a vector", got=tuple(start.shape), expected="(*B, d)")
    check_nonempty(start, "initial_mean")
    return start


def _relaxation(theta: Tensor, zero: Tensor) -> Tensor:
    return torch.diag_embed(zero - theta)


def _restoring(theta: Tensor, mu: Tensor, zero: Tensor) -> Tensor:
    return theta * mu + zero


def _strengths(sigma: Tensor, zero: Tensor) -> Tensor:
    return torch.diag_embed(sigma + zero)


def _stationary_covariance(theta: Tensor, sigma: Tensor, zero: Tensor) -> Tensor:
    return torch.diag_embed(sigma.square() / (2 * theta) + zero)


def _at(value: TimeValue, t: Tensor, x: Tensor) -> Tensor:
    """Evaluate at ``t``, broadcastable to ``x[..., :1]``, aligned with ``x (..., *B, d)``."""
    constant = value.constant
    if constant is not None:
        return constant
    out = value.at(t.reshape(-1).to(x.dtype))
    if t.numel() == 1:
        return out[0]
    own = out.ndim - 1 - len(value.event)
    lead = t.shape[: max(t.ndim - 1, 1)]
    if own and t.numel() == lead[0]:
        # Time leads; axes of the draws stand between it and the batch of the coefficients.
        gap = x.ndim - 2 - own
        return out.reshape(lead[0], *(1,) * gap, *out.shape[1:])
    return out.reshape(*lead, *out.shape[1:])


def _drift(law: LinearGaussianMeasure, t: Tensor, x: Tensor) -> Tensor:
    a, b = (_at(v, t, x) for v in (law.drift_matrix, law.drift_offset))
    return (a @ x[..., None]).squeeze(-1) + b if a.ndim > 2 else x @ a.mT + b


class _LinearDrift(nn.Module):
    def __init__(self, law: LinearGaussianMeasure) -> None:
        super().__init__()
        self.law = law

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return _drift(self.law, t, x)


class _LinearDiffusion(nn.Module):
    def __init__(self, law: LinearGaussianMeasure) -> None:
        super().__init__()
        self.law = law

    def forward(self, t: Tensor, x: Tensor) -> Coefficient:
        return Matrix(_at(self.law.diffusion, t, x))
