"""Results that are kept from one call to the next, whatever mode of torch the first call ran in."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["cached", "ordinary"]

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def ordinary(answer: Callable[[], Answer]) -> Answer:
    """Return an answer made of tensors that any later call can use, training included.

    What is made in inference mode can never be differentiated through, so nothing made there may be kept.
    """
    if not torch.is_inference_mode_enabled():
        return answer()
    with torch.inference_mode(False), torch.no_grad():
        return answer()


def cached(maxsize: int) -> Callable[[Callable[Arguments, Answer]], Callable[Arguments, Answer]]:
    """Keep the answers of a function of hashable arguments: ordinary tensors, on the CPU unless it says otherwise."""

    def keep(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
        @lru_cache(maxsize=maxsize)
        @wraps(function)
        def answer(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
            def made() -> Answer:
                with torch.device("cpu"):
                    return function(*args, **kwargs)

            return ordinary(made)

        return answer  # type: ignore[return-value]

    return keep
