"""Laws whose states are seen in part: weighted draws of what is hidden, and messages over all snapshots."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_seed,
    as_time_grid,
    check_inside,
    check_positive,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws.marginal import draw_index
from stochdyn.bridges.laws.reference import EmpiricalLaw
from stochdyn.core.law.marginals import Generator, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.particles.resampling import effective_size, systematic
from stochdyn.errors import ApproximationWarning, ConvergenceWarning

__all__ = ["HiddenChain", "log_normal", "log_standard", "stratified_normal"]

_TINY = 1e-300
_CHUNK = 2**22


class HiddenChain(PathMeasure):
    """A law whose first components have the snapshots for marginals, on weighted draws of the others.

    Args:
        snapshots: The snapshots of the first components.
        num_hidden: The number of draws of the hidden components per particle.
        num_rounds: The number of times that the hidden components are drawn.
        tolerance: The largest L1 error of a snapshot's marginal.
        max_iterations: The largest number of sweeps over the snapshots in each round; forth and back count as two.
        seed: The seed of the draws.

    Attributes:
        snapshots: The snapshots of the first components.
        seen: The number of components that are seen.
        dim: The number of components of the whole state.
        marginal_errors: The L1 errors of the snapshots' marginals, ``(I,)``, of the law as it is.
        sweeps: The number of sweeps in the last round.
        converged: Whether the errors are within the tolerance.
    """

    snapshots: Snapshots
    seen: int
    dim: int
    marginal_errors: Tensor
    sweeps: int
    converged: bool

    def __init__(
        self, snapshots: Snapshots, num_hidden: int, num_rounds: int, tolerance: float, max_iterations: int, seed: int
    ) -> None:  # fmt: skip
        super().__init__()
        check_type(snapshots, Snapshots, "snapshots")
        check_positive_int(num_hidden, "num_hidden", 2)
        check_positive_int(num_rounds, "num_rounds")
        check_positive_int(max_iterations, "max_iterations")
        check_positive(tolerance, "tolerance")
        self.snapshots, self.seen = snapshots, snapshots.dim
        self.num_hidden, self.num_rounds, self.seed = num_hidden, num_rounds, as_seed(seed)
        self.tolerance, self.max_iterations = float(tolerance), max_iterations
        self.register_load_state_dict_post_hook(_refresh)

    @abstractmethod
    def _log_kernel(self, k: int, a: Tensor, b: Tensor) -> Tensor:
        """Return the log transition density ``(n, m)`` of the reference from snapshot ``k`` to the next."""

    @abstractmethod
    def _log_start(self, x: Tensor) -> Tensor:
        """Return the log density ``(n,)`` of the reference at the first snapshot."""

    @abstractmethod
    def _between(self, k: int, ts: Tensor, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the reference at times ``ts (T,)`` after snapshot ``k``, between states ``a`` and ``b (n, d)``: ``(n, T, d)``."""

    def _draw_around(
        self, centres: list[Tensor], factors: list[Tensor], generator: torch.Generator
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Draw hidden components from normal laws around ``centres (n, h)``, of lower ``factors (h, h)``, with their log densities."""
        hidden, log_q = [], []
        for centre, factor in zip(centres, factors, strict=True):
            white = stratified_normal(centre[:, None].expand(-1, self.num_hidden, -1), generator)
            hidden.append(centre[:, None] + white @ factor.mT)
            log_q.append(log_standard(white) - factor.diagonal().log().sum())
        return hidden, log_q

    def _solve(self, hidden: list[Tensor], log_q: list[Tensor], generator: torch.Generator) -> None:
        """Find the potentials on these draws, and on further ones around those that proved likely."""
        for k in range(self.num_rounds):
            self._build(hidden, log_q)
            self._iterate()
            if k + 1 < self.num_rounds:
                hidden, log_q = self._again(generator)
        if not self.converged:
            warnings.warn(
                f"Marginals are off by {float(self.marginal_errors.max()):.1e} after {self.max_iterations} sweeps "
                f"(tolerance {self.tolerance:.1e}). Allow more max_iterations, more noise, or more num_hidden",
                ConvergenceWarning,
                stacklevel=3,
            )
        worst = float(self.effective_draws().min())
        if worst < 2.0:
            warnings.warn(
                f"The hidden components of a snapshot rest on {worst:.1f} draws per particle. Give more num_hidden or num_rounds",
                ApproximationWarning,
                stacklevel=3,
            )

    def _again(self, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """New draws around the old ones that proved likely, from a mixture for each particle whose density is known."""
        hidden, log_q = [], []
        for k, old in enumerate(self._hidden):
            posterior = self._log_posterior(k)
            share = torch.softmax(posterior, 1)
            count, size = old.shape[1], old.shape[2]
            # a kernel density of the weighted draws of each particle, whose width is that of all of them, shrunk as n^(-1/(d+4))
            mean = (share[..., None] * old).sum(1, keepdim=True)
            spread = torch.einsum("aj,aji,ajk->ik", share, old - mean, old - mean) / len(old)
            variance = spread.diagonal()
            floor = (mean.square().mean((0, 1)) * 1e-12).clamp_min(torch.finfo(old.dtype).tiny)
            spread = spread + 1e-8 * torch.diag(variance.maximum(floor))
            factor = torch.linalg.cholesky(spread) * max(0.5, count ** (-1.0 / (size + 4)))
            # the mixture's components, with one uniform number per particle
            pick = systematic((0.9 * share + 0.1 / count).log().mT, count, generator).mT
            centre = old.gather(1, pick[..., None].expand(-1, -1, size))
            white = stratified_normal(old, generator)
            fresh = centre + white @ factor.mT
            gap = torch.linalg.solve_triangular(factor, (fresh[:, :, None] - old[:, None]).mT, upper=False).mT
            weight = (0.9 * share + 0.1 / count).log()[:, None]
            log_q.append(torch.logsumexp(weight + log_standard(gap), -1) - factor.diagonal().log().sum())
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
        self._targets: list[Tensor] = list(self.snapshots.weights)
        hidden, states = self._hidden, []
        for x, v in zip(self.snapshots.samples, hidden, strict=True):
            states.append(torch.cat((x[:, None].expand(-1, v.shape[1], -1), v), -1).flatten(0, 1))
        self._states = states
        self._base = [-q.flatten() - math.log(q.shape[1]) for q in log_q]
        self._phi: list[Tensor] = [getattr(self, f"phi{k}") for k in range(count)]
        self._weigh_pairs()

    def _weigh_pairs(self) -> None:
        """Work out the kernels between draws, and the messages of the potentials as they are."""
        states = self._states
        self._kernels: list[Tensor] = []
        self._tops: list[Tensor] = []
        for k, (a, b) in enumerate(itertools.pairwise(states)):
            log = self._log_kernel(k, a, b)
            top = log.amax(1)
            self._kernels.append(torch.exp(log - top[:, None]))
            self._tops.append(top)
        self._alpha = [self._log_start(states[0])] + [torch.zeros_like(b) for b in self._base[1:]]
        self._beta = [torch.zeros_like(b) for b in self._base]
        self._pass_all()

    def _pass_all(self) -> None:
        for k in range(len(self._kernels)):
            self._pass_forward(k)
        for k in reversed(range(len(self._kernels))):
            self._pass_backward(k)

    def _reweighted(self, weights: list[Tensor]) -> HiddenChain:
        """Return the law on the same draws through particles of other weights ``(*batch, n)``, one tensor per snapshot."""
        other = copy.copy(self)
        other._targets = weights
        batch = weights[0].shape[:-1]
        other._phi = [phi.expand(*batch, -1).clone() for phi in self._phi]
        other._alpha, other._beta = list(self._alpha), list(self._beta)
        other._pass_all()
        other._iterate()
        return other

    def _joint(self, k: int, first: Tensor, second: Tensor) -> Tensor:
        """Return the log weights ``(*batch, S)``, up to a constant, of pairs of draws at snapshot ``k`` and the next."""
        before = self._alpha[k] + self._potential(k) + self._tops[k]
        after = self._beta[k + 1] + self._potential(k + 1)
        return before[..., first] + (self._kernels[k][first, second] + _TINY).log() + after[..., second]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HiddenChain:
        super()._apply(fn, recurse)
        like = self._buffers["hidden0"]
        assert like is not None
        self.snapshots = self.snapshots.to(like.dtype, like.device)
        self._refresh()
        return self

    def _potential(self, k: int) -> Tensor:
        copies = self._hidden[k].shape[1]
        return self._phi[k].repeat_interleave(copies, -1) + self._base[k]

    def _pass_forward(self, k: int) -> None:
        # alpha_{k+1}(b) = sum_a alpha_k(a) e^{phi_k(a)} p(b | a) / q(a), in logarithms relative to the largest
        weight = self._alpha[k] + self._potential(k) + self._tops[k]
        largest = weight.amax(-1, keepdim=True)
        self._alpha[k + 1] = (torch.exp(weight - largest) @ self._kernels[k] + _TINY).log() + largest

    def _pass_backward(self, k: int) -> None:
        # beta_k(a) = sum_b p(b | a) e^{phi_{k+1}(b)} beta_{k+1}(b) / q(b)
        weight = self._beta[k + 1] + self._potential(k + 1)
        largest = weight.amax(-1, keepdim=True)
        carried = torch.exp(weight - largest) @ self._kernels[k].mT
        self._beta[k] = (carried + _TINY).log() + self._tops[k] + largest

    def _log_posterior(self, k: int) -> Tensor:
        """Log weights ``(*batch, n_k, M)`` of all draws, up to a constant."""
        value = self._alpha[k] + self._beta[k] + self._potential(k)
        return value.unflatten(-1, self._hidden[k].shape[:2])

    def _fit(self, k: int) -> Tensor:
        """Change the potential of snapshot ``k`` so that its marginal is right; returns how wrong it was, at most over a batch."""
        # iterative proportional fitting: the potential grows by the log of target over present mass of each particle
        mass = torch.log_softmax(torch.logsumexp(self._log_posterior(k), -1), -1)
        target = self._targets[k]
        self._phi[k].add_((target + _TINY).log() - mass)
        return (mass.exp() - target).abs().sum(-1).max()

    def _iterate(self) -> None:
        last = len(self._base) - 1
        for sweep in range(self.max_iterations):
            errors = torch.zeros(last + 1, dtype=torch.float64)
            order = range(last + 1) if sweep % 2 == 0 else reversed(range(last + 1))
            for k in order:
                errors[k] = self._fit(k)
                if sweep % 2 == 0 and k < last:
                    self._pass_forward(k)
                if sweep % 2 == 1 and k > 0:
                    self._pass_backward(k - 1)
            if float(errors.max()) <= self.tolerance:
                break
        # messages agree with the last potentials before errors are taken, and before paths are drawn
        self._pass_all()
        self.marginal_errors = torch.stack([self._error(k) for k in range(last + 1)])
        self.sweeps, self.converged = sweep + 1, float(self.marginal_errors.max()) <= 2 * self.tolerance

    def _error(self, k: int) -> Tensor:
        mass = torch.logsumexp(self._log_posterior(k), -1)
        return (torch.softmax(mass, -1) - self._targets[k]).abs().sum(-1).max().double()

    # ----------------------------------------------------------------------------------------- the law
    def effective_draws(self) -> Tensor:
        """Return ``(I,)`` the mean effective number of hidden draws per particle."""
        values = []
        for k in range(len(self._base)):
            effective = effective_size(self._log_posterior(k), 1)
            values.append((self.snapshots.weights[k] * effective).sum())
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
        for k in range(len(times) - 1):
            parts.append(self._between(k, grid[owner == k].to(times), chain[k], chain[k + 1], source))
        x = torch.cat(parts, 1).reshape(*shape, len(grid), self.dim)
        return PathSample(grid, x, x.new_empty(*shape, len(grid) - 1, 0), {}, self)

    def marginal(self, t: Tensor | float) -> SampledMarginal:
        """Return the law of the whole state at time ``t``, by simulation without discretisation error."""
        check_real(t, "t")
        time = torch.as_tensor(t, dtype=torch.float64).reshape(1)
        check_inside(time, self.snapshots.times, "t", "the snapshots")
        return SampledMarginal(lambda shape, generator: self.sample(time, shape, generator).x[..., 0, :])

    def states_at(self, k: int) -> EmpiricalLaw:
        """Return the law of the whole state at snapshot ``k``, as weighted particles."""
        return EmpiricalLaw(self._states[k], torch.softmax(self._log_posterior(k).flatten(), 0))

    def moments(self, k: int) -> tuple[Tensor, Tensor]:
        """Return mean ``(d,)`` and covariance ``(d, d)`` of the whole state at snapshot ``k``."""
        weight = torch.softmax(self._log_posterior(k).flatten(), 0)
        mean = weight @ self._states[k]
        centred = self._states[k] - mean
        return mean, centred.mT @ (weight[:, None] * centred)

    @property
    def log_mass(self) -> Tensor:
        r"""The log of the reference's mass under all potentials; :math:`\sum_k\pi_k\phi_k` less it is the divergence, up to a constant."""
        return torch.logsumexp(self._log_posterior(0).flatten(), 0)

    @property
    def objective(self) -> Tensor:
        """The divergence from the reference, less what the snapshots alone determine."""
        potentials = zip(self.snapshots.weights, self._phi, strict=True)
        return torch.stack([(w * phi).double().sum() for w, phi in potentials]).sum() - self.log_mass.double()


def _refresh(chain: HiddenChain, keys: object) -> None:
    chain._refresh()


def log_normal(x: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """Return the log density ``(n,)`` of a normal law at ``x (n, d)``."""
    factor = torch.linalg.cholesky(cov)
    white = torch.linalg.solve_triangular(factor, (x - mean).mT, upper=False).mT
    return log_standard(white) - factor.diagonal().log().sum()


def stratified_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal numbers ``(n, M, h)`` like a tensor, stratified over the ``M`` of each row and component (a Latin hypercube)."""
    shape = like.shape
    noise = torch.rand((2, *shape), dtype=torch.float64, device=like.device, generator=generator)
    strata = noise[0].argsort(1)
    uniform = ((strata + noise[1]) / shape[1]).clamp(1e-12, 1 - 1e-12)
    return torch.special.ndtri(uniform).to(like.dtype)


def log_standard(white: Tensor) -> Tensor:
    """Return the log density of the standard normal law at ``white (..., d)``."""
    return -0.5 * (white.square().sum(-1) + white.shape[-1] * math.log(2 * math.pi))
