"""Laws on path space: sampling, densities, log-ratios, divergences, control and time reversal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    check_choice,
    check_event_size,
    check_finite,
    check_ndim,
    check_positive_int,
    check_same_device,
    check_time_grid,
)
from stochdyn.core.law import girsanov
from stochdyn.core.law.initial import InitialLaw, SimulatedMarginal, as_initial
from stochdyn.core.law.marginals import Generator, SampledMarginal
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Estimate, PathSample
from stochdyn.core.law.relative import relate
from stochdyn.core.law.transition import euler_log_prob
from stochdyn.core.sde.equation import SDE, Field
from stochdyn.core.sde.solvers import draw_increments, full_state, integrate

__all__ = ["DiffusionMeasure"]


class DiffusionMeasure(PathMeasure):
    r"""The law of the solution of an SDE with a given initial law.

    Args:
        initial: a torch or Pyro distribution with event ``(d,)``, or a tensor ``(d,)`` (or ``(*batch, d)``) for a fixed start.
        sde: the equation.

    Raises:
        ShapeError: if the initial law's event isn't a vector, or drift or diffusion don't fit it.

    Example:
        >>> P = DiffusionMeasure(torch.zeros(1), SDE(lambda t, x: -x, 1.0))
        >>> Q = P.controlled(lambda t, x: torch.ones_like(x))
        >>> ts = torch.linspace(0, 1, 11)
        >>> Q.kl(P, ts, num_paths=8).mean
        tensor(0.5000)
    """

    def __init__(self, initial: Any, sde: SDE) -> None:
        super().__init__()
        self.initial: InitialLaw = as_initial(initial)
        self.sde = sde

    def sample(
        self,
        ts: Tensor,
        sample_shape: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        *,
        method: str = "euler",
        checkpoint: bool | int = False,
        cuda_graph: bool = False,
    ) -> PathSample:
        """Draw paths with the increments that drove them.

        Args:
            ts: ``(T,)`` strictly increasing grid; every interval is one step.
            sample_shape: shape of independent draws.
            generator: source of randomness; the global one if None.
            method: ``"euler"``, ``"heun"`` or ``"milstein"``; see :func:`stochdyn.core.sde.solvers.integrate`.
            checkpoint: recompute segments when back-propagating, to save memory.
            cuda_graph: capture the loop in a CUDA graph; ignored off CUDA.

        Raises:
            TimeGridError: if the grid isn't strictly increasing.
            DeviceMismatchError: if grid and initial law live on different devices.
        """
        check_time_grid(ts)
        x0 = self.initial.draw(tuple(sample_shape), generator)
        check_same_device(ts=ts, initial=x0)
        self.sde.check(ts[0].to(x0.dtype), x0)
        dw, memory0 = draw_increments(self.sde, x0, ts, generator)
        return self.drive(ts, x0, dw, memory0, method=method, checkpoint=checkpoint, cuda_graph=cuda_graph)

    def drive(
        self,
        ts: Tensor,
        x0: Tensor,
        dw: Tensor,
        memory0: Tensor | None = None,
        *,
        method: str = "euler",
        checkpoint: bool | int = False,
        cuda_graph: bool = False,
    ) -> PathSample:
        """Return the paths from ``x0 (*batch, d)`` along given increments ``dw (T-1, *batch, m * R)``."""
        run = integrate(
            self.sde, x0, ts, dw, memory0, method=method, checkpoint=checkpoint, cuda_graph=cuda_graph
        )
        channels = self.sde.noise_dim(ts[0].to(x0.dtype), x0)
        aux = {
            name: value.movedim(0, -2)
            for name, value in (("control", run.control), ("precision", run.precision))
            if value is not None
        }
        if run.memory is not None:
            aux["memory"] = run.memory.movedim(0, -3)
            if dw.shape[-1] > channels:
                aux["residual"] = dw[..., channels:].movedim(0, -2)
        return PathSample(ts, run.x.movedim(0, -2), dw[..., :channels].movedim(0, -2), aux, self)

    def controlled(self, u: Field | None = None, precision: Field | None = None) -> DiffusionMeasure:
        """Return the law whose driving noise has drift ``u(t, z) -> (..., m)``, and increments of extra ``precision``.

        ``z`` is ``x``, followed by the memory states where the noise has any. See :class:`stochdyn.core.sde.equation.Control`.
        """
        return DiffusionMeasure(self.initial, self.sde.controlled(u, precision))

    def reverse(self, score: Any, horizon: float = 1.0, initial: Any = None) -> DiffusionMeasure:
        """Return the time-reversed law on the clock ``horizon - t``.

        Args:
            score: ``score(t, x)`` of this law's marginals on the forward clock: a callable, or an object with a ``score`` method.
            horizon: the time that becomes 0.
            initial: the law at ``horizon``; if None, this law is simulated up to there whenever a start is drawn.
        """
        score_fn = score if callable(score) and not hasattr(score, "score") else score.score
        start = SimulatedMarginal(self, horizon) if initial is None else initial
        return DiffusionMeasure(start, self.sde.reverse(score_fn, horizon))

    def marginal(self, t: Tensor | float) -> SampledMarginal:
        """Return the law at time ``t`` of paths that start at time zero, by simulation in 200 steps."""
        horizon = float(t)

        def draw(sample_shape: tuple[int, ...], generator: Generator) -> Tensor:
            x0 = self.initial.draw((), as_generator(generator))
            ts = torch.linspace(0, horizon, 201, dtype=x0.dtype, device=x0.device)
            return self.sample(ts, sample_shape, as_generator(generator)).x[..., -1, :]

        return SampledMarginal(draw)

    def log_prob(self, path: PathSample) -> Tensor:
        """Return the Euler log density of paths, ``(*sample,)``, with that of a random start.

        Raises:
            SingularDiffusionError: if the diffusion is singular or the noise has memory: no density exists in state space.
        """
        self._check_path(path)
        return euler_log_prob(self.sde, self.initial, path.ts, path.x)

    def log_rn(
        self, path: PathSample, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        r"""Return :math:`\log dQ/dP` on given paths, Q being this law and P ``other``.

        Args:
            path: paths of either law (or of any third one that shares their equation).
            other: P, a DiffusionMeasure with the same diffusion.
            estimator: ``"density"``, the true log weight; ``"rate"``, only its conditional mean under Q; ``"stl"``, the true log
                weight with the low-noise gradient of :func:`stochdyn.core.law.girsanov.stl`. The last two mean something on
                paths of Q alone.
            recorded: take the control of the law that drew the paths as it was then (``path.aux``) rather than evaluate
                it again. It saves most of the time where the control is a network, and is right as long as that law hasn't
                changed since.

        Returns:
            ``(*sample,)``.

        Raises:
            DiffusionMismatchError: if the laws are mutually singular.
        """
        check_choice(estimator, girsanov.ESTIMATORS, "estimator")
        self._check_path(path)
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
        num_paths: int = 4096,
        generator: torch.Generator | None = None,
        estimator: str = "rate",
    ) -> Estimate:
        """Return KL(this || other) on the grid by simulation.

        Args:
            other: the second law.
            ts: ``(T,)`` grid.
            num_paths: number of paths of this law.
            generator: source of randomness.
            estimator: see :meth:`log_rn`; ``"rate"`` has the least noise.

        Raises:
            DiffusionMismatchError: if the laws are mutually singular.
        """
        check_positive_int(num_paths, "num_paths", 2)
        path = self.sample(ts, (num_paths,), generator)
        return Estimate.of(self.log_rn(path, other, estimator, recorded=True))

    def full_state(self, path: PathSample) -> Tensor:
        """Return the states that controls see, time leading: ``(T, *sample, d + m K)``."""
        memory = path.aux.get("memory")
        return full_state(path.leading(), None if memory is None else memory.movedim(-3, 0))

    def _check_path(self, path: PathSample) -> None:
        """Raise a typed error unless the path is finite and has the size of the start and of its grid."""
        check_time_grid(path.ts, "path.ts")
        check_ndim(path.x, tuple(range(2, 13)), "path.x", "(*sample, T, d)")
        check_event_size(path.x, self.initial.dim, "path.x")
        check_event_size(path.x, path.ts.shape[0], "path.x", axis=-2)
        check_finite(path.x.detach(), "path.x")
