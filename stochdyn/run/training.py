"""The steps of ``fit``: a :class:`~stochdyn.run.engine.Resumable` that owns everything a training run changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stochdyn._checks import check_type, values_unchecked
from stochdyn.errors import InvalidInputError, NonFiniteLossError
from stochdyn.objectives.base import ObjectiveValue
from stochdyn.run.callbacks import Callback
from stochdyn.run.data import Batches
from stochdyn.run.distributed import World
from stochdyn.run.ema import ParameterAverage
from stochdyn.run.encoding import pack, unpack
from stochdyn.run.engine import Resumable
from stochdyn.run.guard import FiniteGuard
from stochdyn.run.result import FitResult, LossLog
from stochdyn.run.setup import (
    SPEED_OPTIONS,
    Call,
    Options,
    ParameterWatch,
    check_loss,
    describe_optimizer,
    describe_scheduler,
    make_optimizer,
    make_scheduler,
)
from stochdyn.run.state import FitState

__all__ = ["Training"]


class _StepFunction(Callback):
    """A plain function among the callbacks."""

    def __init__(self, function: Callable[[FitState], Any]) -> None:
        if not callable(function):
            raise InvalidInputError(
                "a callback must be a Callback or a function", got=type(function).__name__
            )
        self._function = function

    def on_step(self, state: FitState) -> None:
        self._function(state)


class Training(Resumable[FitResult]):
    """One call of :func:`stochdyn.fit`: its objects, and all that changes from step to step.

    Callbacks see it through :attr:`view`.
    """

    def __init__(
        self,
        objective: nn.Module,
        batches: Batches,
        callbacks: Sequence[Callback | Callable[[FitState], Any]],
        optimizer: Callable[..., Optimizer] | None,
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        options: Options,
        world: World,
        device: torch.device,
        watch: ParameterWatch,
    ) -> None:
        parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        if not parameters:
            raise InvalidInputError(
                "the objective has no trainable parameters",
                got=type(objective).__name__,
                hint="they must be nn.Parameter of the module; bare pyro.param statements are not listed",
            )
        check_type(callbacks, Sequence, "callbacks", hint="put it in a list")
        self.objective, self.parameters, self.batches = objective, parameters, batches
        self.options, self.world, self.device = options, world, device
        self.total = options.steps
        self.callbacks = [c if isinstance(c, Callback) else _StepFunction(c) for c in callbacks]
        self.optimizer = make_optimizer(optimizer, list(parameters.values()), options.lr)
        self.scheduler = make_scheduler(scheduler, self.optimizer)
        self.average = None if options.ema is None else ParameterAverage(parameters, options.ema)
        self.log = LossLog()
        self.guard = FiniteGuard(parameters, self.optimizer, device, world)
        self.value: ObjectiveValue | None = None
        self.stop_requested = self.stopped = False
        self.view = FitState(self)
        self._watch: ParameterWatch | None = watch
        self._call = world.wrap(Call(objective))
        self._updating = False
        # Callbacks that are still to see the step done last, if the run ended between two of them.
        self._waiting = 0
        self._seen = False
        self._buffers = _Buffers(objective)

    def identity(self) -> dict[str, object]:
        """Return what the parameters at the end depend on, but for the number of steps."""
        options = self.options
        return {
            "objective": self.objective,
            **describe_optimizer(self.optimizer),
            **describe_scheduler(self.scheduler),
            "lr": options.lr,
            "batch_size": options.batch_size,
            "accumulate": options.accumulate,
            "precision": options.precision,
            "number of items": self.batches.items,
            "data": self.batches.source,
            "seed": options.seed,
            "clip_norm": options.clip_norm,
            "ema": options.ema,
            "number of ranks": self.world.size,
        }

    # ----------------------------------------------------------------------------------------- the steps
    @property
    def finished(self) -> bool:
        """Whether all updates are done or a callback's wish to stop was met."""
        return self.number >= self.options.steps or self.stopped

    @property
    def synchronised(self) -> bool:
        """Whether losses come to the host at this step: then all ranks talk to each other."""
        return self.world.size == 1 or self._looks

    @property
    def _looks(self) -> bool:
        """Whether losses come to the host at this step."""
        return self.number == self.options.steps or self.number % self.options.log_every == 0

    def start(self) -> None:
        """Tell the callbacks that it begins; those that an error kept from the last step see it first."""
        for callback in self.callbacks:
            callback.on_start(self.view)
        self._tell()

    def step(self) -> None:
        """One update, from one batch or the mean of several; nothing here waits for the device but what callbacks ask."""
        self.optimizer.zero_grad(set_to_none=True)
        value = self._differentiate()
        if self._watch is not None:
            self._watch.check(self.parameters)
            self._watch = None
        try:
            self.guard.inspect(value)
        except NonFiniteLossError as error:
            self._give_up(error)
            raise
        if self.options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.options.clip_norm)
        self._updating = True
        self.guard.update()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update(self.parameters, self.guard.alive)
        self._updating = False
        self.value = value
        self.log.add(value)
        self._buffers.note()
        self.number += 1
        self._waiting = len(self.callbacks)
        self._tell()
        if self._looks:
            self.gather()
        if self.synchronised:
            self.stopped = bool(self.world.agree(int(self.stop_requested), self.device))

    def _differentiate(self) -> ObjectiveValue:
        """Evaluate the objective on the batches of a step, and leave the gradient of the mean loss."""
        count, precision = self.options.accumulate, self.options.dtype
        values = []
        # On a GPU the values of arguments are looked at in the first step of a call alone: to look is to wait.
        quiet = self._seen and self.device.type != "cpu"
        self._seen = True
        for i in range(count):
            batch = self.batches.next()
            call = self._call
            with contextlib.ExitStack() as stack:
                if i + 1 < count and isinstance(call, DistributedDataParallel):
                    # Ranks exchange gradients once per update, with the last batch.
                    stack.enter_context(call.no_sync())
                if quiet:
                    stack.enter_context(values_unchecked())
                # Autocast to nothing would cost a little in every step.
                with (
                    torch.autocast(self.device.type, precision)
                    if precision is not None
                    else contextlib.nullcontext()
                ):
                    value = call(batch)
                check_loss(value.loss)
                values.append(value.detach())
                (value.loss if count == 1 else value.loss / count).backward()
        return values[0] if count == 1 else ObjectiveValue.mean(values)

    def _tell(self) -> None:
        """Show the step to the callbacks that haven't seen it."""
        while self._waiting:
            self.callbacks[len(self.callbacks) - self._waiting].on_step(self.view)
            self._waiting -= 1

    def end(self) -> None:
        """Tell the callbacks that it is over."""
        self.gather()
        for callback in self.callbacks:
            callback.on_end(self.view)

    # --------------------------------------------------------------------------------- losses and results
    def gather(self) -> None:
        """Bring pending losses to the host and look for a bad step.

        Raises:
            NonFiniteLossError: If one of them was not finite.
        """
        if not self.log.pending:
            return
        try:
            self.guard.look()
        except NonFiniteLossError as error:
            self._give_up(error)
            raise
        self.log.gather(self.world.mean)

    def _give_up(self, error: NonFiniteLossError) -> None:
        """Keep the finite steps of the log, and hang the result on the error."""
        finite = (error.step or 1) - 1 - len(self.log.losses)
        self.log.gather(self.world.mean, limit=max(finite, 0))
        # Found out late, the optimiser's statistics and the random state are those of a later step.
        self.intact = self.guard.immediate
        self.number = len(self.log.losses)
        error.result = self.report()

    def describe(self) -> Mapping[str, Any]:
        """Return the mean of the last losses that are on the host."""
        recent = self.log.losses[-self.options.log_every :]
        return {"loss": f"{recent.mean():.5g}"} if len(recent) else {}

    def report(self) -> FitResult:
        """Return what has been done so far."""
        if self.world.size == 1 and self.intact:
            self.gather()
        average = None if self.average is None else {n: v.clone() for n, v in self.average.values.items()}
        return FitResult(
            losses=self.log.losses.clone(),
            objective=self.objective,
            seconds=self.seconds,
            terms={n: v.clone() for n, v in self.log.terms.items()},
            steps=self.number,
            bound=self.log.bound,
            stopped_early=self.stopped,
            interrupted=self.interrupted,
            ema=average,
        )

    # -------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on. Every rank must call this at the same step."""
        self.gather()
        ranks = [unpack(b) for b in self.world.gather_bytes(pack(self.batches.state_dict()), self.device)]
        return {
            "objective": dict(self.objective.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "log": self.log.state_dict(),
            "callbacks": {n: s for n, c in self._named_callbacks().items() if (s := c.state_dict())},
            "waiting": self._waiting,
            "batches": ranks,
            "stop": [self.stop_requested, self.stopped],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; options of the optimiser that follow the device stay those given."""
        self.objective.load_state_dict(state["objective"])
        given = [{k: g[k] for k in SPEED_OPTIONS if k in g} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, given, strict=True):
            group.update(own)
        _take_layout(self.optimizer)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        self.log.load_state_dict(state["log"])
        for name, callback in self._named_callbacks().items():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        self._waiting = min(int(state["waiting"]), len(self.callbacks))
        self.stop_requested, self.stopped = state["stop"]
        self.guard = FiniteGuard(self.parameters, self.optimizer, self.device, self.world, self.number)
        self.batches.load_state_dict(state["batches"][self.world.rank])

    def keep(self) -> Any:
        """Return the place in the data, and the buffers that evaluations change."""
        return self.batches.state_dict(), self._buffers.keep()

    def put_back(self, kept: Any) -> bool:
        """Undo an evaluation; a failed update can't be undone."""
        batches, buffers = kept
        self.optimizer.zero_grad(set_to_none=True)
        self.batches.load_state_dict(batches)
        return self._buffers.put_back(buffers) and not self._updating

    def _named_callbacks(self) -> dict[str, Callback]:
        """Callbacks by class and count, so that adding one of another class moves no other's state."""
        named: dict[str, Callback] = {}
        for callback in self.callbacks:
            kind = type(callback).__name__
            number = sum(1 for name in named if name.split("#")[0] == kind)
            named[f"{kind}#{number}"] = callback
        return named


class _Buffers:
    """Buffers that an evaluation changes (running means, counters), so that a failed one can be undone.

    Which they are shows in torch's count of changes of each: only those are copied before a step.
    """

    def __init__(self, objective: nn.Module) -> None:
        self._objective = objective
        self._all = [b for b in objective.buffers() if not b.is_inference()]
        self._moving: list[int] = []
        self._versions: list[int] = []

    def keep(self) -> list[Tensor]:
        self._versions = [b._version for b in self._all]
        return [self._all[i].detach().clone() for i in self._moving]

    def note(self) -> None:
        """After a step: take down what it has changed."""
        moved = [i for i, b in enumerate(self._all) if b._version != self._versions[i]]
        if moved != self._moving:
            self._moving = sorted({*moved, *self._moving})

    @torch.no_grad()
    def put_back(self, kept: list[Tensor]) -> bool:
        """Undo what a step did; return whether that was possible."""
        moved = {i for i, b in enumerate(self._all) if b._version != self._versions[i]}
        for i, value in zip(self._moving, kept, strict=True):
            self._all[i].copy_(value)
        same = [id(b) for b in self._all] == [
            id(b) for b in self._objective.buffers() if not b.is_inference()
        ]
        return same and moved <= set(self._moving)


def _take_layout(optimizer: Optimizer) -> None:
    """Lay moments out in memory as their parameters are: a fused optimiser relies on it, and files don't keep it."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if alike and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
