"""A Pyro model with its arguments, run by a guide: what each site is, and how likely the data make a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from stochdyn._transforms import as_leaf, recording
from stochdyn.errors import UnknownSiteError
from stochdyn.infer.coupling import CouplingPlan, element_log_probs, find_coupling
from stochdyn.infer.linearise import Quadratic, second_order

__all__ = ["ModelCall", "ModelRun"]

#: What a site is given: its value, or a function that makes it from the message of the site.
Given = Tensor | Callable[[Any], Tensor]


@dataclass
class ModelRun:
    """The sample sites that one run of a model met, in order, as messages of Pyro.

    Attributes:
        sites: The sites that the model met, by name.
        given: The values that were handed to sites, by name.
    """

    sites: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Given] = field(default_factory=dict)

    def quadratic(
        self,
        leaf: Tensor,
        site_name: str,
        prior: set[str],
        keep_graph: bool = False,
        plan: CouplingPlan | None = None,
    ) -> Quadratic:
        """Return the second-order expansion of the log-likelihood around the path that the run was given.

        Only derivatives are taken (:func:`~stochdyn.infer.linearise.second_order`), so any likelihood, mask or irregular set
        of observation times is served. Scales (of a subsampled plate, say) count relative to that of the path's own site.

        Args:
            leaf: ``(T, *batch, d)`` the path, on the graph.
            site_name: The random site behind the path.
            prior: The sites whose density belongs to the prior of the path.
            keep_graph: Whether gradients reach the other sites.
            plan: The observations that couple times, or None.
        """
        scale = self.sites[site_name]["scale"]
        value, total = leaf.detach().sum(-1).sum(0) * 0.0, leaf.sum() * 0.0
        rest, elements = leaf.sum() * 0.0, {}
        for name, site in self.sites.items():
            if name in prior:
                continue
            if plan is not None and name in plan.sites:
                elements[name] = element_log_probs(site, leaf.shape[1:-1], scale)
                log_prob = elements[name].sum(0)
                rest = rest + log_prob.sum()
            else:
                log_prob = _log_prob(site, scale)
                total = total + log_prob.sum()
            value = value + _series_sum(log_prob.detach(), value.shape)
        if plan is None:
            return second_order(total, leaf, value, keep_graph)
        coupling, ends = plan.read(elements, leaf, keep_graph)
        return second_order(total, leaf, value, keep_graph, (rest, coupling, ends))

    def coupling(self, leaf: Tensor, site_name: str, prior: set[str]) -> CouplingPlan | None:
        """Return how the data couple different times of the path, or None if they don't."""
        sites = [site for name, site in self.sites.items() if name not in prior and site["is_observed"]]
        return find_coupling(sites, leaf, self.sites[site_name]["scale"])


class ModelCall:
    """A model and its arguments, bound for one call of a guide.

    The sites before a given one are known from the last run if their values are the same, so asking for a site again
    runs nothing.

    Args:
        model: Pyro model.
        args: The positional arguments of the model.
        kwargs: The keyword arguments of the model.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self._last = ModelRun()

    def run(
        self,
        values: Mapping[str, Given],
        paths: Mapping[str, Callable[[], Tensor]] | None = None,
        until: str | None = None,
    ) -> ModelRun:
        """Run the model, unseen by handlers outside.

        Args:
            values: The values that sites are given, by name; other sites are drawn.
            paths: The paths ``(*batch, T, d)`` that stand in for driven ones, which then aren't integrated.
            until: A site at which to stop.

        Raises:
            UnknownSiteError: If the model never meets the site at which to stop.
        """
        follow = _Follow(values, paths or {}, until)
        with poutine.block(), follow:
            try:
                self.model(*self.args, **self.kwargs)
            except _ReachedError:
                self._last = follow.run
                return follow.run
        if until is not None:
            raise UnknownSiteError("the model has no such site on this run", got=repr(until))
        return follow.run

    def site(self, name: str, values: Mapping[str, Given]) -> Any:
        """Return the message of site ``name`` when the sites before it take ``values``.

        Raises:
            UnknownSiteError: If the model never meets the site.
        """
        last = self._last
        if name in last.sites:
            before = [n for n in _before(last.sites, name) if n in values or n in last.given]
            if all(values.get(n) is last.given.get(n) for n in before):
                return last.sites[name]
        return self.run(values, until=name).sites[name]

    def likelihood(
        self,
        site_name: str,
        path_name: str,
        prior: set[str],
        values: Mapping[str, Given],
        path: Tensor,
        plan: CouplingPlan | None = None,
    ) -> Quadratic:
        """Return the expansion of the log-likelihood around ``path (T, *batch, d)``, cut off from the graph.

        Args:
            site_name: The random site behind the path.
            path_name: The site that holds the path itself.
            prior: The sites whose density belongs to the prior of the path.
            values: The values of the other sites.
            path: The path.
            plan: The observations that couple times, or None.
        """
        with recording(), pyro.validation_enabled(False):
            run, leaf = self._at(site_name, path_name, values, path)
            return run.quadratic(leaf, site_name, prior, plan=plan)

    def coupling(
        self, site_name: str, path_name: str, prior: set[str], values: Mapping[str, Given], path: Tensor
    ) -> CouplingPlan | None:
        """Return how the data couple different times of the path; arguments as in :meth:`likelihood`."""
        with recording(), pyro.validation_enabled(False):
            run, leaf = self._at(site_name, path_name, values, path)
            return run.coupling(leaf, site_name, prior)

    def _at(
        self, site_name: str, path_name: str, values: Mapping[str, Given], path: Tensor
    ) -> tuple[ModelRun, Tensor]:
        """Run the model with ``path (T, *batch, d)`` in place of its own; return the run and the path on the graph."""
        leaf = as_leaf(path)
        x = leaf.movedim(0, -2)
        given = {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}
        if site_name == path_name:
            given[site_name] = x
        else:
            given[site_name] = lambda msg: still_increments(msg["fn"], leaf.shape[1:-1])
        return self.run(given, {path_name: lambda: x}), leaf


def still_increments(law: Any, batch: torch.Size) -> Tensor:
    """Return increments that are all zero, in the layout of their site."""
    return law.scale.new_zeros(*batch, *law.event_shape)


class _ReachedError(Exception):
    """Leaves the model once the site is met."""


class _Follow(Messenger):
    """Give sites and paths what is at hand, note all sites, and stop at one if asked."""

    def __init__(
        self, values: Mapping[str, Given], paths: Mapping[str, Callable[[], Tensor]], until: str | None
    ) -> None:
        super().__init__()
        self.run = ModelRun()
        self._values, self._paths, self._until = values, paths, until

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name == self._until:
            self.run.sites[name] = msg
            raise _ReachedError
        if name in self._values and not msg["is_observed"]:
            given = self._values[name]
            self.run.given[name] = given
            msg["value"] = given if isinstance(given, Tensor) else given(msg)
            msg["done"] = True
        elif name in self._paths and msg["is_observed"]:
            # A deterministic site that a user's own code has filled.
            msg["value"] = self._paths[name]()

    def _pyro_post_sample(self, msg: Any) -> None:
        self.run.sites[msg["name"]] = msg

    def _pyro_path(self, msg: Any) -> None:
        if msg["name"] in self._paths:
            msg["value"] = self._paths[msg["name"]]()
            msg["done"] = True


def _before(sites: Mapping[str, Any], name: str) -> list[str]:
    names = list(sites)
    return names[: names.index(name)]


def _log_prob(site: Any, scale: Tensor | float) -> Tensor:
    """Return the site's log density, masked, and scaled relative to ``scale``."""
    log_prob = site["fn"].log_prob(site["value"])
    if site["mask"] is not None:
        log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, torch.zeros_like(log_prob))
    return log_prob * (site["scale"] / scale)


def _series_sum(log_prob: Tensor, batch: torch.Size) -> Tensor:
    """Sum over all axes that aren't the path's; what can't be told apart by series is summed whole."""
    while log_prob.ndim > len(batch):
        log_prob = log_prob.sum(0)
    for axis in range(-log_prob.ndim, 0):
        if batch[axis] == 1:
            log_prob = log_prob.sum(axis, keepdim=True)
        elif log_prob.shape[axis] not in (1, batch[axis]):
            return log_prob.sum()
    return log_prob
