"""Randomness for code that draws from torch's global generators alone, such as the distributions of torch and Pyro."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["lent"]

_TURN = threading.RLock()


@contextmanager
def lent(generator: torch.Generator | int | None) -> Iterator[None]:
    """Let the global generators give numbers of their own while this lasts, and put them back afterwards.

    Threads that draw in this way do so one after the other, so that none gets numbers of another.

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
    with _TURN, torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
