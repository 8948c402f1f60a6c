"""What the answer of a run depends on, as short texts that can be compared: its identity.

This is the promise behind :class:`stochdyn.errors.ForeignCheckpointError`. A run is resumed only if all of this is as
it was when the checkpoint was written:

* numbers, texts and options, by value;
* tensors and arrays (data, buffers, frozen parameters), by precision, shape and every bit; not by device;
* modules, by class, by the shapes of their trainable parameters, by their buffers and by their plain attributes. *Values*
  of trainable parameters don't count, since the checkpoint holds them; nor does what the run itself changed between its
  beginning and the save (running means, counters), since it is part of the run's state;
* functions, by their bytecode, constants, default values, closures and the global variables that they read; classes of
  the user, by their methods. Functions and classes of installed libraries count by name;
* any other object, by its class and what it holds. A class that keeps derived values (a cache) lists the names of those
  attributes in ``_derived_``, and they don't count; cached properties don't anyway.

Bytecode differs between versions of Python, so a checkpoint of a run with the user's own functions stays with the version
that wrote it.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import os
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stochdyn.errors import ForeignCheckpointError

__all__ = ["Identity", "check_same_run", "describe", "digest", "fingerprint", "held_by"]

#: Stands in a checkpoint for what the run itself changes.
CHANGES = "changed by the run"
# Parts of torch's modules that say nothing about what they compute.
_BOOKKEEPING = frozenset(vars(nn.Module()))
# Parts of schedulers that move while they run, or that lead to the optimiser.
_MOVING = frozenset(
    {"optimizer", "last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
)
_VALUES = frozenset({"None", "True", "False", "nan", "inf"})
_OWN = "stochdyn."
_PLAIN_LENGTH = 60
_LONGEST_LIST = 16
_LISTED = 8


def digest(*things: object) -> str:
    """Return a text of 32 characters that is the same for the same things, in any process.

    Tensors, arrays, modules, dataclasses, functions and any nesting of them are told apart as the module's page says. The
    values of a module's trainable parameters don't count here either.

    Example:
        >>> digest(torch.arange(3), {"method": "heun"}) == digest(torch.arange(3), {"method": "heun"})
        True
        >>> digest(lambda x: 2 * x) == digest(lambda x: 3 * x)
        False
        >>> digest(torch.zeros(2)) == digest(torch.zeros(1, 2))
        False
    """
    hasher = _Hasher()
    for thing in things:
        hasher.feed(thing)
    return hasher.text()


def describe(things: Mapping[str, object]) -> dict[str, str]:
    """Return what named things are, in texts that an error can show: one for each option, tensor and part of a module.

    Example:
        >>> describe({"seed": 0, "net": nn.Linear(2, 1, bias=False)})["net.weight"]
        'float32 (1, 2)'
    """
    found: dict[str, str] = {}
    for name, thing in things.items():
        _describe(str(name), thing, found)
    return found


def fingerprint(state: nn.Module | Mapping[str, Any]) -> dict[str, str]:
    """Return precision and shape of every tensor of a module or a state dict by name.

    Example:
        >>> fingerprint(nn.Linear(2, 1))
        {'weight': 'float32 (1, 2)', 'bias': 'float32 (1,)'}
    """
    values = state.state_dict() if isinstance(state, nn.Module) else state
    return {n: _shape(v) if isinstance(v, Tensor) else "extra state" for n, v in values.items()}


class Identity:
    """The identity of a run: what it depends on at its beginning, and what of that it changes itself.

    Args:
        things: Whatever the answer depends on, by name.
    """

    def __init__(self, things: Mapping[str, object]) -> None:
        self._things = dict(things)
        self._modules = {n: t for n, t in self._things.items() if isinstance(t, nn.Module)}
        self.start = describe(self._things)

    def now(self) -> dict[str, str]:
        """Return the identity for a checkpoint: parts of modules that have changed since the beginning say so."""
        present = describe(self._modules)
        moved = {n for n, text in present.items() if self.start.get(n) != text}
        moved |= {n for n in self.start if n.split(".")[0] in self._modules and n not in present}
        return {n: CHANGES if n in moved else text for n, text in (self.start | present).items()}

    def check(self, folder: Path, found: Mapping[str, str]) -> None:
        """Raise ForeignCheckpointError, with the names that differ, unless a checkpoint is of this run."""
        free = {n for n, text in found.items() if text == CHANGES}
        check_same_run(
            folder,
            {n: t for n, t in found.items() if n not in free},
            {n: t for n, t in self.start.items() if n not in free},
        )


def check_same_run(
    folder: Path, found: Mapping[str, str], expected: Mapping[str, str], hint: str | None = None
) -> None:
    """Raise ForeignCheckpointError, with the names that differ, unless two descriptions agree.

    Args:
        folder: The checkpoint's directory, for the message.
        found: The description in the checkpoint.
        expected: The description of what is to go on from it.
        hint: What to try; by default to do everything as in that run.
    """
    differences = []
    for name in dict.fromkeys([*expected, *found]):
        if name not in found:
            differences.append(f"{name} is missing")
        elif name not in expected:
            differences.append(f"{name} is unknown here")
        elif found[name] != expected[name]:
            differences.append(f"{name} is {found[name]} instead of {expected[name]}")
    if differences:
        more = f" and {len(differences) - _LISTED} more" if len(differences) > _LISTED else ""
        raise ForeignCheckpointError(
            f"the checkpoint {folder} belongs to another run",
            got="; ".join(differences[:_LISTED]) + more,
            hint=hint or "build everything and call as in that run, or choose another directory",
        )


def _describe(name: str, thing: object, found: dict[str, str]) -> None:
    if isinstance(thing, nn.Module):
        _describe_module(name, thing, found)
    elif isinstance(thing, Mapping) and all(isinstance(k, str) for k in thing):
        for key, value in thing.items():
            _describe(f"{name}.{key}", value, found)
    elif isinstance(thing, list | tuple) and len(thing) <= _LONGEST_LIST and not _is_plain(thing):
        found[name] = f"{type(thing).__name__} of {len(thing)}"
        for i, value in enumerate(thing):
            _describe(f"{name}.{i}", value, found)
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        found[name] = type(thing).__qualname__
        for spec in _fields(thing):
            _describe(f"{name}.{spec.name}", getattr(thing, spec.name, None), found)
    else:
        found[name] = _text(thing)


def _describe_module(name: str, module: nn.Module, found: dict[str, str]) -> None:
    for path, part in module.named_modules():
        here = f"{name}.{path}" if path else name
        found[here] = _class_text(type(part))
        for key, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, nn.UninitializedParameter):
                found[f"{here}.{key}"] = _shape(parameter) if parameter.requires_grad else _text(parameter)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                found[f"{here}.{key}"] = _text(buffer)
        for key, value in held_by(part).items():
            found[f"{here}.{key}"] = _text(value)


def _is_plain(thing: object) -> bool:
    if isinstance(thing, list | tuple):
        return all(_is_plain(t) for t in thing)
    return thing is None or isinstance(thing, bool | int | float | str | torch.dtype | np.generic)


def _text(thing: object) -> str:
    """Return a short text: the value itself where it is short, else its kind and a digest."""
    if isinstance(thing, str):
        # Bare, as in "method is heun", unless it could be taken for a number or None.
        short = thing if thing.isidentifier() and thing not in _VALUES else repr(thing)
    elif _is_plain(thing):
        short = repr(thing.item() if isinstance(thing, np.generic) else thing)
    elif isinstance(thing, Tensor):
        return f"{_shape(thing)} {digest(thing)[:12]}"
    else:
        return f"{getattr(thing, '__qualname__', type(thing).__qualname__)} {digest(thing)[:12]}"
    return short if len(short) <= _PLAIN_LENGTH else f"{short[:24]}... {digest(thing)[:12]}"


def _shape(value: Tensor) -> str:
    if isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer):
        return "not made yet"
    return f"{str(value.dtype)[6:]} {tuple(value.shape)}"


def _class_text(kind: type) -> str:
    """Return a class's name, and a digest of its methods if the user wrote them."""
    own = any(not _is_library(c.__module__) for c in kind.__mro__)
    return f"{kind.__qualname__} {digest(kind)[:12]}" if own else kind.__qualname__


def _fields(thing: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(thing) if f.name not in getattr(type(thing), "_derived_", ())]


def held_by(thing: object) -> dict[str, Any]:
    """Return what an object holds by name: attributes and slots, without what torch keeps and what is derived."""
    names: dict[str, Any] = {}
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(thing, name):
                names[name] = getattr(thing, name)
    names.update(getattr(thing, "__dict__", {}))
    skipped = {"__weakref__", "__dict__", *getattr(type(thing), "_derived_", ())}
    # Other libraries keep caches and marks of use under private names; what this one keeps there counts.
    where = type(thing).__module__
    foreign = _is_library(where) and not where.startswith(_OWN) and not isinstance(thing, LRScheduler)
    if isinstance(thing, nn.Module):
        skipped |= _BOOKKEEPING
    if isinstance(thing, LRScheduler):
        skipped |= _MOVING
    return {
        n: v
        for n, v in names.items()
        if n not in skipped
        and not n.startswith("_pyro_")
        and not (foreign and n.startswith("_"))
        and not isinstance(getattr(type(thing), n, None), functools.cached_property)
    }


@functools.cache
def _library_roots() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    roots = {paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib") if k in paths}
    roots.add(str(Path(__file__).resolve().parents[1]))
    return tuple(os.path.realpath(r) + os.sep for r in roots)


@functools.cache
def _is_library(module: str | None) -> bool:
    """Return whether a module of this name is installed (torch, NumPy, this library) rather than the user's."""
    if module is None or module in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module.split(".")[0] in sys.stdlib_module_names and module != "__main__"
    return os.path.realpath(file).startswith(_library_roots())


def _is_library_code(function: types.FunctionType) -> bool:
    """Return whether a function was written in an installed library, by its file where it has one."""
    file = function.__code__.co_filename
    if file.startswith("<doctest"):
        return False
    if file.startswith("<"):
        return _is_library(function.__module__)
    return os.path.realpath(file).startswith(_library_roots())


class _Hasher:
    """Feeds things to a hash, each with a mark of its kind so that no two kinds look alike."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        # What is being fed at the moment, from the outside in: an object that holds itself is named by its depth there.
        self._open: list[int] = []
        self._done: dict[int, bytes] = {}
        # Objects that were fed stay alive, so that no other one takes over their identity.
        self._alive: list[object] = []

    def text(self) -> str:
        return self._hash.hexdigest()

    def _put(self, mark: str, content: str | bytes = b"") -> None:
        data = content.encode() if isinstance(content, str) else content
        self._hash.update(f"{mark}:{len(data)}:".encode() + data)

    def feed(self, thing: object) -> None:
        match thing:
            case None | bool() | int() | float() | complex():
                self._put("number", repr(thing))
            case enum.Enum():
                self._put("enum", f"{type(thing).__qualname__}.{thing.name}")
            case str():
                self._put("text", thing)
            case bytes() | bytearray():
                self._put("bytes", bytes(thing))
            case np.generic():
                self.feed(thing.item())
            case torch.dtype() | torch.device() | torch.Size() | range() | slice():
                self._put("value", repr(thing))
            case type() | types.ModuleType() | types.BuiltinFunctionType() | types.CodeType():
                self._feed_definition(thing)
            case _:
                self._feed_object(thing)

    def _feed_definition(self, thing: Any) -> None:
        if isinstance(thing, types.CodeType):
            self._feed_code(thing)
        elif isinstance(thing, type) and not _is_library(thing.__module__):
            self._feed_object(thing)
        else:
            self._put(
                "name", f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)}"
            )

    def _feed_object(self, thing: Any) -> None:
        if id(thing) in self._open:
            self._put("cycle", str(self._open.index(id(thing))))
            return
        if id(thing) not in self._done:
            outer, self._hash = self._hash, hashlib.blake2b(digest_size=16)
            self._open.append(id(thing))
            self._alive.append(thing)
            try:
                self._feed_content(thing)
                self._done[id(thing)] = self._hash.digest()
            finally:
                self._open.pop()
                self._hash = outer
        self._put("object", self._done[id(thing)])

    def _feed_content(self, thing: Any) -> None:
        if isinstance(thing, type):
            self._feed_class(thing)
        elif isinstance(thing, Tensor):
            self._feed_tensor(thing)
        elif isinstance(thing, np.ndarray):
            self._feed_array(thing)
        elif isinstance(thing, Mapping):
            self._put("mapping", str(len(thing)))
            for key in sorted(thing, key=digest):
                self.feed(key)
                self.feed(thing[key])
        elif isinstance(thing, list | tuple):
            self._put("sequence", str(len(thing)))
            for part in thing:
                self.feed(part)
        elif isinstance(thing, set | frozenset):
            self._put("set", "".join(sorted(digest(part) for part in thing)))
        elif isinstance(thing, types.FunctionType):
            self._feed_function(thing)
        elif isinstance(thing, types.MethodType):
            self._put("method")
            self.feed(thing.__func__)
            self.feed(thing.__self__)
        elif isinstance(thing, functools.partial):
            self._put("partial")
            self._feed_parts((thing.func, thing.args, thing.keywords))
        else:
            self._feed_other(thing)

    def _feed_other(self, thing: Any) -> None:
        self._put("object", type(thing).__module__ + "." + type(thing).__qualname__)
        if not _is_library(type(thing).__module__):
            self.feed(type(thing))
        if isinstance(thing, nn.Module):
            parts: dict[str, str] = {}
            _describe_module("module", thing, parts)
            self.feed(parts)
        elif isinstance(thing, Optimizer):
            self.feed(thing.defaults)
        elif isinstance(thing, staticmethod | classmethod):
            self.feed(thing.__func__)
        elif isinstance(thing, property):
            self._feed_parts((thing.fget, thing.fset))
        elif isinstance(thing, functools.cached_property):
            self.feed(thing.func)
        elif type(thing).__module__.startswith("pyro.poutine"):
            # Traces of a model that a guide keeps: random draws, which say nothing about the model.
            return
        elif hasattr(thing, "__array__") and hasattr(thing, "shape"):
            self.feed(np.asarray(thing))
            self._feed_parts([str(getattr(thing, name, "")) for name in ("columns", "index", "dims")])
        elif dataclasses.is_dataclass(thing):
            for spec in _fields(thing):
                self._put("field", spec.name)
                self.feed(getattr(thing, spec.name, None))
        elif not isinstance(thing, torch.Generator) and not callable(getattr(thing, "__next__", None)):
            # Generators, iterators and open files move on by themselves: they count by class only.
            held = held_by(thing)
            if not held and isinstance(thing, Iterable) and hasattr(thing, "__len__"):
                self._feed_parts(list(thing))
            for name in sorted(held):
                self._put("attribute", name)
                self.feed(held[name])

    def _feed_parts(self, parts: Iterable[object]) -> None:
        for part in parts:
            self.feed(part)

    def _feed_tensor(self, value: Tensor) -> None:
        value = value.detach()
        self._put("tensor", _shape(value))
        if value.is_meta:
            return
        if value.is_sparse:
            value = value.coalesce()
            self._feed_parts((value.indices(), value.values()))
            return
        if value.layout is not torch.strided:
            value = value.to_dense()
        if value.is_complex():
            value = torch.view_as_real(value.resolve_conj())
        flat = value.resolve_neg().cpu().contiguous().reshape(-1)
        if flat.stride() != (1,):  # a single number, spread out, counts as contiguous with any stride
            flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
        self._hash.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")

    def _feed_array(self, value: np.ndarray[Any, Any]) -> None:
        if value.dtype == object:
            self._put("objects", str(value.shape))
            self._feed_parts(value.reshape(-1).tolist())
            return
        self._put("array", f"{value.dtype.str} {value.shape}")
        self._hash.update(np.ascontiguousarray(value).tobytes())

    def _feed_function(self, function: types.FunctionType) -> None:
        closure = function.__closure__ or ()
        held = [_contents(cell) for cell in closure]
        if _is_library_code(function):
            # Of the library's own functions the name says all, but for what a closure holds.
            self._put("function", f"{function.__module__}.{function.__qualname__}")
            self._feed_parts(held)
            return
        self._put("function")
        self._feed_code(function.__code__)
        self._feed_parts((function.__defaults__, function.__kwdefaults__, *held))
        for name in sorted(_global_names(function.__code__)):
            if name in function.__globals__:
                self._put("global", name)
                self.feed(function.__globals__[name])

    def _feed_code(self, code: types.CodeType) -> None:
        self._put("code", code.co_code)
        self._put("names", " ".join((*code.co_names, *code.co_varnames, *code.co_freevars)))
        constants = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
        self._put("constants", repr([_steady(c) for c in constants]))
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                self._feed_code(inner)

    def _feed_class(self, kind: type) -> None:
        self._put("class", kind.__qualname__)
        descriptors = (types.GetSetDescriptorType, types.MemberDescriptorType)
        for name, value in sorted(vars(kind).items()):
            dunder = name.startswith("__") and name.endswith("__")
            wanted = not dunder or isinstance(value, types.FunctionType)
            if wanted and not name.startswith("_abc_") and not isinstance(value, descriptors):
                self._put("member", name)
                self.feed(value)
        self._feed_parts(kind.__bases__)


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _steady(constant: object) -> object:
    """Return a constant whose text is the same in every process: sets are put in order."""
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> frozenset[str]:
    """Return the global variables that a function, or one inside it, reads."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found |= _global_names(inner)
    return frozenset(found)
