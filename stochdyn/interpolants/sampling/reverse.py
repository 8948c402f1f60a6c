"""The generative model of a learned score: reverse SDE, probability-flow ODE, and their densities."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stochdyn._checks import check_choice, check_event_size, check_ndim, check_positive_int
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.errors import UnavailableError
from stochdyn.interpolants.densities.evidence import feynman_kac_log_density
from stochdyn.interpolants.densities.likelihood import flow_log_prob
from stochdyn.interpolants.fields.potential import FunctionPotential, Potential, PotentialNetwork
from stochdyn.interpolants.paths.processes import AffineProcess
from stochdyn.interpolants.sampling.exponential import Prediction, exponential_ode, exponential_sde

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.diffusion_distribution import DiffusionDistribution

__all__ = ["ReverseDiffusion"]

Field = Callable[[Tensor, Tensor], Tensor]


class ReverseDiffusion(nn.Module):
    r"""Two ways back from noise along one learned score.

    .. math::
        dX=(f-g^2s_\theta)\,dt+g\,d\bar W\quad\text{(SDE)},\qquad
        \dot X=f-\tfrac12g^2s_\theta\quad\text{(ODE)},

    both run from the horizon to the start of the process. Made by :meth:`ScoreMatching.generator`.

    Args:
        process: the noising process.
        source: a :class:`Potential`, or a score ``score(t, x) -> (..., d)``.
        dim: ``d``.
        like: a tensor whose precision and device samples take.
        prior: law at the horizon, a distribution with event ``(d,)``. None for the stationary Gaussian of the process,
            or, with a :class:`PotentialNetwork`, for the noised Gaussian of the moments of the data.

    Example:
        >>> from stochdyn.interpolants import OU
        >>> rev = ReverseDiffusion(OU(), lambda t, x: -2 * x, 3)
        >>> rev.sample(5, method="ode", steps=10).shape
        torch.Size([5, 3])

    Reference:
        Song et al., "Score-based generative modeling through SDEs", 2021, equations 6 and 13.
    """

    def __init__(
        self,
        process: AffineProcess,
        source: Potential | Field,
        dim: int,
        like: Tensor | None = None,
        prior: Any = None,
    ) -> None:
        super().__init__()
        check_positive_int(dim, "dim")
        self.process, self.source, self.dim = process, source, dim
        example = torch.empty(0) if like is None else like
        self._like = torch.zeros(dim, dtype=example.dtype, device=example.device)
        self.prior = self._default_prior() if prior is None else prior

    def _default_prior(self) -> Any:
        if not isinstance(self.source, PotentialNetwork):
            return self.process.prior(self._like)
        t = torch.tensor(self.process.horizon, dtype=self._like.dtype, device=self._like.device)
        mean = self.process.location(t, self.source.data_mean)
        variance = self.process.scale(t).square() * self.source.data_variance + self.process.variance(t)
        normal = torch.distributions.Normal(mean, variance.sqrt(), validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    @property
    def potential(self) -> Potential:
        """The potential.

        Raises:
            UnavailableError: if a score was given in its place.
        """
        if not isinstance(self.source, Potential):
            raise UnavailableError("a score network knows no log density", hint="train a potential")
        return self.source

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the learned score ``(..., d)``."""
        if isinstance(self.source, Potential):
            return self.source.score(t, x)
        time = t if isinstance(t, Tensor) else torch.full((), float(t), dtype=x.dtype, device=x.device)
        return self.source(time.to(x.dtype).expand(*x.shape[:-1], 1), x)

    def start(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, d)`` from the prior."""
        base = getattr(self.prior, "base_dist", self.prior)
        if isinstance(base, torch.distributions.Normal):
            noise = torch.randn(
                n, self.dim, generator=generator, dtype=base.loc.dtype, device=base.loc.device
            )
            return base.loc + base.scale * noise
        with torch.random.fork_rng(enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return self.prior.sample((n,))

    def sample(
        self,
        n: int,
        method: Literal["sde", "ode"] = "sde",
        steps: int = 200,
        *,
        order: int = 2,
        prediction: Prediction = "data",
        spacing: str = "log-snr",
        denoise: bool = True,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Draw points by an exponential integrator.

        Args:
            n: how many.
            method: ``"sde"`` or ``"ode"``.
            steps: evaluations of the network a point.
            order: 1, or 2 at the same cost.
            prediction: ``"data"`` or ``"noise"``, see :func:`exponential_ode`.
            spacing: of the times, see :meth:`AffineProcess.grid`.
            denoise: end with the mean of the start given the point at the start time, which removes the last of the
                noise. Off, the points follow the law at ``process.start``, whose density :meth:`log_prob` gives.
            generator: source of randomness; torch's global one if None.
            batch_size: points at a time, to bound the memory; all if None.

        Returns:
            ``(n, d)``, without gradients.

        Raises:
            InvalidInputError: for an unknown option, or counts that aren't positive.
        """
        check_positive_int(n, "n")
        check_positive_int(steps, "steps")
        check_choice(method, ("sde", "ode"), "method")
        size = n if batch_size is None else batch_size
        check_positive_int(size, "batch_size")
        times = self.process.grid(steps, spacing).to(self._like.device)
        with torch.no_grad():
            x = self.start(n, generator)
            parts = []
            for part in x.split(size):
                if method == "ode":
                    y = exponential_ode(
                        self.process, self.score, part, times, order=order, prediction=prediction
                    )
                else:
                    y = exponential_sde(
                        self.process,
                        self.score,
                        part,
                        times,
                        order=order,
                        prediction=prediction,
                        generator=generator,
                    )
                if denoise:
                    last = times[-1].to(y.dtype)
                    y = self.process.denoised(last, y, self.score(last, y))
                parts.append(y)
        return torch.cat(parts)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity of the probability-flow ODE on the forward clock, ``(..., d)``."""
        return self.process.drift(t, x) - 0.5 * self.process.squared_diffusion(t) * self.score(t, x)

    def log_prob(
        self,
        x: Tensor,
        method: Literal["ode", "sde"] = "ode",
        *,
        steps: int = 100,
        exact: bool = True,
        num_probes: int = 1,
        num_paths: int = 64,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Return the log density of a law at the start time.

        Of the ODE, by the change of variables along its own solution (Runge-Kutta of order 4),

        .. math:: \log o(x)=\log\pi(X_T)+\int\nabla\cdot\big(f-\tfrac12g^2s_\theta\big)(t,X_t)\,dt,

        and of the SDE, by :func:`feynman_kac_log_density`, which needs a potential.

        Args:
            x: ``(n, d)``.
            method: ``"ode"`` or ``"sde"``.
            steps: steps of the ODE, or of the paths.
            exact: trace of the Jacobian exactly, or by random probes (unbiased).
            num_probes: probes if not exact.
            num_paths: paths a point for the SDE.
            generator: source of randomness.

        Returns:
            ``(n,)``, differentiable.

        Raises:
            UnavailableError: for ``"sde"`` with a score in place of a potential.
            ShapeError: if ``x`` isn't ``(n, d)``.
        """
        check_choice(method, ("ode", "sde"), "method")
        check_ndim(x, 2, "x", "(n, d)")
        check_event_size(x, self.dim, "x")
        if method == "sde":
            return feynman_kac_log_density(
                self.potential, x, self.prior, steps=steps, num_paths=num_paths, generator=generator
            ).value
        times = self.process.grid(steps).to(x.device)
        if not (exact and isinstance(self.source, PotentialNetwork)):
            probing: dict[str, Any] = {} if exact else {"num_probes": num_probes, "generator": generator}
            return flow_log_prob(
                self._smooth_velocity(), self.prior.log_prob, x, times, "rk4", exact=exact, **probing
            )
        y, total = _carry(self.process, self.source, x, times.flip(0))
        return self.prior.log_prob(y) + total

    def _smooth_velocity(self) -> Field:
        """Return a velocity whose divergence can be differentiated again; the jets of a potential network can't."""
        if not isinstance(self.source, PotentialNetwork):
            return self.velocity
        return ReverseDiffusion(
            self.process, FunctionPotential(self.process, self.source), self.dim, self._like, self.prior
        ).velocity

    def measure(self) -> DiffusionMeasure:
        """Return the law of the reverse SDE on paths, on the clock ``horizon - t``.

        It starts from the prior at time 0 and should be sampled up to ``horizon - start``. As a
        :class:`stochdyn.DiffusionMeasure` it can be controlled, reversed and weighed.
        """
        return DiffusionMeasure(self.prior, self.process.sde().reverse(self.score, self.process.horizon))

    def distribution(self, steps: int = 50) -> DiffusionDistribution:
        """Return the law of the ODE at the start time as a Pyro distribution with event ``(d,)``.

        Args:
            steps: of the grid, for draws and densities alike.
        """
        from stochdyn.interpolants.sampling.diffusion_distribution import DiffusionDistribution

        return DiffusionDistribution(self, steps)


def _carry(
    process: AffineProcess, potential: PotentialNetwork, x: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    """Follow the ODE by Runge-Kutta steps of order 4, and integrate its divergence, which a potential has cheaply."""

    def slope(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        at = t.to(y.dtype)
        half = 0.5 * process.squared_diffusion(at)
        score, curvature = potential.log_density_curvature(at, y)
        return process.drift(at, y) - half * score, process.rate(at) * potential.dim - half * curvature

    total = x.new_zeros(x.shape[0])
    for t, s in itertools.pairwise(times):
        h, middle = (s - t).to(x.dtype), 0.5 * (t + s)
        k1, d1 = slope(t, x)
        k2, d2 = slope(middle, x + 0.5 * h * k1)
        k3, d3 = slope(middle, x + 0.5 * h * k2)
        k4, d4 = slope(s, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return x, total
