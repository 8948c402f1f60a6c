"""Refinement of a mechanism that is seen in part: bridges with hidden components, and steps of Newton's method on their draws."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.hidden import HiddenStateBridge
from stochdyn.bridges.refinement.history import History
from stochdyn.bridges.refinement.linear_response import (
    DrawsMap,
    flatten,
    iteration_jacobian,
    parameter_jacobian,
    solve_scaled,
    with_coordinates,
)
from stochdyn.bridges.refinement.loop import STILL, AlternatingLoop, Task
from stochdyn.bridges.refinement.methods import Messages
from stochdyn.bridges.refinement.projection import drift_at, drift_shift, path_gain, project_drift, whitening
from stochdyn.errors import ApproximationWarning, ConvergenceWarning, InvalidInputError, NonFiniteError

__all__ = ["MessagesLoop"]

# Newton's method is for this many parameters at most, and begins where an iteration moves them by fewer standard errors than this.
_MAX_PARAMETERS, _NEAR = 20, 5.0
# No direction counts as holding less than this share of the information that paths would have: no step is longer than its inverse.
_LEAST = 0.005
# Newton's steps shrink faster than this; where they don't, they are the Monte Carlo error of the draws.
_JITTER = 0.5
NOISE = "the parameters move by no more than other draws of the hidden components move them"
# Steps on one set of draws, and halvings of a step that makes the objective rise.
_STEPS, _HALVINGS = 3, 4


class MessagesLoop(AlternatingLoop):
    r"""Bridge with hidden components, and projection, in turn.

    Iterations alone are slow in directions that hidden components leave open: what is missing there is as much as what was found. Near the
    end the step is that of Newton's method therefore, :math:`(I-J)^{-1}(T(\theta)-\theta)` for an iteration :math:`T` of Jacobian :math:`J` on the
    draws as they are, and the run stops where that step is small in units of the parameters' own posterior, or no longer shrinks: then it is
    what other draws do, and the answer is the mean of the last two.

    Args:
        task: The task: data, family and options.
        method: The method by which bridges are built.
        result: A function that makes the result from family, bridge and history.
    """

    def __init__(
        self, task: Task, method: Messages, result: Callable[[DriftFamily, HiddenStateBridge, History], Any]
    ) -> None:
        super().__init__(task, method.population)
        self.method, self.result = method, result
        like = task.snapshots.samples[0]
        self.initial = tuple(
            torch.as_tensor(v, dtype=like.dtype, device=like.device)
            for v in (method.initial_mean, method.initial_cov)
        )
        self.size, self.moved, self.near = flatten(self.family).numel(), math.nan, False
        self._bridge: HiddenStateBridge | None = None
        self._check_driven()

    def _check_driven(self) -> None:
        """Refuse families whose parameters change the drift of what has no noise of its own: no law of paths could be compared."""
        spread = self._spread()
        white = whitening(spread)
        if len(white) == len(spread):
            return
        x = self.initial[0].expand(3, -1) + torch.arange(3).to(self.initial[0])[:, None]
        slope = parameter_jacobian(self.family, self.task.snapshots.times[0].to(x), x)[1]
        beyond = slope - torch.linalg.pinv(white) @ white @ slope
        if bool(beyond.abs().max() > 1e-6 * slope.abs().max()):
            raise InvalidInputError(
                "the drift of components without noise of their own must be known",
                got="a family whose parameters change it",
                hint="keep, say, dx = v dt without parameters, or give these components noise",
            )

    def _spread(self) -> Tensor:
        from stochdyn.bridges.laws.reference import spread_of

        return spread_of(self.task.diffusion, self.task.snapshots, len(self.initial[0]), reach=True)

    @property
    def bridge(self) -> HiddenStateBridge:
        """The bridge of the present reference, which follows from its parameters."""
        if self._bridge is None:
            self._bridge = self._build(self.family, self.task.seed)
        return self._bridge

    def _build(self, family: DriftFamily, seed: int) -> HiddenStateBridge:
        task = self.task
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last one speaks for itself
            warnings.simplefilter("ignore", ApproximationWarning)
            return self.method.bridge(
                task.snapshots, family, task.diffusion, task.dt, (self.initial[0], self.initial[1]), seed
            )

    def step(self) -> None:
        """Project on the family, or go on to where projections lead, and on the first law; the next bridge follows."""
        clock, bridge, task = time.process_time(), self.bridge, self.task
        generator = torch.Generator(task.snapshots.device).manual_seed(task.seed)
        nodes = bridge.nodes(self.method.num_nodes, generator)
        family = copy.deepcopy(self.family)
        project_drift(
            family, nodes, bridge.spread, population=self.population,
            projection=self.method.projection, seed=task.seed,
        )  # fmt: skip
        before, after = drift_at(self.family, nodes), drift_at(family, nodes)
        gain = float(path_gain(before, after, nodes, bridge.spread))
        moved = math.sqrt(self.population * drift_shift(before, after, nodes, bridge.spread) / self.size)
        newton = self.size <= _MAX_PARAMETERS and moved < _NEAR and family.log_prior() is None
        if newton:
            family, moved = self._newton(bridge, family)
        if self.method.learn_initial:
            mean, cov = bridge.moments(0)
            self.initial = (mean, cov + 1e-6 * torch.diag(cov.diagonal()))
        error, noise = float(bridge.marginal_errors.max()), float(bridge.spread.diagonal().mean().sqrt())
        self._record(float(bridge.objective), gain, error, family, noise, clock)
        if moved < task.tolerance and (newton or moved == 0):
            self.history.stopped = STILL
        elif newton and self.near and _JITTER * self.moved < moved < 1:
            # the step doesn't shrink any more as Newton's does: each set of draws has a fixed point of its own
            self.history.stopped = NOISE
            family = with_coordinates(family, 0.5 * (flatten(family) + flatten(self.family)))
        self.family, self._bridge, self.moved, self.near = family, None, moved, newton

    def _newton(self, bridge: HiddenStateBridge, image: DriftFamily) -> tuple[DriftFamily, float]:
        """Return the fixed point of iterations on the draws of a bridge, and how far it is in standard deviations of the posterior.

        Where no step makes the objective fall, the image of an iteration is returned.
        """
        step = DrawsMap(bridge, self.family)
        origin, best = flatten(self.family), float(bridge.objective)
        gram, moment = step.moments()
        jacobian = iteration_jacobian(step, origin, gram, self.population)
        inverse, observed = self._inverse(gram, jacobian)
        theta, ahead = origin, solve_scaled(gram, moment)
        for _ in range(_STEPS):
            # one step of Newton's method with the first Jacobian: theta + (I - J)^{-1} (T(theta) - theta)
            leap = inverse @ (ahead - (theta - origin))
            found = self._descend(bridge, theta, leap, best)
            if found is None:
                break
            theta, best = found
            if self._units(leap, observed) < 0.1 * self.task.tolerance:
                break
            ahead = solve_scaled(*step.moved(with_coordinates(self.family, theta)))
        if theta is origin:
            return image, self._units(flatten(image) - origin, observed)
        return with_coordinates(self.family, theta), self._units(theta - origin, observed)

    def _inverse(self, gram: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """Return :math:`(I-J)^{-1}` and the information of the snapshots, with no direction below a least share of that of paths."""
        factor = torch.linalg.cholesky(gram)
        half = torch.linalg.solve_triangular(
            factor, gram @ (torch.eye(len(gram)).to(gram) - jacobian), upper=False
        )
        kept = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        shares, vectors = torch.linalg.eigh(0.5 * (kept + kept.mT))
        shares = shares.clamp_min(_LEAST)
        basis = factor @ vectors
        dual = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
        return (dual / shares) @ basis.mT, (basis * shares) @ basis.mT

    def _units(self, shift: Tensor, observed: Tensor) -> float:
        """The size of a shift of the parameters: the root mean square over parameters, in standard deviations of the posterior."""
        return math.sqrt(self.population * float(shift @ observed @ shift) / self.size)

    def _descend(
        self, bridge: HiddenStateBridge, theta: Tensor, leap: Tensor, bound: float
    ) -> tuple[Tensor, float] | None:
        """Return the first point along a leap that is no worse, and its objective, on the draws of a bridge; None if there is none."""
        slack = 0.5 * self.size * self.task.tolerance**2 / self.population
        for k in range(_HALVINGS):
            trial = theta + 0.5**k * leap
            try:
                law = bridge._moved(with_coordinates(self.family, trial))
            except (NonFiniteError, ValueError):
                continue
            if float(law.objective) <= bound + slack:
                return trial, float(law.objective)
        return None

    def check(self) -> None:
        """Warn if the draws were too few: where other ones would move the answer by more than half a standard deviation of the posterior."""
        if (
            self.size > _MAX_PARAMETERS
            or self.family.log_prior() is not None
            or self.history.stopped != STILL
        ):
            return  # where the run hasn't ended yet, that is what moves the answer
        fresh = DrawsMap(self._build(self.family, self.task.seed + 1), self.family)
        gram, moment = fresh.moments()
        inverse, observed = self._inverse(
            gram, iteration_jacobian(fresh, flatten(self.family), gram, self.population)
        )
        rough = self._units(inverse @ solve_scaled(gram, moment), observed)
        if rough > 0.5:
            warnings.warn(
                f"Monte Carlo error of the hidden components is {rough:.2g} standard deviations of the parameters. "
                f"Give more than num_hidden={self.method.num_hidden}",
                ApproximationWarning,
                stacklevel=4,
            )

    def describe(self) -> dict[str, Any]:
        """Return how far the parameters moved last, in standard errors."""
        return {"moved": f"{self.moved:.2g}"}

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain data and tensors."""
        return {**super().state(), "initial": list(self.initial), "moved": self.moved, "near": self.near}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        super().load_state(state)
        self.initial = tuple(v.to(self.task.snapshots.device) for v in state["initial"])
        self.moved, self.near, self._bridge = state["moved"], state["near"], None

    def report(self) -> Any:
        """Return the result so far."""
        self._end(float(self.bridge.objective))
        return self.result(self.family, self.bridge, self.history)
