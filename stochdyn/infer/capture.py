"""Look into a Pyro model from outside: the distribution of a site, and the likelihood of a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from stochdyn.errors import UnknownSiteError
from stochdyn.infer.linearise import Quadratic, second_order

__all__ = ["likelihood_quadratic", "site_distribution", "site_frames"]


class _FoundError(Exception):
    """Leaves the model once the site is met."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.site = site


class _Substitute(Messenger):
    """Give sites the values at hand, and stop at a named one if asked."""

    def __init__(self, values: Mapping[str, Tensor], stop_at: str | None = None) -> None:
        super().__init__()
        self.values = values
        self.stop_at = stop_at

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.stop_at:
            raise _FoundError(msg)
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


def site_distribution(
    model: Callable[..., Any],
    name: str,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Return the distribution that ``model`` gives site ``name`` when the sites before it take ``values``.

    Raises:
        UnknownSiteError: if the model never meets the site.
    """
    return _meet(model, name, values, args, kwargs)["fn"]


def site_frames(
    model: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the plates around site ``name`` on this run of the model.

    Raises:
        UnknownSiteError: if the model never meets the site.
    """
    return _meet(model, name, {}, args, kwargs)["cond_indep_stack"]


def _meet(
    model: Callable[..., Any],
    name: str,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    with ExitStack() as stack:
        stack.enter_context(poutine.block())
        stack.enter_context(_Substitute(values, name))
        try:
            model(*args, **kwargs)
        except _FoundError as found:
            return found.site
    raise UnknownSiteError("the model has no such site on this run", got=repr(name))


def likelihood_quadratic(
    model: Callable[..., Any],
    site_name: str,
    path_name: str,
    path: Tensor,
    skip: set[str],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keep_graph: bool = False,
) -> Quadratic:
    """Return the second-order expansion of the model's log-likelihood around ``path (T, *batch, d)``.

    Only derivatives are taken (:func:`~stochdyn.infer.linearise.second_order`), so any likelihood, mask or
    irregular set of observation times is served. Scales (of a subsampled plate,
    say) count relative to that of the path's own site.

    Args:
        model: the Pyro model.
        site_name: the random site behind the path.
        path_name: the site (random or deterministic) that holds the path itself.
        path: reference path, time leading.
        skip: further sites whose density belongs to the prior of the path.
        values: values of the other latent sites.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        keep_graph: let gradients reach the other sites.
    """
    with torch.enable_grad():
        leaf = path.detach().requires_grad_()
        given = {**values, path_name: leaf.movedim(0, -2)}
        # Far-off paths are judged by their density alone, whatever the checks of distributions say to them.
        with poutine.block(), pyro.validation_enabled(False), _Substitute(given):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        scale = trace.nodes[site_name]["scale"]
        value, total = leaf.detach().sum(-1).sum(0) * 0.0, leaf.sum() * 0.0
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and name not in {*skip, site_name, path_name}:
                log_prob = _log_prob(site, scale)
                total = total + log_prob.sum()
                value = value + _series_sum(log_prob.detach(), value.shape)
        return second_order(total, leaf, value, keep_graph)


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
