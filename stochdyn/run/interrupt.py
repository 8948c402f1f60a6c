"""Ctrl-C that waits for the end of a training step, so that what is saved is a whole step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stochdyn.run.result import FitResult

__all__ = ["DeferredInterrupt", "FitInterrupted"]


class FitInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped :func:`stochdyn.fit` after a whole step; the checkpoint, if any, holds that step.

    It is a ``KeyboardInterrupt``, so a script stops as it should; whoever catches it finds the run so far
    in ``result``.

    Attributes:
        result: the :class:`~stochdyn.run.FitResult` up to the last whole step.
    """

    def __init__(self, message: str, result: FitResult) -> None:
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
