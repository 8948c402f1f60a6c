"""The law of the solution of an SDE: sampling, densities, log-ratios, divergences, control and time reversal."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_callable,
    check_choice,
    check_event_size,
    check_finite,
    check_ndim,
    check_positive,
    check_positive_int,
    check_real,
    check_same_device,
    check_time_broadcast,
    check_time_grid,
    check_type,
    values_are_checked,
)
from stochdyn.core.law import girsanov
from stochdyn.core.law.initial import InitialLaw, ReflectedStart, SimulatedMarginal, as_initial
from stochdyn.core.law.marginals import Generator, Marginal, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Drawn, Estimate, Path, PathSample, as_parity, stamp_of
from stochdyn.core.law.relative import relate
from stochdyn.core.law.transition import euler_log_prob
from stochdyn.core.sde.control import Control, Field
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import first_time, remembered
from stochdyn.core.sde.methods import Method, as_method
from stochdyn.core.sde.solvers import batch_shape_of, draw_increments, full_state, integrate, stepped
from stochdyn.errors import (
    ApproximationWarning,
    DiffusionMismatchError,
    ExplosionError,
    ShapeError,
    TimeGridError,
)

if TYPE_CHECKING:
    from stochdyn.core.forward.fokker_planck import FokkerPlanck
    from stochdyn.core.law.intervened import IntervenedMeasure
    from stochdyn.core.sde.intervention import Intervention

__all__ = ["DiffusionMeasure", "check_explosion"]

# Where the law has to simulate up to a time by itself and holds no step of its own, it takes this many steps.
_LEAD_STEPS = 200


class DiffusionMeasure(PathMeasure):
    r"""The law of the solution of an SDE with a given initial law.

    Paths are drawn on the grid that is asked for, one step per interval, or in steps of at most ``dt`` where that is given: then
    the law doesn't depend on the grid, and a coarse grid hides no pulse of the drift.

    Use it for every diffusion that isn't linear; a linear one with Gaussian start has exact answers as
    :class:`~stochdyn.LinearGaussianMeasure`.

    Args:
        initial: A torch or Pyro distribution with event ``(d,)``, or a tensor ``(d,)`` (or ``(*batch, d)``) for a fixed start.
        sde: The equation.
        start_time: The time at which ``initial`` holds. Paths that are asked for from a later time on are simulated from here.
            None lets every grid start the law at its own first time; :meth:`marginal` then counts from time zero.
        dt: The largest step of a simulation, in the unit of the times. None takes the grid as it is, and 200 steps where
            the law has to reach a time by itself (in :meth:`marginal`, and from ``start_time`` to the first time of a grid).
        method: The integration method: :class:`~stochdyn.core.Euler`, :class:`~stochdyn.core.Heun`,
            :class:`~stochdyn.core.Milstein` or :class:`~stochdyn.core.Exact`, or the name of one.

    Raises:
        ShapeError: If the initial law's event isn't a vector, or drift or diffusion don't fit it.
        InvalidInputError: If another argument has the wrong type, or ``dt`` isn't positive.

    Example:
        >>> P = DiffusionMeasure(torch.zeros(1), SDE(lambda t, x: -x, 1.0))
        >>> Q = P.controlled(lambda t, x: torch.ones_like(x))
        >>> ts = torch.linspace(0, 1, 11)
        >>> Q.kl(P, ts, num_samples=8).mean
        tensor(0.5000)
    """

    start_time: Tensor | float | None

    def __init__(
        self,
        initial: Any,
        sde: SDE,
        *,
        start_time: Tensor | float | None = None,
        dt: float | None = None,
        method: Method | str = "euler",
    ) -> None:
        super().__init__()
        check_type(sde, SDE, "sde")
        self.initial: InitialLaw = as_initial(initial)
        self.sde = sde
        if start_time is not None:
            check_real(start_time, "start_time")
        if isinstance(start_time, Tensor) and not isinstance(start_time, nn.Parameter):
            self.register_buffer("start_time", start_time)
        else:
            self.start_time = start_time
        if dt is not None:
            check_real(dt, "dt")
            check_positive(dt, "dt")
        self.dt = None if dt is None else float(dt)
        self.method = as_method(method)

    def sample(
        self,
        ts: Tensor,
        sample_shape: SampleShape = (),
        generator: Generator = None,
        *,
        method: Method | str | None = None,
    ) -> PathSample:
        """Draw paths with the increments that drove them.

        Args:
            ts: The strictly increasing times ``(T,)``, data of any kind, or ``(*batch, T)`` where every series has its
                own.
            sample_shape: The shape of independent draws, an integer or a tuple.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
            method: The integration method; None takes that of the law.

        Raises:
            TimeGridError: If the grid isn't strictly increasing, or begins before the law does.
            DeviceMismatchError: If grid and initial law live on different devices.
            NonFiniteError: If a path explodes.
        """
        scheme = self.method if method is None else as_method(method)
        like = self.initial.like()
        ts = as_time_grid(ts, like=like, batch=True)
        shape, source = as_sample_shape(sample_shape), as_generator(generator, like.device)
        grid, index = self._simulation_grid(ts)
        check_same_device(ts=ts, initial=like)
        x0 = self._draw_start(shape, grid, source)
        dw, memory0 = draw_increments(self.sde, x0, grid, source)
        path = self._run(grid, x0, dw, memory0, scheme)
        return path if index is None else path.at(index)

    def _draw_start(self, shape: tuple[int, ...], ts: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw starts ``(*sample, *batch, d)`` with the batch axes of start, equation and grid together."""
        own, grids = self.initial.batch_shape, ts.shape[:-1]
        x0 = self.initial.draw((*shape, *grids[: max(0, len(grids) - len(own))]), generator)
        # What batch the equation has is asked about one draw: beside many, an axis of parameters may pass for one of draws.
        one = x0.detach()[(0,) * len(shape)]
        one = one.unsqueeze(0) if one.ndim == 1 else one
        try:
            batch = batch_shape_of(self.sde, one, ts)
        except (RuntimeError, TypeError, AttributeError, IndexError):
            # What is wrong, if anything is, has a name in the check of the equation.
            batch = one.shape[:-1]
        if batch != one.shape[:-1]:
            x0 = self.initial.draw((*shape, *batch[: len(batch) - len(own)]), generator)
            x0 = x0.expand(*shape, *batch, self.initial.dim)
        self.sde.check(first_time(ts, x0), x0)
        return x0

    def drive(
        self,
        ts: Tensor,
        x0: Tensor,
        dw: Tensor,
        memory0: Tensor | None = None,
        *,
        method: Method | str | None = None,
    ) -> PathSample:
        """Return the paths that given increments drive, one step per interval of the grid.

        Args:
            ts: The strictly increasing times ``(T,)``, or ``(*batch, T)`` where every series has its own.
            x0: The states ``(*batch, d)`` at the first time.
            dw: The increments under this law ``(T-1, *batch, m * R)``, control included, in the layout of
                :class:`~stochdyn.core.NoiseProcess`; ``(T-1, *batch, m)`` for Brownian motion.
            memory0: The memory states ``(*batch, m, K)`` of the noise at the first time, zero if None.
            method: The integration method; None takes that of the law.

        Raises:
            TimeGridError: If the grid isn't strictly increasing.
            ShapeError: If start or increments don't fit the equation and the grid.
            NonFiniteError: If a path explodes.
        """
        scheme = self.method if method is None else as_method(method)
        ts = as_time_grid(ts, like=self.initial.like(), batch=True)
        check_ndim(x0, tuple(range(1, 13)), "x0", "(*batch, d)")
        check_event_size(x0, self.initial.dim, "x0")
        check_ndim(dw, tuple(range(2, 14)), "dw", "(T-1, *batch, m)")
        check_event_size(dw, ts.shape[-1] - 1, "dw", axis=0)
        check_same_device(ts=ts, x0=x0, dw=dw)
        channels = self.sde.noise_dim(first_time(ts, x0), x0)
        check_event_size(dw, channels * self.sde.noise.num_innovations(ts), "dw")
        try:
            torch.broadcast_shapes(x0.shape[:-1], dw.shape[1:-1], ts.shape[:-1])
        except RuntimeError as error:
            got = f"shapes {tuple(x0.shape)}, {tuple(dw.shape)} and {tuple(ts.shape)}"
            raise ShapeError("x0, dw and ts have batch axes that don't fit each other", got=got) from error
        return self._run(ts, x0, dw, memory0, scheme)

    def _run(self, ts: Tensor, x0: Tensor, dw: Tensor, memory0: Tensor | None, method: Method) -> PathSample:
        run = integrate(self.sde, x0, ts, dw, memory0, method=method)
        channels = self.sde.noise_dim(first_time(ts, x0), x0)
        aux = {
            name: value.movedim(0, -2)
            for name, value in (("control", run.control), ("precision", run.precision))
            if value is not None
        }
        if run.memory is not None:
            aux["memory"] = run.memory.movedim(0, -3)
        if dw.shape[-1] > channels:
            aux["residual"] = dw[..., channels:].movedim(0, -2)
        check_explosion(ts, run.x)
        drawn = Drawn(method.name, stamp_of(self.sde))
        return PathSample(ts, run.x.movedim(0, -2), dw[..., :channels].movedim(0, -2), aux, self, None, drawn)

    def _simulation_grid(self, ts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the grid on which paths are simulated, and where ``ts`` stands on it; None if it is ``ts``."""
        if ts.ndim > 1:
            if self.start_time is not None or self.dt is not None:
                raise TimeGridError(
                    "grids of series of their own take no start_time and no dt of the law",
                    got=f"ts {tuple(ts.shape)}",
                    hint="give the grids the start and the steps, and the law neither",
                )
            return ts, None
        # A start that may be learnt is looked at every time.
        divided = (
            self._divide(ts)
            if isinstance(self.start_time, Tensor)
            else remembered(ts, ("steps of a law", self.start_time, self.dt), lambda: self._divide(ts))
        )
        return (ts, None) if divided is None else divided

    def _divide(self, ts: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the grid from the law's start on, with steps as small as they have to be; None if it is ``ts``."""
        start = None if self.start_time is None else _time(self.start_time, ts)
        leads, counts = self._plan(ts, start)
        if not leads and all(n == 1 for n in counts):
            return None
        knots = torch.cat([start.reshape(1), ts]) if leads and start is not None else ts
        grid = [_divided(a, b, n)[:-1] for a, b, n in zip(knots[:-1], knots[1:], counts, strict=True)]
        index = torch.tensor([0, *counts], device=ts.device).cumsum(0)[int(leads) :]
        return torch.cat([*grid, knots[-1:]]), index

    def _plan(self, ts: Tensor, start: Tensor | None) -> tuple[bool, list[int]]:
        """Return whether steps lead from the law's start to the first time, and the number of steps in every interval."""
        if start is None:
            return False, self._step_counts(ts, 0)
        first = ts[0].detach()
        slack = 4 * torch.finfo(ts.dtype).eps * torch.maximum(first.abs(), start.detach().abs())
        if first < start - slack:
            raise TimeGridError(
                "ts begins before the law does",
                got=f"ts[0]={float(first):g}",
                expected=f"at least {float(start.detach()):g}",
            )
        if first > start + slack:
            return True, self._step_counts(torch.cat([start.reshape(1), ts]), 1)
        return False, self._step_counts(ts, 0)

    def _step_counts(self, knots: Tensor, lead: int) -> list[int]:
        """Return the number of steps in every interval; the first ``lead`` ones aren't the user's."""
        if self.dt is None:
            return [_LEAD_STEPS] * lead + [1] * (knots.shape[0] - 1 - lead)
        # Differences of large times carry rounding errors, which must not cost a step.
        slack = 8 * torch.finfo(knots.dtype).eps * float(knots.detach().abs().max())
        return [max(1, math.ceil((h - slack) / self.dt)) for h in (knots[1:] - knots[:-1]).detach().tolist()]

    def controlled(self, u: Field | None = None, precision: Field | None = None) -> DiffusionMeasure:
        """Return the law whose driving noise has drift ``u(t, z) -> (..., m)``, and increments of extra ``precision``.

        ``z`` is ``x``, followed by the memory states where the noise has any. See :class:`stochdyn.core.sde.control.Control`.
        """
        return self._like(self.initial, self.sde.controlled(u, precision), self.start_time)

    def do(self, intervention: Intervention) -> IntervenedMeasure:
        """Return the law of what happens under an intervention: components held, or another drift, from a time on.

        Args:
            intervention: What is done, and from when on.

        Raises:
            InvalidInputError: If the noise has memory.
        """
        from stochdyn.core.law.intervened import IntervenedMeasure

        return IntervenedMeasure(self, intervention)

    def reverse(
        self, score: Any, horizon: float = 1.0, initial: Any = None, parity: Any = None
    ) -> DiffusionMeasure:
        r"""Return the time-reversed law, that of :math:`\epsilon X_{T-\tau}`, on the clock :math:`\tau = T - t`.

        A control counts as part of the drift.

        Args:
            score: A function ``score(t, x)`` of this law's marginals on the forward clock: a callable, or an object
                with a ``score`` method.
            horizon: The time ``T`` that becomes 0.
            initial: The law of :math:`X_T`; if None, this law is simulated up to there whenever a start is drawn.
            parity: The signs :math:`\epsilon`, ``(d,)``, -1 for components that change theirs with the direction of
                time, such as velocities; all +1 if None. The noise must be the same in both directions,
                :math:`\epsilon GG^\top\epsilon=GG^\top`.

        Raises:
            InvalidInputError: If the noise has memory, or the parity isn't one sign for each component.

        Reference:
            Anderson, "Reverse-time diffusion equation models", 1982; with parities: Spinney and Ford, "Entropy production in
            full phase space for continuous stochastic dynamics", 2012.
        """
        check_real(horizon, "horizon")
        signs = None if parity is None else as_parity(parity, torch.empty(0, self.initial.dim))
        score_fn = getattr(score, "score", score)
        check_callable(score_fn, "score", "a function score(t, x), or an object with a method score")
        start = as_initial(SimulatedMarginal(self, horizon) if initial is None else initial)
        start = start if signs is None else ReflectedStart(start, signs)
        sde = self.sde.reverse(score_fn, horizon, signs)
        return self._like(start, sde, None if self.start_time is None else 0.0)

    def backward(self, horizon: float, initial: Any, parity: Any = None) -> DiffusionMeasure:
        r"""Return the law of the same dynamics under the reversed protocol, started where this law ends.

        Its drift and diffusion at :math:`\tau` are those of this law at :math:`T-\tau`. The entropy that this law produces up to
        ``T`` is the divergence of its time reversal from it: ``P.reverse(score, T, rho, parity).kl(P.backward(T, rho, parity), ts)``.

        Args:
            horizon: The time ``T`` that becomes 0.
            initial: The law of :math:`X_T`, or a point.
            parity: The signs ``(d,)`` with which the start is reflected; see :meth:`reverse`. What of the protocol
                itself is odd, such as a magnetic field, is the caller's to change.

        Raises:
            InvalidInputError: If the noise has memory, or the parity isn't one sign for each component.
        """
        check_real(horizon, "horizon")
        signs = None if parity is None else as_parity(parity, torch.empty(0, self.initial.dim))
        start = as_initial(initial)
        start = start if signs is None else ReflectedStart(start, signs)
        return self._like(start, self.sde.backward(horizon), None if self.start_time is None else 0.0)

    def _like(self, initial: Any, sde: SDE, start_time: Tensor | float | None) -> DiffusionMeasure:
        return DiffusionMeasure(initial, sde, start_time=start_time, dt=self.dt, method=self.method)

    def marginal(self, t: Tensor | float) -> Marginal:
        """Return the law at one time of paths that start at ``start_time``, or at time zero where that is None.

        At the start it is the initial law. Later it is known by simulation, in steps of ``dt`` or in 200 steps.

        Raises:
            TimeGridError: If the time lies before the start.
        """
        check_real(t, "t")
        time = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
        start = _time(0.0 if self.start_time is None else self.start_time, time)
        if time < start:
            raise TimeGridError(
                "the law begins later",
                got=f"t={float(time.detach()):g}",
                expected=f"at least {float(start.detach()):g}",
            )
        if time == start:
            return self.initial.marginal()

        def draw(sample_shape: tuple[int, ...], generator: Generator) -> Tensor:
            like = self.initial.like()
            source = as_generator(generator, like.device)
            knots = torch.stack([start, time]).to(like.device)
            ts = _divided(knots[0], knots[1], self._step_counts(knots, 1)[0])
            x0 = self._draw_start(sample_shape, ts, source)
            dw, memory0 = draw_increments(self.sde, x0, ts, source)
            return self._run(ts, x0, dw, memory0, self.method).x[..., -1, :]

        return SampledMarginal(draw)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` at ``x (..., d)``, that of the control included: ``b(t, x) + G(t, x) u(t, x)``.

        Raises:
            UnavailableError: If the noise has memory, so that the state alone doesn't decide it.
            ShapeError: If the times or the states don't fit.
        """
        control = self.sde.control
        if self.sde.noise.num_states:
            self._refuse("drift", "its noise has memory, so the state alone doesn't decide it")
        if control is not None and type(control).shape_increment is not Control.shape_increment:
            self._refuse("drift", f"{type(control).__name__} acts on the increments of a grid")
        x = as_tensor(x, "x", like=self.initial.like())
        check_event_size(x, self.initial.dim, "x")
        time = as_tensor(t, "t", like=x).to(x)
        check_time_broadcast(time, x)
        return self.sde.slope(time, x).expand_as(x)

    def forward(self) -> FokkerPlanck:
        """Return the Fokker-Planck operator of the law.

        Raises:
            UnavailableError: If the noise has memory, or the control acts on the increments of a grid.
        """
        from stochdyn.core.forward.fokker_planck import FokkerPlanck

        control = self.sde.control
        if self.sde.noise.num_states:
            self._refuse(
                "forward", "its noise has memory, so its marginals obey no equation in the state alone"
            )
        if control is not None and type(control).shape_increment is not Control.shape_increment:
            self._refuse("forward", f"{type(control).__name__} acts on the increments of a grid")
        return FokkerPlanck(self.sde)

    def random_points(self, ts: Tensor) -> Tensor:
        """Return ``(T, *batch)``, True for the points of a grid that :meth:`log_prob` is a density of: all but a fixed start."""
        points = super().random_points(ts)
        points[0] = not self.initial.fixed
        return points

    def log_prob(self, path: Path) -> Tensor:
        """Return the Euler log density of paths, ``(*sample,)``, with that of a random start; the exact one if the method is exact.

        Raises:
            SingularDiffusionError: If the diffusion is singular or the noise has memory: no density exists in state space.

        Warns:
            ApproximationWarning: For reversed paths under noise that depends on the state: as the step goes to zero, the ratio of these
                densities to those of the paths themselves tends to another number than that of the laws.
        """
        path = self._beside(self._check_path(path))
        if path._backwards and self.sde.state_dependent:
            warnings.warn(
                "The ratio of Euler densities of paths and of their reversal is wrong at order one where the noise depends on the state, "
                "however short the steps. Take P.reverse(...).log_rn(path.reversed(), P.backward(...)), or "
                "stochdyn.nonequilibrium.dissipation.",
                ApproximationWarning,
                stacklevel=2,
            )
        return euler_log_prob(stepped(self.sde, self.method, path.ts), self.initial, path.ts, path.x)

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        r"""Return :math:`\log dQ/dP` on given paths, Q being this law and P ``other``.

        Args:
            path: The paths of either law (or of any third one that shares their equation).
            other: P, a DiffusionMeasure with the same diffusion.
            estimator: The estimator: ``"density"``, the true log weight; ``"rate"``, only its conditional mean under Q;
                ``"stl"``, the true log weight with the low-noise gradient of :func:`stochdyn.core.law.girsanov.stl`.
                The last two mean something on paths of Q alone.
            recorded: Whether to take control and increments of the law that drew the paths as they were then
                (``path.aux``) rather than evaluate them again. It saves most of the time where the control is a
                network, and is right as long as that law hasn't changed since. Without it the ratio is that of the laws
                as they are now, and differentiable in all their parameters, on paths drawn at any time.

        Returns:
            ``(*sample,)``.

        Raises:
            DiffusionMismatchError: If the laws are mutually singular.
        """
        check_choice(estimator, girsanov.ESTIMATORS, "estimator")
        if not isinstance(other, DiffusionMeasure):
            raise DiffusionMismatchError("log_rn compares two DiffusionMeasures", got=type(other).__name__)
        path = self._beside(self._check_path(path))
        if not (other.sde.control is None and other.sde.shares_base(self.sde)):
            path = other._beside(path)
        relation = relate(self, other, path, recorded)
        start = self.initial.log_ratio(relation.p.initial, path.x[..., 0, :], estimator)
        if estimator == "rate":
            return start + girsanov.rate(relation.law_q(), relation.law_p(), relation.dt)
        if estimator == "density":
            return start + girsanov.density(relation.law_q(), relation.law_p(), relation.e, relation.dt)
        log_q = girsanov.stl(relation.log_q, relation.e, relation.z)
        return start + log_q - relation.log_p()

    def kl(
        self,
        other: PathMeasure,
        ts: Tensor,
        num_samples: int = 4096,
        generator: Generator = None,
        estimator: str = "rate",
    ) -> Estimate:
        """Return KL(this || other) on the grid by simulation.

        Args:
            other: The second law.
            ts: The grid ``(T,)``.
            num_samples: The number of paths drawn from this law.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
            estimator: Which form of the log ratio is averaged; see :meth:`log_rn`. ``"rate"`` has the least noise.

        Raises:
            DiffusionMismatchError: If the laws are mutually singular.
        """
        check_positive_int(num_samples, "num_samples", 2)
        path = self.sample(ts, num_samples, generator)
        return Estimate.of(self.log_rn(path, other, estimator, recorded=True))

    def full_state(self, path: PathSample) -> Tensor:
        """Return the states that controls see, time leading: ``(T, *sample, d + m K)``."""
        memory = path.aux.get("memory")
        return full_state(path.leading(), None if memory is None else memory.movedim(-3, 0))

    def _beside(self, path: PathSample) -> PathSample:
        """Return paths with the batch axes of the law, which would else be taken for their times when time leads."""
        if path.law is self:
            return path
        first = path.x[..., 0, :]
        try:
            batch = batch_shape_of(self.sde, first, path.ts)
        except RuntimeError:
            self.sde.check(first_time(path.ts, first), first)  # which says what doesn't fit
            raise
        return path.expanded(batch)

    def _check_path(self, path: Path) -> PathSample:
        """Return the paths on the grid of their simulation; raise a typed error unless they are finite and fit this law."""
        check_type(path, PathSample, "path")
        assert isinstance(path, PathSample)
        path = path.fine if path.fine is not None else path
        check_time_grid(path.ts, "path.ts", batch=True)
        check_ndim(path.x, tuple(range(2, 13)), "path.x", "(*sample, T, d)")
        check_event_size(path.x, self.initial.dim, "path.x")
        check_event_size(path.x, path.ts.shape[-1], "path.x", axis=-2)
        check_finite(path.x.detach(), "path.x")
        if self.start_time is not None and values_are_checked():
            first, start = path.ts[..., 0].detach(), float(_time(self.start_time, path.ts).detach())
            if bool(((first - start).abs() > 1e-5 * (path.ts[..., -1] - first)).any()):
                raise TimeGridError(
                    "a density needs paths from the start of the law on",
                    got=f"a first time {float(first.reshape(-1)[0]):g}",
                    expected=f"start_time={start:g}",
                )
        return path


def _time(value: Tensor | float, like: Tensor) -> Tensor:
    """Return a time in the precision of others; as a tensor of the default one a number would lose digits."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _divided(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Return ``n + 1`` equally spaced times from ``a`` to ``b``, differentiable in both."""
    return torch.lerp(a, b, torch.linspace(0, 1, n + 1, dtype=a.dtype, device=a.device))


def check_explosion(ts: Tensor, x: Tensor) -> None:
    """Raise ExplosionError if a path ``x (T, *batch, d)`` explodes; every scheme adds to the state, so it stays so."""
    if not values_are_checked():
        return
    last = x[-1].detach()
    bad = ~torch.isfinite(last)
    if not bool(bad.any()):
        return
    first = int((~torch.isfinite(x.detach())).flatten(1).any(-1).nonzero()[0, 0])
    count, when = int(bad.any(-1).sum()), ts[..., first].min()
    raise ExplosionError(
        "paths explode",
        got=f"{count} of {max(1, last[..., 0].numel())} beyond the largest number from t={float(when):g} on",
        hint="take smaller steps (dt=... of the law, or a finer ts), or check the sign of the drift",
    )
