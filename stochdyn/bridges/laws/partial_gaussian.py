"""Gaussian snapshots of a part of the state, such as positions under a reference with momentum."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from stochdyn._checks import (
    check_event_size,
    check_finite,
    check_ndim,
    check_positive_int,
    check_same_dtype,
    check_time_grid,
)
from stochdyn.bridges.laws._pinned_linear import PinnedLinear
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.gaussian.small import symmetrise
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import (
    ConvergenceWarning,
    InvalidInputError,
    ShapeError,
    SingularDiffusionError,
    TimeGridError,
)

__all__ = ["PartialGaussianBridge"]


class PartialGaussianBridge:
    r"""The law nearest to a linear reference with given Gaussian marginals of :math:`HX` at several times.

    .. math:: \min_Q\mathrm{KL}(Q\,\|\,R),\qquad HX_{t_k}\sim_Q N(m_k,S_k),\quad k=1,\dots,I

    Where :math:`H` is not invertible the problem doesn't fall apart into pairs: what is not seen at a snapshot ties its past
    to its future. The optimum multiplies the reference by a Gaussian potential of :math:`Hx` at each snapshot; they are found
    by iterative proportional fitting in information form, one snapshot after the other, forth and back, with
    messages, so that a sweep costs :math:`O(I d^3)`.

    Args:
        times: ``(I,)``.
        means: :math:`m_k`, ``(I, p)``.
        covs: :math:`S_k`, ``(I, p, p)``, positive definite.
        observe: :math:`H`, ``(p, d)``; ``torch.eye(p, 2 * p)`` sees positions of a state (position, velocity).
        drift_matrix: of the reference, ``(d, d)``.
        diffusion: of the reference, a number, ``(d,)``, ``(d, m)`` or a coefficient. The noise must reach
            every component through the drift.
        initial_mean: mean of the reference at the first snapshot, ``(d,)``; None for zero.
        initial_cov: its covariance, positive definite; None for the identity. It matters where the state isn't
            seen.
        drift_offset: ``(d,)``; None for zero.
        tolerance: on the largest change of a potential's natural parameters in a sweep, relative to their size.
        max_sweeps: forth and back count as two.

    Raises:
        TimeGridError, ShapeError, DtypeMismatchError, InvalidInputError: on arguments that don't fit.
        SingularDiffusionError: if the reference can't move some direction between snapshots.

    Warns:
        ConvergenceWarning: if ``max_sweeps`` didn't suffice.

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
        max_sweeps: int = 2000,
    ) -> None:
        check_time_grid(times, "times")
        check_positive_int(max_sweeps, "max_sweeps")
        dim, seen = _check_arguments(times, means, covs, observe, drift_matrix)
        mean = means.new_zeros(dim) if initial_mean is None else initial_mean
        cov = torch.eye(dim).to(means) if initial_cov is None else initial_cov
        offset = means.new_zeros(dim) if drift_offset is None else drift_offset
        self.times, self.means, self.covs, self.observe, self.dim = times, means, covs, observe, dim
        #: the reference, which starts at the first snapshot
        self.reference = LinearGaussianMeasure(drift_matrix, offset, diffusion, mean, cov)
        self._steps = [
            PinnedLinear(self.reference, float(times[i + 1] - times[i])) for i in range(times.shape[0] - 1)
        ]
        prior = _inverse(cov, "initial_cov")
        count = times.shape[0]
        self._forward = [(prior, prior @ mean)] * count
        zero = (means.new_zeros(dim, dim), means.new_zeros(dim))
        self._backward = [zero] * count
        self._precision = means.new_zeros(count, seen, seen)
        self._linear = means.new_zeros(count, seen)
        self._targets = [(_inverse(s, "covs"), m) for s, m in zip(covs, means, strict=True)]
        for k in range(count - 1):
            self._pass_forward(k)
        for k in reversed(range(count - 1)):
            self._pass_backward(k)
        self.sweeps, self.converged = self._iterate(tolerance, max_sweeps)
        if not self.converged:
            warnings.warn(
                f"the potentials still moved by more than {tolerance:g} after {max_sweeps} sweeps; "
                "give more sweeps or a larger tolerance",
                ConvergenceWarning,
                stacklevel=2,
            )

    def _iterate(self, tolerance: float, max_sweeps: int) -> tuple[int, bool]:
        count = self.times.shape[0]
        for sweep in range(max_sweeps):
            before = torch.cat((self._precision.flatten(), self._linear.flatten()))
            order = range(count) if sweep % 2 == 0 else reversed(range(count))
            for k in order:
                self._fit(k)
                if sweep % 2 == 0 and k < count - 1:
                    self._pass_forward(k)
                if sweep % 2 == 1 and k > 0:
                    self._pass_backward(k - 1)
            after = torch.cat((self._precision.flatten(), self._linear.flatten()))
            if float((after - before).abs().max()) <= tolerance * max(1.0, float(after.abs().max())):
                return sweep + 1, True
        return max_sweeps, False

    def _fit(self, k: int) -> None:
        """Change the potential of snapshot ``k`` so that its marginal is right."""
        mean, cov = self._moments(k)
        seen_mean, seen_cov = self.observe @ mean, symmetrise(self.observe @ cov @ self.observe.mT)
        present = torch.linalg.inv(seen_cov)
        precision, target = self._targets[k]
        self._precision[k] += precision - present
        self._linear[k] += precision @ target - present @ seen_mean

    def _potential(self, k: int) -> tuple[Tensor, Tensor]:
        return self.observe.mT @ self._precision[k] @ self.observe, self.observe.mT @ self._linear[k]

    def _information(self, k: int) -> tuple[Tensor, Tensor]:
        potential, forward, backward = self._potential(k), self._forward[k], self._backward[k]
        return forward[0] + potential[0] + backward[0], forward[1] + potential[1] + backward[1]

    def _moments(self, k: int) -> tuple[Tensor, Tensor]:
        precision, linear = self._information(k)
        cov = torch.linalg.inv(symmetrise(precision))
        return cov @ linear, symmetrise(cov)

    def _pass_forward(self, k: int) -> None:
        step = self._steps[k]
        potential, message = self._potential(k), self._forward[k]
        inverse = torch.cholesky_inverse(step.factor)
        pull = step.phi.mT @ inverse
        gain = torch.linalg.solve(message[0] + potential[0] + pull @ step.phi, pull).mT
        linear = message[1] + potential[1] - pull @ step.shift
        self._forward[k + 1] = symmetrise(inverse - gain @ pull), inverse @ step.shift + gain @ linear

    def _pass_backward(self, k: int) -> None:
        step = self._steps[k]
        potential, message = self._potential(k + 1), self._backward[k + 1]
        inverse = torch.cholesky_inverse(step.factor)
        pull = step.phi.mT @ inverse
        gain = torch.linalg.solve(message[0] + potential[0] + inverse, inverse @ step.phi).mT
        linear = message[1] + potential[1] + inverse @ step.shift
        precision = symmetrise(pull @ step.phi - gain @ inverse @ step.phi)
        self._backward[k] = precision, gain @ linear - pull @ step.shift

    def states(self) -> tuple[Tensor, Tensor]:
        """Return means ``(I, d)`` and covariances ``(I, d, d)`` of the whole state at the snapshots."""
        moments = [self._moments(k) for k in range(self.times.shape[0])]
        return torch.stack([m for m, _ in moments]), torch.stack([c for _, c in moments])

    def transitions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bridge's chain through the snapshots: matrices ``(I-1, d, d)``, shifts and covariances."""
        rows = []
        for k, step in enumerate(self._steps):
            potential, message = self._potential(k + 1), self._backward[k + 1]
            inverse = torch.cholesky_inverse(step.factor)
            cov = torch.linalg.inv(symmetrise(inverse + potential[0] + message[0]))
            shift = cov @ (inverse @ step.shift + potential[1] + message[1])
            rows.append((cov @ inverse @ step.phi, shift, symmetrise(cov)))
        a, b, c = (torch.stack(part) for part in zip(*rows, strict=True))
        return a, b, c

    def joint_precision(self) -> Tensor:
        """Return the precision ``(I d, I d)`` of the states at all snapshots; it is block tridiagonal."""
        dim, count = self.dim, self.times.shape[0]
        joint = self.means.new_zeros(count, dim, count, dim)
        joint[0, :, 0] = torch.linalg.inv(self.reference.initial_cov)
        for k in range(count):
            joint[k, :, k] += self._potential(k)[0]
        for k, step in enumerate(self._steps):
            inverse = torch.cholesky_inverse(step.factor)
            joint[k, :, k] += step.phi.mT @ inverse @ step.phi
            joint[k + 1, :, k + 1] += inverse
            joint[k, :, k + 1] = -step.phi.mT @ inverse
            joint[k + 1, :, k] = -inverse @ step.phi
        return joint.reshape(count * dim, count * dim)

    def sample(self, ts: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` exact paths of the whole state ``(n, T, d)`` at times ``ts (T,)`` within the snapshots."""
        check_time_grid(ts, min_points=1)
        check_positive_int(n, "n")
        slack = 1e-6 * float(self.times[-1] - self.times[0])
        if float(ts[0]) < float(self.times[0]) - slack or float(ts[-1]) > float(self.times[-1]) + slack:
            raise TimeGridError(
                "ts must lie within the snapshots", got=f"{float(ts[0]):g} to {float(ts[-1]):g}"
            )
        states = self.sample_states(n, generator)
        owner = torch.searchsorted(self.times, ts.contiguous()).clamp(1, self.times.shape[0] - 1) - 1
        parts = []
        for k, step in enumerate(self._steps):
            clock = (ts[owner == k] - self.times[k]).to(self.means.dtype).clamp(0.0, step.horizon)
            if clock.numel():
                parts.append(step.sample(clock, states[:, k], states[:, k + 1], generator))
        return torch.cat(parts, 1)

    def sample_states(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` chains ``(n, I, d)`` of the whole state at the snapshots."""
        mean, cov = self._moments(0)

        def noise(cov: Tensor) -> Tensor:
            white = torch.randn(n, self.dim, dtype=cov.dtype, device=cov.device, generator=generator)
            return white @ torch.linalg.cholesky(cov).mT

        states = [mean + noise(cov)]
        for matrix, shift, spread in zip(*self.transitions(), strict=True):
            states.append(states[-1] @ matrix.mT + shift + noise(spread))
        return torch.stack(states, 1)


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
