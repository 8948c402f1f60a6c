"""Gaussian snapshots of a part of the state, such as positions under a reference with momentum."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    as_time_grid,
    check_event_size,
    check_finite,
    check_ndim,
    check_positive,
    check_positive_int,
    check_same_dtype,
)
from stochdyn.core.gaussian.conditioning import EndPotential, PiecewiseMeasure, absorb, reachable
from stochdyn.core.gaussian.constant_steps import Transition
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.gaussian.small import symmetrise
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import ConvergenceWarning, InvalidInputError, ShapeError, SingularDiffusionError

__all__ = ["PartialGaussianBridge", "unit_information"]


class PartialGaussianBridge(PiecewiseMeasure):
    r"""The law nearest to a linear reference with given Gaussian marginals of :math:`HX` at several times.

    .. math:: \min_Q\mathrm{KL}(Q\,\|\,R),\qquad HX_{t_k}\sim_Q N(m_k,S_k),\quad k=1,\dots,I

    Where :math:`H` is not invertible the problem doesn't fall apart into pairs: what is not seen at a snapshot ties its past
    to its future. The optimum multiplies the reference by a Gaussian potential of :math:`Hx` at each snapshot; they are found
    by iterative proportional fitting in information form, one snapshot after the other, forth and back, with
    messages, so that a sweep costs :math:`O(I d^3)`.

    Use it where what is seen is known by two moments only; for particles there is :class:`PartialBridge`.

    Args:
        times: The times of the snapshots, ``(I,)``.
        means: The means :math:`m_k` of what is seen, ``(I, p)``.
        covs: The covariances :math:`S_k` of what is seen, ``(I, p, p)``, positive definite.
        observe: The matrix :math:`H` that says what is seen, ``(p, d)``; ``torch.eye(p, 2 * p)`` sees positions of a state
            (position, velocity).
        drift_matrix: The matrix of the reference's drift, ``(d, d)``, in 1/time.
        diffusion: The noise of the reference, a number, ``(d,)``, ``(d, m)`` or a coefficient. The noise must reach every
            component through the drift.
        initial_mean: The mean of the reference at the first snapshot, ``(d,)``.
        initial_cov: The covariance of the reference at the first snapshot, ``(d, d)``, positive definite. The law depends on it
            where the state isn't seen. If both are None, they are those of :func:`unit_information`, which come from the
            snapshots and so have their units.
        drift_offset: The offset of the reference's drift, ``(d,)``; None for zero.
        tolerance: The largest change of a snapshot's moments from their targets in a sweep, relative to their spread.
        max_iterations: The largest number of sweeps; forth and back count as two.

    Raises:
        TimeGridError, ShapeError, DtypeMismatchError, InvalidInputError: If arguments don't fit one another.
        SingularDiffusionError: If the reference can't move some direction between snapshots.

    Warns:
        ConvergenceWarning: If ``max_iterations`` didn't suffice.

    Example:
        >>> times = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        >>> means, covs = torch.tensor([[0.0], [1.0], [0.0]]).double(), 0.1 * torch.ones(3, 1, 1).double()
        >>> momentum = torch.tensor([[0.0, 1.0], [0.0, -0.3]], dtype=torch.float64)
        >>> noise = torch.tensor([[0.0], [0.7]], dtype=torch.float64)
        >>> law = PartialGaussianBridge(times, means, covs, torch.eye(1, 2).double(), momentum, noise)
        >>> mean, cov = law.states()
        >>> round(mean[1, 0].item(), 6), round(cov[1, 0, 0].item(), 6)
        (1.0, 0.1)

    Reference: Chen, Conforti, Georgiou & Ripani (2019), Multi-marginal Schrödinger bridges; Chen, Liu, Tao & Theodorou (2023),
    Deep momentum multi-marginal Schrödinger bridge.
    """

    means: Tensor
    covs: Tensor
    observe: Tensor
    _precision: Tensor
    _linear: Tensor

    def __init__(
        self,
        times: Tensor,
        means: Tensor,
        covs: Tensor,
        observe: Tensor,
        drift_matrix: Tensor,
        diffusion: Coefficient | Tensor | float,
        initial_mean: Tensor | None = None,
        initial_cov: Tensor | None = None,
        drift_offset: Tensor | None = None,
        *,
        tolerance: float = 1e-12,
        max_iterations: int = 2000,
    ) -> None:
        super().__init__()
        times = as_time_grid(times, "times")
        check_positive_int(max_iterations, "max_iterations")
        check_positive(tolerance, "tolerance")
        means = as_tensor(means, "means")
        covs, observe = as_tensor(covs, "covs", like=means), as_tensor(observe, "observe", like=means)
        drift_matrix = as_tensor(drift_matrix, "drift_matrix", like=means)
        dim, seen = _check_arguments(times, means, covs, observe, drift_matrix)
        offset = means.new_zeros(dim) if drift_offset is None else drift_offset
        for own in covs:
            _inverse(own, "covs")
        if initial_mean is None or initial_cov is None:
            found = unit_information(times, means, covs, observe, drift_matrix, offset)
        mean = found[0] if initial_mean is None else initial_mean
        cov = found[1] if initial_cov is None else initial_cov
        self.times, self.dim, self.batch_shape = times, dim, torch.Size()
        #: the reference, which starts at the first snapshot
        self.reference = LinearGaussianMeasure(drift_matrix, offset, diffusion, mean, cov)
        if self.reference.batch_shape:
            raise ShapeError(
                "the reference must be one law", got=f"a batch {tuple(self.reference.batch_shape)}"
            )
        count = times.shape[0]
        buffers = {
            "means": means, "covs": covs, "observe": observe,
            "_precision": means.new_zeros(count, seen, seen), "_linear": means.new_zeros(count, seen),
        }  # fmt: skip
        for name, value in buffers.items():
            self.register_buffer(name, value)
        _inverse(cov, "initial_cov")
        self._refresh()
        self.register_load_state_dict_post_hook(_refresh)
        self.sweeps, self.converged = self._iterate(tolerance, max_iterations)
        if not self.converged:
            warnings.warn(
                f"the potentials still moved by more than {tolerance:g} after {max_iterations} sweeps; "
                "give more sweeps or a larger tolerance",
                ConvergenceWarning,
                stacklevel=2,
            )

    def _refresh(self) -> None:
        """Pass all messages, with the potentials as they are."""
        count, like = len(self.times), self.means
        spans = self.times.diff().to(like.dtype)
        self._factors = [reachable(self.reference, span) for span in spans.tolist()]
        #: the reference over each interval: matrices, shifts and covariances
        self._steps = self.reference.transition(torch.zeros_like(spans), spans)
        self._forward = [(self.reference.initial_mean, self.reference.initial_cov)] * count
        self._backward = [(like.new_zeros(self.dim, self.dim), like.new_zeros(self.dim))] * count
        self._targets = [(_inverse(s, "covs"), m) for s, m in zip(self.covs, self.means, strict=True)]
        for k in range(count - 1):
            self._pass_forward(k)
        for k in reversed(range(count - 1)):
            self._pass_backward(k)

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device of all answers."""
        return self.means

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartialGaussianBridge:
        super()._apply(fn, recurse)
        self.times = self.times.to(self.means.device)  # times keep their precision
        self._refresh()
        return self

    def _iterate(self, tolerance: float, max_iterations: int) -> tuple[int, bool]:
        count = self.times.shape[0]
        for sweep in range(max_iterations):
            off = 0.0
            order = range(count) if sweep % 2 == 0 else reversed(range(count))
            for k in order:
                off = max(off, self._fit(k))
                if sweep % 2 == 0 and k < count - 1:
                    self._pass_forward(k)
                if sweep % 2 == 1 and k > 0:
                    self._pass_backward(k - 1)
            if off <= tolerance:
                return sweep + 1, True
        return max_iterations, False

    def _fit(self, k: int) -> float:
        """Change the potential of snapshot ``k`` so that its marginal is right; returns how wrong it was, without units."""
        mean, cov = self._state(k)
        seen_mean, seen_cov = self.observe @ mean, symmetrise(self.observe @ cov @ self.observe.mT)
        # multiply by target over present density of H x: precisions and linear parts of the potential add the difference
        present = torch.linalg.inv(seen_cov)
        precision, target = self._targets[k]
        self._precision[k] += precision - present
        self._linear[k] += precision @ target - present @ seen_mean
        # both moments in coordinates in which the target is a standard normal
        factor = torch.linalg.cholesky(precision)
        gap = factor.mT @ seen_cov @ factor - torch.eye(len(target)).to(precision)
        away = factor.mT @ (seen_mean - target)
        return max(float(gap.abs().max()), float(away.abs().max()))

    def _potential(self, k: int) -> tuple[Tensor, Tensor]:
        return self.observe.mT @ self._precision[k] @ self.observe, self.observe.mT @ self._linear[k]

    def _later(self, k: int) -> tuple[Tensor, Tensor]:
        """Precision and linear part of all potentials from snapshot ``k`` on, as they are seen there."""
        potential, message = self._potential(k), self._backward[k]
        return potential[0] + message[0], potential[1] + message[1]

    def _state(self, k: int) -> tuple[Tensor, Tensor]:
        return absorb(*self._forward[k], *self._later(k))

    def _step(self, k: int) -> Transition:
        phi, shift, noise = (x[k] for x in self._steps)
        return phi, shift, noise

    def _pass_forward(self, k: int) -> None:
        phi, shift, noise = self._step(k)
        mean, cov = absorb(*self._forward[k], *self._potential(k))
        self._forward[k + 1] = phi @ mean + shift, symmetrise(phi @ cov @ phi.mT + noise)

    def _pass_backward(self, k: int) -> None:
        self._backward[k] = EndPotential.information(*self._later(k + 1)).before(self._step(k))

    def states(self) -> tuple[Tensor, Tensor]:
        """Return means ``(I, d)`` and covariances ``(I, d, d)`` of the whole state at the snapshots."""
        moments = [self._state(k) for k in range(self.times.shape[0])]
        return torch.stack([m for m, _ in moments]), torch.stack([c for _, c in moments])

    def step(self, index: int, start: Tensor, stop: Tensor) -> Transition:
        """Return the transition between two times after snapshot ``index``, within its interval."""
        start, stop = start.to(self.means.dtype), stop.to(self.means.dtype)
        end = torch.full_like(stop, float(self.times[index + 1] - self.times[index]))
        reference = self.reference.transition
        potential = EndPotential.information(*self._later(index + 1))
        return potential.tilt(reference(start, stop), reference(stop, end)[0], reference(start, end))

    def start_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mean ``(d,)`` and covariance ``(d, d)`` of the state at snapshot ``index``."""
        return self._state(index)

    def joint_precision(self) -> Tensor:
        """Return the precision ``(I d, I d)`` of the states at all snapshots; it is block tridiagonal."""
        dim, count = self.dim, self.times.shape[0]
        joint = self.means.new_zeros(count, dim, count, dim)
        # minus the Hessian of log p(x_1) + sum phi_k(x_k) + sum log N(x_{k+1}; Phi x_k + c, Q)
        joint[0, :, 0] = torch.linalg.inv(self.reference.initial_cov)
        for k in range(count):
            joint[k, :, k] += self._potential(k)[0]
        for k, factor in enumerate(self._factors):
            phi, inverse = self._step(k)[0], torch.cholesky_inverse(factor)
            joint[k, :, k] += phi.mT @ inverse @ phi
            joint[k + 1, :, k + 1] += inverse
            joint[k, :, k + 1] = -phi.mT @ inverse
            joint[k + 1, :, k] = -inverse @ phi
        return joint.reshape(count * dim, count * dim)

    def affine_drift_in(self, index: int, elapsed: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return matrix and offset of :math:`Ax+b+GG^\top\nabla\log h_t(x)`."""
        clock = elapsed.to(self.means.dtype)
        end = torch.full_like(clock, float(self.times[index + 1] - self.times[index]))
        whole = self.reference.transition(clock, end)
        precision, linear = EndPotential.information(*self._later(index + 1)).before(whole)
        a, b, s = self.reference.coefficients(clock)
        return a - s @ precision, b + (s @ linear.unsqueeze(-1)).squeeze(-1)

    @property
    def driven(self) -> LinearGaussianMeasure:
        """The reference."""
        return self.reference

    def sample_states(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw the whole state at all snapshots, ``(*sample, I, d)``."""
        return self.sample(self.times, sample_shape, generator).x


def _refresh(bridge: PartialGaussianBridge, keys: object) -> None:
    bridge._refresh()


def unit_information(
    times: Tensor, means: Tensor, covs: Tensor, observe: Tensor, drift_matrix: Tensor, drift_offset: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return mean ``(d,)`` and covariance ``(d, d)`` of a first state that says as much about it as one snapshot does on average.

    .. math:: \Sigma^{-1}=\frac1I\sum_k(H\Phi_k)^\top C_k^{-1}H\Phi_k,\qquad C_k=S_k+S_1+(m_k-m_1)(m_k-m_1)^\top,

    with :math:`\Phi_k` of the reference without noise. What is hidden, such as a velocity, gets the size that displacements over the
    intervals have, in the units of the data.

    Raises:
        InvalidInputError: If snapshots say nothing about some hidden direction.

    Reference: Kass & Wasserman (1995), A reference Bayesian test for nested hypotheses (unit information priors).
    """
    dim = drift_matrix.shape[0]
    # the offset as a last, constant component, in units in which exponents are of order one
    whole = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=means.device)
    whole[:dim, :dim], whole[:dim, dim] = drift_matrix, drift_offset
    # generalised least squares of the first state on all means, each seen through the reference without noise
    information, moment = whole.new_zeros(dim, dim), whole.new_zeros(dim)
    base, target = observe.double(), means.double()
    for k, elapsed in enumerate((times - times[0]).double().tolist()):
        phi = torch.linalg.matrix_exp(elapsed * whole)
        moved = target[k] - target[0]
        spread = covs[k].double() + (covs[0].double() + torch.outer(moved, moved) if k else 0.0)
        seen = base @ phi[:dim, :dim]
        weighed = torch.linalg.solve(spread, seen).mT
        information += weighed @ seen / len(times)
        moment += weighed @ (target[k] - base @ phi[:dim, dim]) / len(times)
    scale = information.diagonal().clamp_min(1e-300).rsqrt()
    scaled = scale[:, None] * information * scale
    if not float(torch.linalg.eigvalsh(scaled)[0]) > 1e-10:
        raise InvalidInputError(
            "initial_mean and initial_cov are needed: the snapshots say nothing about some hidden direction",
            hint="give the law of the whole state at the first snapshot",
        )
    cov = scale[:, None] * torch.linalg.inv(scaled) * scale
    return (cov @ moment).to(means), symmetrise(cov).to(means)


def _check_arguments(
    times: Tensor, means: Tensor, covs: Tensor, observe: Tensor, drift_matrix: Tensor
) -> tuple[int, int]:
    check_same_dtype(means=means, covs=covs, observe=observe, drift_matrix=drift_matrix)
    check_ndim(observe, 2, "observe", "(p, d)")
    check_ndim(means, 2, "means", "(I, p)")
    check_ndim(covs, 3, "covs", "(I, p, p)")
    seen, dim = observe.shape
    check_event_size(means, times.shape[0], "means", axis=0)
    check_event_size(means, seen, "means")
    if covs.shape != (times.shape[0], seen, seen):
        raise ShapeError("covs don't fit", got=tuple(covs.shape), expected=(times.shape[0], seen, seen))
    if drift_matrix.shape != (dim, dim):
        raise ShapeError("drift_matrix doesn't fit", got=tuple(drift_matrix.shape), expected=(dim, dim))
    for name, x in (("means", means), ("covs", covs), ("observe", observe)):
        check_finite(x, name)
    if int(torch.linalg.matrix_rank(observe)) < seen:
        raise InvalidInputError("observe must have full row rank", got=tuple(observe.shape))
    return dim, seen


def _inverse(cov: Tensor, name: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(cov)
    if bool(info > 0):
        raise SingularDiffusionError(f"{name} must be positive definite")
    return torch.cholesky_inverse(factor)
