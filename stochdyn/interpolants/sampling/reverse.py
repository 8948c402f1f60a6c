"""The generative model of a learned score: reverse SDE, probability-flow ODE, and their densities."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_bool,
    check_choice,
    check_event_size,
    check_nonempty,
    check_positive_int,
    check_type,
)
from stochdyn._transforms import ordinarily
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.initial import as_initial
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.densities.evidence import feynman_kac_log_density
from stochdyn.interpolants.densities.likelihood import flow_log_prob
from stochdyn.interpolants.fields.conditions import rows_of_condition
from stochdyn.interpolants.fields.learned import LearnedScore
from stochdyn.interpolants.fields.networks import evaluating
from stochdyn.interpolants.fields.potential import Potential, PotentialNetwork
from stochdyn.interpolants.paths.processes import AffineProcess, check_process
from stochdyn.interpolants.sampling.exponential import (
    ExponentialODE,
    ExponentialSDE,
    exponential_ode,
    exponential_sde,
)
from stochdyn.interpolants.sampling.samplers import integrate_ode
from stochdyn.interpolants.sampling.starts import moved_law

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.diffusion_distribution import DiffusionDistribution

__all__ = ["ReverseDiffusion"]

Field = Callable[..., Tensor]
Method = str | ExponentialODE | ExponentialSDE
_METHODS: dict[str, ExponentialODE | ExponentialSDE] = {"sde": ExponentialSDE(), "ode": ExponentialODE()}


class ReverseDiffusion(nn.Module):
    r"""Two ways back from noise along one learned score.

    .. math::
        dX=(f-g^2s_\theta)\,dt+g\,d\bar W\quad\text{(SDE)},\qquad
        \dot X=f-\tfrac12g^2s_\theta\quad\text{(ODE)},

    both run from the horizon to the start of the process. Made by :meth:`ScoreMatching.generator`. :meth:`sample` is the short
    call for end points; the law on paths is :meth:`measure`.

    Args:
        process: The noising process.
        source: A :class:`Potential`, or a score ``score(t, x) -> (..., d)``, also with a condition as third argument.
        dim: The number d of components of a point.
        like: A tensor whose precision and device samples take.
        prior: The law at the horizon, a distribution with event ``(d,)``. None for the stationary Gaussian of the process,
            or, with a :class:`PotentialNetwork`, for the noised Gaussian of the moments of the data.

    Example:
        >>> from stochdyn.interpolants import OU
        >>> rev = ReverseDiffusion(OU(), lambda t, x: -2 * x, 3)
        >>> rev.sample(5, method="ode", num_steps=10).shape
        torch.Size([5, 3])

    Reference:
        Song et al., "Score-based generative modeling through SDEs", 2021, equations 6 and 13.
    """

    example: Tensor

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
        if prior is not None:
            check_type(prior, torch.distributions.Distribution, "prior", "a distribution with event (d,)")
            if tuple(prior.event_shape) != (dim,):
                raise ShapeError(
                    "the prior has another event shape", got=tuple(prior.event_shape), expected=(dim,)
                )
        self.learned, self.dim = LearnedScore(check_process(process), source), dim
        if like is not None:
            check_type(like, Tensor, "like")
        example = torch.empty(0) if like is None or not like.is_floating_point() else like
        self.register_buffer("example", torch.zeros(dim, dtype=example.dtype, device=example.device))
        self._prior = prior

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReverseDiffusion:
        """Move a prior that was given with everything else."""
        super()._apply(fn, recurse)
        if self._prior is not None:
            self._prior = moved_law(self._prior, fn)
        return self

    @property
    def process(self) -> AffineProcess:
        """The noising process."""
        return self.learned.process

    @property
    def source(self) -> Any:
        """The potential or the score."""
        return self.learned.source

    @property
    def potential(self) -> Potential:
        """The potential.

        Raises:
            UnavailableError: If a score was given in its place.
        """
        return self.learned.potential

    @property
    def prior(self) -> Any:
        """The law at the horizon."""
        if self._prior is not None:
            return self._prior
        if not isinstance(self.source, PotentialNetwork):
            return self.process.prior(self.example)
        t = torch.tensor(self.process.horizon, dtype=self.example.dtype, device=self.example.device)
        # the Gaussian of the moments of the data, noised up to the horizon: nearer to the truth than the stationary law
        mean = self.process.location(t, self.source.data_mean)
        variance = self.process.scale(t).square() * self.source.data_variance + self.process.variance(t)
        normal = torch.distributions.Normal(mean, variance.sqrt(), validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def score(self, t: Tensor | float, x: Tensor, condition: Any = None) -> Tensor:
        """Return the learned score ``(..., d)`` at ``x (..., d)``, for a condition per point or one for all."""
        x = as_tensor(x, "x", finite=False)
        check_event_size(x, self.dim, "x")
        rows = self._rows(condition, tuple(x.shape[:-1]), x)
        if rows is not None:
            rows = rows.reshape(*x.shape[:-1], *rows.shape[1:])
        with evaluating(self):
            return self.learned.given(rows)(t, x)

    def _given(self, condition: Any, mean: Any, lead: tuple[int, ...]) -> tuple[LearnedScore, Tensor | None]:
        """Return the score for conditions and means of points, and these means as rows."""
        means = self._means(mean, lead)
        return self.learned.given(self._rows(condition, lead), means), means

    def _rows(self, condition: Any, lead: tuple[int, ...], like: Tensor | None = None) -> Tensor | None:
        """Return conditions as rows, one per point, beside ``like``."""
        if condition is None:
            self.learned.check_absent()
        return rows_of_condition(
            condition, torch.Size(lead).numel(), lead, self.example if like is None else like
        )

    def _means(self, mean: Any, lead: tuple[int, ...]) -> Tensor | None:
        """Return means as rows, one per point."""
        if mean is None:
            return None
        means = as_tensor(mean, "mean", like=self.example).to(self.example)
        check_event_size(means, self.dim, "mean")
        return means.expand(*lead, self.dim).reshape(-1, self.dim) if lead else means.reshape(1, self.dim)

    def start(
        self, sample_shape: SampleShape = (), generator: Generator = None, mean: Tensor | None = None
    ) -> Tensor:
        """Draw ``(*sample_shape, d)`` from the prior, shifted to ``mean`` where every item has its own."""
        shape = as_sample_shape(sample_shape)
        if mean is None:
            return as_initial(self.prior).draw(shape, as_generator(generator))
        noise = self.process.with_mean(0.0).prior(self.example)
        return as_initial(noise).draw(shape, as_generator(generator)) + mean

    @ordinarily
    def sample(
        self,
        sample_shape: SampleShape = (),
        method: Method = "sde",
        num_steps: int = 100,
        *,
        spacing: str = "log-snr",
        denoise: bool = True,
        condition: Any = None,
        mean: Any = None,
        generator: Generator = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Draw points by an exponential integrator.

        Args:
            sample_shape: The shape of independent draws, an integer or a tuple.
            method: What to integrate: ``"sde"``, ``"ode"``, or an :class:`ExponentialSDE` or :class:`ExponentialODE` with options.
            num_steps: The number of evaluations of the network per point.
            spacing: How the times are spaced, see :meth:`AffineProcess.grid`.
            denoise: Whether to end with the mean of the start given the point at the start time, which removes the last of the
                noise. Off, the points follow the law at ``process.start``, whose density :meth:`log_prob` gives.
            condition: The labels or contexts: one per draw, ``(*sample_shape, ...)``, or one for all.
            mean: What the process reverts to, ``(*sample_shape, d)`` or ``(d,)``, where items have their own.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
            batch_size: The number of points at a time, to bound the memory; all if None.

        Returns:
            ``(*sample_shape, d)``, without gradients.

        Raises:
            InvalidInputError: If an option is unknown, or a number isn't positive.
        """
        lead = as_sample_shape(sample_shape)
        count = torch.Size(lead).numel()
        check_positive_int(num_steps, "num_steps")
        check_bool(denoise, "denoise")
        chosen = self._method(method)
        size = count if batch_size is None else batch_size
        check_positive_int(size, "batch_size")
        times = self.process.grid(num_steps, spacing).to(self.example.device)
        source = as_generator(generator)
        with torch.no_grad(), evaluating(self):
            rows, means = self._rows(condition, lead), self._means(mean, lead)
            x = self.start(count, source, means)
            parts = []
            for i in range(0, count, size):
                part = slice(i, i + size)
                own = self.learned.given(
                    None if rows is None else rows[part],
                    None if means is None else means[part].expand(x[part].shape),
                )
                parts.append(self._back(own, x[part], times, chosen, denoise, source))
        return torch.cat(parts).reshape(*lead, self.dim)

    def _method(self, method: Method) -> ExponentialODE | ExponentialSDE:
        if isinstance(method, ExponentialODE | ExponentialSDE):
            return method
        check_choice(method, tuple(_METHODS), "method")
        return _METHODS[method]

    def _back(
        self, own: LearnedScore, x: Tensor, times: Tensor, method: ExponentialODE | ExponentialSDE, denoise: bool,
        generator: torch.Generator | None,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"order": method.order, "prediction": method.prediction}
        if isinstance(method, ExponentialODE):
            y = exponential_ode(own.process, own, x, times, **options)
        else:
            y = exponential_sde(own.process, own, x, times, generator=generator, **options)
        if denoise:
            last = times[-1].to(y.dtype)
            y = own.process.denoised(last, y, own(last, y))
        return y

    def velocity(self, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        """Return the velocity of the probability-flow ODE on the forward clock, ``(..., d)``."""
        x = as_tensor(x, "x", like=self.example, finite=False)
        return self.process.drift(t, x) - 0.5 * self.process.squared_diffusion(t) * self.score(
            t, x, condition
        )

    @ordinarily
    def flow(self, x: Tensor, num_steps: int = 50, condition: Any = None) -> Tensor:
        """Carry points ``(n, d)`` at the horizon to the start time along the ODE, by Runge-Kutta steps; differentiable."""
        x = as_tensor(x, "x", 2, "(n, d)", like=self.example, finite=False)
        own = self._given(condition, None, tuple(x.shape[:-1]))[0]
        times = self.process.grid(num_steps).to(x.device)
        with evaluating(self):
            return integrate_ode(own.velocity, x, times, "rk4")

    @ordinarily
    def log_prob(
        self,
        x: Any,
        method: Literal["ode", "sde"] = "ode",
        *,
        num_steps: int = 100,
        exact: bool = True,
        num_probes: int | None = None,
        num_particles: int = 64,
        condition: Any = None,
        mean: Any = None,
        generator: Generator = None,
    ) -> Tensor:
        r"""Return the log density of a law at the start time.

        Of the ODE, by the change of variables along its own solution (Runge-Kutta of order 4),

        .. math:: \log o(x)=\log\pi(X_T)+\int\nabla\cdot\big(f-\tfrac12g^2s_\theta\big)(t,X_t)\,dt,

        and of the SDE, by :func:`feynman_kac_log_density`, which needs a potential.

        Args:
            x: The points, ``(n, d)``.
            method: The law that is meant: that of the ``"ode"`` or of the ``"sde"``.
            num_steps: The number of steps of the ODE, or of the paths.
            exact: Whether to take the trace of the Jacobian exactly, or by random probes (unbiased).
            num_probes: The number of probes per point if not exact; one if None.
            num_particles: The number of paths per point for the SDE.
            condition: The labels or contexts, one per point or one for all.
            mean: What the process reverts to, ``(n, d)`` or ``(d,)``, where items have their own.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            ``(n,)``, differentiable.

        Raises:
            UnavailableError: If ``"sde"`` is asked of a score in place of a potential.
            ShapeError: If ``x`` isn't ``(n, d)``.
        """
        check_choice(method, ("ode", "sde"), "method")
        check_positive_int(num_steps, "num_steps")
        check_bool(exact, "exact")
        x = as_tensor(x, "x", 2, "(n, d)")
        check_nonempty(x, "x")
        check_event_size(x, self.dim, "x")
        own, means = self._given(condition, mean, tuple(x.shape[:-1]))
        prior = self.prior
        if means is not None:
            std = self.process.std(torch.tensor(self.process.horizon, dtype=torch.float64)).to(x)
            prior = torch.distributions.Independent(torch.distributions.Normal(means, std), 1)
        with evaluating(self):
            if method == "sde":
                return feynman_kac_log_density(
                    own.potential,
                    x,
                    prior,
                    num_steps=num_steps,
                    num_particles=num_particles,
                    generator=generator,
                ).value
            if exact and num_probes is not None:
                raise InvalidInputError("num_probes does nothing with exact=True", got=num_probes)
            times = self.process.grid(num_steps).to(x.device)
            if exact and isinstance(own.source, PotentialNetwork):
                y, total = _carry(self.process, own.source, x, times.flip(0))
                return prior.log_prob(y) + total
            return flow_log_prob(
                own.smooth().velocity, prior.log_prob, x, times, "rk4", exact=exact, num_probes=num_probes,
                generator=generator,
            )  # fmt: skip

    def measure(self, condition: Any = None, *, dt: float | None = None) -> DiffusionMeasure:
        """Return the law of the reverse SDE on paths, on the clock ``horizon - t``.

        It starts from the prior at time 0 and should be sampled up to ``horizon - start``. As a
        :class:`stochdyn.DiffusionMeasure` it can be controlled, reversed and weighed.

        Args:
            condition: One label or one context for all paths.
            dt: The largest step of a simulation, whatever grid is asked for; a two-hundredth of the horizon if None.

        Raises:
            InvalidInputError: If the step isn't positive.
        """
        dt = self.process.horizon / 200 if dt is None else dt

        def score(t: Tensor, x: Tensor) -> Tensor:
            return self.score(t, x, condition)

        return DiffusionMeasure(
            self.prior, self.process.sde().reverse(score, self.process.horizon), start_time=0.0, dt=dt
        )

    def distribution(self, num_steps: int = 50, condition: Any = None) -> DiffusionDistribution:
        """Return the law of the ODE at the start time as a Pyro distribution with event ``(d,)``.

        Args:
            num_steps: The number of steps of the grid, for draws and densities alike.
            condition: One label ``()`` or one context vector ``(c,)``; with leading axes a batch of laws.
        """
        from stochdyn.interpolants.sampling.diffusion_distribution import DiffusionDistribution

        return DiffusionDistribution(self, num_steps, condition)


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
        # Runge-Kutta of order 4 for the state and for the integral of the divergence together
        k1, d1 = slope(t, x)
        k2, d2 = slope(middle, x + 0.5 * h * k1)
        k3, d3 = slope(middle, x + 0.5 * h * k2)
        k4, d4 = slope(s, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return x, total
