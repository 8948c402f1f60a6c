"""What an answer mustn't depend on: a checker for each invariance, for our own algorithms and for those of users.

Each takes a function that computes the answer and calls it under changes that mustn't matter. Answers are tensors, numbers, or
dictionaries, lists and tuples of them.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stochdyn._checks import check_callable, check_ndim, check_points, check_time_grid, check_type
from stochdyn.errors import StochdynError

__all__ = [
    "check_company",
    "check_device",
    "check_forms",
    "check_gradients",
    "check_order",
    "check_precision",
    "check_question",
    "check_repetition",
    "check_storage",
    "check_units",
]

Answer = Any


def check_units(
    answer: Callable[[float], Answer],
    factors: Sequence[float] = (1e-12, 1e-6, 1e6, 1e12),
    rtol: float = 1e-6,
) -> None:
    """Check that an answer doesn't depend on the unit of what goes in.

    Args:
        answer: The writes the problem ``answer(factor)`` in units in which its lengths (or times) are ``factor`` times
            as large, and returns the answer converted back.
        factors: The factors that are compared with 1.
        rtol: The relative tolerance, with respect to the largest entry of each tensor.

    Raises:
        AssertionError: If an answer differs, with the factor.

    Example:
        >>> variance = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> check_units(lambda unit: (unit**2 * variance).sqrt() / unit)
    """
    check_callable(answer, "answer")
    wanted = answer(1.0)
    for factor in factors:
        _same(answer(factor), wanted, rtol, f"in units of {factor:g}")


def check_company(
    answer: Callable[[Tensor], Answer],
    x: Tensor,
    factors: Sequence[float] = (1e-6, 1.0, 1e6),
    rtol: float = 1e-6,
    axis: int = 0,
) -> None:
    """Check that a member of a batch has the answer beside others that it has alone.

    Args:
        answer: A function that maps a batch, along the first axis, to answers along their axis ``axis``.
        x: One member, without its batch axis.
        factors: The factors by which the other members are larger.
        rtol: The relative tolerance, with respect to the largest entry of each tensor of the member.
        axis: The batch axis of the answers.

    Raises:
        AssertionError: If the company matters, with the factor.

    Example:
        >>> check_company(lambda x: x / x.norm(dim=-1, keepdim=True), torch.tensor([3.0, 4.0]))
    """
    check_callable(answer, "answer")
    check_type(x, Tensor, "x")
    alone = _select(answer(x.unsqueeze(0)), axis, 0)
    for factor in factors:
        for place in (0, 1):
            members = [factor * x, factor * x]
            members[place] = x
            beside = _select(answer(torch.stack(members)), axis, place)
            _same(beside, alone, rtol, f"beside a member {factor:g} times as large")


def check_order(
    answer: Callable[[Tensor], Answer],
    x: Tensor,
    axis: int = 0,
    equivariant: bool = False,
    rtol: float = 1e-6,
) -> None:
    """Check that the order of particles, sites, series or nodes doesn't matter.

    Args:
        answer: A function that maps data to an answer.
        x: The data, to be permuted along ``axis``.
        axis: The axis of the things whose order doesn't matter.
        equivariant: Whether the answer is permuted with the data, along its first axis, rather than unchanged.
        rtol: The relative tolerance, with respect to the largest entry of each tensor.

    Raises:
        AssertionError: If the order matters.

    Example:
        >>> check_order(lambda x: x.mean(0), torch.arange(6.0).reshape(3, 2))
    """
    check_callable(answer, "answer")
    check_ndim(x, tuple(range(1, 13)), "x", "one axis or more")
    order = torch.randperm(x.shape[axis], generator=torch.Generator().manual_seed(0))
    wanted = answer(x)
    if equivariant:
        wanted = _map(wanted, lambda v: v[order])
    _same(answer(x.index_select(axis, order)), wanted, rtol, "in another order")


def check_repetition(answer: Callable[[], Answer]) -> None:
    """Check that the same call gives the same answer to the last bit, and leaves torch's global state as it was.

    Args:
        answer: A function that makes its objects, computes, and returns the answer; its randomness has a seed.

    Raises:
        AssertionError: If the second answer differs, or a global of torch has changed.

    Example:
        >>> check_repetition(lambda: torch.randn(3, generator=torch.Generator().manual_seed(0)))
    """
    check_callable(answer, "answer")
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    first = answer()
    second = answer()
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == before, (
        "the call leaves a global of torch changed"
    )
    _same(second, first, 0.0, "the second time")


def check_question(answer: Callable[[Tensor], Answer], ts: Tensor, rtol: float = 1e-6, axis: int = 0) -> None:
    """Check that an answer at a time doesn't depend on which other times were asked for.

    Args:
        answer: A function that maps times ``(T,)`` to answers at these times, along the axis ``axis``.
        ts: Increasing times, three or more.
        rtol: The relative tolerance, with respect to the largest entry of each tensor at that time.
        axis: The axis of times in the answers.

    Raises:
        AssertionError: If the other times matter.

    Example:
        >>> check_question(lambda ts: torch.exp(-ts), torch.linspace(0, 1, 5))
    """
    check_callable(answer, "answer")
    check_time_grid(ts, min_points=3)
    whole = answer(ts)
    last = ts.shape[0] - 1
    for picked in ([0, last], [0, last // 2, last], list(range(0, last + 1, 2))):
        part = answer(ts[picked])
        for place, index in enumerate(picked):
            what = f"at t={float(ts[index]):g} with other times"
            _same(_select(part, axis, place), _select(whole, axis, index), rtol, what)


def check_precision(answer: Callable[[torch.dtype], Answer], rtol: float = 1e-4) -> None:
    """Check that single and double precision both work, keep their precision, and agree.

    Args:
        answer: The makes its inputs ``answer(dtype)`` in this precision and returns the answer.
        rtol: The relative tolerance, with respect to the largest entry of each tensor.

    Raises:
        AssertionError: If a floating answer has another precision than its inputs, or the values differ.

    Example:
        >>> check_precision(lambda dtype: torch.ones(2, dtype=dtype).exp())
    """
    check_callable(answer, "answer")
    answers = {}
    for dtype in (torch.float32, torch.float64):
        answers[dtype] = answer(dtype)
        for leaf in _leaves(answers[dtype]):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                assert leaf.dtype == dtype, f"inputs of {dtype} lead to {leaf.dtype}"
    single = _map(answers[torch.float32], lambda v: v.double() if v.is_floating_point() else v)
    _same(single, answers[torch.float64], rtol, "in single precision")


def check_device(module: nn.Module) -> None:
    """Check that all tensors that a module holds move with it: to another device and to double precision.

    Attributes that aren't registered count, whatever holds them: lists, dictionaries, distributions, data classes.

    Args:
        module: Any module of torch; it isn't changed.

    Raises:
        AssertionError: If something stays behind, with the names of the tensors that stay behind.

    Example:
        >>> check_device(nn.Linear(2, 1))
    """
    check_type(module, nn.Module, "module")
    twin = copy.deepcopy(module).to("meta")
    left = [name for name, value in _held(twin) if value.device.type != "meta"]
    assert not left, f"stay behind when {type(module).__name__} moves to another device: {left}"
    twin = copy.deepcopy(module).double()
    left = [
        name for name, value in _held(twin) if value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert not left, f"stay in single precision when {type(module).__name__} becomes double: {left}"


def check_storage(module: nn.Module, answer: Callable[[Any], Answer], pickles: bool = True) -> None:
    """Check that a copy, a pickle and a loaded state give the answer of the original.

    Args:
        module: Any module of torch; it isn't changed.
        answer: A function that maps the module or a copy of it to an answer; its randomness has a seed.
        pickles: Whether the module can be pickled, which it can't with lambdas inside.

    Raises:
        AssertionError: If one of them has another answer.

    Example:
        >>> check_storage(nn.Linear(2, 1), lambda net: net(torch.ones(2)))
    """
    check_type(module, nn.Module, "module")
    check_callable(answer, "answer")
    wanted = answer(module)
    twin = copy.deepcopy(module)
    _same(answer(twin), wanted, 0.0, "from a deep copy")
    if pickles:
        _same(answer(pickle.loads(pickle.dumps(module))), wanted, 0.0, "from a pickle")
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for value in (*twin.parameters(), *twin.buffers()):
            if value.is_floating_point():
                value.mul_(1.01)
    twin.load_state_dict(torch.load(file))
    _same(answer(twin), wanted, 0.0, "from a loaded state")


def check_forms(answer: Callable[[Any], Answer], x: Tensor, rtol: float = 1e-6) -> None:
    """Check that lists, NumPy, pandas, xarray and torch give the same answer.

    Args:
        answer: A function that maps data to an answer.
        x: The data as a tensor, of any number of axes; pandas is tried for one and two.
        rtol: The relative tolerance, with respect to the largest entry of each tensor.

    Raises:
        AssertionError: If a form gives another answer, or is refused.

    Example:
        >>> check_forms(lambda data: torch.as_tensor(np.asarray(data, dtype=float)).sum(), torch.arange(3.0))
    """
    check_callable(answer, "answer")
    check_type(x, Tensor, "x")
    wanted = answer(x)
    array = x.detach().cpu().numpy()
    forms: dict[str, Any] = {"a list": array.tolist(), "NumPy": array}
    try:
        import pandas
    except ImportError:
        pass
    else:
        if x.ndim <= 2:
            forms["pandas"] = pandas.Series(array) if x.ndim == 1 else pandas.DataFrame(array)
    try:
        import xarray
    except ImportError:
        pass
    else:
        forms["xarray"] = xarray.DataArray(array)
    for name, form in forms.items():
        try:
            got = answer(form)
        except (StochdynError, TypeError, ValueError, AttributeError) as error:
            raise AssertionError(f"{name} is refused: {error}") from error
        _same(got, wanted, rtol, f"given as {name}")


def check_gradients(function: Callable[..., Tensor], *inputs: Tensor, second: bool = True) -> None:
    """Check derivatives by automatic differentiation against finite differences.

    Args:
        function: A function that maps the inputs to a tensor; its randomness has a seed.
        inputs: Tensors in float64.
        second: Whether second derivatives are checked too.

    Raises:
        AssertionError: If a derivative is missing or differs.

    Example:
        >>> check_gradients(torch.sin, torch.ones(2, dtype=torch.float64))
    """
    check_callable(function, "function")
    for x in inputs:
        check_points(x, "inputs")
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    value = function(*leaves)
    assert value.requires_grad, "the result doesn't depend on the inputs for automatic differentiation"
    slopes = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    lost = [i for i, slope in enumerate(slopes) if slope is None]
    assert not lost, f"no gradient reaches inputs {lost}"
    try:
        torch.autograd.gradcheck(function, leaves)
        if second:
            torch.autograd.gradgradcheck(function, leaves)
    except RuntimeError as error:
        raise AssertionError(str(error)) from error


def _leaves(answer: Answer) -> list[Any]:
    if isinstance(answer, Mapping):
        return [leaf for key in answer for leaf in _leaves(answer[key])]
    if isinstance(answer, list | tuple):
        return [leaf for part in answer for leaf in _leaves(part)]
    return [answer]


def _map(answer: Answer, f: Callable[[Tensor], Tensor]) -> Answer:
    if isinstance(answer, Mapping):
        return {key: _map(value, f) for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [_map(value, f) for value in answer]
    return f(answer) if isinstance(answer, Tensor) else answer


def _select(answer: Answer, axis: int, index: int) -> Answer:
    return _map(answer, lambda v: v.select(axis, index))


def _same(got: Answer, wanted: Answer, rtol: float, what: str) -> None:
    """Raise unless two answers agree, every tensor with respect to its own largest entry."""
    first, second = _leaves(got), _leaves(wanted)
    assert len(first) == len(second), f"another answer {what}"
    for a, b in zip(first, second, strict=True):
        a, b = (v.detach() if isinstance(v, Tensor) else torch.as_tensor(np.asarray(v)) for v in (a, b))
        assert a.shape == b.shape, f"another shape {what}: {tuple(a.shape)} for {tuple(b.shape)}"
        if not b.is_floating_point() and not b.is_complex():
            assert torch.equal(a, b.to(a)), f"another answer {what}"
            continue
        finite = b[torch.isfinite(b)].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        close = torch.isclose(a.to(b), b, rtol=rtol, atol=rtol * scale, equal_nan=True)
        gap = (a.to(b) - b).abs().nan_to_num(torch.inf).max() if b.numel() else 0.0
        assert bool(close.all()), (
            f"another answer {what}: off by {float(gap):.3g} where the largest entry is {scale:.3g}"
        )


def _held(thing: Any, name: str = "", seen: set[int] | None = None) -> list[tuple[str, Tensor]]:
    """Return all tensors that an object holds, by the way to them."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [(name, thing)]
    if isinstance(thing, Mapping):
        parts = [(f"{name}[{key!r}]", value) for key, value in thing.items()]
    elif isinstance(thing, list | tuple | set | frozenset):
        parts = [(f"{name}[{i}]", value) for i, value in enumerate(thing)]
    elif isinstance(thing, nn.Module):
        own = dict(vars(thing))
        for registered in ("_parameters", "_buffers", "_modules"):
            own |= own.pop(registered)
        parts = [(f"{name}.{key}".lstrip("."), value) for key, value in own.items()]
    elif hasattr(thing, "__dict__") and not isinstance(thing, type) and not callable(thing):
        parts = [(f"{name}.{key}".lstrip("."), value) for key, value in vars(thing).items()]
    else:
        return []
    return [found for at, value in parts for found in _held(value, at, seen)]
