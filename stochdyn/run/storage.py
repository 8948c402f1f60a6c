"""``sd.save`` and ``sd.load``: anything fitted, in a directory of JSON and safetensors, never pickled.

What is written is the object as it stands: its class, and what it holds, down to tensors and numbers. Reading it makes
objects of known classes and fills them; no constructor and no function runs, so that a file can't run code. Known are the
classes of this library, of ``torch.nn``, ``torch.distributions``, Pyro's and GPyTorch's, and the user's own after
:func:`storable`. A class that can be made again from less defines ``to_storage(self)``, which returns plain data, tensors
and storable objects, and the class method ``from_storage(state)``.
"""

from __future__ import annotations

import enum
import functools
import importlib
import inspect
import os
import types
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stochdyn._version import __version__
from stochdyn.errors import CheckpointError, DamagedCheckpointError, InvalidInputError, UnavailableError
from stochdyn.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from stochdyn.run.engine import as_folder
from stochdyn.run.folder import claimed
from stochdyn.run.identity import check_same_run

__all__ = ["load", "save", "storable"]

Kind = TypeVar("Kind", bound=Callable[..., Any])

_KIND = "object"
# Packages whose classes may stand in a file, and those whose functions may.
_CLASSES = ("stochdyn.", "torch.nn.", "torch.distributions.", "pyro.", "gpytorch.", "linear_operator.")
_FUNCTIONS = (
    "stochdyn.",
    "gpytorch.",
    "linear_operator.",
    "pyro.infer.",
    "pyro.distributions.",
    "pyro.poutine.",
)
# Classes that keep what a program did: traces of a model, and samplers that have run.
_RECORDS = ("pyro.poutine.trace_struct", "pyro.infer.mcmc")
_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    "Size": torch.Size,
}
# Places of torch's functions: neither those that read files nor those that compile.
_TORCH = (
    None,
    "torch",
    "torch.functional",
    "torch.special",
    "torch._C._nn",
    "torch.nn.functional",
    "torch._VariableFunctionsClass",
)
_HOOKS = frozenset(n for n in vars(nn.Module()) if "hook" in n)
# What has been registered, and the classes that plain data name.
_own: dict[str, Any] = {f"builtins:{k.__name__}": k for k in (list, dict, set, tuple, int, float, str, bool)}


def storable(kind: Kind) -> Kind:
    """Let objects of a class of your own, or a function of your own, be saved and loaded; a decorator.

    The file names it by module and name. It must be registered when the file is read, too: the class isn't imported from
    the file's word.

    Args:
        kind: A class, or a function that stands at the top of its module.

    Raises:
        InvalidInputError: If it is neither.

    Example:
        >>> import tempfile
        >>> import stochdyn as sd
        >>> @storable
        ... def drift(t, x):
        ...     return x - x**3
        >>> folder = tempfile.mkdtemp()
        >>> save(sd.DiffusionMeasure(torch.zeros(1), sd.SDE(drift, 0.5)), folder)
        >>> law = load(folder)
        >>> ts = torch.linspace(0, 1, 5)
        >>> law.sample(ts, 3, generator=0).x.shape
        torch.Size([3, 5, 1])
    """
    if not isinstance(kind, type | types.FunctionType) or "<" in kind.__qualname__:
        raise InvalidInputError(
            "storable needs a class, or a function with a name at the top of a module",
            got=getattr(kind, "__qualname__", repr(kind)[:60]),
        )
    _own[f"{kind.__module__}:{kind.__qualname__}"] = kind
    return kind


def save(thing: object, path: str | os.PathLike[str]) -> None:
    """Write an object into a directory: a fitted model, a law, a result, a network; read it again by :func:`load`.

    The directory holds one JSON manifest and one safetensors file, both with checksums. It is replaced atomically: after
    a crash at any moment the old content is whole, or the new one.

    Args:
        thing: The object. Tensors are written without their graph and come back on the CPU.
        path: The directory, made if need be; what it holds already is replaced.

    Raises:
        UnavailableError: If something inside can't be saved, such as a lambda; the message says where it stands.
        CheckpointInUseError: If another process writes to the directory.
        CheckpointWriteError: If the disk is full or refuses; what was there is then still whole.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
        >>> save(net, folder)
        >>> x = torch.ones(1, 2)
        >>> torch.equal(load(folder)(x), net(x))
        True
    """
    folder = as_folder(path, resume=True, name="path")
    assert folder is not None
    writer = _Writer()
    root = writer.put(thing, type(thing).__name__)
    state = {"library": __version__, "root": root, "objects": writer.objects, "tensors": writer.tensors}
    content = Checkpoint(_KIND, 0, {"class": _name(type(thing))}, state)
    with claimed(folder):
        write_checkpoint(folder, content)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """Read the object that :func:`save` wrote: it samples and predicts as before.

    Args:
        path: The directory.
        device: Where its tensors go.

    Raises:
        CheckpointError: If there is nothing at ``path``, or another version of the library wrote it.
        DamagedCheckpointError: If the files were cut short or altered.
        ForeignCheckpointError: If the directory holds something else, such as the checkpoint of a run.
        UnavailableError: If it needs a class of yours that isn't registered by :func:`storable`.
    """
    folder = as_folder(path, resume=True, name="path")
    assert folder is not None
    content = read_checkpoint(folder)
    if content is None:
        raise CheckpointError("there is nothing to load", got=str(folder), expected="a directory of sd.save")
    check_same_run(folder, {"kind": content.kind}, {"kind": _KIND})
    written = str(content.state.get("library"))
    if written.split(".")[:2] != __version__.split(".")[:2]:
        raise CheckpointError(
            f"another version of stochdyn wrote {folder}",
            got=written,
            expected=__version__,
            hint=f"load it with stochdyn {written}",
        )
    try:
        return _Reader(content.state, torch.device(device)).get(content.state["root"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError | UnavailableError | InvalidInputError):
            raise
        raise DamagedCheckpointError(
            f"the object in {folder} can't be made", got=f"{type(error).__name__}: {error}"
        ) from error


def _name(kind: Any) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _is_channels_last(value: Tensor) -> bool:
    """Return whether images lie in memory pixel by pixel rather than channel by channel."""
    last = value.layout is torch.strided and value.is_contiguous(memory_format=torch.channels_last)
    return last and not value.is_contiguous()


def _is_known(name: str, packages: tuple[str, ...]) -> bool:
    return name in _own or (name.replace(":", ".") + ".").startswith(packages)


def _resolve(name: str, packages: tuple[str, ...]) -> Any:
    """Return the class or function of a name in a file, if it is a known one."""
    if name in _own:
        return _own[name]
    module, _, path = name.partition(":")
    if not _is_known(name, packages):
        raise UnavailableError(
            "the file holds something of a class that isn't known here",
            got=name,
            hint="register it by sd.run.storable",
        )
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = inspect.getattr_static(found, part) if isinstance(found, type) else getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise DamagedCheckpointError("the file names a class that doesn't exist", got=name) from error
    if _name(found) != name:
        raise DamagedCheckpointError("the file names something under a name that isn't its own", got=name)
    return found


def _held(thing: Any) -> dict[str, Any]:
    """Return what an object holds: attributes and slots, but for cached properties, which are derived."""
    found = {
        name: getattr(thing, name)
        for kind in type(thing).__mro__
        for slots in [kind.__dict__.get("__slots__", ())]
        for name in ((slots,) if isinstance(slots, str) else slots)
        if name not in ("__dict__", "__weakref__") and hasattr(thing, name)
    }
    found.update(getattr(thing, "__dict__", {}))
    derived = {n for n in found if isinstance(getattr(type(thing), n, None), functools.cached_property)}
    if isinstance(thing, nn.Module):
        derived |= _HOOKS
    return {n: v for n, v in found.items() if n not in derived}


class Lost:
    """Stands where a record of what has run held a function without a name.

    Args:
        where: The place that it had.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Say that it is gone."""
        raise UnavailableError(f"the function at {self.where} had no name and wasn't saved")


def _plain_array(values: np.ndarray[Any, Any]) -> Any:
    """Return an array, or a list where it holds text."""
    return values if values.dtype.kind in "fiubc" else values.tolist()


def _nothing() -> None:
    """A reference to what is there no more."""


class _Writer:
    """Turns objects into plain data: a list of objects and a list of tensors, which refer to each other by number."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, dict[str, Any]] = {}
        # What has a number stays alive, so that no other object takes over its identity.
        self._alive: list[object] = []
        # Inside of records of what has run, functions without a name are left out: nobody calls them again.
        self._remembering = False

    def put(self, thing: Any, where: str) -> Any:
        match thing:
            case None | bool() | int() | float() | str() | bytes() if type(thing) in _BARE:
                return thing
            case np.generic():
                return self.put(thing.item(), where)
            case complex():
                return {"#complex": [thing.real, thing.imag]}
            case torch.dtype():
                return {"#dtype": str(thing)}
            case torch.device():
                return {"#device": thing.type}
            case torch.layout() | torch.memory_format():
                return {"#torch": str(thing)}
            case range() | slice():
                return {f"#{type(thing).__name__}": [thing.start, thing.stop, thing.step]}
            case enum.Enum():
                return {"#enum": [self._class(type(thing), where), thing.name]}
            case type():
                return {"#class": self._class(thing, where)}
        if id(thing) not in self._numbers:
            self._alive.append(thing)
            try:
                self._numbers[id(thing)] = self._new(thing, where)
            except UnavailableError:
                if not self._remembering:
                    raise
                self._numbers[id(thing)] = {"#lost": where}
        return self._numbers[id(thing)]

    def _class(self, kind: type, where: str) -> str:
        if not _is_known(_name(kind), _CLASSES) or "<" in kind.__qualname__:
            raise UnavailableError(
                f"{where} can't be saved",
                got=f"an object of {_name(kind).replace(':', '.')}",
                hint="put @sd.run.storable above a class of your own, at the top of its module",
            )
        try:
            _resolve(_name(kind), _CLASSES)
        except DamagedCheckpointError:
            raise UnavailableError(
                f"{where} can't be saved",
                got=f"an object of {kind.__qualname__}, a class that was made on the fly",
            ) from None
        return _name(kind)

    def _new(self, thing: Any, where: str) -> dict[str, Any]:
        if isinstance(thing, Tensor):
            return self._tensor(thing, where)
        if isinstance(thing, np.ndarray) and thing.dtype.kind in "fiubc":
            return {"#array": self.put(torch.tensor(thing.copy()), where)}
        if isinstance(thing, torch.Generator):
            return {"#generator": self.put(thing.get_state(), where)}
        name = type(thing).__name__
        if type(thing) is defaultdict:
            return {"#defaultdict": [self.put(thing.default_factory, where), self.put(dict(thing), where)]}
        if name in _CONTAINERS and type(thing).__module__ in ("builtins", "collections", "torch"):
            items = list(thing.items()) if isinstance(thing, dict) else list(thing)
            return {
                f"#{name}": [self._pair(i, v, isinstance(thing, dict), where) for i, v in enumerate(items)]
            }
        if isinstance(thing, types.FunctionType | types.BuiltinFunctionType | type(torch.sin)):
            return {"#function": self._function(thing, where)}
        if isinstance(thing, types.MethodType):
            return {"#method": [self.put(thing.__self__, where), thing.__func__.__name__]}
        if isinstance(thing, functools.partial):
            held = (thing.func, tuple(thing.args), dict(thing.keywords))
            return {"#partial": [self.put(p, where) for p in held]}
        if type(thing).__module__.startswith(("xarray.", "arviz.")):
            return self._container(thing, where)
        if isinstance(thing, weakref.ref):
            return {"#weak": self.put(thing(), where)}
        if type(thing).__module__.startswith("scipy.sparse"):
            entries = thing.tocoo()
            parts = (entries.row, entries.col, entries.data, tuple(map(int, thing.shape)), thing.format)
            return {"#sparse": [self.put(p, where) for p in parts]}
        return self._object(thing, where)

    def _container(self, thing: Any, where: str) -> dict[str, Any]:
        """Take apart what ArviZ reads: groups of named arrays with named axes."""
        name = type(thing).__name__
        if name == "Dataset":
            parts = [
                {str(n): [list(map(str, v.dims)), _plain_array(v.values)] for n, v in variables.items()}
                for variables in (thing.data_vars, thing.coords)
            ]
            return {"#dataset": [self.put(p, where) for p in (*parts, dict(thing.attrs))]}
        if name in ("InferenceData", "DataTree"):
            groups = thing.groups() if name == "InferenceData" else list(thing.children)
            held = {g: thing[g] if name == "InferenceData" else thing[g].to_dataset() for g in groups}
            return {"#groups": [name, self.put(held, where), self.put(dict(thing.attrs), where)]}
        raise UnavailableError(
            f"{where} can't be saved", got=f"an object of {name}", hint="use its own file format"
        )

    def _pair(self, index: int, item: Any, is_dict: bool, where: str) -> Any:
        if not is_dict:
            return self.put(item, f"{where}[{index}]")
        key, value = item
        # Parts of a module are named as in its state dict.
        owner, _, kind = where.rpartition(".")
        inside = f"{owner}.{key}" if kind in ("_modules", "_parameters", "_buffers") else f"{where}[{key!r}]"
        return [self.put(key, where), self.put(value, inside)]

    def _tensor(self, value: Tensor, where: str) -> dict[str, Any]:
        if value.is_meta or isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise UnavailableError(f"{where} can't be saved", got="a tensor without values")
        if value.is_sparse:
            own = value.detach().coalesce()
            return {"#coo": [self.put(own.indices(), where), self.put(own.values(), where), list(own.shape)]}
        self.tensors.append(
            value.detach().to_dense() if value.layout is not torch.strided else value.detach()
        )
        kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
        # A tensor inside a graph comes back as a leaf; only leaves were wanted as such.
        content: list[Any] = [len(self.tensors) - 1, value.requires_grad and value.is_leaf]
        if value.ndim == 4 and _is_channels_last(value):
            content.append("channels_last")
        return {f"#{kind}": content}

    def _function(self, function: Any, where: str) -> str:
        module = getattr(function, "__module__", None) or "torch"
        name = f"{module}:{function.__qualname__}"
        short = str(function.__name__)
        if getattr(torch, short, None) is function:
            return f"torch:{short}"
        if getattr(nn.functional, short, None) is function:
            return f"torch.nn.functional:{short}"
        if not _is_known(name, _FUNCTIONS) or "<" in function.__qualname__:
            raise UnavailableError(
                f"{where} can't be saved",
                got=f"the function {function.__qualname__}",
                hint="put @sd.run.storable above a function at the top of a module, or make it a module's method",
            )
        return name

    def _object(self, thing: Any, where: str) -> dict[str, Any]:
        kind = type(thing)
        name = self._class(kind, where)
        reference = {"#object": len(self.objects)}
        entry: dict[str, Any] = {"class": name}
        self.objects.append(entry)
        self._numbers[id(thing)] = reference
        if hasattr(kind, "to_storage"):
            entry["storage"] = self.put(thing.to_storage(), where)
        elif kind.__module__.startswith(_RECORDS) and not self._remembering:
            self._remembering = True
            try:
                entry["holds"] = {n: self.put(v, f"{where}.{n}") for n, v in _held(thing).items()}
            finally:
                self._remembering = False
        elif isinstance(thing, tuple):
            entry["items"] = [self.put(v, f"{where}[{i}]") for i, v in enumerate(thing)]
        else:
            entry["holds"] = {n: self.put(v, f"{where}.{n}") for n, v in _held(thing).items()}
        return reference


_BARE = frozenset({type(None), bool, int, float, str, bytes})


class _Reader:
    """Makes the objects that a :class:`_Writer` took apart."""

    def __init__(self, state: dict[str, Any], device: torch.device) -> None:
        self._objects, self._tensors, self._device = state["objects"], state["tensors"], device
        self._made: dict[int, Any] = {}
        self._found: dict[int, Tensor] = {}
        self._busy: set[int] = set()

    def get(self, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        ((tag, content),) = tree.items()
        tag = tag.removeprefix("#")
        if tag in ("dict", "OrderedDict", "Counter"):
            return _CONTAINERS[tag]([(self.get(k), self.get(v)) for k, v in content])
        if tag in _CONTAINERS:
            return _CONTAINERS[tag]([self.get(v) for v in content])
        return getattr(self, f"_get_{tag}")(content)

    def _get_object(self, number: int) -> Any:
        if number in self._made:
            return self._made[number]
        entry = self._objects[number]
        kind: Any = _resolve(entry["class"], _CLASSES)
        if not isinstance(kind, type):
            raise DamagedCheckpointError("the file names a class that is none", got=entry["class"])
        if "holds" in entry:
            made: Any = object.__new__(kind)
            self._made[number] = made
            if isinstance(made, nn.Module):
                nn.Module.__init__(made)
            for name, value in entry["holds"].items():
                if hasattr(made, "__dict__") and not isinstance(
                    getattr(kind, name, None), types.MemberDescriptorType
                ):
                    made.__dict__[name] = self.get(value)
                else:
                    object.__setattr__(made, name, self.get(value))
            return made
        if number in self._busy:
            raise DamagedCheckpointError(
                "the file holds an object that is made from itself", got=entry["class"]
            )
        self._busy.add(number)
        if "items" in entry:
            self._made[number] = tuple.__new__(kind, [self.get(v) for v in entry["items"]])
        else:
            rebuilt: Any = kind
            self._made[number] = rebuilt.from_storage(self.get(entry["storage"]))
        return self._made[number]

    def _get_tensor(self, content: list[Any]) -> Tensor:
        number, wanted, *layout = content
        if number not in self._found:
            self._found[number] = self._laid_out(number, layout).requires_grad_(wanted)
        return self._found[number]

    def _get_parameter(self, content: list[Any]) -> Tensor:
        number, wanted, *layout = content
        if number not in self._found:
            self._found[number] = nn.Parameter(self._laid_out(number, layout), requires_grad=wanted)
        return self._found[number]

    def _laid_out(self, number: int, layout: list[str]) -> Tensor:
        """Return a tensor on its device, in the layout in which convolutions of it are fast if it had that."""
        value = self._tensors[number].to(self._device)
        return value.contiguous(memory_format=torch.channels_last) if layout else value

    def _get_coo(self, content: list[Any]) -> Tensor:
        indices, values, shape = content
        return torch.sparse_coo_tensor(
            self.get(indices), self.get(values), shape, check_invariants=True
        ).coalesce()

    def _get_array(self, content: Any) -> Any:
        return self.get(content).cpu().numpy()

    def _get_sparse(self, content: list[Any]) -> Any:
        import scipy.sparse

        row, column, data, shape, form = (self.get(c) for c in content)
        return scipy.sparse.coo_matrix((data, (row, column)), shape=shape).asformat(form)

    def _get_generator(self, content: Any) -> torch.Generator:
        generator = torch.Generator()
        generator.set_state(self.get(content).cpu())
        return generator

    def _get_defaultdict(self, content: list[Any]) -> Any:
        return defaultdict(self.get(content[0]), self.get(content[1]))

    def _get_function(self, name: str) -> Any:
        if name in _own:
            return _own[name]
        module, _, path = name.partition(":")
        if module in ("torch", "torch.nn.functional"):
            found = getattr(importlib.import_module(module), path)
            if (
                not callable(found)
                or isinstance(found, type)
                or getattr(found, "__module__", None) not in _TORCH
            ):
                raise DamagedCheckpointError("the file names a function that is none", got=name)
            return found
        return _resolve(name, _FUNCTIONS)

    def _get_method(self, content: list[Any]) -> Any:
        owner, name = self.get(content[0]), content[1]
        found = getattr(owner, name)
        if not isinstance(found, types.MethodType) or name.startswith("__"):
            raise DamagedCheckpointError("the file names a method that is none", got=name)
        return found

    def _get_partial(self, content: list[Any]) -> Any:
        function, arguments, keywords = (self.get(c) for c in content)
        return functools.partial(function, *arguments, **keywords)

    def _get_lost(self, where: str) -> Any:
        return Lost(where)

    def _get_dataset(self, content: list[Any]) -> Any:
        import xarray

        variables, coords, attrs = (self.get(c) for c in content)
        data = {n: (tuple(dims), np.asarray(values)) for n, (dims, values) in variables.items()}
        axes = {n: (tuple(dims), np.asarray(values)) for n, (dims, values) in coords.items()}
        return xarray.Dataset(data, coords=axes, attrs=attrs)

    def _get_groups(self, content: list[Any]) -> Any:
        name, groups, attrs = content[0], self.get(content[1]), self.get(content[2])
        if name == "DataTree":
            import xarray

            tree = xarray.DataTree.from_dict(groups)
            tree.attrs.update(attrs)
            return tree
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the last 0.x announces 1.0 at every import
            import arviz
        return arviz.InferenceData(attrs=attrs, **groups)

    def _get_weak(self, content: Any) -> Any:
        target = self.get(content)
        return _nothing if target is None else weakref.ref(target)

    def _get_class(self, name: str) -> Any:
        return _resolve(name, _CLASSES)

    def _get_enum(self, content: list[Any]) -> Any:
        return _resolve(content[0], _CLASSES)[content[1]]

    def _get_dtype(self, name: str) -> torch.dtype:
        found = getattr(torch, name.removeprefix("torch."))
        if not isinstance(found, torch.dtype):
            raise DamagedCheckpointError("the file names a precision that is none", got=name)
        return found

    def _get_torch(self, name: str) -> Any:
        found = getattr(torch, name.removeprefix("torch."))
        if not isinstance(found, torch.layout | torch.memory_format):
            raise DamagedCheckpointError("the file names a layout that is none", got=name)
        return found

    def _get_device(self, kind: str) -> torch.device:
        return self._device

    def _get_complex(self, content: list[float]) -> complex:
        return complex(*content)

    def _get_range(self, content: list[int]) -> range:
        return range(*content)

    def _get_slice(self, content: list[Any]) -> slice:
        return slice(*content)
