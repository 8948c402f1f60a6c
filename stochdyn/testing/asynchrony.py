"""Whether a computation waits for its device: on a GPU every look at a number costs the time that runs ahead."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stochdyn._checks import check_callable, values_unchecked

__all__ = ["check_asynchronous"]

#: Kernels whose result, or the shape of it, has to come to the host.
_KERNELS = frozenset(
    {
        "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item",
        "masked_select", "nonzero", "unique_consecutive", "unique_dim",
    }
)  # fmt: skip
#: Methods of tensors that copy to the host, some of them without a kernel.
_METHODS: frozenset[Any] = frozenset(
    {
        Tensor.__array__, Tensor.__bool__, Tensor.__float__, Tensor.__index__, Tensor.__int__, Tensor.cpu, Tensor.item,
        Tensor.numpy, Tensor.tolist,
    }
)  # fmt: skip
#: Code that reads what it likes, and isn't ours to change.
_FOREIGN = ("/pyro/", "/torch/distributions/", "/torch/optim/")


def check_asynchronous(function: Callable[[], object], skip: str = "") -> None:
    """Check that a computation never waits for its device, on a CPU as well as on a GPU.

    It runs twice: what is asked once (grids, plans, fields that are compiled) may be asked in the first run. In the second
    nothing may read a number of a tensor, copy one to the host, or need one to know a shape. The checks of values are off,
    as they are after the first step of :func:`stochdyn.fit` on a GPU. What Pyro and torch themselves read doesn't count.

    Args:
        function: The computation, such as a step of training or a time loop.
        skip: A part of the path of files whose reads don't count, for what is done on the host on purpose.

    Raises:
        AssertionError: If it waits, with every place at which it does.

    Example:
        >>> x = torch.randn(3)
        >>> check_asynchronous(lambda: x.where(x > 0, 0.0).sum())
        >>> check_asynchronous(lambda: x[x > 0].sum())
        Traceback (most recent call last):
            ...
        AssertionError: it waits for the device: index by a mask at <doctest ...>:1
    """
    check_callable(function, "function")
    function()
    places: list[str] = []

    def note(what: str) -> None:
        frames = [f for f in traceback.extract_stack()[:-2] if not _is_torch(f.filename)]
        if frames[-1].filename == __file__:
            frames = [f for f in frames if f.filename != __file__]
        innermost = frames[-1]
        if any(part in innermost.filename for part in _FOREIGN) or (skip and skip in innermost.filename):
            return
        place = f"{what} at {innermost.filename.rpartition('stochdyn/')[2]}:{innermost.lineno}"
        if place not in places:
            places.append(place)

    with values_unchecked(), _Methods(note), _Kernels(note):
        function()
    assert not places, "it waits for the device: " + ", ".join(places)


def _is_torch(file: str) -> bool:
    return "/torch/" in file and not any(part in file for part in _FOREIGN)


class _Kernels(TorchDispatchMode):
    """Note the kernels that make the host wait."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.rpartition("::")[2]
        if name in _KERNELS:
            self._note(name)
        elif name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self._note("index by a mask")
        elif name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self._note("repeat_interleave without output_size")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Note the methods of tensors that copy to the host."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            self._note(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))
