"""Bad arguments, one at a time: every call in a docstring's example is made again with one argument changed.

A call must answer, without NaN, or raise a typed error, within ten seconds. A small sample that rotates with the date runs by
default; everything runs under ``-m slow``.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import datetime
import doctest
import importlib
import inspect
import io
import math
import pkgutil
import random
import signal
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.errors import StochdynError

LIMIT = 10
PACKAGES = [m.name for m in pkgutil.iter_modules(sd.__path__) if m.ispkg]

#: How many bad arguments of a package are still answered by a raw error or NaN; to be lowered, not raised.
KNOWN = {"fractional": 4}

#: Calls, or calls with one changed argument, that are left alone, with the reason.
EXCEPTIONS = {
    "MasterEquation.apply": "given a function it is nn.Module.apply",
    "Diagonal.solve": "an inner function of time loops, whose arguments are checked at the entrance",
    "affine_states": "a recursion below the checks",
    "gaussian_moments": "a recursion below the checks",
    "bridge_coefficients": "a formula below the checks",
    "unbiased_square": "a NaN residual is reported by the run that minimises it",
    "ObjectiveValue(loss: NaN)": "a loss that isn't finite is reported by the run that minimises it",
    "matching_rate(noise: NaN)": "likewise: to look at draws of a training step would wait for the device",
    "matching_rate(noise: infinite)": "likewise",
    "conservativity(x: of another size)": "the user's function alone knows the size it takes",
    "gauge_residual(x: of another size)": "likewise",
    "intrinsic_dimension(x: of another size)": "likewise",
    "Globe.vectors(east: NaN)": "NaN is a missing measurement, and stays where it is",
    "Globe.vectors(north: NaN)": "likewise",
    "Globe.components(vectors: NaN)": "likewise",
    "predict_path(args: empty)": "the arguments of the user's model are the model's own matter",
    "fit_guide(args: empty)": "likewise",
    "draw_posterior(args: empty)": "the arguments of the user's model are the model's own matter",
    "to_inference_data(args: empty)": "likewise",
    "sbc(args: empty)": "likewise",
    "check_order": "what a function does with other data is its own matter",
    "check_company": "likewise",
    "GaussianDecoder.sample(x: of another size)": "its mean is a function of the user's, which alone knows the size it takes",
}


@dataclass(frozen=True)
class Call:
    """A working call of an example."""

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    def again(self, argument: str | None = None, value: Any = None) -> Any:
        """Make the call again on copies, with one argument changed."""
        owner = getattr(self.function, "__self__", None)
        function = self.function
        if owner is not None and not inspect.isclass(owner):
            function = types.MethodType(self.function.__func__, _copied(owner))  # type: ignore[attr-defined]
        bound = inspect.signature(function).bind_partial()
        bound.arguments.update({k: _copied(v) for k, v in self.arguments.items()})
        if argument is not None:
            bound.arguments[argument] = value
        return function(*bound.args, **bound.kwargs)


def _copied(value: Any) -> Any:
    if isinstance(value, AutoGuide):
        return value  # Pyro's guides forget their models when they are copied, the original too
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def documented(package: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return name, docstring and globals of everything public of a package that has an example."""
    found: dict[str, tuple[str, str, dict[str, Any]]] = {}
    module = importlib.import_module(f"stochdyn.{package}")
    for name in dir(module):
        thing = getattr(module, name)
        home = getattr(thing, "__module__", "")
        if not isinstance(thing, type | types.FunctionType) or not home.startswith("stochdyn."):
            continue
        space = vars(importlib.import_module(home))
        methods = (
            [
                (f"{name}.{k}", v)
                for k, v in vars(thing).items()
                if not k.startswith("_") and callable(v) and getattr(v, "__module__", "") == home
            ]
            if isinstance(thing, type)
            else []
        )
        for label, part in ((name, thing), *methods):
            text = getattr(part, "__doc__", None) or ""
            if ">>>" in text:
                found[label] = (label, text, space)
    return sorted(found.values(), key=lambda item: item[0])


class _Recorder(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            return node
        hook = ast.Name("_record_call", ast.Load())
        return ast.copy_location(ast.Call(hook, [node.func, *node.args], node.keywords), node)


def calls(text: str, space: dict[str, Any]) -> list[Call]:
    """Run an example and return the calls of the library's own functions in it, the first of each."""
    found: dict[str, Call] = {}

    def record(function: Any, *args: Any, **kwargs: Any) -> Any:
        label = _label(function)
        if label is not None and label not in found:
            with contextlib.suppress(TypeError, ValueError):
                bound = inspect.signature(function).bind(*args, **kwargs)
                kinds = inspect.signature(function).parameters
                plain = {
                    k: v
                    for k, v in bound.arguments.items()
                    if kinds[k].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
                }
                found[label] = Call(label, function, {k: _copied(v) for k, v in plain.items()})
        return function(*args, **kwargs)

    names = {"sd": sd, "torch": torch, "nn": nn, "np": np, "math": math, **space, "_record_call": record}
    for example in doctest.DocTestParser().get_examples(text):
        if example.exc_msg is not None:
            continue  # it shows an error
        tree = ast.fix_missing_locations(_Recorder().visit(ast.parse(example.source)))
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(tree, "<example>", "exec"), names)
    return list(found.values())


def _label(function: Any) -> str | None:
    """Return the name of a public function, class or method of the library, None for anything else."""
    if inspect.isclass(function):
        return function.__name__ if _is_ours(function) else None
    owner = getattr(function, "__self__", None)
    if owner is not None and not inspect.isclass(owner):
        kind, name = type(owner), getattr(function, "__name__", "_")
        public = _is_ours(kind) and not name.startswith("_") and not hasattr(nn.Module, name)
        return f"{kind.__name__}.{name}" if public else None
    if not isinstance(function, types.FunctionType) or function.__name__.startswith("_"):
        return None
    return function.__qualname__ if _is_ours(function) else None


def _is_ours(thing: Any) -> bool:
    """Whether a class or a function stands in a module of the library, rather than in an example."""
    home = getattr(thing, "__module__", None) or ""
    name = thing.__qualname__.split(".")[0]
    return home.startswith("stochdyn.") and hasattr(importlib.import_module(home), name)


def mutations(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what stands in for a value, and what is wrong with it."""
    yield "None", None
    yield "an object", object()
    if isinstance(value, bool):
        yield "a number for a bool", 0.5
        yield "a word for a bool", "no"
    elif isinstance(value, int):
        yield from (("negative", -1), ("zero", 0), ("a fraction", 1.5), ("NaN", math.nan), ("a word", "3"))
    elif isinstance(value, float):
        yield from (
            ("NaN", math.nan),
            ("infinite", math.inf),
            ("negative", -value - 1),
            ("zero", 0.0),
            ("a word", "x"),
        )
    elif isinstance(value, str):
        yield from (("misspelt", value + "x"), ("a number", 3))
    elif isinstance(value, Tensor) and value.is_floating_point():
        plain = value.detach()
        for name, number in (("NaN", math.nan), ("infinite", math.inf)):
            if plain.numel():
                bad = plain.clone().contiguous()
                bad.view(-1)[0] = number
                yield name, bad
        yield from (
            ("negative", -plain.abs() - 1),
            ("zero", torch.zeros_like(plain)),
            ("another number of axes", plain.unsqueeze(0)),
            ("integer", plain.long()),
            ("half precision", plain.half()),
            ("complex", plain.to(torch.complex64)),
            ("a word", "x"),
        )
        if plain.ndim:
            yield "empty", plain[:0]
            yield "of another size", torch.cat([plain, plain], -1)
            yield "not contiguous", torch.stack([plain, plain], -1)[..., 0]
    elif isinstance(value, list | tuple):
        yield from (
            ("empty", type(value)()) if type(value) in (list, tuple) else ("a word", "x"),
            ("a number", 3),
        )
    elif callable(value):
        yield from (("a number", 3), ("a word", "f"))
    else:
        yield "a number", 3


def has_nan(result: Any, depth: int = 0) -> bool:
    """Whether there is NaN in a result."""
    if depth > 3:
        return False
    if isinstance(result, Tensor):
        return result.is_floating_point() and bool(torch.isnan(result.detach()).any())
    if isinstance(result, nn.Module):
        return any(has_nan(v, depth + 1) for v in (*result.parameters(), *result.buffers()))
    if isinstance(result, float):
        return math.isnan(result)
    if isinstance(result, list | tuple):
        return any(has_nan(v, depth + 1) for v in result)
    if isinstance(result, Mapping):
        return any(has_nan(v, depth + 1) for v in result.values())
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return any(has_nan(getattr(result, f.name, None), depth + 1) for f in dataclasses.fields(result))
    return False


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(call: Call, argument: str, value: Any, sound: bool) -> str | None:
    """Return what is wrong with the answer to a changed call, or None."""
    try:
        with limited(LIMIT):
            result = call.again(argument, value)
    except StochdynError:
        return None
    except AssertionError as error:
        # That is what a checker of invariances has to say.
        return None if call.name.startswith("check_") else f"AssertionError: {error}"
    except TimeoutError:
        return f"takes over {LIMIT} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    return "NaN without a word" if sound and has_nan(result) else None


def faults(items: list[tuple[str, str, dict[str, Any]]]) -> tuple[int, list[str]]:
    """Return the number of calls tried, and those with a bad answer."""
    tried, bad, seen = 0, [], set()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        for label, text, space in items:
            try:
                with limited(6 * LIMIT):
                    working = calls(text, space)
            except Exception as error:
                bad.append(f"{label}: its example fails: {type(error).__name__}: {str(error)[:80]}")
                continue
            for call in working:
                if call.name in seen or any(call.name.startswith(name) for name in EXCEPTIONS):
                    continue
                seen.add(call.name)
                try:
                    with limited(LIMIT):
                        sound = not has_nan(call.again())
                except Exception:
                    continue
                for argument, value in call.arguments.items():
                    for what, other in mutations(value):
                        tried += 1
                        with (
                            contextlib.redirect_stdout(io.StringIO()),
                            contextlib.redirect_stderr(io.StringIO()),
                        ):
                            wrong = verdict(call, argument, other, sound)
                        case = f"{call.name}({argument}: {what})"
                        if wrong is not None and case not in EXCEPTIONS:
                            bad.append(f"{case}: {wrong}")
    return tried, bad


def test_a_rotating_sample_of_the_core() -> None:
    """Twelve examples, others every day."""
    items = documented("core")
    chosen = random.Random(datetime.date.today().toordinal()).sample(items, min(12, len(items)))
    tried, bad = faults(chosen)
    assert tried
    assert not bad, "\n".join(bad)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_bad_arguments_are_refused_by_name(package: str) -> None:
    tried, bad = faults(documented(package))
    assert len(bad) <= KNOWN.get(package, 0), "\n".join([f"{len(bad)} of {tried}", *bad])
