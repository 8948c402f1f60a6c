"""The state of a running ``fit``: what callbacks see and what a checkpoint holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stochdyn.errors import NonFiniteLossError
from stochdyn.objectives.base import ObjectiveValue
from stochdyn.run.checkpoint import Checkpoint, fingerprint
from stochdyn.run.data import Batches
from stochdyn.run.distributed import World
from stochdyn.run.ema import ParameterAverage
from stochdyn.run.encoding import pack, unpack
from stochdyn.run.guard import FiniteGuard
from stochdyn.run.randomness import capture_random_state, restore_random_state
from stochdyn.run.result import FitResult, LossLog

if TYPE_CHECKING:
    from stochdyn.run.callbacks import Callback

__all__ = ["FitState"]


class FitState:
    """A run of :func:`stochdyn.fit` in progress.

    Attributes:
        objective: the objective, as it was given.
        optimizer: the optimiser.
        scheduler: the learning-rate scheduler, or None.
        step: number of steps done.
        steps: number of steps wanted.
        value: the :class:`~stochdyn.ObjectiveValue` of the last step, on the device; None before the first.
        device: where the run computes.
        average: the running average of the parameters, or None.
        stop_requested: a callback has asked to stop; stopped: and the run obeyed.
        log: losses and terms so far; guard: the watch for NaN. Both belong to the loop.
    """

    def __init__(
        self,
        objective: nn.Module,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        average: ParameterAverage | None,
        batches: Batches,
        callbacks: list[Callback],
        steps: int,
        device: torch.device,
        world: World,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.step = 0
        self.steps = steps
        self.value: ObjectiveValue | None = None
        self.device = device
        self._parameters = parameters
        self.average = average
        self._batches = batches
        self._callbacks = callbacks
        self._world = world
        self.log = LossLog()
        self.guard = FiniteGuard(parameters, optimizer, device, world)
        self.stop_requested = False
        self.stopped = False
        self._seconds = 0.0
        self._started = time.perf_counter()

    @property
    def is_main(self) -> bool:
        """Whether this process should print and write."""
        return self._world.is_main

    @property
    def losses(self) -> Tensor:
        """Losses of all steps so far on the CPU; waits for the device. All ranks must ask at one step."""
        self.gather()
        return self.log.losses

    @property
    def terms(self) -> dict[str, Tensor]:
        """Terms of all steps so far on the CPU; waits for the device."""
        self.gather()
        return self.log.terms

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """Averaged parameters by name; None without ``ema``."""
        return None if self.average is None else self.average.values

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run so far, earlier parts of a resumed run included."""
        return self._seconds + time.perf_counter() - self._started

    def request_stop(self) -> None:
        """End the run after this step (under data-parallel training, when losses are next gathered)."""
        self.stop_requested = True

    def gather(self) -> None:
        """Bring pending losses to the host and look for a bad step.

        Raises:
            NonFiniteLossError: if one of them was not finite.
        """
        if not self.log.pending:
            return
        try:
            self.guard.look()
        except NonFiniteLossError as error:
            self.give_up(error)
            raise
        self.log.gather(self._world.mean)

    def give_up(self, error: NonFiniteLossError) -> None:
        """Keep the finite steps of the log, and hang the result on the error."""
        finite = (error.step or 1) - 1 - len(self.log.losses)
        self.log.gather(self._world.mean, limit=max(finite, 0))
        self.step = len(self.log.losses)
        error.result = self.result()

    def result(self, interrupted: bool = False) -> FitResult:
        """Return what has been done so far."""
        ema = None if self.ema is None else {n: v.clone() for n, v in self.ema.items()}
        return FitResult(
            losses=self.log.losses.clone(),
            objective=self.objective,
            seconds=self.seconds,
            terms={n: v.clone() for n, v in self.log.terms.items()},
            steps=self.step,
            bound=self.log.bound,
            stopped_early=self.stopped,
            interrupted=interrupted,
            ema=ema,
        )

    def checkpoint(self, settings: dict[str, Any]) -> Checkpoint:
        """Return everything that the next step depends on. Every rank must call this at the same step."""
        self.gather()
        own = {"random": capture_random_state(self.device), "data": self._batches.state_dict()}
        ranks = [unpack(b) for b in self._world.gather_bytes(pack(own), self.device)]
        state = {
            "settings": settings,
            "objective": dict(self.objective.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "log": self.log.state_dict(),
            "callbacks": self._callback_states(),
            "ranks": ranks,
            "seconds": self.seconds,
            "stop": [self.stop_requested, self.stopped],
        }
        return Checkpoint("training", self.step, fingerprint(self.objective), state)

    def restore(self, content: Checkpoint) -> None:
        """Continue from :meth:`checkpoint`; random state last, so that the next draw is the one after it."""
        state = content.state
        self.step = content.step
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        _take_layout(self.optimizer)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        self.log.load_state_dict(state["log"])
        for name, callback in self._named_callbacks().items():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        self._seconds = state["seconds"]
        self.stop_requested, self.stopped = state["stop"]
        self.guard = FiniteGuard(self._parameters, self.optimizer, self.device, self._world, self.step)
        own = state["ranks"][self._world.rank]
        self._batches.load_state_dict(own["data"])
        restore_random_state(own["random"], self.device)

    def _named_callbacks(self) -> dict[str, Callback]:
        """Callbacks by class and count, so that adding one of another class moves no other's state."""
        named: dict[str, Callback] = {}
        for callback in self._callbacks:
            kind = type(callback).__name__
            number = sum(1 for name in named if name.split("#")[0] == kind)
            named[f"{kind}#{number}"] = callback
        return named

    def _callback_states(self) -> dict[str, Any]:
        return {name: s for name, c in self._named_callbacks().items() if (s := c.state_dict())}


def _take_layout(optimizer: Optimizer) -> None:
    """Lay moments out in memory as their parameters are: a fused optimiser relies on it, and files don't keep it."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if alike and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
