"""The steps of a run, and its saves and ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from stochdyn.errors import CheckpointWriteError, InvalidInputError, NonFiniteLossError
from stochdyn.objectives.base import ObjectiveValue
from stochdyn.run.callbacks import Callback
from stochdyn.run.checkpoint import (
    check_fingerprint,
    fingerprint,
    prepare_folder,
    read_checkpoint,
    write_checkpoint,
)
from stochdyn.run.data import Batches
from stochdyn.run.distributed import World
from stochdyn.run.ema import ParameterAverage
from stochdyn.run.encoding import encode
from stochdyn.run.interrupt import DeferredInterrupt, FitInterrupted
from stochdyn.run.result import FitResult
from stochdyn.run.setup import Call, Options, ParameterWatch, check_loss, make_optimizer, make_scheduler
from stochdyn.run.state import FitState

__all__ = ["Run"]


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


class Run:
    """One call of :func:`stochdyn.fit`: its objects, put together."""

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
        self.parameters, self.batches, self.options, self.world = parameters, batches, options, world
        self.watch: ParameterWatch | None = watch
        self.callbacks = [c if isinstance(c, Callback) else _StepFunction(c) for c in callbacks]
        made = make_optimizer(optimizer, list(parameters.values()), options.lr)
        schedule = make_scheduler(scheduler, made)
        average = None if options.ema is None else ParameterAverage(parameters, options.ema)
        self.state = FitState(
            objective,
            parameters,
            made,
            schedule,
            average,
            batches,
            self.callbacks,
            options.steps,
            device,
            world,
        )
        self.settings = options.identity(made, schedule, batches.items, world.size)
        self.saved_step: int | None = None

    def open_checkpoint(self, folder: Path, resume: bool) -> None:
        """Make sure, before any work, that saving will succeed; continue from what is there if asked to."""
        self._on_main(lambda: prepare_folder(folder))
        encode(self.state.checkpoint(self.settings).state, "state", {})
        content = read_checkpoint(folder) if resume else None
        if content is None:
            return
        check_fingerprint(folder, {"kind": content.kind}, {"kind": "training"})
        check_fingerprint(folder, content.fingerprint, fingerprint(self.state.objective))
        check_fingerprint(folder, content.state["settings"], self.settings)
        self.state.restore(content)
        self.saved_step = content.step

    def save(self) -> None:
        """Write a checkpoint of this step, on the main rank, unless there is one."""
        folder = self.options.folder
        if folder is None or self.saved_step == self.state.step:
            return
        content = self.state.checkpoint(self.settings)
        self._on_main(lambda: write_checkpoint(folder, content))
        self.saved_step = self.state.step

    def _on_main(self, action: Callable[[], None]) -> None:
        """Act on the main rank; if that fails, every rank fails."""
        failure: Exception | None = None
        if self.world.is_main:
            try:
                action()
            except Exception as error:
                failure = error
        failed = self.world.agree(int(failure is not None), self.state.device)
        if failure is not None:
            raise failure
        if failed:
            raise CheckpointWriteError(
                "the main rank couldn't write the checkpoint", hint="its error says why"
            )

    def train(self, interrupt: DeferredInterrupt) -> FitResult:
        """Run to the end, to a callback's stop, or to Ctrl-C."""
        state, options = self.state, self.options
        call = self.world.wrap(Call(state.objective))
        hidden = not (options.progress and self.world.is_main)
        with tqdm(total=options.steps, initial=state.step, disable=hidden) as bar:
            for callback in self.callbacks:
                callback.on_start(state)
            interrupted = False
            while state.step < options.steps and not state.stopped and not interrupted:
                self.step(call)
                for callback in self.callbacks:
                    callback.on_step(state)
                look = state.step == options.steps or state.step % options.log_every == 0
                if look:
                    state.gather()
                    if not hidden:
                        recent = state.losses[-options.log_every :]
                        bar.set_postfix(loss=f"{recent.mean():.5g}", refresh=False)
                bar.update()
                # Ranks may see Ctrl-C, or a callback a clock, at different steps: they agree when they look.
                if self.world.size == 1 or look:
                    code = self.world.agree(
                        2 if interrupt.requested else int(state.stop_requested), state.device
                    )
                    interrupted, state.stopped = code == 2, code == 1
                if state.step % options.checkpoint_every == 0:
                    self.save()
            self.save()
            state.gather()
            for callback in self.callbacks:
                callback.on_end(state)
        result = state.result(interrupted)
        if interrupted and options.on_interrupt == "raise":
            where = "" if options.folder is None else f"; the checkpoint {options.folder} holds it"
            raise FitInterrupted(f"interrupted after step {state.step} of {options.steps}{where}", result)
        return result

    def step(self, call: nn.Module) -> None:
        """One batch, one gradient, one update; nothing here waits for the device."""
        state = self.state
        batch = self.batches.next()
        state.optimizer.zero_grad(set_to_none=True)
        loss, terms, bound = call(batch)
        check_loss(loss)
        state.value = ObjectiveValue(loss.detach(), terms, bound)
        state.log.add(state.value)
        loss.backward()
        if self.watch is not None:
            self.watch.check(self.parameters)
            self.watch = None
        try:
            state.guard.inspect(state.value)
        except NonFiniteLossError as error:
            state.give_up(error)
            raise
        if self.options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.options.clip_norm)
        state.guard.update()
        if state.scheduler is not None:
            state.scheduler.step()
        if state.average is not None:
            state.average.update(self.parameters, state.guard.alive)
        state.step += 1
