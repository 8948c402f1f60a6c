"""Any drift as a family: modules, functions of named parameters, and Pyro models that return a drift, whose priors then act."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_sequence,
    check_callable,
    check_mapping,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn._lending import lent
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.errors import InvalidInputError, ShapeError, UnknownSiteError

__all__ = ["FunctionDrift", "ModuleDrift", "PyroDrift", "as_family", "named_defaults", "required_arguments"]

Drift = Callable[[Tensor, Tensor], Tensor]


class ModuleDrift(DriftFamily):
    """An ``nn.Module`` drift(t, x) as a family; its parameters are those of the family.

    Use it for a network or mechanism that is there as a module already.

    Args:
        module: The drift, called as ``module(t, x)``.
        dim: The number ``d`` of components of the state.

    Raises:
        ShapeError: If the drift of a point ``(1, d)`` has another shape.

    Example:
        >>> class Decay(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rate = nn.Parameter(torch.ones(()))
        ...     def forward(self, t, x):
        ...         return -self.rate * x
        >>> ModuleDrift(Decay(), 2).named_values()
        {'rate': tensor(1.)}
    """

    def __init__(self, module: nn.Module, dim: int) -> None:
        super().__init__(dim)
        check_type(module, nn.Module, "module")
        self.module = module
        parameter = next(module.parameters(), torch.zeros(()))
        _check_drift(module, parameter.new_zeros(1, dim))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        return self.module(t, x)

    def named_values(self) -> dict[str, Tensor]:
        """Return the module's own names."""
        return {name: value.detach().clone() for name, value in self.module.named_parameters()}


class FunctionDrift(DriftFamily):
    """A function of time, state and named parameters as a family; the defaults are where the parameters start.

    Use it for a mechanism that is written down as a formula.

    Args:
        function: The drift, ``drift(t, x, rate=1.0, ...)``; every further argument is a number.
        dim: The number ``d`` of components of the state.
        positive: The names of parameters that stay positive, kept as logarithms; none if empty.

    Raises:
        InvalidInputError: If there are no parameters, a default isn't a number, or a positive one isn't.
        ShapeError: If the drift of a point ``(1, d)`` has another shape.

    Example:
        >>> def decay(t, x, rate=0.5, level=1.0):
        ...     return rate * (level - x)
        >>> FunctionDrift(decay, 1, positive=["rate"]).named_values()
        {'rate': tensor(0.5000), 'level': tensor(1.)}
    """

    def __init__(self, function: Callable[..., Tensor], dim: int, positive: Sequence[str] = ()) -> None:
        super().__init__(dim)
        check_callable(function, "function", "drift(t, x, rate=1.0, ...)")
        defaults = named_defaults(function)
        if not defaults:
            raise InvalidInputError("the function has no parameters", expected="drift(t, x, rate=1.0, ...)")
        positive = as_sequence(positive, "positive", "names of parameters")
        unknown = set(positive) - set(defaults)
        if unknown:
            raise InvalidInputError(
                "positive names no parameter", got=sorted(unknown)[0], expected=" | ".join(defaults)
            )
        self.function, self.positive, self.names = function, tuple(positive), tuple(defaults)
        self.raw = nn.ParameterDict()
        for name, value in defaults.items():
            check_real(value, name, above=0.0 if name in self.positive else -math.inf)
            start = torch.tensor(float(value))
            self.raw[_key(name)] = nn.Parameter(start.log() if name in self.positive else start)
        _check_drift(self, torch.zeros(1, dim))

    def values(self) -> dict[str, Tensor]:
        """Return the parameters by name, with gradients."""
        raw = {name: self.raw[_key(name)] for name in self.names}
        return {name: value.exp() if name in self.positive else value for name, value in raw.items()}

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        return self.function(t, x, **self.values())

    def named_values(self) -> dict[str, Tensor]:
        """Return the parameters by name."""
        return {name: value.detach().clone() for name, value in self.values().items()}


class PyroDrift(DriftFamily):
    r"""A Pyro model without arguments that samples parameters and returns a drift, as a family.

    The parameters are the values of its sample sites, kept in unconstrained coordinates. The refinement then climbs

    .. math:: -\mathrm{KL}(Q\,\|\,R_\theta)\cdot N+\log p(\theta)

    so priors act as penalties (the density is that of the constrained values, without the Jacobian of the coordinates, so the
    optimum doesn't depend on them). Use it where something is known of the parameters beforehand.

    Args:
        model: The model: ``model()`` returns ``drift(t, x)``; sites must not depend on chance other than their own, and plates
            are allowed.
        dim: The number ``d`` of components of the state.
        init: The values that sites start from, by name, constrained; the others start at the median of prior draws.

    Raises:
        InvalidInputError: If the model samples nothing or returns no function.
        UnknownSiteError: If ``init`` names a site that doesn't exist.
        ShapeError: If the drift of a point ``(1, d)`` has another shape.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model():
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
        ...     return lambda t, x: -rate * x
        >>> family = PyroDrift(model, 1, init={"rate": torch.tensor(2.0)})
        >>> family(torch.zeros(()), torch.ones(1, 1)), family.log_prior() is not None
        (tensor([[-2.]], grad_fn=<MulBackward0>), True)
    """

    def __init__(self, model: Callable[[], Drift], dim: int, init: dict[str, Tensor] | None = None) -> None:
        super().__init__(dim)
        from pyro import poutine
        from torch.distributions import biject_to

        check_callable(model, "model", "a Pyro model")
        if init is not None:
            check_mapping(init, "init", "values of sites by name")
        self.model = model
        with lent(0):
            traces: list[Any] = [poutine.trace(model).get_trace() for _ in range(15)]
        sites = _latent_sites(traces[0])
        if not sites:
            raise InvalidInputError(
                "the model has no latent sites", hint="sample its parameters by pyro.sample"
            )
        unknown = set(init or {}) - set(sites)
        if unknown:
            raise UnknownSiteError(f"the model has no site {sorted(unknown)[0]!r}; it has {sorted(sites)}")
        self.sites = sites
        self._bijections = {name: biject_to(traces[0].nodes[name]["fn"].support) for name in sites}
        self.unconstrained = nn.ParameterDict()
        for name in sites:
            if init is not None and name in init:
                value = torch.as_tensor(init[name]).to(traces[0].nodes[name]["value"])
            else:
                value = torch.stack([t.nodes[name]["value"] for t in traces]).median(0).values
            self.unconstrained[_key(name)] = nn.Parameter(self._bijections[name].inv(value).detach().clone())
        drift = self.drift()
        if not callable(drift):
            raise InvalidInputError("the model must return a drift(t, x)", got=type(drift).__name__)
        _check_drift(drift, next(iter(self.unconstrained.values())).new_zeros(1, dim))

    def values(self) -> dict[str, Tensor]:
        """Return the constrained values of the sites, with gradients."""
        return {name: self._bijections[name](self.unconstrained[_key(name)]) for name in self.sites}

    def drift(self) -> Drift:
        """Return the model's drift at the present parameters."""
        from pyro import poutine

        with poutine.block(), poutine.condition(data=self.values()):
            return self.model()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        return self.drift()(t, x)

    def log_prior(self) -> Tensor:
        """Return the log prior density of the parameters, a scalar with a gradient."""
        return self.log_prior_of(self.values())

    def log_prior_of(self, values: dict[str, Tensor]) -> Tensor:
        """Return the log prior density of constrained values of the sites."""
        from pyro import poutine

        with poutine.block(), poutine.condition(data=values):
            trace = poutine.trace(self.model).get_trace()
        return torch.as_tensor(trace.log_prob_sum())

    def named_values(self) -> dict[str, Tensor]:
        """Return the constrained values under the names of the sites."""
        return {name: value.detach().clone() for name, value in self.values().items()}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw new values from the prior."""
        from pyro import poutine

        with lent(generator), torch.no_grad():
            trace = poutine.trace(self.model).get_trace()
            for name in self.sites:
                self.unconstrained[_key(name)].copy_(self._bijections[name].inv(trace.nodes[name]["value"]))


def as_family(drift: Any, dim: int) -> DriftFamily:
    """Return a family for whatever a user gives: a family, a module ``drift(t, x)``, or a Pyro model ``model()``.

    Args:
        drift: The object to make a family of.
        dim: The number ``d`` of components of the state.

    Raises:
        ShapeError: If it is for another dimension, or returns another shape.
        InvalidInputError: If it is none of these.

    Example:
        >>> from stochdyn.bridges import LotkaVolterra
        >>> as_family(LotkaVolterra(), 2).dim
        2
    """
    check_positive_int(dim, "dim")
    if isinstance(drift, DriftFamily):
        if drift.dim != dim:
            raise ShapeError("the family is for another dimension", got=drift.dim, expected=dim)
        return drift
    arguments = required_arguments(drift)
    if arguments == 2 and not isinstance(drift, nn.Module) and named_defaults(drift):
        return FunctionDrift(drift, dim)
    if arguments == 0:
        return PyroDrift(drift, dim)
    if isinstance(drift, nn.Module):
        return ModuleDrift(drift, dim)
    if arguments is not None and arguments > 2:
        raise InvalidInputError(
            "the parameters of a drift need values to start from",
            got=f"a function that needs {arguments} arguments",
            expected="drift(t, x, rate=1.0, ...)",
            hint="give each parameter a number as its default",
        )
    raise InvalidInputError(
        "this is no family of drifts",
        got=type(drift).__name__,
        expected="a DriftFamily, a torch.nn.Module drift(t, x), a function drift(t, x, rate=1.0, ...), or a Pyro model without arguments",
        hint="a drift with nothing to learn needs no refinement: give it to SchrodingerBridge as its reference",
    )


def required_arguments(function: Any) -> int | None:
    """Return how many positional arguments a function can't do without; None if that can't be told."""
    if not callable(function):
        return None
    try:
        named = inspect.signature(
            function.forward if isinstance(function, nn.Module) else function
        ).parameters
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in named.values()):
        return None
    return sum(p.kind in kinds and p.default is p.empty for p in named.values())


def named_defaults(function: Any) -> dict[str, Any]:
    """Return the names and defaults of what a function takes beyond the arguments that it needs."""
    try:
        named = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default for p in named if p.kind in kinds and p.default is not p.empty}


def _latent_sites(trace: Any) -> list[str]:
    from pyro.poutine.util import site_is_subsample

    return [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and not site_is_subsample(node)
        and not node["infer"].get("_deterministic")
    ]


def _key(name: str) -> str:
    return name.replace(".", "__")  # names of parameters must not hold dots


def _check_drift(drift: Drift, x: Tensor) -> None:
    with torch.no_grad():
        value = drift(x.new_zeros(()), x)
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            "the drift returns the wrong shape", got=got, expected=f"{tuple(x.shape)} for x {tuple(x.shape)}"
        )
