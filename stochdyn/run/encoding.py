"""Nested Python state (optimisers, schedulers, callbacks) as plain JSON plus named tensors; never pickle."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from stochdyn.errors import CheckpointError, DamagedCheckpointError

__all__ = ["decode", "encode", "map_tensors", "pack", "unpack"]

# A dict whose only key is one of these is a tagged value; an ordinary dict that has one is written as pairs.
_TAGS = frozenset({"$tensor", "$complex_tensor", "$tuple", "$pairs", "$counter", "$float", "$bytes"})


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON-ready data, and put copies of its tensors into ``tensors``.

    Knows None, bool, int, float, str, bytes, tensors, NumPy scalars, lists, tuples, dicts with any such keys
    and Counters, nested in any way.

    Args:
        value: What is to be written.
        name: Where it stands, such as ``"optimizer"``; keys of tensors and errors start with it.
        tensors: A list that is filled with detached, contiguous copies on the CPU.

    Raises:
        CheckpointError: If a value of another type is met, such as a function.

    Example:
        >>> tensors = {}
        >>> encode({"lr": 0.1, "betas": (0.9, 0.99), "state": torch.zeros(2)}, "adam", tensors)
        {'lr': 0.1, 'betas': {'$tuple': [0.9, 0.99]}, 'state': {'$tensor': 'adam/state'}}
        >>> list(tensors)
        ['adam/state']
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), name, tensors)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, Tensor):
        return _encode_tensor(value, name, tensors)
    if isinstance(value, list):
        return [encode(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, Mapping):
        if type(value) is not Counter and all(isinstance(k, str) for k in value) and not _TAGS & set(value):
            return {k: encode(v, f"{name}/{k}", tensors) for k, v in value.items()}
        tag = "$counter" if isinstance(value, Counter) else "$pairs"
        pairs = [
            [encode(k, f"{name}/key", tensors), encode(v, f"{name}/{k}", tensors)] for k, v in value.items()
        ]
        return {tag: pairs}
    raise CheckpointError(
        f"{name} can't be written to a checkpoint",
        got=type(value).__name__,
        expected="None, numbers, text, tensors, and lists, tuples or dicts of them",
    )


def _encode_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    key, n = name, 1
    while key in tensors:
        key, n = f"{name}~{n}", n + 1
    data = value.detach().to("cpu", copy=True).contiguous()
    if data.is_complex():
        tensors[key] = torch.view_as_real(data.resolve_conj()).contiguous()
        return {"$complex_tensor": key}
    tensors[key] = data.resolve_neg()
    return {"$tensor": key}


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what :func:`encode` was given.

    Raises:
        DamagedCheckpointError: If a tensor is missing or a tag is unknown.
    """
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (tag := next(iter(value))) in _TAGS:
        content = value[tag]
        match tag:
            case "$float":
                return float(content)
            case "$bytes":
                return bytes.fromhex(content)
            case "$tuple":
                return tuple(decode(v, tensors) for v in content)
            case "$pairs":
                return {decode(k, tensors): decode(v, tensors) for k, v in content}
            case "$counter":
                return Counter({decode(k, tensors): decode(v, tensors) for k, v in content})
            case _:
                if content not in tensors:
                    raise DamagedCheckpointError("the checkpoint lacks a tensor that it names", got=content)
                tensor = tensors[content]
                return torch.view_as_complex(tensor) if tag == "$complex_tensor" else tensor
    return {k: decode(v, tensors) for k, v in value.items()}


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists, dicts and dataclasses.

    Anything else passes through.

    Example:
        >>> map_tensors(lambda x: x + 1, (torch.zeros(1), {"a": torch.ones(1)}, "text"))
        (tensor([1.]), {'a': tensor([2.])}, 'text')
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        parts = [map_tensors(function, v) for v in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [map_tensors(function, v) for v in tree]
    if isinstance(tree, Mapping):
        return {k: map_tensors(function, v) for k, v in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = copy.copy(tree)
        for spec in dataclasses.fields(tree):
            # Also for frozen classes, and without running checks of __post_init__ on a slice again.
            object.__setattr__(changed, spec.name, map_tensors(function, getattr(tree, spec.name)))
        return changed
    return tree


def pack(tree: Any) -> bytes:
    """Return a nested state as bytes, for another rank: the length of the JSON, the JSON, the tensors."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(tree, "own", tensors)).encode()
    return len(text).to_bytes(8, "little") + text + safetensors.torch.save(tensors)


def unpack(packed: bytes) -> Any:
    """Return what :func:`pack` was given."""
    end = 8 + int.from_bytes(packed[:8], "little")
    return decode(json.loads(packed[8:end]), safetensors.torch.load(packed[end:]))
