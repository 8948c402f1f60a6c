"""One run of a Pyro model and its guide: which sites there are, and how to run them on many draws at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from stochdyn._checks import check_callable, check_type
from stochdyn.diagnostics.explosions import MOST_DRAWS, drawn_anew
from stochdyn.diagnostics.sites import Site, is_delta, read_sites
from stochdyn.errors import ShapeError, UnknownSiteError

__all__ = [
    "Chunk",
    "NotVectorisedError",
    "Probe",
    "Program",
    "SetValues",
    "check_program",
    "random_values",
    "reason_of",
]

_PLATE = "_stochdyn_draws"

Program = Callable[..., Any]


def check_program(model: object, guide: object, args: object, kwargs: object) -> None:
    """Raise unless these are a model, a guide (or nothing) and their arguments."""
    check_callable(model, "model", "a Pyro model")
    if guide is not None:
        check_callable(guide, "guide", "a Pyro guide")
    check_type(args, (tuple, list), "args", hint="put the arguments of the model into a tuple")
    check_type(kwargs, (Mapping, type(None)), "kwargs")


def reason_of(error: Exception) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class NotVectorisedError(Exception):
    """A run on many draws disagrees with a run on one of them."""


class SetValues(Messenger):
    """Give sites their values; unlike under ``condition`` they stay random.

    Args:
        values: The values of sites, by name.
        check_shapes: Whether to raise if a value hasn't the shape that the model gives it on one draw.
    """

    def __init__(self, values: Mapping[str, Any], check_shapes: bool = False) -> None:
        super().__init__()
        self.given = values
        self.check_shapes = check_shapes

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.given and not msg["is_observed"]:
            if self.check_shapes and not site_is_subsample(msg):
                value, due = self.given[msg["name"]], tuple(msg["fn"].batch_shape + msg["fn"].event_shape)
                if tuple(value.shape) != due:
                    raise ShapeError(
                        f"a draw of {msg['name']!r} has the wrong shape", got=tuple(value.shape), expected=due
                    )
            msg["value"] = self.given[msg["name"]]
            msg["done"] = True


@dataclass
class Chunk:
    """Traces of model and guide on ``size`` draws, whose axis is ``depth`` from the right of batch shapes."""

    model: poutine.Trace
    guide: poutine.Trace | None
    replica: poutine.Trace | None
    size: int
    depth: int


class Probe:
    """One run of guide and model on a single draw: which sites there are, and their shapes."""

    guide_trace: poutine.Trace | None = None

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        predictive: bool,
        split_events: bool = False,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.predictive, self.split_events, self.given = predictive, split_events, given
        self.subsamples: dict[str, Tensor] = {}
        (first, raw), _ = drawn_anew(self._first_run, self.most_draws)
        self._keep_subsamples(raw)
        self.model_trace = prune_subsample_sites(raw)
        self.sites = read_sites(self.model_trace)
        self._check_names(first)
        self.points: set[str] = set()
        if self.guide_trace is not None:
            self.points = {
                name
                for name in first
                if name in self.sites
                and is_delta(self.guide_trace.nodes[name]["fn"])
                and not is_delta(self.model_trace.nodes[name]["fn"])
            }
        traces = [self.model_trace] + ([self.guide_trace] if self.guide_trace is not None else [])
        self.depth = 1 + max(_batch_depth(trace) for trace in traces)
        self.elements = sum(_numel(site.get("value")) for trace in traces for site in trace.nodes.values())

    @property
    def most_draws(self) -> int:
        """How often a draw that isn't finite is drawn anew: those that are given can't be."""
        return 1 if self.guide is None else MOST_DRAWS

    def _first_run(self) -> tuple[dict[str, Any], poutine.Trace]:
        """Return a draw of the guide, or the first that is given, and a run of the model on it."""
        first: dict[str, Any] = {name: value[0] for name, value in (self.given or {}).items()}
        if self.guide is not None:
            raw = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            self._keep_subsamples(raw)
            self.guide_trace = prune_subsample_sites(raw)
            first = random_values(self.guide_trace)
        handled = SetValues({**self.subsamples, **first}, check_shapes=self.guide is None)(self.model)
        return first, poutine.trace(handled).get_trace(*self.args, **self.kwargs)

    def _keep_subsamples(self, trace: poutine.Trace) -> None:
        for name, site in trace.nodes.items():
            if site_is_subsample(site):
                self.subsamples[name] = torch.as_tensor(site["value"])

    def _check_names(self, given: Mapping[str, Any]) -> None:
        wanted = {name for name, site in self.sites.items() if site.kind == "latent"}
        missing = sorted(wanted - set(given))
        source = "the guide" if self.guide is not None else "the set of draws"
        if missing:
            raise UnknownSiteError(
                f"{source} lacks sites of the model",
                got=", ".join(sorted(given)) or "none",
                expected=", ".join(missing),
                hint="every latent site needs a guide site; enumerated sites must be sampled or marginalised",
            )
        foreign = sorted(
            name
            for name in set(given) - wanted
            if self.guide_trace is None or not _infer(self.guide_trace, name).get("is_auxiliary")
        )
        if foreign:
            raise UnknownSiteError(
                f"{source} has sites that the model lacks",
                got=", ".join(foreign),
                expected=", ".join(sorted(wanted)),
                hint="mark helper sites of a guide with infer={'is_auxiliary': True}",
            )

    def run(self, start: int, size: int, depth: int) -> Chunk:
        """Run on ``size`` draws, which follow the first ``start``, in a plate; or with ``depth=0`` on one."""
        guide_trace = None
        if self.guide is not None:
            guide_trace = self.run_guide({}, size, depth)
            values = random_values(guide_trace)
        else:
            assert self.given is not None
            values = {
                name: self._spread(value[start : start + size], self.sites[name], depth)
                for name, value in self.given.items()
            }
        replica = None
        if self.predictive:
            released = Release()(self.model)
            replica = self._trace(released, values, size, depth, densities=False)
        return Chunk(self.run_model(values, size, depth), guide_trace, replica, size, depth)

    def run_guide(self, values: Mapping[str, Any], size: int, depth: int) -> poutine.Trace:
        """Run the guide alone, at ``values`` where given."""
        assert self.guide is not None
        return self._trace(self.guide, values, size, depth)

    def run_model(self, values: Mapping[str, Any], size: int, depth: int) -> poutine.Trace:
        """Run the model alone at ``values``."""
        return self._trace(self.model, values, size, depth)

    def _trace(
        self, program: Program, values: Mapping[str, Any], size: int, depth: int, densities: bool = True
    ) -> poutine.Trace:
        def plated(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate(_PLATE, size, dim=-depth):
                return program(*args, **kwargs)

        handled = SetValues({**self.subsamples, **values})(plated if depth > 0 else program)
        # every plate leaves a site with its indices: ours and the model's are no part of the density
        trace = prune_subsample_sites(poutine.trace(handled).get_trace(*self.args, **self.kwargs))
        if densities:
            trace.compute_log_prob()
        return trace

    @staticmethod
    def _spread(value: Tensor, site: Site, depth: int) -> Tensor:
        if depth == 0:
            return value[0]
        gap = depth - 1 - len(site.batch_shape)
        return value.reshape(value.shape[0], *(1,) * gap, *value.shape[1:])


class Release(Messenger):
    """Draw observed sites anew; deterministic ones, which Pyro marks as observed, stay as they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic"):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def random_values(trace: poutine.Trace) -> dict[str, Any]:
    """Return the values of all sample statements that weren't observed."""
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def _batch_depth(trace: poutine.Trace) -> int:
    sites: list[Any] = [s for s in trace.nodes.values() if s["type"] == "sample"]
    frames = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.dim is not None]
    batches = [len(s["fn"].batch_shape) for s in sites if isinstance(s["fn"], TorchDistributionMixin)]
    return max(frames + batches, default=0)


def _infer(trace: poutine.Trace, name: str) -> dict[str, Any]:
    return dict(trace.nodes[name]["infer"] or {})


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0
