"""Coefficients of terms: numbers, functions of time, expressions in parameters, and tables of samples."""

from __future__ import annotations

import ast
import contextlib
import inspect
import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, as_time_grid, check_choice
from stochdyn.errors import LindbladianError, ShapeError

__all__ = ["Coefficient", "SampledCoefficient", "coefficient_value", "read_coefficient"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "log": torch.log,
    "abs": torch.abs,
}
_CONSTANTS = {"pi": math.pi}
_TIME = "t"


@dataclass(frozen=True)
class Coefficient:
    r"""The coefficient of a term, ``factor * function(t, parameters)``.

    Attributes:
        factor: The constant number that multiplies the rest.
        function: A function of the time, if it uses it, and then of the parameters in ``names``; None for a number.
        names: The names of the parameters that the function takes.
        uses_time: Whether the function takes the time first.
        bound: The values of parameters that are set already, by name.
    """

    factor: float = 1.0
    function: Callable[..., Any] | None = None
    names: tuple[str, ...] = ()
    uses_time: bool = False
    bound: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_constant(self) -> bool:
        """Whether the coefficient is a plain number."""
        return self.function is None

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters that have no value yet."""
        return tuple(name for name in self.names if name not in self.bound)

    @property
    def takes_many_times(self) -> bool:
        """Whether the function takes many times at once, against draws of the parameters."""
        return isinstance(self.function, _Expression)

    @property
    def breaks(self) -> Sequence[float]:
        """Times at which the function says that it isn't smooth."""
        return getattr(self.function, "breaks", ())

    @property
    def key(self) -> tuple[Any, ...]:
        """What two coefficients share that differ by their factors only."""
        values = tuple((n, id(v) if isinstance(v, Tensor) else v) for n, v in sorted(self.bound.items()))
        return (None if self.function is None else id(self.function), self.names, values)

    def bind(self, values: Mapping[str, Any]) -> Coefficient:
        """Return the coefficient with some parameters set, a plain number if that makes it one."""
        mine = {name: values[name] for name in self.free if name in values}
        if not mine:
            return self
        kept = {n: v if _is_variable(v) else float(v) for n, v in mine.items()}
        new = Coefficient(self.factor, self.function, self.names, self.uses_time, {**self.bound, **kept})
        if new.free or new.uses_time or any(_is_variable(v) for v in new.bound.values()):
            return new
        return Coefficient(self.factor * float(new.relative(None)))

    def relative(self, t: Tensor | None, values: Mapping[str, Any] | None = None) -> Tensor:
        """Return the value over the factor.

        Args:
            t: The time ``()`` or times of any shape, where the coefficient depends on it.
            values: The values of parameters that aren't bound, numbers or tensors.

        Raises:
            LindbladianError: If a parameter has no value, or the value isn't a finite real number.
        """
        like = t if t is not None else torch.zeros((), dtype=torch.float64)
        if self.function is None:
            return torch.ones_like(like)
        known = {**self.bound, **(values or {})}
        missing = [name for name in self.names if name not in known]
        if missing:
            raise LindbladianError(
                "parameters must be bound first", got=", ".join(missing), hint="model.bind(name=value)"
            )
        arguments = [torch.as_tensor(known[name], dtype=like.dtype) for name in self.names]
        if not self.uses_time:
            value = self.function(*arguments)
        elif t is None:
            raise LindbladianError("a coefficient depends on time", hint="say at which time")
        else:
            value = _at_times(self.function, t, arguments)
        return torch.as_tensor(value, dtype=like.dtype)


def coefficient_value(coefficient: Coefficient, t: float) -> float:
    """Return the value of a coefficient at a time.

    Raises:
        LindbladianError: If a parameter isn't bound, or the value isn't finite.
    """
    if coefficient.function is None:
        return coefficient.factor
    time = torch.tensor(t, dtype=torch.float64)
    with torch.no_grad():
        value = coefficient.factor * float(coefficient.relative(time))
    if not math.isfinite(value):
        raise LindbladianError("a coefficient isn't finite", got=f"{value} at time {t:g}")
    return value


def read_coefficient(value: Any, name: str) -> Coefficient:
    """Return a coefficient from a number, an expression, a function or a differentiable tensor.

    Args:
        value: The coefficient as one writes it: a number; an expression such as ``"g"``, ``"-g/2"`` or
            ``"gamma*(n+1)"`` in parameters, numbers, the time ``t`` and the functions sin, cos, tan, tanh, exp, sqrt,
            log, abs; a function of the time and of parameters by the names of its arguments, such as ``lambda t, g: g *
            math.cos(t)``; or a tensor of one element, which stays differentiable.
        name: The name of the term in messages.

    Raises:
        LindbladianError: If it can't be read, or is no finite real number.

    Example:
        >>> read_coefficient("0.5*gamma*(n+1)", "a term").free
        ('gamma', 'n')
    """
    if isinstance(value, Coefficient):
        return value
    if isinstance(value, str):
        return _read_expression(value, name)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise LindbladianError(f"the coefficient of {name} must be one number", got=tuple(value.shape))
        if value.requires_grad and not value.is_complex():
            return Coefficient(1.0, _identity, ("value",), bound={"value": value.reshape(())})
    elif callable(value):
        return _read_function(value, name)
    try:
        number = complex(value)
    except (TypeError, ValueError) as error:
        raise LindbladianError(
            f"the coefficient of {name} can't be read",
            got=repr(value)[:60],
            expected="a number, an expression in parameters, or a function of time",
        ) from error
    if number.imag != 0 or not math.isfinite(number.real):
        raise LindbladianError(
            f"the coefficient of {name} must be real and finite",
            got=repr(value)[:60],
            hint="put phases into the operator; a Hamiltonian term has to be Hermitian as a whole",
        )
    return Coefficient(number.real)


class SampledCoefficient:
    r"""A coefficient given by its values at some times, such as a pulse from a waveform generator.

    Outside the times the first and the last value go on.

    Args:
        times: The increasing times ``(n,)`` of the samples.
        values: The value ``(n,)`` at each of them.
        method: The way between samples: ``"constant"`` holds each value until the next time, ``"linear"`` joins them by
            lines.

    Raises:
        TimeGridError: If the times don't increase.
        ShapeError: If there isn't one value for each time.

    Example:
        >>> pulse = SampledCoefficient([0.0, 1.0, 2.0], [0.0, 1.0, 0.0], method="constant")
        >>> pulse(0.5), pulse(1.0), pulse(3.0)
        (0.0, 1.0, 0.0)
    """

    def __init__(self, times: Any, values: Any, method: str = "linear") -> None:
        check_choice(method, ("linear", "constant"), "method")
        like = torch.empty(0, dtype=torch.float64)
        grid = as_time_grid(times, "times", 1, like).detach().double().cpu()
        data = as_tensor(values, "values", 1, "(n,)", like=like).detach().double().cpu()
        if len(grid) != len(data):
            raise ShapeError("values must have one entry for each time", got=len(data), expected=len(grid))
        self.times, self.values, self.method = grid.numpy(), data.numpy(), method
        self.breaks: tuple[float, ...] = tuple(self.times.tolist())

    def __call__(self, t: Any) -> float:
        """Return the value at a time."""
        at = float(t)
        if self.method == "linear":
            return float(np.interp(at, self.times, self.values))
        place = int(np.searchsorted(self.times, at, side="right")) - 1
        return float(self.values[max(place, 0)])


def _identity(value: Tensor) -> Tensor:
    return value


def _is_variable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


# ---------------------------------------------------------------------- functions of users


_WANTS_FLOAT: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _at_times(function: Callable[..., Any], t: Tensor, arguments: Sequence[Tensor]) -> Tensor:
    """Call a function of one time at every one of many; an expression takes them all at once."""
    if isinstance(function, _Expression):
        return function(t, *arguments)
    if t.ndim == 0:
        return torch.as_tensor(_at_time(function, t, arguments), dtype=t.dtype)
    values = [torch.as_tensor(_at_time(function, x, arguments), dtype=t.dtype) for x in t.reshape(-1)]
    return torch.stack([v.reshape(()) for v in values]).reshape(t.shape)


def _at_time(function: Callable[..., Any], t: Tensor, arguments: Sequence[Tensor]) -> Any:
    """Call a function with the time as a float, or as a tensor if it is one that wants tensors (torch's, say)."""
    wants_float = _wants_float(function, t, arguments)
    value = function(float(t) if wants_float else t, *arguments)
    if not isinstance(value, Tensor):
        return _real(value)
    if all(argument.ndim == 0 for argument in arguments):
        return value.reshape(()) if value.numel() == 1 else _refuse(value)
    # of many draws of the parameters, one value for each
    return value


def _wants_float(function: Callable[..., Any], t: Tensor, arguments: Sequence[Tensor]) -> bool:
    """Find out once for each function what it is to be called with.

    A float, unless the function refuses it, or answers in single precision where a tensor of the time in double
    precision would lead to double: rounding to seven digits is noise that solvers of high order would follow.
    """
    if isinstance(function, SampledCoefficient | _Expression):
        return isinstance(function, SampledCoefficient)
    try:
        return _WANTS_FLOAT[function]
    except (KeyError, TypeError):
        pass
    found = True
    try:
        value = function(float(t), *arguments)
        if isinstance(value, Tensor) and torch.finfo(t.dtype).eps < _resolution(value):
            found = _resolution(function(t, *arguments)) >= _resolution(value)
    except LindbladianError:
        raise
    except Exception:
        found = False
    with contextlib.suppress(TypeError):  # not everything can be referred to weakly
        _WANTS_FLOAT[function] = found
    return found


def _resolution(value: Any) -> float:
    """Return the relative spacing of the numbers of a tensor's type; zero for exact types and plain numbers."""
    return torch.finfo(value.dtype).eps if isinstance(value, Tensor) and value.is_floating_point() else 0.0


def _real(value: Any) -> Any:
    try:
        number = complex(value)
    except (TypeError, ValueError):
        return _refuse(value)
    return number.real if not abs(number.imag) > 1e-12 * abs(number) else _refuse(value)


def _refuse(value: Any) -> Any:
    raise LindbladianError("a coefficient must be one real number at each time", got=repr(value)[:60])


def _read_function(function: Callable[..., Any], name: str) -> Coefficient:
    """Read which parameters a function of time takes besides the time."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # builtins such as math.cos, compiled objects
        return Coefficient(function=function, uses_time=True)
    named = [
        p for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]  # fmt: skip
    if not named and not any(p.kind is p.VAR_POSITIONAL or p.default is not p.empty for p in parameters):
        raise LindbladianError(f"the coefficient of {name} is a function without arguments")
    if len(named) < 2:
        return Coefficient(function=function, uses_time=True)
    return Coefficient(function=function, names=tuple(p.name for p in named[1:]), uses_time=True)


# ---------------------------------------------------------------------- expressions


class _Expression:
    """An arithmetic expression in the time and in parameters."""

    def __init__(self, tree: ast.expr, text: str) -> None:
        self.tree, self.text = tree, text
        names = dict.fromkeys(
            node.id for node in ast.walk(tree)
            if isinstance(node, ast.Name) and node.id not in _CONSTANTS and node.id not in _FUNCTIONS
        )  # fmt: skip
        self.uses_time = _TIME in names
        self.names = tuple(name for name in names if name != _TIME)

    def __repr__(self) -> str:
        return self.text

    def to_storage(self) -> dict[str, str]:
        """Return the text."""
        return {"text": self.text}

    @classmethod
    def from_storage(cls, state: Mapping[str, str]) -> _Expression:
        """Read the text again, which may hold nothing but arithmetic."""
        _check_tree(ast.parse(state["text"], mode="eval").body)
        return _compiled(state["text"])

    def __call__(self, *arguments: Tensor) -> Tensor:
        names = ((_TIME,) if self.uses_time else ()) + self.names
        value = _evaluate(self.tree, dict(zip(names, arguments, strict=True)))
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _read_expression(text: str, name: str) -> Coefficient:
    # "2g" is 2*g, as people write it; an exponent such as 1e3 is left alone
    spaced = re.sub(r"(?<![\w.])((?>\d+\.?\d*(?:[eE][-+]?\d+)?))\s*(?=[A-Za-z_(])", r"\1*", text.strip())
    try:
        tree = ast.parse(spaced, mode="eval").body
        _check_tree(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LindbladianError(
            f"the coefficient of {name} can't be read",
            got=repr(text)[:80],
            expected="an expression such as 'g', '-g/2' or 'gamma*(n+1)'",
        ) from error
    try:
        factor, rest = _split_factor(tree)
        if rest is None or not math.isfinite(factor):
            return read_coefficient(factor, name)
        expression = _compiled(ast.unparse(rest))
        if not expression.names and not expression.uses_time:  # sqrt(2)*pi
            return read_coefficient(factor * float(expression()), name)
    except ArithmeticError as error:
        raise LindbladianError(f"the coefficient of {name} isn't finite", got=repr(text)[:80]) from error
    return Coefficient(factor, expression, expression.names, expression.uses_time)


@lru_cache(maxsize=1024)
def _compiled(text: str) -> _Expression:
    """One object for one expression, so that terms that share it share its evaluation."""
    return _Expression(ast.parse(text, mode="eval").body, text)


def _check_tree(tree: ast.expr) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
            if not known or len(node.args) != 1 or node.keywords:
                raise ValueError("unknown function")
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool) or not isinstance(node.value, int | float):
                raise ValueError("not a number")
        elif not isinstance(
            node,
            ast.Name | ast.BinOp | ast.UnaryOp | ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow | ast.USub
            | ast.UAdd | ast.Load,
        ):  # fmt: skip
            raise ValueError("not arithmetic")


def _split_factor(tree: ast.expr) -> tuple[float, ast.expr | None]:
    """Return the number that multiplies an expression, and what is left (None for one)."""
    if isinstance(tree, ast.Constant):
        return float(tree.value), None  # type: ignore[arg-type]
    if isinstance(tree, ast.UnaryOp):
        factor, rest = _split_factor(tree.operand)
        return (-factor if isinstance(tree.op, ast.USub) else factor), rest
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult | ast.Div):
        left, a = _split_factor(tree.left)
        right, b = _split_factor(tree.right)
        divides = isinstance(tree.op, ast.Div)
        factor = left / right if divides else left * right
        if b is None:
            return factor, a
        if a is None and not divides:
            return factor, b
        return factor, ast.BinOp(a or ast.Constant(1.0), tree.op, b)
    return 1.0, tree


def _evaluate(node: ast.expr, values: Mapping[str, Tensor]) -> Any:
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return _CONSTANTS[node.id] if node.id in _CONSTANTS else values[node.id]
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, values)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        argument = torch.as_tensor(_evaluate(node.args[0], values), dtype=torch.float64)
        return _FUNCTIONS[node.func.id](argument)
    assert isinstance(node, ast.BinOp)
    a, b = _evaluate(node.left, values), _evaluate(node.right, values)
    if isinstance(node.op, ast.Add):
        return a + b
    if isinstance(node.op, ast.Sub):
        return a - b
    if isinstance(node.op, ast.Mult):
        return a * b
    return a / b if isinstance(node.op, ast.Div) else a**b
