"""Linear-Gaussian Markov chains in discrete time: moments, Kalman filter, smoother, evidence, samples."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_mask,
    as_sample_shape,
    as_tensor,
    check_finite,
    check_same_device,
    check_same_dtype,
)
from stochdyn.core.gaussian import filter as kalman
from stochdyn.core.gaussian.observations import Observed, prepare, without_missing
from stochdyn.core.gaussian.recursion import (
    affine_states,
    broadcast_batches,
    columns,
    covariance_states,
    flatten_batch,
    gaussian_moments,
    joint_covariance,
    restore,
    restore_columns,
    samples_first,
)
from stochdyn.core.gaussian.small import psd_factor, symmetrise
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import ShapeError

__all__ = ["GaussianChain", "GaussianFilter", "GaussianSmoother"]


@dataclass(frozen=True)
class GaussianFilter:
    """Laws of the state given the observations so far.

    Attributes:
        mean, cov: Mean and covariance after the observation of the same index, ``(N+1, *B, z)`` and
            ``(N+1, *B, z, z)``.
        predicted_mean, predicted_cov: Mean and covariance before it, of the same shapes.
        log_evidence: The log density ``(*B,)`` of all observations.
    """

    mean: Tensor
    cov: Tensor
    predicted_mean: Tensor
    predicted_cov: Tensor
    log_evidence: Tensor


@dataclass(frozen=True)
class GaussianSmoother:
    """Laws of the state given all observations.

    Attributes:
        mean, cov: Mean and covariance, ``(N+1, *B, z)`` and ``(N+1, *B, z, z)``.
        log_evidence: The log density ``(*B,)`` of all observations.
    """

    mean: Tensor
    cov: Tensor
    log_evidence: Tensor


class GaussianChain:
    r"""A linear-Gaussian Markov chain.

    .. math:: z_{n+1}=A_nz_n+c_n+e_n,\qquad e_n\sim N(0,Q_n),\qquad z_0\sim N(m_0,P_0).

    :math:`Q_n` and :math:`P_0` may be singular, :math:`P_0` may be zero (a fixed start). Every answer is
    exact and differentiable in every tensor. Nothing is inverted but the covariance of an observation, so
    nearly collinear states do no harm; float64 is recommended for long chains.

    Use it where time is discrete to begin with; in continuous time :class:`~stochdyn.LinearGaussianMeasure` makes the
    chain.

    Args:
        initial_mean: The mean of a Gaussian start, ``(*B, z)``.
        initial_cov: The covariance of a Gaussian start, ``(*B, z, z)``.
        transition: The matrices of the steps, ``(N, *B, z, z)``.
        offset: The constant parts of the steps, ``(N, *B, z)``.
        noise_cov: The covariance of the noise of a step, ``(N, *B, z, z)``.

    Batch axes broadcast, and may be left out of any argument.

    Raises:
        ShapeError, DtypeMismatchError, DeviceMismatchError, NonFiniteError: On arguments that don't fit.

    Example:
        >>> one = torch.ones(3, 1, 1, dtype=torch.float64)
        >>> walk = GaussianChain(one[0, 0] * 0, one[0] * 0, one, one[..., 0] * 0, one)
        >>> walk.moments()[1].flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]

    Reference: Durbin & Koopman (2012), Time Series Analysis by State Space Methods, chapter 4.
    """

    def __init__(
        self, initial_mean: Tensor, initial_cov: Tensor, transition: Tensor, offset: Tensor, noise_cov: Tensor
    ) -> None:
        like = as_tensor(initial_mean, "initial_mean")
        initial_mean, initial_cov, transition, offset, noise_cov = (
            as_tensor(x, name, like=like)
            for x, name in (
                (initial_mean, "initial_mean"),
                (initial_cov, "initial_cov"),
                (transition, "transition"),
                (offset, "offset"),
                (noise_cov, "noise_cov"),
            )
        )
        named = {
            "initial_mean": (initial_mean, 0, 1),
            "initial_cov": (initial_cov, 0, 2),
            "transition": (transition, 1, 2),
            "offset": (offset, 1, 1),
            "noise_cov": (noise_cov, 1, 2),
        }
        tensors = {name: entry[0] for name, entry in named.items()}
        check_same_device(**tensors)
        check_same_dtype(**tensors)
        for name, (x, lead, event) in named.items():
            if x.ndim < lead + event:
                expected = ("(N, *B" if lead else "(*B") + ", z" * event + ")"
                raise ShapeError(f"{name} has too few axes", got=f"shape {tuple(x.shape)}", expected=expected)
            check_finite(x.detach(), name)
        size, steps = initial_mean.shape[-1], transition.shape[0]
        for name, (x, lead, event) in named.items():
            if x.shape[x.ndim - event :] != (size,) * event or (lead and x.shape[0] != steps):
                raise ShapeError(
                    f"{name} doesn't fit the other arguments",
                    got=f"shape {tuple(x.shape)}",
                    expected=f"N={steps} steps of z={size} states",
                )
        self.initial_mean, self.initial_cov = initial_mean, initial_cov
        self.transition, self.offset, self.noise_cov = transition, offset, noise_cov
        self.num_steps, self.state_dim = steps, size
        self._cov_batch = broadcast_batches(
            {n: tuple(x.shape[k : x.ndim - e]) for n, (x, k, e) in named.items() if e == 2}
        )
        self.batch_shape = broadcast_batches(
            {n: tuple(x.shape[k : x.ndim - e]) for n, (x, k, e) in named.items()}
        )

    def detach(self) -> GaussianChain:
        """Return the same chain cut off from the graph."""
        parts = self.initial_mean, self.initial_cov, self.transition, self.offset, self.noise_cov
        return GaussianChain(*(x.detach() for x in parts))

    def at(self, index: Tensor) -> GaussianChain:
        """Return the chain at some of its times, which is a chain too.

        Args:
            index: The increasing positions ``(M,)``, of which the first is 0.
        """
        places = index.tolist()
        if places == list(range(self.num_steps + 1)):
            return self
        rows = []
        for first, last in itertools.pairwise(places):
            a, c, q = self.transition[first], self.offset[first], self.noise_cov[first]
            for n in range(first + 1, last):
                # Composition: z_{n+1} = A_n (a z + c + e) + c_n + e_n has matrix A_n a, offset A_n c + c_n, noise A_n q A_n^T + Q_n.
                step = self.transition[n]
                c = (step @ c.unsqueeze(-1)).squeeze(-1) + self.offset[n]
                q = symmetrise(step @ q @ step.mT) + self.noise_cov[n]
                a = step @ a
            rows.append((a, c, q))
        if not rows:
            return GaussianChain(
                self.initial_mean, self.initial_cov, self.transition[:0], self.offset[:0], self.noise_cov[:0]
            )
        return GaussianChain(
            self.initial_mean, self.initial_cov, *(torch.stack(x) for x in zip(*rows, strict=True))
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the marginal means ``(N+1, *B, z)`` and covariances ``(N+1, *B, z, z)``."""
        batch, flat = self.batch_shape, self._flat(self.batch_shape)
        a = flatten_batch(self.transition, 1, 2, batch, flat)
        noise = flatten_batch(self.noise_cov, 1, 2, batch, flat)
        cov = flatten_batch(self.initial_cov, 0, 2, batch, flat)
        start = columns(self.initial_mean[None], batch, flat)[0]
        offset = columns(self.offset, batch, flat)
        if start.shape[-1] == 1:
            mean, covs = gaussian_moments(a, offset[..., 0], noise, start[..., 0], cov)
            mean = mean[..., None]
        else:
            # Series that share their covariance: one recursion for it, and a column per series for the means.
            mean, covs = affine_states(a, offset, start), covariance_states(a, noise, cov)
        return restore_columns(mean, batch, flat), restore(covs, batch, flat)

    def joint_covariance(self, emission: Tensor | None = None) -> Tensor:
        """Return the covariance ``(*B, (N+1) d, (N+1) d)`` of the path, flattened with time leading.

        Args:
            emission: The matrix that maps states to observations, ``(d, z)``, for the covariance of ``emission @ z``
                alone; None for the whole state.
        """
        batch, flat = self.batch_shape, self._flat(self.batch_shape)
        a = flatten_batch(self.transition, 1, 2, batch, flat)
        noise = flatten_batch(self.noise_cov, 1, 2, batch, flat)
        covs = covariance_states(a, noise, flatten_batch(self.initial_cov, 0, 2, batch, flat))
        return restore(joint_covariance(covs, a, emission)[None], batch, flat)[0]

    def filter(
        self, y: Tensor, emission: Tensor, obs_cov: Tensor, mask: Tensor | None = None
    ) -> GaussianFilter:
        r"""Condition on the past: :math:`y_n=H_nz_n+\epsilon_n`, :math:`\epsilon_n\sim N(0,R_n)`.

        Args:
            y: The observed values ``(N+1, *B, p)``, NaN where a value is missing; anything where the mask is False.
            emission: The matrix that maps states to observations, ``(p, z)`` or ``(N+1, *B, p, z)``.
            obs_cov: The covariance of the observation noise, ``(p, p)`` or ``(N+1, *B, p, p)``.
            mask: True where observed: ``(N+1, *B)`` for whole vectors, or with as many axes as ``y`` for
                single components. None: everything is that isn't NaN.

        Raises:
            ShapeError, NonFiniteError, DtypeMismatchError: On arguments that don't fit.
            SingularDiffusionError: If an observation has no density given those before it.

        Example:
            >>> eye = torch.eye(1, dtype=torch.float64)
            >>> chain = GaussianChain(eye[0] * 0, eye, eye[None], eye * 0, eye[None])
            >>> y = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
            >>> round(chain.filter(y, eye, eye).log_evidence.item(), 4)
            -3.3426
        """
        seen = self._observed(y, emission, obs_cov, mask)
        gains = self._gains(seen)
        predicted, filtered, white = self._forward(gains, seen)
        batch, flat = seen.batch, seen.flat
        return GaussianFilter(
            mean=restore_columns(filtered, batch, flat),
            cov=restore(gains.filtered(seen.obs_cov), batch, flat),
            predicted_mean=restore_columns(predicted, batch, flat),
            predicted_cov=restore(gains.predicted, batch, flat),
            log_evidence=_log_evidence(gains, white, seen),
        )

    def log_evidence(
        self, y: Tensor, emission: Tensor, obs_cov: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the ``(*B,)`` log density of the observations; arguments as in :meth:`filter`."""
        seen = self._observed(y, emission, obs_cov, mask)
        gains = self._gains(seen)
        return _log_evidence(gains, self._forward(gains, seen)[2], seen)

    def smooth(
        self, y: Tensor, emission: Tensor, obs_cov: Tensor, mask: Tensor | None = None
    ) -> GaussianSmoother:
        """Condition on all observations; arguments as in :meth:`filter`.

        Reference: Bierman (1973), Fixed interval smoothing with discrete measurements (the modified
        Bryson-Frazier form, which inverts no state covariance).
        """
        seen = self._observed(y, emission, obs_cov, mask)
        gains = self._gains(seen)
        _, filtered, white = self._forward(gains, seen)
        a = flatten_batch(self.transition, 1, 2, seen.batch, seen.flat)
        # Bryson-Frazier: the filtered law corrected by the messages of later data, m + P mu and P - P Lambda P.
        cov = gains.filtered(seen.obs_cov)
        mean = filtered + cov @ kalman.backward_means(gains, a, white)
        cov = symmetrise(cov - cov @ kalman.backward_covariances(gains, a) @ cov)
        return GaussianSmoother(
            mean=restore_columns(mean, seen.batch, seen.flat),
            cov=restore(cov, seen.batch, seen.flat),
            log_evidence=_log_evidence(gains, white, seen),
        )

    def posterior_joint_covariance(
        self,
        y: Tensor,
        emission: Tensor,
        obs_cov: Tensor,
        mask: Tensor | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        r"""Return the covariance of the path given the observations, ``(*B, (N+1) d, (N+1) d)``.

        .. math:: \mathrm{Cov}(z_n,z_m\mid y)=(I-P_nN_n)\,L_{n-1}\cdots L_m\,P_m,\qquad L=A(I-KH),\quad n\ge m,

        with the predicted covariances P and the covariance N of the adjoint; no state covariance is inverted.

        Args:
            y: As in :meth:`filter`.
            emission: As in :meth:`filter`.
            obs_cov: As in :meth:`filter`.
            mask: As in :meth:`filter`.
            read: The matrix by which states are read, ``(d, z)``, for the covariance of ``read @ z`` alone; None for
                the whole state.

        Reference: de Jong & Mackinnon (1988), Covariances for smoothed estimates in state space models.
        """
        seen = self._observed(y, emission, obs_cov, mask)
        gains = self._gains(seen)
        a = flatten_batch(self.transition, 1, 2, seen.batch, seen.flat)
        # N_n = H^T S^{-1} H + (I-KH)^T A^T N_{n+1} A (I-KH), for the state before its own observation
        later = kalman.backward_covariances(gains, a)
        adjoint = gains.weighted.mT @ gains.weighted + gains.closed.mT @ later @ gains.closed
        eye = torch.eye(self.state_dim, dtype=a.dtype, device=a.device)
        left = eye - gains.predicted @ adjoint
        joint = joint_covariance(gains.predicted, a @ gains.closed[:-1], read, left)
        return restore(joint[None], seen.batch, seen.flat)[0]

    def score_of_start(
        self, y: Tensor, emission: Tensor, obs_cov: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        r"""Return the gradient of :math:`\log p(y_1,\dots,y_N\mid z_0)` at ``initial_mean``, ``(*B, z)``.

        The chain must start from a fixed point; arguments as in :meth:`filter`, of which the first observation doesn't count.
        """
        seen = self._observed(y, emission, obs_cov, mask)
        gains = self._gains(seen)
        white = self._forward(gains, seen)[2]
        a = flatten_batch(self.transition, 1, 2, seen.batch, seen.flat)
        return restore_columns(kalman.backward_means(gains, a, white), seen.batch, seen.flat)[0]

    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw paths, ``(*sample, N+1, *B, z)``, reparametrised."""
        shape = as_sample_shape(sample_shape)
        batch, n = self.batch_shape, math.prod(shape)
        source = as_generator(generator, self.transition.device)
        z = samples_first(self._draw(n, batch, self._flat(batch), source), n, batch)
        return z.reshape(*shape, *z.shape[1:])

    def sample_posterior(
        self,
        sample_shape: SampleShape,
        y: Tensor,
        emission: Tensor,
        obs_cov: Tensor,
        mask: Tensor | None = None,
        generator: Generator = None,
    ) -> Tensor:
        """Draw paths given the observations, ``(*sample, N+1, *B, z)``; arguments as in :meth:`filter`.

        A prior path is drawn with observations of its own, and corrected by the smoothed residual, so the
        draws are exact also where the posterior covariance is singular.

        Reference: Durbin & Koopman (2002), A simple and efficient simulation smoother, Biometrika 89.
        """
        shape = as_sample_shape(sample_shape)
        n, source = math.prod(shape), as_generator(generator, self.transition.device)
        seen = self._observed(y, emission, obs_cov, mask)
        gains = self._gains(seen)
        # A draw of the prior plus the smoothed mean of the data less what the draw would have shown (Durbin and Koopman).
        z = self._draw(n, seen.batch, seen.flat, source)
        noise = _correlated(seen.obs_cov, z.shape[-1], source)
        data = columns(seen.y, seen.batch, seen.flat, n)
        residual = data - seen.emission @ z - noise
        a = flatten_batch(self.transition, 1, 2, seen.batch, seen.flat)
        zero = torch.zeros_like(z[0])
        _, filtered, white = kalman.forward_means(
            gains, zero, a, torch.zeros_like(z[:-1]), seen.emission, residual
        )
        cov = gains.filtered(seen.obs_cov)
        z = z + filtered + cov @ kalman.backward_means(gains, a, white)
        z = samples_first(z, n, seen.batch)
        return z.reshape(*shape, *z.shape[1:])

    def _observed(self, y: Tensor, emission: Tensor, obs_cov: Tensor, mask: Tensor | None) -> Observed:
        like = self.transition
        y = as_tensor(y, "y", like=like, finite=False)
        emission, obs_cov = (
            as_tensor(x, name, like=like) for x, name in ((emission, "emission"), (obs_cov, "obs_cov"))
        )
        mask = None if mask is None else as_mask(mask)
        if y.ndim >= 2 and (mask is None or (1 <= mask.ndim <= y.ndim and mask.shape[0] == y.shape[0])):
            mask, y = without_missing(y, mask)
        check_same_device(y=y, emission=emission, obs_cov=obs_cov, mask=mask, transition=self.transition)
        check_same_dtype(y=y, emission=emission, obs_cov=obs_cov, transition=self.transition)
        shape = self.num_steps + 1, self.state_dim
        return prepare(y, emission, obs_cov, mask, shape, self._cov_batch, self.batch_shape)

    def _flat(self, batch: torch.Size) -> int:
        return 1 if self._cov_batch.numel() == 1 else batch.numel()

    def _draw(self, n: int, batch: torch.Size, flat: int, generator: torch.Generator | None) -> Tensor:
        start = columns(self.initial_mean[None], batch, flat, n)
        width = start.shape[-1]
        first = _correlated(flatten_batch(self.initial_cov[None], 1, 2, batch, flat), width, generator)
        noise = _correlated(flatten_batch(self.noise_cov, 1, 2, batch, flat), width, generator)
        a = flatten_batch(self.transition, 1, 2, batch, flat)
        return affine_states(a, columns(self.offset, batch, flat, n) + noise, (start + first)[0])

    def _gains(self, seen: Observed) -> kalman.Gains:
        return kalman.riccati(
            flatten_batch(self.initial_cov, 0, 2, seen.batch, seen.flat),
            flatten_batch(self.transition, 1, 2, seen.batch, seen.flat),
            flatten_batch(self.noise_cov, 1, 2, seen.batch, seen.flat),
            seen.emission,
            seen.obs_cov,
        )

    def _forward(self, gains: kalman.Gains, seen: Observed) -> tuple[Tensor, Tensor, Tensor]:
        return kalman.forward_means(
            gains,
            columns(self.initial_mean[None], seen.batch, seen.flat)[0],
            flatten_batch(self.transition, 1, 2, seen.batch, seen.flat),
            columns(self.offset, seen.batch, seen.flat),
            seen.emission,
            columns(seen.y, seen.batch, seen.flat),
        )


def _correlated(cov: Tensor, width: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``width`` columns of noise of each covariance ``(T, flat, k, k)``."""
    shape = (*cov.shape[:-1], width)
    white = torch.randn(shape, generator=generator, dtype=cov.dtype, device=cov.device)
    return psd_factor(cov) @ white


def _log_evidence(gains: kalman.Gains, white: Tensor, seen: Observed) -> Tensor:
    squares = restore_columns(white.square().sum((0, 2), keepdim=True), seen.batch, seen.flat)[0, ..., 0]
    log_scale = restore(
        gains.factor.diagonal(dim1=-2, dim2=-1).log().sum((0, 2))[None], seen.batch, seen.flat
    )[0]
    return -0.5 * (squares + seen.num_seen * math.log(2 * math.pi)) - log_scale
