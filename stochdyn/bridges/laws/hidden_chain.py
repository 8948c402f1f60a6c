"""Laws whose states are seen in part: weighted draws of what is hidden, and messages over all snapshots."""

from __future__ import annotations

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
    as_time_grid,
    check_inside,
    check_positive,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws.marginal import draw_index
from stochdyn.core.law.marginals import Generator, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.errors import ApproximationWarning, ConvergenceWarning

__all__ = ["HiddenChain", "log_normal", "log_standard"]

_TINY = 1e-300
_CHUNK = 2**22


class HiddenChain(PathMeasure):
    """A law whose first components have the snapshots for marginals, on weighted draws of the others.

    Attributes:
        snapshots: what was seen of the first components.
        seen: their number.
        dim: the number of components of the whole state.
        marginal_errors: the L1 errors of the snapshots' marginals, ``(I,)``, of the law as it is.
        sweeps: the number of sweeps in the last round.
        converged: whether the errors are within the tolerance.
    """

    snapshots: Snapshots
    seen: int
    dim: int
    marginal_errors: Tensor
    sweeps: int
    converged: bool

    @abstractmethod
    def _log_kernel(self, k: int, a: Tensor, b: Tensor) -> Tensor:
        """Return the log transition density ``(n, m)`` of the reference from snapshot ``k`` to the next."""

    @abstractmethod
    def _log_start(self, x: Tensor) -> Tensor:
        """Return the log density ``(n,)`` of the reference at the first snapshot."""

    @abstractmethod
    def _between(self, k: int, ts: Tensor, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the reference at times ``ts (T,)`` after snapshot ``k``, between states ``a`` and ``b (n, d)``: ``(n, T, d)``."""

    @staticmethod
    def _check_options(
        snapshots: object, num_hidden: object, num_rounds: object, tolerance: object, max_iterations: object
    ) -> None:
        """Raise unless the options that all such laws have make sense."""
        check_type(snapshots, Snapshots, "snapshots")
        check_positive_int(num_hidden, "num_hidden", 2)
        check_positive_int(num_rounds, "num_rounds")
        check_positive_int(max_iterations, "max_iterations")
        check_positive(tolerance, "tolerance")

    def _solve(
        self, hidden: list[Tensor], log_q: list[Tensor], num_rounds: int, tolerance: float, max_iterations: int,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """Find the potentials on these draws, and on further ones around those that proved likely."""
        for k in range(num_rounds):
            self._build(hidden, log_q)
            self.sweeps, self.converged = self._iterate(tolerance, max_iterations)
            if k + 1 < num_rounds:
                hidden, log_q = self._again(generator)
        if not self.converged:
            warnings.warn(
                f"Marginals are off by {float(self.marginal_errors.max()):.1e} after {max_iterations} sweeps (tolerance {tolerance:.1e}). "
                "Allow more max_iterations, more noise, or more num_hidden",
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
        hidden, states = self._hidden, []
        for x, v in zip(self.snapshots.samples, hidden, strict=True):
            states.append(torch.cat((x[:, None].expand(-1, v.shape[1], -1), v), -1).flatten(0, 1))
        self._states = states
        self._base = [-q.flatten() - math.log(q.shape[1]) for q in log_q]
        self._kernels, self._tops = [], []
        for k, (a, b) in enumerate(itertools.pairwise(states)):
            log = self._log_kernel(k, a, b)
            top = log.amax(1)
            self._kernels.append(torch.exp(log - top[:, None]))
            self._tops.append(top)
        start = self._log_start(states[0])
        self._alpha = [start] + [torch.zeros_like(b) for b in self._base[1:]]
        self._beta = [torch.zeros_like(b) for b in self._base]
        self._phi: list[Tensor] = [getattr(self, f"phi{k}") for k in range(count)]
        for k in range(len(self._kernels)):
            self._pass_forward(k)
        for k in reversed(range(len(self._kernels))):
            self._pass_backward(k)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HiddenChain:
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
        self._alpha[k + 1] = (torch.exp(weight - largest) @ self._kernels[k] + _TINY).log() + largest

    def _pass_backward(self, k: int) -> None:
        weight = self._beta[k + 1] + self._potential(k + 1)
        largest = weight.max()
        self._beta[k] = (
            (self._kernels[k] @ torch.exp(weight - largest) + _TINY).log() + self._tops[k] + largest
        )

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


def log_normal(x: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """Return the log density ``(n,)`` of a normal law at ``x (n, d)``."""
    factor = torch.linalg.cholesky(cov)
    white = torch.linalg.solve_triangular(factor, (x - mean).mT, upper=False).mT
    return log_standard(white) - factor.diagonal().log().sum()


def log_standard(white: Tensor) -> Tensor:
    """Return the log density of the standard normal law at ``white (..., d)``."""
    return -0.5 * (white.square().sum(-1) + white.shape[-1] * math.log(2 * math.pi))
