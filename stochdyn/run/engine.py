"""The one engine for long runs: it owns the bar, the checkpoint, the identity, Ctrl-C, failures and resumption.

Whatever runs longer than seconds is a :class:`Resumable`, which says what its state is, how to take a step and what its
result is, and goes through :func:`run_to_end`. :func:`stochdyn.fit` is its first user.
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from stochdyn._checks import check_bool, check_callable, check_choice, check_positive_int, check_type
from stochdyn.errors import (
    CheckpointError,
    CheckpointWriteError,
    DamagedCheckpointError,
    InvalidInputError,
    LostProcessError,
)
from stochdyn.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from stochdyn.run.distributed import World
from stochdyn.run.encoding import encode, map_tensors, pack, unpack
from stochdyn.run.folder import claimed
from stochdyn.run.identity import Identity, check_same_run
from stochdyn.run.interrupt import DeferredInterrupt, Interrupted
from stochdyn.run.progress import progress_bar
from stochdyn.run.randomness import OwnRandomness

__all__ = ["Resumable", "run_to_end"]

Result = TypeVar("Result")

# Seconds between looks at what the bar shows.
_LOOK = 0.1
# What a state of the right file and the wrong content may raise where it is taken over.
_MISFITS = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)


class Resumable(ABC, Generic[Result]):
    """A long computation in steps, as :func:`run_to_end` runs it.

    A subclass implements :meth:`state`, :meth:`load_state`, :meth:`step`, :meth:`report` and :attr:`finished`. The state
    is everything that the next step depends on and everything that the result needs, in nested dicts, lists and tuples of
    tensors, numbers and text: objects that the run made itself (starting points, statistics, schedules, histories)
    included. Random numbers may come from a ``torch.Generator`` that is seeded from the run's seed and the number of the
    step, or from the global generators, which belong to the run while it runs and are kept in its checkpoint.

    Attributes:
        total: Where the bar ends: a number of steps, or whatever :attr:`position` counts; None if unknown.
        unit: What the bar counts.
        number: The number of steps have been done, those before a resumption included; set by the engine.
        seconds: The wall-clock time of the run so far, earlier parts included; set by the engine.
        interrupted: Whether Ctrl-C ended the run; set by the engine before it asks for the report.
        intact: Whether the state may be saved; a run that learns late that an earlier step went wrong sets it to False.
        world: The processes that run together, one by default.
    """

    total: float | None = None
    unit: str = "step"
    number: int = 0
    interrupted: bool = False
    intact: bool = True
    world: World = World()
    _spent: float = 0.0
    _since: float | None = None

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return all that the next step and the report depend on. The engine copies the tensors."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned; its tensors come on the CPU."""

    @abstractmethod
    def step(self) -> None:
        """Do one step. If it raises, the engine puts the state back to what it was before.

        A step that ends with functions of the user's may add one to ``number`` before it calls them: an error of theirs
        then leaves the step as done.
        """

    @abstractmethod
    def report(self) -> Result:
        """Return the result so far."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether there is nothing more to do. The engine asks before every step, so also of a resumed run."""

    @property
    def position(self) -> float:
        """Where the bar stands, in the units of :attr:`total`: the number of steps unless a run counts something else."""
        return self.number

    def describe(self) -> Mapping[str, Any]:
        """Return by name what the bar shows at its right; asked ten times per second at most."""
        return {}

    def start(self) -> None:
        """Called once before the first step of this call, after a checkpoint has been taken over."""

    def end(self) -> None:
        """Called once after the last step and its checkpoint, after Ctrl-C too, but not after an error."""

    def keep(self) -> Any:
        """Return what :meth:`put_back` needs to undo the step that comes: here a copy of the state.

        A run whose steps take less than some milliseconds, or whose state is large, does that more cheaply.
        """
        return map_tensors(lambda x: x.detach().clone(), self.state())

    def put_back(self, kept: Any) -> bool:
        """After a failed step go back to before it; return whether the state is whole, so that it may be saved."""
        self.load_state(kept)
        return True

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run so far, in seconds, earlier parts of a resumed run included."""
        return self._spent + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def synchronised(self) -> bool:
        """Whether all processes of a data-parallel run are at a step at which they may talk to each other."""
        return True


def run_to_end(
    job: Resumable[Result],
    what: str,
    *,
    identity: Mapping[str, object] | None = None,
    randomness: OwnRandomness | int | None = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int = 1,
    stop: Callable[[Any], bool] | None = None,
    on_interrupt: Literal["raise", "return"] = "raise",
) -> Result:
    """Run a job to its end, and keep what it did whatever happens.

    * **Progress**: a bar appears after two seconds, with what :meth:`Resumable.describe` says.
    * **Checkpoint**: in a directory, atomically and without pickle, every ``checkpoint_every`` steps, at the end, after
      Ctrl-C and after an error. The directory belongs to one run at a time.
    * **Resumption** to the same bits as if the run had never stopped: the job's state and the random state are put back.
      A checkpoint of another run, by ``identity`` (see :mod:`stochdyn.run.identity`), is refused.
    * **Ctrl-C** waits for the end of the step; then :class:`Interrupted` has the result so far. A second one stops at
      once, with the result of the steps before.
    * **An exception** in a step goes through to the caller; the state before that step is saved, and the exception's
      ``result`` has the result so far.
    * **Randomness**: inside, the global generators of Python, NumPy and torch belong to the run; afterwards they are as
      they were. Runs in several threads take turns step by step and give the numbers that each gives alone.

    Args:
        job: What to run.
        what: The name of the run, such as ``"evolve"``: at the bar's left, in messages, and as the kind of its
            checkpoints.
        identity: By name, everything that the answer depends on: data, models, options, functions. What may change when
            a run is continued, such as its length, stays out.
        randomness: The seed of the run, or an :class:`OwnRandomness` that was used while the job was made.
        device: Where the job computes, if ``randomness`` is a seed.
        progress: Whether to show a bar.
        checkpoint: The directory for checkpoints, made if need be. One that is there already is replaced at the first
            save unless ``resume`` is set.
        resume: Whether to continue the run in ``checkpoint``; a fresh run if there is none.
        checkpoint_every: The number of steps between saves.
        stop: A function that is called with the job after every step; true ends the run there.
        on_interrupt: What happens after Ctrl-C: ``"raise"`` raises :class:`Interrupted` after Ctrl-C, ``"return"``
            returns the result so far.

    Returns:
        The job's report.

    Raises:
        InvalidInputError: For arguments that can't work; before any step.
        CheckpointInUseError: If another run has the directory.
        CheckpointWriteError: If a checkpoint can't be written; the previous one is whole.
        DamagedCheckpointError: If the checkpoint to resume was cut short or altered.
        ForeignCheckpointError: If it belongs to another run; the message names what differs.
        LostProcessError: If another rank, or a process of an executor, has died; the last checkpoint is whole.
        Interrupted: After Ctrl-C.

    Example:
        A power iteration, and its resumption. The public function checks its arguments, makes the job and runs it.

        >>> import tempfile
        >>> class PowerIteration(Resumable[float]):
        ...     def __init__(self, matrix, steps):
        ...         self.matrix, self.total = matrix, steps
        ...         self.vector = torch.randn(len(matrix), dtype=matrix.dtype)
        ...         self.value = float("nan")
        ...     @property
        ...     def finished(self):
        ...         return self.number >= self.total
        ...     def step(self):
        ...         image = self.matrix @ self.vector
        ...         self.value = float(image @ self.vector / self.vector.square().sum())
        ...         self.vector = image / image.norm()
        ...     def state(self):
        ...         return {"vector": self.vector, "value": self.value}
        ...     def load_state(self, state):
        ...         self.vector, self.value = state["vector"].to(self.matrix.device), state["value"]
        ...     def describe(self):
        ...         return {"value": f"{self.value:.4g}"}
        ...     def report(self):
        ...         return self.value
        >>> def largest_eigenvalue(matrix, steps=50, seed=0, progress=True, checkpoint=None, resume=False):
        ...     own = OwnRandomness(seed)
        ...     with own:
        ...         job = PowerIteration(matrix, steps)
        ...     return run_to_end(
        ...         job, "largest_eigenvalue", identity={"matrix": matrix, "seed": seed}, randomness=own,
        ...         progress=progress, checkpoint=checkpoint, resume=resume, checkpoint_every=10,
        ...     )
        >>> matrix = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> folder = tempfile.mkdtemp()
        >>> half = largest_eigenvalue(matrix, steps=5, checkpoint=folder)
        >>> whole = largest_eigenvalue(matrix, steps=50, checkpoint=folder, resume=True)
        >>> whole == largest_eigenvalue(matrix, steps=50)
        True
        >>> largest_eigenvalue(2 * matrix, checkpoint=folder, resume=True)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        stochdyn.errors.ForeignCheckpointError: the checkpoint ... belongs to another run; got matrix is ...
    """
    check_type(job, Resumable, "job")
    check_type(what, str, "what")
    if identity is not None:
        check_type(identity, Mapping, "identity")
    check_bool(progress, "progress")
    check_bool(resume, "resume")
    check_positive_int(checkpoint_every, "checkpoint_every")
    check_choice(on_interrupt, ("raise", "return"), "on_interrupt")
    if stop is not None:
        check_callable(stop, "stop")
    folder = as_folder(checkpoint, resume)
    if not isinstance(randomness, OwnRandomness):
        randomness = OwnRandomness(randomness, device)
    run = _Run(job, what, folder, randomness, identity or {}, checkpoint_every)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            run.on_main(lambda: stack.enter_context(claimed(folder)))
        stack.enter_context(randomness)
        interrupt = stack.enter_context(DeferredInterrupt())
        job._since = time.perf_counter()
        try:
            if folder is not None:
                run.open(resume)
            run.go(interrupt, progress, stop)
        except KeyboardInterrupt:
            job.interrupted = True
            raise Interrupted(run.message("interrupted"), job.report()) from None
        except Exception as error:
            if interrupt.requested and isinstance(error, LostProcessError):
                # A terminal's Ctrl-C goes to the processes of an executor too.
                job.interrupted = True
                raise Interrupted(run.message("interrupted"), job.report()) from None
            if job.world.is_lost(error):
                lost = LostProcessError(
                    "another rank has died",
                    hint="see what it said, and start all of them again; with checkpoint=... and resume=True they go on from "
                    "the last save",
                )
                run.explain(lost)
                raise lost from error
            run.explain(error)
            raise
        finally:
            job._spent, job._since = job.seconds, None
        if job.interrupted and on_interrupt == "raise":
            raise Interrupted(run.message("interrupted"), job.report())
        return job.report()


def as_folder(checkpoint: object, resume: bool, name: str = "checkpoint") -> Path | None:
    """Return the directory of a run's checkpoints, or None.

    Raises:
        InvalidInputError: If it isn't a path, or if there is none to resume from.
    """
    if checkpoint is None and name == "checkpoint":
        if resume:
            raise InvalidInputError("resume=True needs the directory of the run", hint="pass checkpoint=...")
        return None
    if not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint):
        raise InvalidInputError(f"{name} must be the path of a directory", got=repr(checkpoint)[:60])
    return Path(os.fsdecode(os.fspath(checkpoint)))


class _Run(Generic[Result]):
    """One call of :func:`run_to_end`."""

    def __init__(
        self,
        job: Resumable[Result],
        what: str,
        folder: Path | None,
        randomness: OwnRandomness,
        identity: Mapping[str, object],
        every: int,
    ) -> None:
        self.job, self.what, self.folder, self.randomness, self.every = job, what, folder, randomness, every
        # Hashing the data takes a second per some gigabytes: only where it is needed.
        self.identity = None if folder is None else Identity(identity)
        self.saved: int | None = None

    def message(self, how: str) -> str:
        job = self.job
        whole = f" of {job.total}" if isinstance(job.total, int) else ""
        where = ""
        if self.folder is not None and self.saved is not None:
            held = "it" if self.saved == job.number else f"step {self.saved}"
            where = f"; the checkpoint {self.folder} holds {held}"
        return f"{self.what} {how} after step {job.number}{whole}{where}"

    # ------------------------------------------------------------------------------------- checkpoints
    def open(self, resume: bool) -> None:
        """Make sure, before any work, that saving will succeed; continue from what is there if asked to."""
        assert self.folder is not None and self.identity is not None
        content = read_checkpoint(self.folder) if resume else None
        if content is None:
            encode(self.job.state(), "state", {})
            return
        check_same_run(self.folder, {"kind": content.kind}, {"kind": self.what})
        self.identity.check(self.folder, content.identity)
        before = self.job.keep()
        try:
            self._take(content)
        except _MISFITS as error:
            self.job.number = 0
            with contextlib.suppress(Exception):
                self.job.put_back(before)
            raise DamagedCheckpointError(
                f"the checkpoint {self.folder} doesn't hold the state of this run",
                got=f"{type(error).__name__}: {error}",
            ) from error
        self.saved = content.step

    def _take(self, content: Checkpoint) -> None:
        """Take over a state; random state last, so that the next number drawn is the one after it."""
        state = content.state
        self.job.number = content.step
        self.job.load_state(state["job"])
        self.job._spent = float(state["seconds"])
        self.randomness.load_state(state["random"][self.job.world.rank])

    def save(self) -> None:
        """Write a checkpoint of this step, on the main process, unless there is one."""
        job, folder = self.job, self.folder
        if folder is None or self.identity is None or not job.intact or job.number in (0, self.saved):
            # Before the first step there is nothing to keep, and perhaps an older checkpoint to lose.
            return
        own = pack(self.randomness.state())
        random = [unpack(b) for b in job.world.gather_bytes(own, torch.device(self.randomness.device))]
        state = {"job": job.state(), "random": random, "seconds": job.seconds}
        content = Checkpoint(self.what, job.number, self.identity.now(), state)
        self.on_main(lambda: write_checkpoint(folder, content))
        self.saved = job.number

    def on_main(self, action: Callable[[], Any]) -> None:
        """Act on the main process; if that fails, every process fails."""
        world, failure = self.job.world, None
        if world.is_main:
            try:
                action()
            except Exception as error:
                failure = error
        failed = world.agree(int(failure is not None), self.randomness.device)
        if failure is not None:
            raise failure
        if failed:
            raise CheckpointWriteError(
                "the main process couldn't write the checkpoint", hint="its error says why"
            )

    # ------------------------------------------------------------------------------------------- steps
    def go(self, interrupt: DeferredInterrupt, progress: bool, stop: Callable[[Any], bool] | None) -> None:
        """Run to the end, to what ``stop`` says, or to Ctrl-C."""
        job = self.job
        shown = progress and job.world.is_main
        with progress_bar(job.total, self.what, shown, initial=job.position, unit=job.unit) as bar:
            self._guarded(job.start)
            look, stopped = 0.0, False
            while not (job.finished or stopped or job.interrupted):
                stopped = self._guarded(self._step, stop)
                if shown and (now := time.perf_counter()) >= look:
                    look = now + _LOOK
                    _show(bar, job)
                # Processes may see Ctrl-C at different steps: they agree at a step at which all of them talk.
                if job.synchronised:
                    asked = bool(job.world.agree(int(interrupt.requested), self.randomness.device))
                    job.interrupted = asked and not (job.finished or stopped)
                if job.number % self.every == 0:
                    self.save()
                self.randomness.yield_turn()
            _show(bar, job)
        self.save()
        self._guarded(job.end)

    def _step(self, stop: Callable[[Any], bool] | None) -> bool:
        job, before = self.job, self.job.number
        job.step()
        job.number = before + 1
        return stop is not None and bool(stop(job))

    def _guarded(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Act; after an error, or Ctrl-C in the middle, go back to what was whole and save that."""
        job, before, kept = self.job, self.job.number, self.job.keep()
        place = None if self.folder is None else self.randomness.snapshot()
        try:
            return action(*arguments)
        except BaseException:
            whole = True
            if job.number == before:
                try:
                    whole = job.put_back(kept)
                except Exception:
                    whole = False
                if place is not None:
                    whole = self.randomness.rewind(place) and whole
            # Other processes know nothing of this error, and saving is something that all of them do.
            if whole and job.world.size == 1:
                with contextlib.suppress(CheckpointError):
                    self.save()
            raise

    def explain(self, error: Exception) -> None:
        """Hang the result so far on an error, if there is one."""
        if self.job.number == 0:
            return
        with contextlib.suppress(Exception):
            if getattr(error, "result", None) is None:
                error.result = self.job.report()  # type: ignore[attr-defined]
            error.add_note(
                f"{self.message('stopped')}. What it had done is in this error's attribute `result`"
            )


def _show(bar: Any, job: Resumable[Any]) -> None:
    if bar.disable:
        return
    bar.set_postfix(job.describe(), refresh=False)
    bar.update(job.position - bar.n)
