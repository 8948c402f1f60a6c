"""A distribution taken apart into the tensors that define it, and put together again from others."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform

from stochdyn.errors import StochdynWarning

__all__ = ["Template"]


class Template:
    """The structure of a distribution, without its tensors.

    Attributes:
        tensors: The tensors that define the distribution, by names that tell where they stand in it. A parameter stands for
            itself even where the distribution holds an expanded view of it.
    """

    def __init__(self, distribution: Distribution) -> None:
        self._distribution = distribution
        self._views: dict[str, torch.Size] = {}
        self.tensors: dict[str, Tensor] = {}
        self.names: tuple[str, ...] = ()
        self._spent: set[str] = set()
        _visit(distribution, "", self._collect)

    def __getstate__(self) -> dict[str, Any]:
        # Pickle and deepcopy carry the structure; results of computations are cut off from their graph.
        state = dict(self.__dict__)
        state["_distribution"] = _rebuilt(self._distribution, "", lambda name, value: value.detach())
        return state

    def release(self) -> None:
        """Forget the tensors; whoever took them has to hand them to :meth:`filled`."""
        self.names = tuple(self.tensors)
        self.tensors = {}

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move the structure to where its tensors go."""
        self._distribution = _rebuilt(self._distribution, "", lambda name, value: function(value.detach()))

    def filled(self, tensors: Mapping[str, Tensor]) -> Distribution:
        """Return the distribution of other tensors of the same names."""

        def place(name: str, value: Tensor) -> Tensor:
            tensor = tensors[name]
            if tensor.grad_fn is not None and _is_spent(tensor):
                self._warn(name)
                tensor = tensor.detach()
            return tensor.expand(self._views[name]) if name in self._views else tensor

        return _rebuilt(self._distribution, "", place)

    def _collect(self, name: str, value: Tensor) -> Tensor:
        base = value._base
        if isinstance(base, nn.Parameter) and _is_expanded(base, value):
            self._views[name] = value.shape
            self.tensors[name] = base
        else:
            self.tensors[name] = value
        return value

    def _warn(self, name: str) -> None:
        if name in self._spent:
            return
        self._spent.add(name)
        warnings.warn(
            StochdynWarning(
                f"the initial law's {name.replace('__', '.')} is the result of a computation that was made once, so it stays as it "
                "is while the parameters behind it are learnt. Give a function that returns the distribution instead: "
                "initial=lambda: Independent(Normal(loc, log_scale.exp()), 1)"
            ),
            stacklevel=6,
        )


def _is_expanded(base: Tensor, value: Tensor) -> bool:
    """Whether ``value`` is ``base.expand(value.shape)``."""
    try:
        wide = base.detach().expand(value.shape)
    except RuntimeError:
        return False
    return wide.stride() == value.stride() and wide.storage_offset() == value.storage_offset()


def _is_spent(tensor: Tensor) -> bool:
    """Whether a backward pass has freed the graph behind a tensor."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved_"):
                try:
                    getattr(node, name)
                except RuntimeError as error:
                    return "freed" in str(error)
        todo += [following for following, _ in node.next_functions]
    return False


def _visit(d: Any, prefix: str, place: Any) -> None:
    _rebuilt(d, prefix, place)


def _rebuilt(d: Distribution, prefix: str, place: Any) -> Distribution:
    """Return a distribution like ``d`` whose tensors are ``place(name, tensor)``."""
    if type(d) is Independent or isinstance(d, Independent):
        inner = _rebuilt(d.base_dist, f"{prefix}base_dist__", place)
        return type(d)(inner, d.reinterpreted_batch_ndims, validate_args=False)
    own = vars(d)
    names = _defining(d)
    if names and _takes(type(d), names):
        # Built anew, so that what the constructor derives (a Cholesky factor) follows the tensors.
        return type(d)(**{n: place(prefix + n, own[n]) for n in names}, validate_args=False)
    return _filled(d, prefix, place)


# Arguments of which a constructor takes one; torch computes the others when they are asked for.
_ALTERNATIVES = (("probs", "logits"), ("covariance_matrix", "precision_matrix", "scale_tril"))


def _defining(d: Distribution) -> list[str]:
    """Return the names of the arguments from which a distribution was built."""
    own = vars(d)
    constraints: Any = type(
        d
    ).arg_constraints  # a dictionary of the class, which torch declares as a property
    names = [n for n in constraints if isinstance(own.get(n), Tensor)]
    for group in _ALTERNATIVES:
        present = [n for n in group if n in names]
        given = [n for n in present if isinstance(own[n]._base, nn.Parameter) or own[n] is own.get("_param")]
        names = [n for n in names if n not in present or n == (given or present)[0]]
    return names


def _takes(kind: type[Distribution], names: list[str]) -> bool:
    """Whether a class can be constructed from tensors of these names alone."""
    known = inspect.signature(kind.__init__).parameters
    needed = [
        n
        for n, p in known.items()
        if p.default is p.empty and n != "self" and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return all(n in known for n in (*names, "validate_args")) and all(n in names for n in needed)


def _filled(thing: Any, prefix: str, place: Any) -> Any:
    """Return a shallow copy of a distribution or a transform with all tensors inside it replaced."""
    other = copy.copy(thing)
    for name, value in vars(thing).items():
        at = f"{prefix}{name.lstrip('_')}"
        if isinstance(value, Tensor):
            other.__dict__[name] = place(at, value)
        elif isinstance(value, Distribution):
            other.__dict__[name] = _rebuilt(value, f"{at}__", place)
        elif isinstance(value, Transform):
            other.__dict__[name] = _filled(value, f"{at}__", place)
        elif isinstance(value, list | tuple) and any(isinstance(v, Transform) for v in value):
            parts = [_filled(v, f"{at}_{i}__", place) for i, v in enumerate(value)]
            other.__dict__[name] = type(value)(parts)
    return other
