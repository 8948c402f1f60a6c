"""Jobs that know nothing of one another, done here or by any executor of ``concurrent.futures``.

A job's random numbers start from a seed of its own, and results are taken in the order of the jobs, so an answer is the same to the
bit whoever computes it and in whatever order they finish.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from stochdyn._checks import as_seed, as_sequence, check_callable, check_type
from stochdyn.errors import InvalidInputError, LostProcessError
from stochdyn.run.engine import Resumable, run_to_end
from stochdyn.run.randomness import OwnRandomness, others_turn, seed_of

__all__ = ["Jobs", "check_executor", "run_each"]

Result = TypeVar("Result")

_HERE = uuid.uuid4().hex


def _process() -> tuple[str, int]:
    """What tells this process from others, those that it forks included."""
    return _HERE, os.getpid()


class _Whole(OwnRandomness):
    """The numbers of one job: no other thread comes in between, since Pyro's handlers are one stack for all threads."""

    divisible = False


@dataclass(frozen=True)
class _Settings:
    """What torch has set in the caller's process or thread and a job's answer depends on."""

    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    num_threads: int = field(default_factory=torch.get_num_threads)
    grad: bool = field(default_factory=torch.is_grad_enabled)
    process: tuple[str, int] = field(default_factory=_process)

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = torch.get_default_dtype(), torch.get_num_threads()
        try:
            if before[1] != self.num_threads:
                torch.set_num_threads(self.num_threads)
            torch.set_default_dtype(self.dtype)
            with torch.set_grad_enabled(self.grad):
                yield
        finally:
            torch.set_default_dtype(before[0])
            if torch.get_num_threads() != before[1]:
                torch.set_num_threads(before[1])


def _elsewhere(
    function: Callable[[Any], Any], item: Any, seed: int, device: torch.device, settings: _Settings
) -> tuple[Any, list[warnings.WarningMessage]]:
    """Do a job in a thread or a process of an executor; return its result and, of another process, its warnings."""
    if settings.process == _process():
        with _Whole(seed, device), settings.applied():
            return function(item), []
    with settings.applied(), _undisturbed(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with _Whole(seed, device):
            value = function(item)
    return value, [_plain(w) for w in said]


def _plain(said: warnings.WarningMessage) -> warnings.WarningMessage:
    return warnings.WarningMessage(said.message, said.category, said.filename, said.lineno)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave Ctrl-C to the process that gave the job: a terminal sends it to all of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _packed(function: bytes, item: bytes, *rest: Any) -> bytes:
    """Do a job from bytes to bytes: queues of processes would move tensors to shared memory, which is scarce."""
    return pickle.dumps(_elsewhere(pickle.loads(function), pickle.loads(item), *rest))


def _pickled(thing: Any, what: str) -> bytes:
    try:
        return pickle.dumps(thing)
    except Exception as error:  # what pickle raises depends on the object
        raise InvalidInputError(
            f"{what} can't be sent to another process",
            got=f"{type(error).__name__}: {error}",
            hint="put functions and models at the top of a module, not into other functions or notebooks' cells; or take an "
            "executor that sends more than pickle can, such as Dask's or loky's, or one of threads",
        ) from error


def check_executor(executor: object) -> None:
    """Raise unless it is None or an executor.

    Raises:
        InvalidInputError: If it is something else, such as a number of processes.
    """
    check_type(
        executor, (Executor, type(None)), "executor", hint="an executor of concurrent.futures, or None"
    )


class Jobs(Generic[Result]):
    """Results of independent jobs by number: computed when they are asked for, or ahead of that by an executor.

    Use it inside ``with``: at the end, after Ctrl-C or an error, what hasn't begun is cancelled.

    Args:
        function: What is done, a function of an item. For processes it must be picklable, ``functools.partial`` of a function at
            the top of a module.
        items: What it is done to.
        seed: The seed of all jobs; each one has a seed of its own, made of it and its number.
        executor: What computes, or None for this thread.
        device: The device whose random numbers belong to a job, besides the CPU's.

    Raises:
        InvalidInputError: If ``executor`` isn't one, or function or items can't be sent to its processes.
    """

    def __init__(
        self,
        function: Callable[[Any], Result],
        items: Sequence[Any],
        seed: int,
        executor: Executor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_executor(executor)
        self.function, self.items, self.seed, self.executor = function, items, seed, executor
        self.device = torch.device(device)
        self._futures: dict[int, Future[Any]] = {}
        self._pickles = isinstance(executor, ProcessPoolExecutor)
        if self._pickles:
            self._bytes = _pickled(function, "what is to be done")
            for item in items[:1]:
                _pickled(item, "an item")

    def __enter__(self) -> Jobs[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()

    def result(self, number: int, wanted: int | None = None) -> Result:
        """Return the result of a job, and drop it.

        Args:
            number: The number of the job.
            wanted: The number of jobs from this one on that will be asked for, as far as is known; all if None.

        Raises:
            LostProcessError: If a process of the executor has died.

        An exception of the job goes through.
        """
        if self.executor is None:
            with OwnRandomness(seed_of(self.seed, number), self.device):
                return self.function(self.items[number])
        end = len(self.items) if wanted is None else min(number + wanted, len(self.items))
        for k in range(number, end):
            if k not in self._futures:
                self._futures[k] = self._submit(k)
        future = self._futures.pop(number)
        try:
            with others_turn():
                found = future.result()
        except BrokenExecutor as error:
            raise LostProcessError(
                "a process of the executor has died",
                hint='it may have run out of memory; and a script that starts processes needs if __name__ == "__main__"',
            ) from error
        value, said = pickle.loads(found) if self._pickles else found
        for w in said:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return value

    def _submit(self, number: int) -> Future[Any]:
        assert self.executor is not None
        rest = seed_of(self.seed, number), self.device, _Settings()
        if self._pickles:
            return self.executor.submit(_packed, self._bytes, _pickled(self.items[number], "an item"), *rest)
        return self.executor.submit(_elsewhere, self.function, self.items[number], *rest)


class _Each(Resumable[list[Any]]):
    """One item after the other; the results are the state."""

    unit = "job"

    def __init__(self, jobs: Jobs[Any]) -> None:
        self.jobs = jobs
        self.total = len(jobs.items)
        self.results: list[Any] = []

    @property
    def finished(self) -> bool:
        return len(self.results) >= len(self.jobs.items)

    def step(self) -> None:
        self.results.append(self.jobs.result(len(self.results)))

    def keep(self) -> int:
        return len(self.results)

    def put_back(self, kept: int) -> bool:
        del self.results[kept:]
        return True

    def state(self) -> dict[str, Any]:
        return {"results": self.results}

    def load_state(self, state: dict[str, Any]) -> None:
        self.results = list(state["results"])

    def report(self) -> list[Any]:
        return list(self.results)


def run_each(
    function: Callable[[Any], Result],
    items: Iterable[Any],
    *,
    seed: int = 0,
    executor: Executor | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> list[Result]:
    """Do one thing to many items that know nothing of one another, and return the results in their order.

    Use it for particle filters or fits of many series, restarts, simulations. While the function runs, the global generators
    (Python's, NumPy's, torch's) start from a seed that is made of ``seed`` and the item's number, so the results are the same to
    the bit with any executor, any number of workers and in any order of finishing. Threads have one set of generators between
    them and take turns; processes compute at the same time.

    Args:
        function: A function of an item. For processes it must stand at the top of a module.
        items: The items.
        seed: The seed of all random numbers.
        executor: An executor of ``concurrent.futures``, such as ``ProcessPoolExecutor()``, Dask's or MPI's; this thread if None.
        device: The device whose random numbers belong to a job, besides the CPU's.
        progress: Whether to show a bar, which appears after two seconds.
        checkpoint: The directory that is saved to after every item; results must then be numbers, tensors, text, or lists,
            tuples and dicts of them.
        resume: Whether to continue the run in ``checkpoint``.

    Returns:
        What the function returned, one entry for each item.

    Raises:
        InvalidInputError: If function or items can't be sent to other processes; before any work.
        LostProcessError: If a process of the executor has died.
        Interrupted: After Ctrl-C; its ``result`` holds the results so far.

    An exception of the function goes through, with the results so far as its ``result``.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> def noisy(x):
        ...     return x + torch.randn(())
        >>> with ThreadPoolExecutor(2) as pool:
        ...     run_each(noisy, [1.0, 2.0], executor=pool) == run_each(noisy, [1.0, 2.0])
        True
    """
    check_callable(function, "function", "a function of an item")
    things = as_sequence(items, "items", "what there is to do")
    with Jobs(function, things, as_seed(seed), executor, device) as jobs:
        return run_to_end(
            _Each(jobs), "jobs", identity={"function": function, "items": things, "seed": seed}, randomness=seed,
            device=device, progress=progress, checkpoint=checkpoint, resume=resume,
        )  # fmt: skip
