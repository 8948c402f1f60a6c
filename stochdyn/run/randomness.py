"""Random state of a run: seeding it, leaving the caller's untouched, and carrying it through a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["capture_random_state", "fork_random_state", "restore_random_state", "seed_everything"]


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed Python, NumPy and torch (on the CPU and on ``device``), as ``pyro.set_rng_seed`` does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def capture_random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of the global generators of Python, NumPy and torch as tensors.

    Args:
        device: the CUDA device whose generator is captured as well; other kinds add nothing.

    Returns:
        Tensors under the keys ``python``, ``python_gauss``, ``numpy``, ``numpy_gauss``, ``torch`` and, on a
        CUDA device, ``cuda``.

    Example:
        >>> state = capture_random_state(torch.device("cpu"))
        >>> a = torch.rand(3)
        >>> restore_random_state(state, torch.device("cpu"))
        >>> torch.equal(a, torch.rand(3))
        True
    """
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the global generators to a state from :func:`capture_random_state`."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item())
    )
    torch.set_rng_state(state["torch"].contiguous())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].contiguous(), device)


@contextmanager
def fork_random_state(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the global generators inside the block and put the caller's state back after it.

    With ``seed=None`` the block draws from the caller's generators as any other code does, and nothing is put
    back: two runs in a row then differ.
    """
    if seed is None:
        yield
        return
    before = capture_random_state(device)
    try:
        seed_everything(seed, device)
        yield
    finally:
        restore_random_state(before, device)
