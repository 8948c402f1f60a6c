"""Snapshots of a part of the state, such as positions without velocities: messages over all snapshots."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_inside,
    check_positive,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws.marginal import draw_index
from stochdyn.bridges.laws.partial_gaussian import PartialGaussianBridge
from stochdyn.core.gaussian.conditioning import EndPotential, TiltedMeasure, reachable
from stochdyn.core.law.marginals import Generator, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import ApproximationWarning, ConvergenceWarning, InvalidInputError, ShapeError

__all__ = ["PartialBridge", "momentum"]

_TINY = 1e-300
_CHUNK = 2**22


def momentum(dim: int, friction: float = 0.0, diffusion: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Return drift matrix and diffusion of a reference with momentum, for states (position, velocity).

    .. math:: dx=v\,dt,\qquad dv=-\gamma v\,dt+\sigma\,dW

    Args:
        dim: the number of components of a position.
        friction: :math:`\gamma`, in 1/time.
        diffusion: :math:`\sigma`, in units of velocity per root of time.

    Returns:
        ``(2 dim, 2 dim)`` and ``(2 dim, dim)``, in double precision.

    Example:
        >>> matrix, diffusion = momentum(1, friction=0.3)
        >>> matrix.tolist(), diffusion.tolist()
        ([[0.0, 1.0], [0.0, -0.3]], [[0.0], [1.0]])
    """
    check_positive_int(dim, "dim")
    check_real(friction, "friction")
    check_positive(diffusion, "diffusion")
    eye, zero = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    matrix = torch.cat((torch.cat((zero, eye), 1), torch.cat((zero, -friction * eye), 1)))
    return matrix, torch.cat((zero, diffusion * eye))


class PartialBridge(PathMeasure):
    r"""The law nearest to a linear reference whose *seen* components have the snapshots for marginals.

    .. math:: \min_q\mathrm{KL}(q\,\|\,p)\quad\text{with}\quad (X_{t_i})_{1..p}\sim\pi_i,\ i=1,\dots,I

    What isn't seen ties the past of a snapshot to its future, so pairs can't be solved one by one. The optimum weighs the reference by one
    potential a snapshot, a function of what is seen there, and iterative proportional fitting finds them one after the other, forth and back,
    with messages over the whole chain. Hidden components are represented by weighted draws for every particle, first from the bridge
    through the snapshots' Gaussian approximations, then anew around those that proved likely.

    Use it for positions without velocities, and for species that aren't measured, under a linear reference; where the snapshots are known by
    two moments only, :class:`PartialGaussianBridge` is exact. States have ``d`` components, of which the first ``p`` are those of the
    snapshots; scores against a snapshot compare these.

    Args:
        snapshots: what was seen of the first ``p`` components.
        drift_matrix: the matrix of the reference's drift, ``(d, d)`` with ``d > p``, in 1/time.
        diffusion: its noise, a number, ``(d,)`` or ``(d, m)``, which must reach every component through the drift.
        initial_mean: the mean of the reference at the first snapshot, ``(d,)``.
        initial_cov: its covariance there, ``(d, d)``. The law depends on it through what is hidden. Where they are None, they are those
            of :func:`~stochdyn.bridges.laws.unit_information`: what is hidden gets the size that the displacements between snapshots have.
        num_hidden: the number of draws of the hidden components for each particle.
        num_rounds: how often they are drawn; 1 keeps the first.
        tolerance: the largest marginal error, in L1.
        max_iterations: the largest number of sweeps over the snapshots in each round; forth and back count as two.
        seed: the seed of the draws.

    Attributes:
        marginal_errors: the L1 errors of the snapshots' marginals, ``(I,)``, of the law as it is.
        sweeps: the number of sweeps in the last round.

    Raises:
        ShapeError: if the drift doesn't fit.
        InvalidInputError: if the first law is left out and snapshots say nothing about some hidden component.
        SingularDiffusionError: if noise doesn't reach every component.

    Warns:
        ConvergenceWarning: if ``max_iterations`` didn't suffice.
        ApproximationWarning: if a snapshot rests on few draws.

    Example:
        >>> clouds = [torch.randn(30, 1).double() + 2 * k for k in range(3)]
        >>> law = PartialBridge(Snapshots([0.0, 1.0, 2.0], clouds), *momentum(1, diffusion=2.0))
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
        num_rounds: int = 2,
        tolerance: float = 1e-4,
        max_iterations: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_type(snapshots, Snapshots, "snapshots")
        check_positive_int(num_hidden, "num_hidden", 2)
        check_positive_int(num_rounds, "num_rounds")
        check_positive_int(max_iterations, "max_iterations")
        check_positive(tolerance, "tolerance")
        drift_matrix = as_tensor(drift_matrix, "drift_matrix", 2, "(d, d)", like=snapshots.samples[0])
        seen, dim = snapshots.dim, drift_matrix.shape[-1]
        if drift_matrix.shape != (dim, dim) or dim <= seen:
            raise ShapeError(
                "drift_matrix doesn't fit", got=tuple(drift_matrix.shape), expected=f"(d, d) with d > {seen}"
            )
        self.snapshots, self.seen, self.dim = snapshots, seen, dim
        like = snapshots.samples[0]
        observe = torch.eye(seen, dim).to(like)
        means = torch.stack([snap.mean for snap in snapshots])
        covs = torch.stack([snap.covariance for snap in snapshots])
        # relative to all that the snapshots spread and move, so that clouds of one particle have a Gaussian approximation too
        size = covs.diagonal(dim1=-2, dim2=-1).mean(0) + means.var(0, correction=0)
        if not bool((size > 0).all()):
            raise InvalidInputError("snapshots neither move nor spread in some component", got=size.tolist())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it only says where to draw
            gauss = PartialGaussianBridge(
                snapshots.times, means, covs + 1e-6 * torch.diag(size), observe,
                drift_matrix.to(like), diffusion, initial_mean, initial_cov, tolerance=1e-6,
            )  # fmt: skip
        self.reference = gauss.reference
        self.register_load_state_dict_post_hook(_refresh)
        generator = torch.Generator(like.device).manual_seed(seed)
        hidden, log_q = self._first_draws(gauss, num_hidden, generator)
        for k in range(num_rounds):
            self._build(hidden, log_q)
            self.sweeps, converged = self._iterate(tolerance, max_iterations)
            if k + 1 < num_rounds:
                hidden, log_q = self._again(generator)
        if not converged:
            warnings.warn(
                f"Marginals are off by {float(self.marginal_errors.max()):.1e} after {max_iterations} sweeps (tolerance {tolerance:.1e}). "
                "Allow more max_iterations, more noise, or more num_hidden",
                ConvergenceWarning,
                stacklevel=2,
            )
        worst = float(self.effective_draws().min())
        if worst < 2.0:
            warnings.warn(
                f"The hidden components of a snapshot rest on {worst:.1f} draws per particle. Give more num_hidden or num_rounds",
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
            variance = spread.diagonal()
            floor = (mean.square().mean((0, 1)) * 1e-12).clamp_min(torch.finfo(old.dtype).tiny)
            spread = spread + 1e-8 * torch.diag(variance.maximum(floor))
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
        for k, (v, q) in enumerate(zip(hidden, log_q, strict=True)):
            self.register_buffer(f"hidden{k}", v)
            self.register_buffer(f"log_q{k}", q)
            self.register_buffer(f"phi{k}", torch.zeros_like(self.snapshots.weights[k]))
        self._refresh()

    def _refresh(self) -> None:
        """Work out kernels and messages from the draws and potentials as they are."""
        count = len(self.snapshots)
        self._hidden: list[Tensor] = [getattr(self, f"hidden{k}") for k in range(count)]
        log_q: list[Tensor] = [getattr(self, f"log_q{k}") for k in range(count)]
        hidden, states = self._hidden, []
        spans = self.snapshots.durations.to(self.reference.like.dtype)
        steps = [x.unbind(0) for x in self.reference.transition(torch.zeros_like(spans), spans)[:2]]
        for x, v in zip(self.snapshots.samples, hidden, strict=True):
            states.append(torch.cat((x[:, None].expand(-1, v.shape[1], -1), v), -1).flatten(0, 1))
        self._states = states
        self._base = [-q.flatten() - math.log(q.shape[1]) for q in log_q]
        self._kernels, self._tops = [], []
        for span, phi, shift, a, b in zip(spans.tolist(), *steps, states[:-1], states[1:], strict=True):
            factor = reachable(self.reference, span)
            expected = torch.linalg.solve_triangular(factor, (a @ phi.mT + shift).mT, upper=False).mT
            reached = torch.linalg.solve_triangular(factor, b.mT, upper=False).mT
            log = -0.5 * torch.cdist(expected, reached, compute_mode="donot_use_mm_for_euclid_dist").square()
            top = log.amax(1)
            self._kernels.append(torch.exp(log - top[:, None]))
            self._tops.append(top)
        factor = torch.linalg.cholesky(self.reference.initial_cov)
        gap = (states[0] - self.reference.initial_mean).mT
        start = _log_standard(torch.linalg.solve_triangular(factor, gap, upper=False).mT)
        self._alpha = [start] + [torch.zeros_like(b) for b in self._base[1:]]
        self._beta = [torch.zeros_like(b) for b in self._base]
        self._phi: list[Tensor] = [getattr(self, f"phi{k}") for k in range(count)]
        for k in range(len(self._kernels)):
            self._pass_forward(k)
        for k in reversed(range(len(self._kernels))):
            self._pass_backward(k)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartialBridge:
        super()._apply(fn, recurse)
        like = self._buffers["hidden0"]
        assert like is not None
        self.snapshots = self.snapshots.to(like.dtype, like.device)
        self._refresh()
        return self

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
        self._phi[k].add_((target + _TINY).log() - mass)
        return (mass.exp() - target).abs().sum()

    def _iterate(self, tolerance: float, max_iterations: int) -> tuple[int, bool]:
        last = len(self._base) - 1
        for sweep in range(max_iterations):
            errors = torch.zeros(last + 1, dtype=torch.float64)
            order = range(last + 1) if sweep % 2 == 0 else reversed(range(last + 1))
            for k in order:
                errors[k] = self._fit(k)
                if sweep % 2 == 0 and k < last:
                    self._pass_forward(k)
                if sweep % 2 == 1 and k > 0:
                    self._pass_backward(k - 1)
            if float(errors.max()) <= tolerance:
                break
        # messages agree with the last potentials before errors are taken, and before paths are drawn
        for k in range(last):
            self._pass_forward(k)
        for k in reversed(range(last)):
            self._pass_backward(k)
        self.marginal_errors = torch.stack([self._error(k) for k in range(last + 1)])
        return sweep + 1, float(self.marginal_errors.max()) <= 2 * tolerance

    def _error(self, k: int) -> Tensor:
        mass = torch.logsumexp(self._log_posterior(k), 1)
        return (torch.softmax(mass, 0) - self.snapshots.weights[k]).abs().sum().double()

    # ----------------------------------------------------------------------------------------- the law
    def effective_draws(self) -> Tensor:
        """Return ``(I,)`` the mean effective number of hidden draws per particle."""
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
    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw paths of the whole state, ``(*sample, T, d)``, at times ``ts (T,)`` within the snapshots.

        What drove them isn't known, so ``dw`` is empty, ``(*sample, T-1, 0)``.
        """
        times = self.snapshots.times
        grid = as_time_grid(ts, min_points=1, like=times)
        check_inside(grid, times, "ts", "the snapshots")
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.snapshots.device)
        n = torch.Size(shape).numel()
        index = draw_index(torch.softmax(self._log_posterior(0).flatten(), 0), n, source)
        chain = [self._states[0][index]]
        for k, kernel in enumerate(self._kernels):
            ahead = self._beta[k + 1] + self._potential(k + 1)
            weight = torch.exp(ahead - ahead.max())
            index = torch.cat(
                [
                    torch.multinomial(kernel[own] * weight + _TINY, 1, generator=source)[:, 0]
                    for own in index.split(max(1, _CHUNK // kernel.shape[1]))
                ]
            )
            chain.append(self._states[k + 1][index])
        owner = torch.searchsorted(times, grid.to(times).contiguous()).clamp(1, len(times) - 1) - 1
        parts = []
        for k, span in enumerate(self.snapshots.durations.tolist()):
            clock = grid[owner == k].to(times) - times[k]
            parts.append(self._between(span, clock, chain[k], chain[k + 1], source))
        x = torch.cat(parts, 1).reshape(*shape, len(grid), self.dim)
        return PathSample(grid, x, x.new_empty(*shape, len(grid) - 1, 0), {}, self)

    def marginal(self, t: Tensor | float) -> SampledMarginal:
        """Return the law of the whole state at time ``t``, by simulation without discretisation error."""
        check_real(t, "t")
        time = torch.as_tensor(t, dtype=torch.float64).reshape(1)
        check_inside(time, self.snapshots.times, "t", "the snapshots")
        return SampledMarginal(lambda shape, generator: self.sample(time, shape, generator).x[..., 0, :])

    def _between(
        self, span: float, clock: Tensor, a: Tensor, b: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw the reference at times ``clock (T,)`` since a snapshot, between states ``a`` and ``b (n, d)``: ``(n, T, d)``."""
        if not clock.numel():
            return a[:, None][:, :0]
        still = torch.zeros(self.dim, self.dim, dtype=a.dtype, device=a.device)
        pinned = TiltedMeasure(self.reference, span, EndPotential.pinned(b), a, still)
        return pinned.sample(clock.to(a.dtype).clamp(0.0, span), (), generator).x


def _refresh(bridge: PartialBridge, keys: object) -> None:
    bridge._refresh()


def _log_standard(white: Tensor) -> Tensor:
    return -0.5 * (white.square().sum(-1) + white.shape[-1] * math.log(2 * math.pi))
