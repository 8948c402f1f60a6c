"""The trained model: samples, densities, path measures and distributions from the fields of an interpolant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_bool,
    check_choice,
    check_nonempty,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn._transforms import ordinarily
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.sde.coefficients import Scalar
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError, UnavailableError
from stochdyn.interpolants.densities.likelihood import (
    PathWeights,
    feynman_kac_log_prob,
    flow_log_prob,
    flow_with_log_density,
)
from stochdyn.interpolants.fields.conditions import rows_of_condition
from stochdyn.interpolants.fields.drift import ForwardDrift
from stochdyn.interpolants.fields.networks import Fields, evaluating
from stochdyn.interpolants.paths.interpolant import Interpolant, check_times
from stochdyn.interpolants.sampling.methods import (
    FLOW_METHODS,
    NOISY_METHODS,
    FlowMethod,
    as_method,
)
from stochdyn.interpolants.sampling.noise_level import Epsilon, EpsilonLike, as_epsilon
from stochdyn.interpolants.sampling.samplers import integrate_marginals, integrate_ode, time_grid
from stochdyn.interpolants.sampling.starts import Starts

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.distribution import InterpolantDistribution

__all__ = ["InterpolantGenerator"]

Method = str | FlowMethod


class InterpolantGenerator(nn.Module):
    r"""A model of :math:`\rho_1` made of the fields of an interpolant.

    The same networks give three samplers with the same exact marginals: the probability flow :math:`\dot X=b`, the forward
    equation :math:`dX=(b+\varepsilon s)dt+\sqrt{2\varepsilon}\,dW`, and the backward equation with drift
    :math:`b-\varepsilon s` and time reversed. :meth:`sample` is the short call for end points; the law on paths, with everything
    that laws offer, is :meth:`measure`. Networks are evaluated in evaluation mode.

    Args:
        fields: The networks and their interpolant.
        starts: The law of the starts, :math:`\rho_0`.

    Reference:
        Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, section 2.3 and algorithms 4 and 5.
    """

    def __init__(self, fields: Fields, starts: Starts | None = None) -> None:
        super().__init__()
        check_type(fields, Fields, "fields")
        if starts is not None:
            check_type(starts, Starts, "starts")
        self.fields = fields
        self.starts = starts if starts is not None else Starts(None, True)

    @property
    def interpolant(self) -> Interpolant:
        """The path that the networks were trained on."""
        return self.fields.interpolant

    @property
    def event_shape(self) -> tuple[int, ...] | None:
        """The shape of one event, or None as long as it isn't known."""
        if self.fields.event_shape is not None:
            return self.fields.event_shape
        return None if self.starts.dim is None else (self.starts.dim,)

    def velocity(self, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0) -> Tensor:
        """Return the velocity b, of the shape of ``x (..., *event)``."""
        return self.field("velocity", t, x, condition, guidance)

    def score(self, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0) -> Tensor:
        """Return the score, of the shape of ``x (..., *event)``.

        Raises:
            UnavailableError: If the networks don't determine it.
        """
        return self.field("score", t, x, condition, guidance)

    def noise_prediction(
        self, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0
    ) -> Tensor:
        """Return the mean of the latent given the point, of the shape of ``x (..., *event)``."""
        return self.field("noise_prediction", t, x, condition, guidance)

    def data_prediction(
        self, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0
    ) -> Tensor:
        """Return the mean of the data given the point, of the shape of ``x (..., *event)``."""
        return self.field("data_prediction", t, x, condition, guidance)

    def field(
        self, name: str, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0
    ) -> Tensor:
        """Return any field by name, of the shape of ``x (..., *event)``.

        At a time at which it is known as a limit only, such as a score from a noise prediction at time 1, the value is that
        of a time a thousandth away.

        Args:
            name: The name of the field: ``"velocity"``, ``"score"``, ``"noise_prediction"``, ``"data_prediction"``, ``"start_prediction"`` or
                ``"path_velocity"``.
            t: A time, or times ``(...)`` with one for each point; for vectors they may also be ``(..., 1)``.
            x: The points, ``(..., *event)``.
            condition: The labels or contexts, one per point or one for all.
            guidance: The strength of classifier-free guidance.

        Raises:
            UnavailableError: If the networks don't determine the field.
        """
        if name == "score":
            self._need_score()
        x = as_tensor(x, "x", finite=False)
        flat, lead = self._flat(x, "x")
        time = as_tensor(t, "t", like=x).to(x)
        if time.ndim:
            event = len(x.shape) - len(lead)
            if time.ndim == x.ndim and tuple(time.shape[len(lead) :]) == (1,) * event:
                time = time.reshape(time.shape[: len(lead)])
            if time.ndim > len(lead) or any(
                a not in (1, b) for a, b in zip(reversed(time.shape), reversed(lead), strict=False)
            ):
                raise ShapeError(
                    "there must be one time per point, or one for all", got=tuple(time.shape), expected=lead
                )
            time = time.expand(lead).reshape(-1, 1)
        check_times(time)
        given = rows_of_condition(condition, len(flat), lead, x)
        with evaluating(self.fields):
            return self.fields(name, time, flat, given, guidance).reshape(x.shape)

    def drift(
        self,
        t: Tensor | float,
        x: Tensor,
        epsilon: EpsilonLike = 0.0,
        condition: Any = None,
        guidance: float = 1.0,
    ) -> Tensor:
        r"""Return the forward drift :math:`b+\varepsilon s` at vectors ``x (..., d)``."""
        x = as_tensor(x, "x", finite=False)
        level = as_epsilon(epsilon, self.interpolant)
        strength = 0.0 if level.vanishes else level
        with evaluating(self.fields):
            return ForwardDrift(self.fields, strength, condition, guidance)(t, x)

    def _need_score(self) -> None:
        if not self.fields.has_score:
            raise UnavailableError(
                "these networks give no score",
                got=" and ".join(self.fields.names),
                hint="learn the noise_prediction beside the velocity (with the independent coupling on one-sided paths), "
                "or sample with epsilon=0",
            )

    def _grid(self, num_steps: int | None, ts: Any, like: Tensor, default: int = 100) -> Tensor:
        if ts is None:
            return time_grid(default if num_steps is None else num_steps, like=like)
        if num_steps is not None:
            raise InvalidInputError("give num_steps or ts, not both", got=f"num_steps={num_steps!r} and ts")
        grid = as_tensor(ts, "ts", 1, "(T,)", like=like).to(like)
        if len(grid) < 2 or not bool((grid.diff() > 0).all()) or float(grid[0]) != 0 or float(grid[-1]) != 1:
            raise TimeGridError("ts must increase from 0 to 1", got=grid.tolist()[:8])
        return grid

    def _inside(self, *names: str) -> tuple[bool, bool]:
        """Return whether a field is known as a limit only at time 0, and at time 1."""
        first, last = (not all(self.fields.regular_at(name, end) for name in names) for end in (0, 1))
        return first, last

    def _flat(self, x: Any, name: str) -> tuple[Tensor, tuple[int, ...]]:
        """Return points as vectors ``(n, d)``, and the axes that they came with."""
        x = as_tensor(x, name)
        check_nonempty(x, name)
        event = self.event_shape
        if event is None:
            if x.ndim < 1:
                raise ShapeError(
                    f"{name} has the wrong number of axes", got=f"shape {tuple(x.shape)}", expected="(n, d)"
                )
            event = (x.shape[-1],)
        if tuple(x.shape[x.ndim - len(event) :]) != event or x.ndim < len(event):
            raise ShapeError(
                f"{name} has events of another shape",
                got=tuple(x.shape),
                expected=f"(..., {', '.join(map(str, event))})",
            )
        lead = tuple(x.shape[: x.ndim - len(event)])
        return x.reshape(-1, torch.Size(event).numel()), lead

    def _shaped(self, flat: Tensor, lead: tuple[int, ...]) -> Tensor:
        """Give vectors ``(..., n, d)`` the axes of events again."""
        event = self.event_shape or (flat.shape[-1],)
        return flat.reshape(*flat.shape[:-2], *lead, *event)

    def _velocity(self, condition: Any, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
        check_real(guidance, "guidance")
        return lambda t, x: self.fields("velocity", t, x, condition, guidance)

    @ordinarily
    def push(
        self,
        x0: Any,
        num_steps: int | None = None,
        method: Method | None = None,
        *,
        ts: Any = None,
        backward: bool = False,
        condition: Any = None,
        guidance: float = 1.0,
        trajectory: bool = False,
    ) -> Tensor:
        """Carry points along the probability flow from time 0 to 1.

        Args:
            x0: The points at time 0, ``(..., *event)``; with ``backward`` at time 1.
            num_steps: The number of steps of a grid of equal ones; 100 if neither this nor ``ts`` is given. Adaptive methods
                choose their own.
            method: How to take a step: ``"euler"``, ``"midpoint"``, ``"ralston"``, ``"heun"``, ``"rk4"``, ``"dopri5"`` or torchdiffeq's
                other adaptive methods; or an object such as ``Adaptive("dopri5", rtol=1e-8)``. None stands for ``"ralston"``, which has
                the least error of the methods with two evaluations per step.
            ts: The times of the steps from 0 to 1, ``(T,)``, in place of ``num_steps``; :func:`time_grid` makes uneven ones.
            backward: Whether to go from time 1 to 0.
            condition: The labels or contexts, one per point or one for all, which are passed on to the networks.
            guidance: The strength of classifier-free guidance; 1 for none.
            trajectory: Whether to return all states, ``(T, ..., *event)``.

        Returns:
            ``(..., *event)``; differentiable in ``x0`` if that requires a gradient.

        Raises:
            ShapeError, EmptyDataError, NonFiniteError: If the points don't fit.
        """
        check_bool(backward, "backward")
        check_bool(trajectory, "trajectory")
        chosen = as_method("ralston" if method is None else method, FLOW_METHODS, "flows")
        x, lead = self._flat(x0, "x0")
        given = rows_of_condition(condition, len(x), lead, x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad), evaluating(self.fields):
            out = self._flow(x, self._grid(num_steps, ts, x), chosen, given, guidance, backward, trajectory)
        return self._shaped(out, lead)

    def _flow(
        self, x: Tensor, grid: Tensor, method: Method, condition: Any, guidance: float, backward: bool = False,
        trajectory: bool = False,
    ) -> Tensor:  # fmt: skip
        inside = self._inside("velocity")
        flow = self._velocity(condition, guidance)
        if backward:
            grid, inside = grid.flip(0), (inside[1], inside[0])
        return integrate_ode(flow, x, grid, method, trajectory=trajectory, inside=inside)

    @ordinarily
    def sample(
        self,
        sample_shape: SampleShape = (),
        epsilon: EpsilonLike = 0.0,
        num_steps: int | None = None,
        method: Method | None = None,
        *,
        ts: Any = None,
        x0: Any = None,
        condition: Any = None,
        guidance: float = 1.0,
        trajectory: bool = False,
        generator: Generator = None,
    ) -> Tensor:
        r"""Draw from the model.

        Args:
            sample_shape: The shape of independent draws, an integer or a tuple.
            epsilon: The strength of the noise: a number, a function of time, or ``"optimal"`` (one-network models); 0 for the
                probability flow.
            num_steps: The number of steps of a grid of equal ones; 100 if neither this nor ``ts`` is given.
            method: How to take a step of the SDE: ``"heun"`` (weak order 2, two evaluations per step), ``"euler"``, or ``"strang"`` (weak
                order 2 with a smaller constant, six evaluations); of the flow, the methods of :meth:`push`. Or an object that carries
                options. None stands for ``"heun"`` and, for the flow, ``"ralston"``.
            ts: The times of the steps from 0 to 1, ``(T,)``, in place of ``num_steps``; :func:`time_grid` makes uneven ones.
            x0: The starts, ``(*sample_shape, *event)``; drawn from their law if None.
            condition: The labels or contexts: one per draw, ``(*sample_shape, ...)``, or one for all.
            guidance: The strength of classifier-free guidance; 1 for none.
            trajectory: Whether to return all states, ``(T, *sample_shape, *event)``.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            ``(*sample_shape, *event)``.

        Raises:
            UnavailableError: If epsilon isn't 0 and the networks give no score, or the starts aren't known.
            InvalidInputError: If an option doesn't exist.

        Example:
            >>> from stochdyn.interpolants import FieldNetwork
            >>> model = InterpolantGenerator(Fields(Interpolant("one-sided-linear"), {"velocity": FieldNetwork(2)}))
            >>> model.sample(5, epsilon="optimal", num_steps=10, x0=torch.randn(5, 2)).shape
            torch.Size([5, 2])
        """
        lead = as_sample_shape(sample_shape)
        check_bool(trajectory, "trajectory")
        level = as_epsilon(epsilon, self.interpolant)
        chosen = self._method(method, level)
        with torch.no_grad(), evaluating(self.fields):
            x, source = self._starts(lead, x0, generator)
            grid = self._grid(num_steps, ts, x)
            given = rows_of_condition(condition, len(x), lead, x)
            if level.vanishes:
                out = self._flow(x, grid, chosen, given, guidance, trajectory=trajectory)
            else:
                out = self._diffuse(x, grid, level, chosen, given, guidance, trajectory, source)
            return self._shaped(out, lead)

    def _method(self, method: Method | None, level: Epsilon) -> FlowMethod:
        if level.vanishes:
            flow = "ralston" if method is None else method
            return as_method(flow, FLOW_METHODS, "the probability flow, epsilon=0")
        self._need_score()
        return as_method("heun" if method is None else method, NOISY_METHODS, "SDEs")

    def _starts(
        self, lead: tuple[int, ...], x0: Any, generator: Generator
    ) -> tuple[Tensor, torch.Generator | None]:
        """Return starts ``(n, d)`` and the source of all that follows, so that a seed isn't used twice."""
        count = torch.Size(lead).numel()
        if x0 is not None:
            x, own = self._flat(x0, "x0")
            if own != lead:
                raise ShapeError("x0 must have the sample shape", got=own, expected=lead)
            return x, as_generator(generator, x.device)
        source = as_generator(generator) if isinstance(generator, int) else generator
        x = self.starts.draw(count, source)
        return x, as_generator(source, x.device)

    def _diffuse(
        self, x: Tensor, grid: Tensor, level: Epsilon, method: FlowMethod, condition: Any, guidance: float,
        trajectory: bool, generator: torch.Generator | None,
    ) -> Tensor:  # fmt: skip
        def score(t: Tensor, y: Tensor) -> Tensor:
            return self.fields("score", t, y, condition, guidance)

        def drift(epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
            return ForwardDrift(self.fields, epsilon, condition, guidance)

        return integrate_marginals(
            (self._velocity(condition, guidance), score, drift),
            level.of_steps(grid, method.max_rate),  # type: ignore[attr-defined]
            x, grid, method, inside=self._inside("velocity"), noise_inside=self._inside("velocity", "score"),
            generator=generator, trajectory=trajectory,
        )  # fmt: skip

    @ordinarily
    def sample_posterior(
        self,
        y: Any,
        operator: Any = None,
        obs_scale: Any = 1.0,
        sample_shape: SampleShape = (),
        epsilon: EpsilonLike = 0.0,
        num_steps: int | None = None,
        method: Method | None = None,
        *,
        condition: Any = None,
        generator: Generator = None,
    ) -> Tensor:
        r"""Draw from the posterior of a point given linear observations, with the model as the prior.

        .. math:: y=A\,x_1+s\,\xi,\qquad \xi\sim N(0,I)

        The flow or the SDE is guided by the likelihood of the observations given the point on the path, which is exact for
        Gaussian data and an approximation for others: for the exact posterior of a model of few dimensions see
        :meth:`distribution`. Every evaluation takes one reverse pass per observation.

        Args:
            y: The observed values, ``(m,)``; NaN is missing.
            operator: The matrix A, ``(m, d)``, on events as vectors; None for the identity.
            obs_scale: The standard deviation s of the observations, a number or ``(m,)``.
            sample_shape: The shape of independent draws.
            epsilon: The strength of the noise, as in :meth:`sample`; 0 for the flow.
            num_steps: The number of steps; 100 if None.
            method: How to take a step: one of the methods of :meth:`sample`.
            condition: One label or one context for all draws.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            ``(*sample_shape, *event)``.

        Raises:
            UnavailableError: If the model doesn't start in the standard normal, or its networks don't determine the data.
            ShapeError: If the observations don't fit.

        Reference:
            Boys et al., "Tweedie moment projected diffusions for inverse problems", 2024, carried over to interpolants.
        """
        from stochdyn.interpolants.sampling.posterior import LinearGuide

        lead = as_sample_shape(sample_shape)
        level = as_epsilon(epsilon, self.interpolant)
        chosen = self._method(method, level)
        with torch.no_grad(), evaluating(self.fields):
            x, source = self._starts(lead, None, generator)
            guide = LinearGuide(self, y, operator, obs_scale, x)
            grid = self._grid(num_steps, None, x)
            given = rows_of_condition(condition, len(x), lead, x)
            plain = self._velocity(given, 1.0)

            def velocity(t: Tensor, z: Tensor) -> Tensor:
                return plain(t, z) + guide.rate(t) * guide.slope(t, z, given, 1.0)

            def score(t: Tensor, z: Tensor) -> Tensor:
                return self.fields("score", t, z, given, 1.0) + guide.slope(t, z, given, 1.0)

            def drift(epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
                forward = ForwardDrift(self.fields, epsilon, given, 1.0)
                return lambda t, z: forward(t, z) + (guide.rate(t) + epsilon) * guide.slope(t, z, given, 1.0)

            both = (True, True)
            if level.vanishes:
                out = integrate_ode(velocity, x, grid, chosen, inside=both)
            else:
                out = integrate_marginals(
                    (velocity, score, drift), level.of_steps(grid, chosen.max_rate), x, grid, chosen,  # type: ignore[attr-defined]
                    inside=both, noise_inside=both, generator=source,
                )  # fmt: skip
            return self._shaped(out, lead)

    @ordinarily
    def log_prob(
        self,
        x1: Any,
        exact: bool = True,
        num_steps: int | None = None,
        method: Method = "rk4",
        *,
        ts: Any = None,
        num_probes: int | None = None,
        condition: Any = None,
        guidance: float = 1.0,
        generator: Generator = None,
    ) -> Tensor:
        r"""Return the log density of the probability flow; differentiable.

        Args:
            x1: The ends, ``(..., *event)``.
            exact: Whether to take the exact divergence; else Hutchinson's unbiased estimate of the log density.
            num_steps: The number of steps of a grid of equal ones; 50 if neither this nor ``ts`` is given.
            method: How to take a step: one of the methods of :meth:`push`.
            ts: The times of the steps from 0 to 1, ``(T,)``, in place of ``num_steps``.
            num_probes: The number of Hutchinson's probes per point where the divergence isn't exact; one if None.
            condition: The labels or contexts, one per point or one for all.
            guidance: The strength of classifier-free guidance; 1 for none.
            generator: The source of Hutchinson's probes.

        Returns:
            ``(...)``, one number per event.

        Raises:
            UnavailableError: If the density of the starts isn't known.
            ShapeError, NonFiniteError: If the points don't fit.
        """
        chosen = as_method(method, FLOW_METHODS, "flows")
        x, lead = self._flat(x1, "x1")
        law = self.starts.law(x.shape[-1], x)
        given = rows_of_condition(condition, len(x), lead, x)
        with evaluating(self.fields):
            value = flow_log_prob(
                self._velocity(given, guidance), law.log_prob, x, self._grid(num_steps, ts, x, 50), chosen,
                exact=exact, num_probes=num_probes, inside=self._inside("velocity"), generator=generator,
            )  # fmt: skip
        return value.reshape(lead)

    def bits_per_dim(self, x1: Any, bin_width: float, **options: Any) -> Tensor:
        r"""Return minus the log density of quantised data in bits per dimension.

        .. math:: -\frac{\log\hat\rho_1(x)}{d\log2}-\log_2\Delta

        Args:
            x1: The data, ``(..., *event)``, to which uniform noise of one bin was added (dequantisation).
            bin_width: The width :math:`\Delta` of a bin in the units of ``x1``: 1/256 for 8-bit images scaled to [0, 1], 2/256 for [-1, 1].
            **options: The options of :meth:`log_prob`.

        Raises:
            UnavailableError: If the density of the starts isn't known.
        """
        check_real(bin_width, "bin_width", above=0.0)
        value = self.log_prob(x1, **options)
        event = self.event_shape or (as_tensor(x1, "x1").shape[-1],)
        # -log p(x) Delta^d per dimension, in bits: the mass of a bin is at least its density times its volume, in the mean
        bits = torch.log(torch.tensor(2.0, dtype=value.dtype, device=value.device))
        return -value / (torch.Size(event).numel() * bits) - torch.log2(value.new_tensor(bin_width))

    @ordinarily
    def sample_and_log_prob(
        self,
        sample_shape: SampleShape = (),
        num_steps: int | None = None,
        method: Method = "rk4",
        *,
        ts: Any = None,
        exact: bool = True,
        num_probes: int | None = None,
        condition: Any = None,
        guidance: float = 1.0,
        generator: Generator = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw from the probability flow, with log densities, in one pass: ``(*sample_shape, *event)`` and ``(*sample_shape)``.

        The arguments are those of :meth:`log_prob` and :meth:`sample`.
        """
        lead = as_sample_shape(sample_shape)
        chosen = as_method(method, FLOW_METHODS, "flows")
        law = self.starts.law()
        x0, source = self._starts(lead, None, generator)
        given = rows_of_condition(condition, len(x0), lead, x0)
        with evaluating(self.fields):
            x1, change = flow_with_log_density(
                self._velocity(given, guidance), x0, self._grid(num_steps, ts, x0, 50), chosen,
                exact=exact, num_probes=num_probes, inside=self._inside("velocity"), generator=source,
            )  # fmt: skip
        return self._shaped(x1, lead), (law.log_prob(x0) + change).reshape(lead)

    @ordinarily
    def sde_log_prob(
        self,
        x1: Any,
        epsilon: EpsilonLike = 0.5,
        num_steps: int | None = None,
        *,
        ts: Any = None,
        num_particles: int = 64,
        method: str = "feynman-kac",
        proposal: str = "score",
        condition: Any = None,
        guidance: float = 1.0,
        generator: Generator = None,
    ) -> PathWeights:
        """Return weighted paths whose mean weight is the density of the SDE sampler at ``x1``; ``.log_prob`` is its log.

        Args:
            x1: The ends, ``(n, *event)``.
            epsilon: The strength of the noise, not zero in any step.
            num_steps: The number of steps of a grid of equal ones; 100 if neither this nor ``ts`` is given.
            ts: The times of the steps from 0 to 1, ``(T,)``, in place of ``num_steps``.
            num_particles: The number of paths per point.
            method: How paths are weighed, ``"feynman-kac"`` or ``"transition"``; see :func:`feynman_kac_log_prob`.
            proposal: How paths run back: ``"score"`` runs back with the reversed drift, ``"drift"`` with the forward one, whose weights vary wildly.
            condition: The labels or contexts, one per point or one for all.
            guidance: The strength of classifier-free guidance; 1 for none.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Raises:
            UnavailableError: If the networks give no score, or the density of the starts isn't known.
        """
        self._need_score()
        check_choice(proposal, ("score", "drift"), "proposal")
        check_positive_int(num_particles, "num_particles")
        x, lead = self._flat(x1, "x1")
        law = self.starts.law(x.shape[-1], x)
        level = as_epsilon(epsilon, self.interpolant)
        given = rows_of_condition(condition, len(x), lead, x)
        if given is not None:
            given = given.repeat(num_particles, *[1] * (given.ndim - 1))
        drift = ForwardDrift(self.fields, level, given, guidance)

        def score(t: Tensor, y: Tensor) -> Tensor:
            return self.fields("score", t, y, given, guidance)

        with torch.no_grad(), evaluating(self.fields):
            return feynman_kac_log_prob(
                drift, lambda t: (2 * level(t)).sqrt(), law.log_prob, x, self._grid(num_steps, ts, x),
                score=score if proposal == "score" else None, num_particles=num_particles, method=method,
                generator=generator,
            )  # fmt: skip

    def measure(
        self,
        epsilon: EpsilonLike = 0.5,
        condition: Any = None,
        guidance: float = 1.0,
        *,
        dt: float | None = 0.01,
    ) -> DiffusionMeasure:
        r"""Return the law on paths of the forward equation :math:`dX=(b+\varepsilon s)dt+\sqrt{2\varepsilon}dW` on [0, 1].

        It is a law like all others: it samples on any grid, has marginals, a drift, a forward operator and density ratios. Where its
        starts are those of the data it has no density at time 0.

        Args:
            epsilon: A positive number, a function of time, or ``"optimal"``.
            condition: One label or one context for all paths.
            guidance: The strength of classifier-free guidance; 1 for none.
            dt: The largest step of a simulation, whatever grid is asked for; None takes the grid as it is.

        Raises:
            UnavailableError: If the networks give no score, or the law of the starts isn't known.
            InvalidInputError: If epsilon is zero, or the step isn't positive.
        """
        from stochdyn.interpolants.sampling.starts import EmpiricalStart

        self._need_score()
        level = as_epsilon(epsilon, self.interpolant)
        if level.vanishes:
            raise InvalidInputError(
                "a path measure needs noise", got="epsilon=0", hint="push() is the probability flow"
            )
        if len(self.event_shape or (1,)) != 1:
            raise ShapeError("a law on paths is one of vectors", got=f"events of shape {self.event_shape}")
        drift = _SharedCondition(ForwardDrift(self.fields, level, None, guidance), condition)
        initial = EmpiricalStart(self.starts.kept) if self.starts.empirical else self.starts.law()
        constant = level.constant
        diffusion: Any = _Spread(level) if constant is None else (2 * constant) ** 0.5
        return DiffusionMeasure(initial, SDE(drift, diffusion), start_time=0.0, dt=dt)

    def distribution(
        self, num_steps: int = 50, method: Method = "rk4", condition: Any = None, guidance: float = 1.0
    ) -> InterpolantDistribution:
        """Return the law of the probability flow as a Pyro distribution with the event shape of the data.

        Args:
            num_steps: The number of steps of the grid.
            method: How to take a step: one of the methods of :meth:`push`.
            condition: One label ``()`` or one context vector ``(c,)``; labels ``(*batch,)`` or contexts ``(*batch, c)`` make a batch of
                laws.
            guidance: The strength of classifier-free guidance; 1 for none.

        Raises:
            UnavailableError: If the density of the starts isn't known.
        """
        from stochdyn.interpolants.sampling.distribution import InterpolantDistribution

        return InterpolantDistribution(self, num_steps, method, condition, guidance)


class _Spread(nn.Module):
    r"""The noise :math:`\sqrt{2\varepsilon(t)}` of the forward equation."""

    def __init__(self, level: Epsilon) -> None:
        super().__init__()
        self.level = level

    def forward(self, t: Tensor, x: Tensor) -> Scalar:
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        # relative to its own size at the middle, so that a vanishing end has a density too
        least = 1e-6 * (2 * self.level(torch.full_like(time, 0.5))).sqrt()
        strength = torch.maximum((2 * self.level(time)).sqrt(), least)
        return Scalar(strength[..., 0] if strength.ndim else strength)


class _SharedCondition(nn.Module):
    """A drift with one condition for all points of whatever shape, in evaluation mode."""

    def __init__(self, drift: ForwardDrift, condition: Any) -> None:
        super().__init__()
        self.inner, self.condition = drift, condition

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        if self.condition is not None:
            count = x.shape[:-1].numel()
            rows = rows_of_condition(self.condition, count, tuple(x.shape[:-1]), x)
            assert rows is not None
            self.inner.condition = rows.reshape(*x.shape[:-1], *rows.shape[1:])
        with evaluating(self.inner):
            return self.inner(t, x)
