"""Snapshots of a part of the state, such as positions without velocities: messages over all snapshots."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from stochdyn._checks import check_inside, check_positive, check_positive_int, check_time_grid
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws._pinned_linear import PinnedLinear
from stochdyn.bridges.laws.partial_gaussian import PartialGaussianBridge
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import ApproximationWarning, ConvergenceWarning, ShapeError

__all__ = ["PartialBridge", "momentum"]

_TINY = 1e-300
_CHUNK = 2**22


def momentum(dim: int, friction: float = 0.0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Return drift matrix and diffusion of a reference with momentum, for states (position, velocity).

    .. math:: dx=v\,dt,\qquad dv=-\gamma v\,dt+\sigma\,dW

    Args:
        dim: components of a position.
        friction: :math:`\gamma`, in 1/time.
        noise: :math:`\sigma`, in units of velocity per root of time.

    Returns:
        ``(2 dim, 2 dim)`` and ``(2 dim, dim)``, in double precision.

    Example:
        >>> matrix, diffusion = momentum(1, friction=0.3)
        >>> matrix.tolist(), diffusion.tolist()
        ([[0.0, 1.0], [0.0, -0.3]], [[0.0], [1.0]])
    """
    check_positive_int(dim, "dim")
    check_positive(noise, "noise")
    eye, zero = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    matrix = torch.cat((torch.cat((zero, eye), 1), torch.cat((zero, -friction * eye), 1)))
    return matrix, torch.cat((zero, noise * eye))


class PartialBridge:
    r"""The law nearest to a linear reference whose *seen* components have the snapshots for marginals.

    .. math:: \min_q\mathrm{KL}(q\,\|\,p)\quad\text{with}\quad (X_{t_i})_{1..p}\sim\pi_i,\ i=1,\dots,I

    What isn't seen ties the past of a snapshot to its future, so pairs can't be solved one by one. The optimum weighs the reference by one
    potential a snapshot, a function of what is seen there, and iterative proportional fitting finds them one after the other, forth and back,
    with messages over the whole chain. Hidden components are represented by weighted draws for every particle, first from the bridge
    through the snapshots' Gaussian approximations, then anew around those that proved likely.

    Args:
        snapshots: of the first ``p`` components.
        drift_matrix: of the reference, ``(d, d)`` with ``d > p``.
        diffusion: a number, ``(d,)`` or ``(d, m)``; noise must reach every component through the drift.
        initial_mean: of the reference at the first snapshot, ``(d,)``; None for the snapshot's mean and zero for what is hidden.
        initial_cov: ``(d, d)``; None for the snapshot's covariance and the identity.
        num_hidden: draws of the hidden components for each particle.
        rounds: how often they are drawn; 1 keeps the first.
        tolerance: largest marginal error, in L1.
        max_sweeps: forth and back count as two.
        seed: of the draws.

    Attributes:
        marginal_errors: ``(I,)`` L1.
        sweeps: that were needed in the last round.

    Raises:
        ShapeError: if the drift doesn't fit.
        SingularDiffusionError: if noise doesn't reach every component.

    Warns:
        ConvergenceWarning: if ``max_sweeps`` didn't suffice.
        ApproximationWarning: if a snapshot rests on few draws.

    Example:
        >>> clouds = [torch.randn(30, 1).double() + 2 * k for k in range(3)]
        >>> law = PartialBridge(Snapshots([0.0, 1.0, 2.0], clouds), *momentum(1, noise=2.0))
        >>> law.sample(torch.linspace(0, 2, 5, dtype=torch.float64), 10).x.shape
        torch.Size([10, 5, 2])

    Reference: Chen et al. (2023), Deep momentum multi-marginal Schrödinger bridge; Hong, Shi & Niles-Weed (2025), Trajectory
    inference with smooth Schrödinger bridges (message passing with sampled velocities).
    """

    def __init__(
        self,
        snapshots: Snapshots,
        drift_matrix: Tensor,
        diffusion: Coefficient | Tensor | float,
        initial_mean: Tensor | None = None,
        initial_cov: Tensor | None = None,
        *,
        num_hidden: int = 20,
        rounds: int = 2,
        tolerance: float = 1e-4,
        max_sweeps: int = 500,
        seed: int = 0,
    ) -> None:
        check_positive_int(num_hidden, "num_hidden", 2)
        check_positive_int(rounds, "rounds")
        check_positive_int(max_sweeps, "max_sweeps")
        check_positive(tolerance, "tolerance")
        seen, dim = snapshots.dim, drift_matrix.shape[-1]
        if drift_matrix.shape != (dim, dim) or dim <= seen:
            raise ShapeError(
                "drift_matrix doesn't fit", got=tuple(drift_matrix.shape), expected=f"(d, d) with d > {seen}"
            )
        self.snapshots, self.seen, self.dim = snapshots, seen, dim
        like = snapshots.samples[0]
        first = snapshots[0]
        if initial_mean is None:
            initial_mean = torch.cat((first.mean, like.new_zeros(dim - seen)))
        if initial_cov is None:
            initial_cov = torch.eye(dim).to(like)
            initial_cov[:seen, :seen] = first.covariance + 1e-6 * torch.eye(seen).to(like)
        observe = torch.eye(seen, dim).to(like)
        covs = torch.stack([s.covariance for s in snapshots])
        ridge = 1e-6 * covs.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(seen).to(like)
        gauss = PartialGaussianBridge(
            snapshots.times, torch.stack([s.mean for s in snapshots]), covs + ridge, observe,
            drift_matrix.to(like), diffusion, initial_mean, initial_cov, tolerance=1e-8,
        )  # fmt: skip
        self.reference, self._steps = gauss.reference, gauss._steps
        generator = torch.Generator(like.device).manual_seed(seed)
        hidden, log_q = self._first_draws(gauss, num_hidden, generator)
        for k in range(rounds):
            self._build(hidden, log_q)
            self.sweeps, converged = self._iterate(tolerance, max_sweeps)
            if k + 1 < rounds:
                hidden, log_q = self._again(generator)
        if not converged:
            warnings.warn(
                f"Marginals are off by {float(self.marginal_errors.max()):.1e} after {max_sweeps} sweeps (tolerance {tolerance:.1e}). "
                "Allow more sweeps, more noise, or more num_hidden",
                ConvergenceWarning,
                stacklevel=2,
            )
        worst = float(self.effective_draws().min())
        if worst < 2.0:
            warnings.warn(
                f"The hidden components of a snapshot rest on {worst:.1f} draws a particle. Give more num_hidden or rounds",
                ApproximationWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------------------------------------- draws
    def _first_draws(
        self, gauss: PartialGaussianBridge, count: int, generator: torch.Generator
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden components given what is seen, under the Gaussian bridge made half as wide again."""
        hidden, log_q = [], []
        for x, mean, cov in zip(self.snapshots.samples, *gauss.states(), strict=True):
            s = self.seen
            gain = torch.linalg.solve(cov[:s, :s], cov[:s, s:]).mT
            factor = 1.5 * torch.linalg.cholesky(cov[s:, s:] - gain @ cov[:s, s:])
            centre = mean[s:] + (x - mean[:s]) @ gain.mT
            white = torch.randn(
                len(x), count, self.dim - s, dtype=x.dtype, device=x.device, generator=generator
            )
            hidden.append(centre[:, None] + white @ factor.mT)
            log_q.append(_log_standard(white) - factor.diagonal().log().sum())
        return hidden, log_q

    def _again(self, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """New draws around the old ones that proved likely, from a mixture for each particle whose density is known."""
        hidden, log_q = [], []
        for k, old in enumerate(self._hidden):
            posterior = self._log_posterior(k)
            share = torch.softmax(posterior, 1)
            count, size = old.shape[1], old.shape[2]
            mean = (share[..., None] * old).sum(1, keepdim=True)
            spread = torch.einsum("aj,aji,ajk->ik", share, old - mean, old - mean) / len(old)
            spread = spread + 1e-8 * torch.eye(size).to(old) * spread.diagonal().mean().clamp_min(1e-12)
            factor = torch.linalg.cholesky(spread) * max(0.5, count ** (-1.0 / (size + 4)))
            pick = torch.multinomial(0.9 * share + 0.1 / count, count, replacement=True, generator=generator)
            centre = old.gather(1, pick[..., None].expand(-1, -1, size))
            white = torch.randn(old.shape, dtype=old.dtype, device=old.device, generator=generator)
            fresh = centre + white @ factor.mT
            gap = torch.linalg.solve_triangular(factor, (fresh[:, :, None] - old[:, None]).mT, upper=False).mT
            weight = (0.9 * share + 0.1 / count).log()[:, None]
            log_q.append(torch.logsumexp(weight + _log_standard(gap), -1) - factor.diagonal().log().sum())
            hidden.append(fresh)
        return hidden, log_q

    # ---------------------------------------------------------------------------------------- messages
    def _build(self, hidden: list[Tensor], log_q: list[Tensor]) -> None:
        """Kernels between all draws of neighbouring snapshots, and neutral potentials."""
        self._hidden = hidden
        states = []
        for x, v in zip(self.snapshots.samples, hidden, strict=True):
            states.append(torch.cat((x[:, None].expand(-1, v.shape[1], -1), v), -1).flatten(0, 1))
        self._states = states
        self._base = [-q.flatten() - math.log(q.shape[1]) for q in log_q]
        self._kernels, self._tops = [], []
        for step, a, b in zip(self._steps, states[:-1], states[1:], strict=True):
            expected = torch.linalg.solve_triangular(
                step.factor, (a @ step.phi.mT + step.shift).mT, upper=False
            ).mT
            reached = torch.linalg.solve_triangular(step.factor, b.mT, upper=False).mT
            log = -0.5 * torch.cdist(expected, reached, compute_mode="donot_use_mm_for_euclid_dist").square()
            top = log.amax(1)
            self._kernels.append(torch.exp(log - top[:, None]))
            self._tops.append(top)
        factor = torch.linalg.cholesky(self.reference.initial_cov)
        gap = (states[0] - self.reference.initial_mean).mT
        start = _log_standard(torch.linalg.solve_triangular(factor, gap, upper=False).mT)
        self._alpha = [start] + [torch.zeros_like(b) for b in self._base[1:]]
        self._beta = [torch.zeros_like(b) for b in self._base]
        self._phi = [torch.zeros_like(w) for w in self.snapshots.weights]
        for k in range(len(self._kernels)):
            self._pass_forward(k)
        for k in reversed(range(len(self._kernels))):
            self._pass_backward(k)

    def _potential(self, k: int) -> Tensor:
        copies = self._hidden[k].shape[1]
        return self._phi[k].repeat_interleave(copies) + self._base[k]

    def _pass_forward(self, k: int) -> None:
        weight = self._alpha[k] + self._potential(k) + self._tops[k]
        largest = weight.max()
        self._alpha[k + 1] = (torch.exp(weight - largest) @ self._kernels[k] + _TINY).log()

    def _pass_backward(self, k: int) -> None:
        weight = self._beta[k + 1] + self._potential(k + 1)
        largest = weight.max()
        self._beta[k] = (self._kernels[k] @ torch.exp(weight - largest) + _TINY).log() + self._tops[k]

    def _log_posterior(self, k: int) -> Tensor:
        """Log weights ``(n_k, M)`` of all draws, up to a constant."""
        value = self._alpha[k] + self._beta[k] + self._potential(k)
        return value.reshape(self._hidden[k].shape[:2])

    def _fit(self, k: int) -> Tensor:
        """Change the potential of snapshot ``k`` so that its marginal is right; returns how wrong it was."""
        mass = torch.logsumexp(self._log_posterior(k), 1)
        mass = mass - torch.logsumexp(mass, 0)
        target = self.snapshots.weights[k]
        self._phi[k] = self._phi[k] + (target + _TINY).log() - mass
        return (mass.exp() - target).abs().sum()

    def _iterate(self, tolerance: float, max_sweeps: int) -> tuple[int, bool]:
        last = len(self._base) - 1
        for sweep in range(max_sweeps):
            errors = torch.zeros(last + 1, dtype=torch.float64)
            order = range(last + 1) if sweep % 2 == 0 else reversed(range(last + 1))
            for k in order:
                errors[k] = self._fit(k)
                if sweep % 2 == 0 and k < last:
                    self._pass_forward(k)
                if sweep % 2 == 1 and k > 0:
                    self._pass_backward(k - 1)
            self.marginal_errors = errors
            if float(errors.max()) <= tolerance:
                return sweep + 1, True
        return max_sweeps, False

    # ----------------------------------------------------------------------------------------- the law
    def effective_draws(self) -> Tensor:
        """Return ``(I,)`` the mean effective number of hidden draws a particle."""
        values = []
        for k in range(len(self._base)):
            share = torch.softmax(self._log_posterior(k), 1)
            values.append((self.snapshots.weights[k] / share.square().sum(1)).sum())
        return torch.stack(values)

    def hidden_means(self, k: int) -> Tensor:
        """Return the expected hidden components ``(n_k, d - p)`` of every particle of snapshot ``k``."""
        share = torch.softmax(self._log_posterior(k), 1)
        return (share[..., None] * self._hidden[k]).sum(1)

    @torch.no_grad()
    def sample(self, ts: Tensor, n: int, generator: torch.Generator | None = None) -> PathSample:
        """Draw ``n`` paths of the whole state, ``(n, T, d)``, at times ``ts (T,)`` within the snapshots.

        The driving increments aren't recorded: ``dw`` is empty, ``(n, T-1, 0)``.
        """
        check_time_grid(ts, min_points=1)
        check_positive_int(n, "n")
        times = self.snapshots.times
        check_inside(ts, times, "ts", "the snapshots")
        index = torch.multinomial(
            torch.softmax(self._log_posterior(0).flatten(), 0), n, replacement=True, generator=generator
        )
        chain = [self._states[0][index]]
        for k, kernel in enumerate(self._kernels):
            ahead = self._beta[k + 1] + self._potential(k + 1)
            weight = torch.exp(ahead - ahead.max())
            index = torch.cat(
                [
                    torch.multinomial(kernel[own] * weight + _TINY, 1, generator=generator)[:, 0]
                    for own in index.split(max(1, _CHUNK // kernel.shape[1]))
                ]
            )
            chain.append(self._states[k + 1][index])
        owner = torch.searchsorted(times, ts.double().contiguous()).clamp(1, len(times) - 1) - 1
        parts = []
        for k, step in enumerate(self._steps):
            parts.append(self._between(step, ts[owner == k] - times[k], chain[k], chain[k + 1], generator))
        x = torch.cat(parts, 1)
        return PathSample(ts, x, x.new_zeros(n, len(ts) - 1, 0))

    def _between(
        self, step: PinnedLinear, clock: Tensor, a: Tensor, b: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        if not clock.numel():
            return a[:, None][:, :0]
        return step.sample(clock.to(a.dtype).clamp(0.0, step.horizon), a, b, generator)


def _log_standard(white: Tensor) -> Tensor:
    return -0.5 * (white.square().sum(-1) + white.shape[-1] * math.log(2 * math.pi))
