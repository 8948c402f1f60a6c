r"""Diffusions with jumps at random times: a compound Poisson process beside the Brownian motion, with its likelihood.

.. math:: dX_t=b(t,X_t)\,dt+G(t,X_t)\,dW_t+dJ_t,\qquad J_t=\sum_{k\le N_t}\xi_k,

with :math:`N` a Poisson process of rate :math:`\lambda(t)` and independent sizes :math:`\xi_k` of one law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from stochdyn._checks import as_generator, as_sample_shape, as_tensor, as_time_grid, check_choice, check_type
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.girsanov import ESTIMATORS
from stochdyn.core.law.initial import DistributionStart
from stochdyn.core.law.marginals import Generator, Marginal, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path, PathSample
from stochdyn.core.law.relative import check_equivalent
from stochdyn.core.law.transition import check_has_density
from stochdyn.core.sde.coefficients import Coefficient, Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import first_time, steps_of, time_column
from stochdyn.core.sde.solvers import draw_increments, integrate
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError

__all__ = ["JumpDiffusionMeasure"]

# What a term of the sum over numbers of jumps may be left out at, in nats below the sum.
_NEGLIGIBLE = 38.0
_MOST_JUMPS = 4096


class JumpDiffusionMeasure(PathMeasure):
    r"""The law of an SDE with jumps at random times, by Euler steps.

    In a step the number of jumps is Poisson of mean :math:`\lambda(t_n)\Delta_n`. Paths carry their jumps: ``path.aux["counts"]``,
    how many there were in each step, and ``path.aux["jumps"]``, their sum. For Gaussian sizes the density of the states alone is known,

    .. math:: p(x_{n+1}\mid x_n)=\sum_k\frac{(\lambda\Delta)^k}{k!}e^{-\lambda\Delta}
        N\big(x_{n+1};\,x_n+b\Delta+k\mu,\ GG^\top\Delta+k\Sigma\big),

    so parameters can be fitted to paths that were seen without their jumps: for constant coefficients it is exact on any grid, that
    of Merton's model. Use it where a path moves now and then by more than its noise lets it; a process that only jumps is one of
    :mod:`stochdyn.jumps`.

    Args:
        initial: A distribution with event ``(d,)``, or a tensor ``(d,)`` or ``(*batch, d)`` for a fixed start.
        sde: The equation between jumps, driven by Brownian motion.
        rates: The rate of jumps in 1/time: a number, a tensor ``(*batch,)``, or a function of times ``(n,)`` that returns
            ``(n, *batch)``.
        jumps: The law of the size of a jump, a distribution with event ``(d,)``.
        start_time: The time at which ``initial`` holds; see :class:`~stochdyn.DiffusionMeasure`.
        dt: The largest step of a simulation; see :class:`~stochdyn.DiffusionMeasure`.

    Raises:
        InvalidInputError: If a rate is negative, the noise has memory, or another argument has the wrong type.
        ShapeError: If the sizes of jumps don't fit the state.

    Example:
        >>> sizes = Independent(Normal(torch.tensor([-0.1]), 0.05), 1)
        >>> price = JumpDiffusionMeasure(torch.zeros(1), SDE(lambda t, x: 0.0 * x, 0.2), 3.0, sizes)
        >>> path = price.sample(torch.linspace(0, 1, 11), 4, generator=0)
        >>> path.aux["counts"].sum(-1), price.log_prob(path).shape
        (tensor([3., 6., 3., 3.]), torch.Size([4]))

    Reference:
        Merton, "Option pricing when underlying stock returns are discontinuous", 1976.
    """

    rate: Any

    def __init__(
        self,
        initial: Any,
        sde: SDE,
        rates: Tensor | float | Callable[[Tensor], Tensor],
        jumps: Distribution,
        *,
        start_time: Tensor | float | None = None,
        dt: float | None = None,
    ) -> None:
        super().__init__()
        self.diffusion = DiffusionMeasure(initial, sde, start_time=start_time, dt=dt)
        self.sde = sde
        if sde.noise.num_states or sde.control is not None:
            raise InvalidInputError("jumps go with an uncontrolled equation driven by Brownian motion")
        check_type(jumps, Distribution, "jumps")
        #: The law of a jump, whose tensors move and are learnt with this module.
        self.size = DistributionStart(jumps)
        if self.size.dim != self.diffusion.initial.dim:
            raise ShapeError(
                "the sizes of jumps don't fit the state",
                got=f"event ({self.size.dim},)",
                expected=f"({self.diffusion.initial.dim},)",
            )
        if callable(rates) and not isinstance(rates, Tensor):
            self.rate = rates
            return
        rate = as_tensor(rates, "rates", like=self.diffusion.initial.like())
        if bool((rate.detach() < 0).any()):
            raise InvalidInputError("rates must not be negative", got=float(rate.detach().min()))
        if isinstance(rate, nn.Parameter):
            self.rate = rate
        else:
            self.register_buffer("rate", rate if rate.requires_grad else rate.detach().clone())

    def expected_jumps(self, ts: Tensor) -> Tensor:
        r"""Return the mean number of jumps :math:`\lambda(t_n)\Delta_n` ``(T-1, *batch)`` in the steps of a grid ``(T,)``."""
        dt = (ts[1:] - ts[:-1]).to(self.diffusion.initial.like().dtype)
        if isinstance(self.rate, Tensor):
            return dt.reshape(-1, *(1,) * self.rate.ndim) * self.rate.to(dt)
        rate = torch.as_tensor(self.rate(ts[:-1]))
        if rate.ndim == 0 or rate.shape[0] != len(dt):
            raise ShapeError(
                "rates must return one row per time", got=tuple(rate.shape), expected=f"({len(dt)}, *batch)"
            )
        return dt.reshape(-1, *(1,) * (rate.ndim - 1)) * rate.to(dt)

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw paths with the increments and the jumps that drove them; see :meth:`stochdyn.PathMeasure.sample`."""
        like = self.diffusion.initial.like()
        grid = as_time_grid(ts, like=like)
        shape, source = as_sample_shape(sample_shape), as_generator(generator, like.device)
        fine, index = self.diffusion._simulation_grid(grid)
        mean = self.expected_jumps(fine).detach()
        x0 = self.diffusion._draw_start(shape, fine, source)
        own = x0.shape[len(shape) : -1]
        every = torch.broadcast_shapes(own, mean.shape[1:])
        if len(every) > len(own):
            # Every rate of a batch has starts of its own.
            x0 = self.diffusion._draw_start((*shape, *every[: len(every) - len(own)]), fine, source)
        batch = torch.Size((*shape, *every))
        x0 = x0.expand(*batch, x0.shape[-1])
        dw, _ = draw_increments(self.sde, x0, fine, source)
        lead = (mean.shape[0], *(1,) * (len(batch) - mean.ndim + 1), *mean.shape[1:])
        counts = torch.poisson(mean.reshape(lead).expand(-1, *batch).contiguous(), generator=source).to(x0)
        jumps = self._sizes(counts, source)
        channels = self.sde.noise_dim(first_time(fine, x0), x0)
        # A jump is a further increment, through a diffusion that is one.
        wide = SDE(self.sde.drift, _WithJumps(self.sde))
        x = integrate(wide, x0, fine, torch.cat([dw[..., :channels], jumps], -1)).x
        aux = {"jumps": jumps.movedim(0, -2), "counts": counts.movedim(0, -1)}
        path = PathSample(fine, x.movedim(0, -2), dw[..., :channels].movedim(0, -2), aux, self)
        return path if index is None else path.at(index)

    def _sizes(self, counts: Tensor, source: torch.Generator | None) -> Tensor:
        """Return the sums ``(N, *batch, d)`` of as many jumps as ``counts (N, *batch)`` says."""
        most = int(counts.max()) if counts.numel() else 0
        total = counts.new_zeros(*counts.shape, self.size.dim)
        for k in range(most):
            here = (counts > k).unsqueeze(-1)
            own = len(self.size.batch_shape)
            drawn = self.size.draw(tuple(counts.shape[: counts.ndim - own]), source)
            total = total + torch.where(here, drawn.to(total), torch.zeros_like(total))
        return total

    def marginal(self, t: Tensor | float) -> Marginal:
        """Return the law of the state at one time; see :meth:`stochdyn.DiffusionMeasure.marginal`."""
        before = self.diffusion.marginal(t)
        start = 0.0 if self.diffusion.start_time is None else self.diffusion.start_time
        knots = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in (start, t)])
        if bool(knots[0] == knots[1]):
            return before
        count = self.diffusion._step_counts(knots, 1)[0]
        grid = torch.linspace(float(knots[0]), float(knots[1]), count + 1, dtype=torch.float64)
        return SampledMarginal(lambda shape, source: self.sample(grid, shape, source).x[..., -1, :])

    def log_prob(self, path: Path) -> Tensor:
        """Return the log density ``(*sample, *batch)`` of the states of paths, whatever jumps made them.

        Raises:
            UnavailableError: If the sizes of jumps aren't Gaussian.
            SingularDiffusionError: If the diffusion is singular.
        """
        path = self.diffusion._beside(self.diffusion._check_path(path))
        states = path.leading()
        return self.diffusion.initial.log_prob(states[0]) + self._transitions(path).sum(0)

    def random_points(self, ts: Tensor) -> Tensor:
        """Return ``(T, *batch)``, True for the points of a grid that :meth:`log_prob` is a density of: all but a fixed start."""
        return self.diffusion.random_points(ts)

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        """Return the log density ratio of the states of paths; see :meth:`stochdyn.PathMeasure.log_rn`.

        Raises:
            UnavailableError: If the other law isn't a diffusion with jumps, sizes aren't Gaussian, or for another estimator than
                ``"density"``.
            DiffusionMismatchError: If the diffusions differ.
        """
        check_choice(estimator, ESTIMATORS, "estimator")
        check_type(other, PathMeasure, "other")
        if not isinstance(other, JumpDiffusionMeasure) or estimator != "density":
            raise UnavailableError(
                "the density ratio is known between diffusions with jumps, by estimator='density'"
            )
        fine = other.diffusion._beside(self.diffusion._beside(self.diffusion._check_path(path)))
        x = fine.leading()
        t = time_column(fine.ts[:-1], x[:-1])
        check_equivalent(self.sde, other.sde, t, x[:-1])
        start = self.diffusion.initial.log_ratio(other.diffusion.initial, x[0], "density")
        return start + (self._transitions(fine) - other._transitions(fine)).sum(0)

    def _transitions(self, path: PathSample) -> Tensor:
        """Return the log densities ``(T-1, *batch)`` of the steps, summed over the number of jumps."""
        mean, cov = _moments(self.size.distribution)
        states = path.leading()
        before, after, dim = states[:-1], states[1:], states.shape[-1]
        t, dt = time_column(path.ts[:-1], before), steps_of(path.ts, before)
        g = self.sde.diffusion(t, before)
        check_has_density(self.sde, g, dim)
        excess = after - before - self.sde.drift(t, before) * dt
        spread = (g.covariance(dim) * dt.unsqueeze(-1)).expand(*excess.shape, dim)
        expected = self.expected_jumps(path.ts).to(excess)
        # A batch of rates goes with one path too.
        axes = max(excess.ndim - 1, expected.ndim)
        excess, spread, expected = (
            v.reshape(v.shape[0], *(1,) * (axes - v.ndim + events), *v.shape[1:])
            for v, events in ((excess, 1), (spread, 2), (expected, 0))
        )
        # log 0 is no term for no jump, and no density for any.
        log_rate = torch.where(expected > 0, expected, 1.0).log()

        def term(k: int) -> Tensor:
            weight = torch.where(
                expected > 0, k * log_rate, torch.tensor(0.0 if k == 0 else -math.inf).to(excess)
            )
            gap = (excess - k * mean).unsqueeze(-1)
            factor = torch.linalg.cholesky(spread + k * cov)
            white = torch.linalg.solve_triangular(factor, gap, upper=False).squeeze(-1)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            normal = -0.5 * white.square().sum(-1) - log_det - 0.5 * dim * math.log(2 * math.pi)
            return weight - expected - math.lgamma(k + 1) + normal

        terms = [term(0), term(1)]
        # Far from its mean a step needs many jumps: terms are added until they fall and no longer count.
        while len(terms) < _MOST_JUMPS:
            total = torch.stack([v.detach() for v in terms]).logsumexp(0)
            last, previous = terms[-1].detach(), terms[-2].detach()
            if bool(((last <= previous) & (last < total - _NEGLIGIBLE) | (expected == 0)).all()):
                break
            terms.append(term(len(terms)))
        return torch.stack(terms).logsumexp(0)


class _WithJumps(nn.Module):
    """A diffusion with one more channel for each component, which takes jumps as they are."""

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        self.sde = sde

    def forward(self, t: Tensor, x: Tensor) -> Coefficient:
        dim = x.shape[-1]
        g = self.sde.diffusion(t, x).matrix(dim).to(x)
        eye = torch.eye(dim, dtype=x.dtype, device=x.device)
        return Matrix(torch.cat([g, eye.expand(*g.shape[:-2], dim, dim)], -1))


def _moments(law: Distribution) -> tuple[Tensor, Tensor]:
    """Return the mean ``(*batch, d)`` and the covariance ``(*batch, d, d)`` of Gaussian sizes.

    Raises:
        UnavailableError: For another law.
    """
    if isinstance(law, MultivariateNormal):
        return law.mean, law.covariance_matrix
    if isinstance(law, Independent) and isinstance(law.base_dist, Normal):
        return law.mean, torch.diag_embed(law.variance)
    raise UnavailableError(
        f"the density of a diffusion with jumps is known for Gaussian sizes, not for {type(law).__name__}"
    )
