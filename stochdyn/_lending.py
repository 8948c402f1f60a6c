"""Whose numbers torch's global generators give: for code that draws from them alone, as the distributions of torch do."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stochdyn.errors import StochdynWarning

__all__ = ["lent", "turns"]

# Seconds after which a thread that waits for the step of another one's run says so.
_PATIENCE = 60.0


class _Turns:
    """One thread's numbers at a time, in the order of asking; a thread that has the turn may take it again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._owner: int | None = None
        self._depth = 0

    @property
    def wanted(self) -> bool:
        """Whether another thread waits for a turn that its owner could give back as a whole."""
        return bool(self._queue) and self._depth == 1

    def take(self, patient: bool = False) -> None:
        me = threading.get_ident()
        if self._owner == me:  # nobody else can change that
            self._depth += 1
            return
        ticket = object()
        began, said = time.monotonic(), False
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._owner is not None or self._queue[0] is not ticket:
                    self._changed.wait(1.0)
                    if not (said or patient) and time.monotonic() - began > _PATIENCE:
                        said = True
                        warnings.warn(
                            "a run waits for the step of a run in another thread to end. Runs take turns, step by step; "
                            "one that is started in a thread by a step of another, which waits for it, never begins",
                            StochdynWarning,
                            stacklevel=2,
                        )
                self._owner, self._depth = me, 1
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def give(self) -> None:
        if self._depth > 1:
            self._depth -= 1
            return
        with self._changed:
            self._owner, self._depth = None, 0
            self._changed.notify_all()


turns = _Turns()


@contextmanager
def lent(generator: torch.Generator | int | None) -> Iterator[None]:
    """Let the global generators give numbers of their own while this lasts, and put them back afterwards.

    Threads that draw in this way, and runs in other threads, take turns, so that none gets numbers of another.

    Args:
        generator: A generator that gives the seed, the seed itself, or None for the global state as it is.
    """
    if generator is None:
        yield
        return
    if isinstance(generator, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    else:
        seed = generator
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    turns.take()
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
    finally:
        turns.give()
