"""Random state of a run: generators of its own, which two runs in two threads never mix up."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_seed
from stochdyn._lending import turns

__all__ = [
    "OwnRandomness",
    "fork_random_state",
    "global_state",
    "others_turn",
    "seed_everything",
    "seed_of",
    "set_global_state",
]

# Steps that leave Python's and NumPy's generators alone before they are taken to do so.
_PROOF = 3


def seed_of(seed: int, number: int) -> int:
    """Return the seed of one of many jobs, which depends on its number alone and not on who does it."""
    return (seed * 1_000_003 + number) % 2**63


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed Python, NumPy and torch (on the CPU and on ``device``), as ``pyro.set_rng_seed`` does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class _Globals:
    """A copy of the state of the process's generators: Python's, NumPy's and torch's on the CPU and some GPUs."""

    def __init__(self, devices: frozenset[torch.device]) -> None:
        self.python = random.getstate()
        self.numpy: tuple[Any, ...] = tuple(np.random.get_state(legacy=True))
        self.torch = torch.get_rng_state()
        self.cuda = {d: torch.cuda.get_rng_state(d) for d in devices}

    def put_back(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    def same_host(self, other: _Globals) -> bool:
        """Return whether Python's and NumPy's generators stand at the same place in another copy."""
        same_numpy = all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
        return self.python == other.python and same_numpy

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors, for a file."""
        _, words, gauss = self.python
        _, keys, position, has_gauss, cached = self.numpy
        found = {
            "python": torch.tensor(words, dtype=torch.int64),
            "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)], dtype=torch.int64),
            "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
            "torch": self.torch,
        }
        for state in self.cuda.values():
            found["cuda"] = state
        return found

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Become the state that :meth:`tensors` returned."""
        gauss = state["python_gauss"].tolist()
        self.python = (3, tuple(state["python"].tolist()), gauss[0] if gauss else None)
        *keys, position, has_gauss = state["numpy"].tolist()
        self.numpy = (
            "MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()
        )  # fmt: skip
        self.torch = state["torch"].contiguous()
        if "cuda" in state:
            self.cuda = {d: state["cuda"].contiguous() for d in self.cuda}


class _Here(threading.local):
    """What this thread has put in place of the process's generators."""

    def __init__(self) -> None:
        self.stack: list[OwnRandomness] = []
        self.base: _Globals | None = None
        self.devices: frozenset[torch.device] = frozenset()


_here = _Here()


class OwnRandomness:
    """Generators of its own for a block of code, whatever global ones the code draws from.

    Inside the block the global generators of Python, NumPy and torch (on the CPU and on ``device``) are those of this
    object; after it they are the caller's again, as they were. The object keeps its place between blocks. Blocks may be
    nested. Only one thread is inside at a time; :meth:`yield_turn` lets another one in at a place where that does no
    harm, so that two runs in two threads give the numbers that each gives alone. Code that draws from the global
    generators in other threads, outside any such block, isn't kept away.

    Args:
        seed: What the generators start from; None draws a seed from torch's global generator at the first entrance.
        device: The device whose generator belongs to the block, besides the CPU's.

    Example:
        >>> own = OwnRandomness(0)
        >>> with own:
        ...     first = torch.rand(2)
        >>> with OwnRandomness(1):
        ...     other = torch.rand(2)
        >>> with own:
        ...     second = torch.rand(2)
        >>> both = torch.rand(4, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(torch.cat((first, second)), both)
        True
    """

    #: Whether :meth:`yield_turn` may let another thread in, here and in blocks within this one.
    divisible = True

    def __init__(self, seed: int | None = 0, device: torch.device | str = "cpu") -> None:
        self.seed = None if seed is None else as_seed(seed)
        self.device = torch.device(device)
        self._devices = frozenset({self.device} if self.device.type == "cuda" else ())
        self._kept: _Globals | None = None
        self._depth = 0
        # The last full snapshot, and how many in a row found Python's and NumPy's generators where they were.
        self._still: _Globals | None = None
        self._unmoved = 0

    def __enter__(self) -> OwnRandomness:
        if _here.stack and _here.stack[-1] is self:
            self._depth += 1
            return self
        if not _here.stack:
            turns.take()
        try:
            if self.seed is None:
                self.seed = int(torch.randint(2**62, ()))
            if _here.stack:
                _here.stack[-1]._keep()
            else:
                _here.base, _here.devices = _Globals(self._devices), self._devices
            new = self._devices - _here.devices
            if new and _here.base is not None:
                _here.base.cuda |= _Globals(new).cuda
                _here.devices |= new
            if self._kept is None:
                seed_everything(self.seed, self.device)
            else:
                self._kept.put_back()
        except BaseException:
            if not _here.stack:
                turns.give()
            raise
        _here.stack.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._depth:
            self._depth -= 1
            return
        self._keep()
        _here.stack.pop()
        if _here.stack:
            _here.stack[-1]._back()
            return
        self._leave()

    def reseed(self, seed: int) -> None:
        """Start again from a seed; inside the block."""
        seed_everything(seed % 2**63, self.device)
        self._still, self._unmoved = None, 0

    def yield_turn(self) -> None:
        """Let another thread's block run if one waits; inside the block, at a place where nothing is half done."""
        if turns.wanted and _here.stack[0].divisible:
            with others_turn():
                pass

    def snapshot(self) -> Any:
        """Return the present place, for :meth:`rewind`; inside the block, and quick.

        To copy the states of Python and NumPy takes a hundred times as long as torch's. Where the first steps don't draw
        from them they are copied no more, until a checkpoint finds that they have moved.
        """
        if self._still is not None and self._unmoved >= _PROOF:
            return torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in self._devices}
        now = _Globals(self._devices)
        self._unmoved = self._unmoved + 1 if self._still is not None and self._still.same_host(now) else 0
        self._still = now
        return now

    def rewind(self, snapshot: Any) -> bool:
        """Go back to the place that :meth:`snapshot` noted, inside the block; return whether it is known in full."""
        if isinstance(snapshot, _Globals):
            snapshot.put_back()
            return True
        torch.set_rng_state(snapshot[0])
        for device, state in snapshot[1].items():
            torch.cuda.set_rng_state(state, device)
        return self._still is not None and self._still.same_host(_Globals(frozenset()))

    def state(self) -> dict[str, Tensor]:
        """Return the present place as tensors, for a checkpoint; inside the block."""
        now = _Globals(self._devices)
        if self._still is not None and not self._still.same_host(now):
            self._still, self._unmoved = None, 0
        return now.tensors()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go to the place that :meth:`state` noted; inside the block."""
        now = _Globals(self._devices)
        now.take(state)
        now.put_back()
        self._still, self._unmoved = None, 0

    def _keep(self) -> None:
        self._kept = _Globals(self._devices)

    def _back(self) -> None:
        assert self._kept is not None
        self._kept.put_back()

    @staticmethod
    def _leave() -> None:
        """Give the process its own generators back, and the turn to whoever waits."""
        try:
            if _here.base is not None:
                _here.base.put_back()
                _here.base = None if not _here.stack else _here.base
        finally:
            turns.give()


@contextmanager
def others_turn() -> Iterator[None]:
    """Let the blocks of other threads run while this thread waits for them; the turn comes back at the end."""
    if not _here.stack:
        yield
        return
    own = _here.stack[-1]
    own._keep()
    own._leave()
    try:
        yield
    finally:
        turns.take(patient=True)
        _here.base = _Globals(_here.devices)
        own._back()


def global_state() -> dict[str, Tensor]:
    """Return the state of the process's generators on the CPU as tensors."""
    return _Globals(frozenset()).tensors()


def set_global_state(state: Mapping[str, Tensor]) -> None:
    """Put the process's generators on the CPU where :func:`global_state` found them."""
    now = _Globals(frozenset())
    now.take(state)
    now.put_back()


@contextmanager
def fork_random_state(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the global generators inside the block and put the caller's state back after it.

    With ``seed=None`` the block draws from the caller's generators as any other code does, and nothing is put
    back: two runs in a row then differ.
    """
    if seed is None:
        yield
        return
    with OwnRandomness(seed, device):
        yield
