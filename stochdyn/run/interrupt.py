"""Ctrl-C that waits for the end of a step, so that what is saved and returned is a whole one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["DeferredInterrupt", "Interrupted"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped a long run after a whole step; the checkpoint, if there is one, holds that step.

    It is a ``KeyboardInterrupt``, so that a script stops as it should; whoever catches it finds the run so far in
    ``result``. Every long run of the library raises it: :func:`stochdyn.fit`, ``refine``, ``evolve`` and the others.

    Attributes:
        result: What the run would have returned, up to the last whole step.

    Example:
        >>> from stochdyn.run import Interrupted
        >>> try:
        ...     raise Interrupted("stopped after step 3", result=[1.0, 2.0, 3.0])
        ... except Interrupted as stopped:
        ...     print(len(stopped.result))
        3
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


class DeferredInterrupt:
    """Inside the block the first SIGINT only sets ``requested``; a second one raises at once.

    Does nothing outside the main thread, or where the program has a SIGINT handler of its own.
    """

    def __init__(self) -> None:
        self.requested = False
        self._installed = False

    def __enter__(self) -> DeferredInterrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
