"""What torch does with what runs now: transforms that map over it or differentiate it, and modes that don't record it.

This is the only place that asks torch's private interface for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "as_leaf",
    "as_ordinary",
    "maps_are_active",
    "ordinarily",
    "recorded",
    "recording",
    "transforms_are_active",
    "version_of",
]

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def maps_are_active() -> bool:
    """Return whether a transform of ``torch.func`` is active."""
    return bool(torch._C._are_functorch_transforms_active())


def transforms_are_active() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode differentiation is active."""
    return maps_are_active() or torch.autograd.forward_ad._current_level >= 0


@contextmanager
def _recording_again() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def recording() -> AbstractContextManager[Any]:
    """Record what runs for differentiation, whatever mode the caller is in.

    In inference mode ``torch.enable_grad`` has no effect, and a derivative that takes what isn't recorded for constant is zero.
    """
    return _recording_again() if torch.is_inference_mode_enabled() else torch.enable_grad()


def as_leaf(x: Tensor) -> Tensor:
    """Return ``x`` as a leaf to differentiate with respect to; what was made in inference mode is copied for that."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def version_of(x: Tensor) -> int:
    """Return a number that changes when a tensor is written to; tensors made in inference mode don't count how often they are."""
    return -1 if x.is_inference() else x._version


def as_ordinary(value: Any) -> Any:
    """Return tensors, alone or in lists, tuples and dicts, that derivatives can be taken with; anything else as it is."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (tuple, list):
        return type(value)(as_ordinary(v) for v in value)
    if type(value) is dict:
        return {k: as_ordinary(v) for k, v in value.items()}
    return value


def ordinarily(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Run a function that takes derivatives along the way outside of inference mode, without gradients of its answer.

    Its grids, states and conditions would else be tensors that no derivative can be taken with.
    """

    @wraps(function)
    def answer(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*map(as_ordinary, args), **{k: as_ordinary(v) for k, v in kwargs.items()})

    return answer


def recorded(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Run a function that trains or maximises with gradients switched on, whatever mode the caller is in."""

    @wraps(function)
    def answer(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with recording():
            return function(*map(as_ordinary, args), **{k: as_ordinary(v) for k, v in kwargs.items()})

    return answer
