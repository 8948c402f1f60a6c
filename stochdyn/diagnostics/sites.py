"""What the sites of a Pyro trace are: latent, deterministic or observed; their plates and time grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from stochdyn.errors import ShapeError

__all__ = ["HasTimes", "Site", "is_delta", "read_sites"]

Kind = Literal["latent", "deterministic", "observed", "factor"]


@runtime_checkable
class HasTimes(Protocol):
    """A distribution over paths, of events ``(T, d)`` or ``(T - 1, d)``, with its grid ``(T,)``."""

    ts: Tensor


@runtime_checkable
class _Wrapper(Protocol):
    base_dist: Any


@dataclass(frozen=True)
class Site:
    """One sample statement of a model.

    Attributes:
        kind: The kind: ``"latent"``, ``"deterministic"``, ``"observed"`` or ``"factor"``.
        shape: The shape of one draw's value, ``(*batch, *event)``.
        batch_shape: The part of ``shape`` that counts independent values.
        elements: The and the event axes ``batch_shape`` that only declare independent values together (``to_event``).
        plates: The name of its plate for each batch axis, None where no plate declares it.
        times: The time of each entry of a path along its second last axis, else None.
        drives: The name of the deterministic path that this site's increments drive, else None.
        value: The data of an observed site, else None.
        seen: Which of its ``elements`` a mask leaves in the likelihood; None where none is masked.
    """

    kind: Kind
    shape: tuple[int, ...]
    batch_shape: tuple[int, ...]
    elements: tuple[int, ...]
    plates: tuple[str | None, ...]
    times: Tensor | None = None
    drives: str | None = None
    value: Tensor | None = None
    seen: Tensor | None = None


def read_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Describe every sample statement of a model's trace on one draw, plates' own indices left out."""
    grids = _grids(trace)
    return {
        name: _read(node, grids.get(name))
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


def is_delta(fn: Any) -> bool:
    """Return whether a distribution is a point mass, under whatever wraps it."""
    return isinstance(_unwrap(fn), dist.Delta)


def _unwrap(fn: Any) -> Any:
    while isinstance(fn, _Wrapper) and not isinstance(fn, HasTimes):
        fn = fn.base_dist
    return fn


def _grids(trace: poutine.Trace) -> dict[str, Tensor]:
    """Find the grid of every path site; increments name the path that they drive in ``infer["path"]``."""
    grids: dict[str, Tensor] = {}
    for name, node in trace.nodes.items():
        fn = _unwrap(node["fn"]) if node["type"] == "sample" else None
        if isinstance(fn, HasTimes):
            infer: Any = node["infer"]
            grids[name] = fn.ts
            if "path" in infer:
                grids[infer["path"]] = fn.ts
    return grids


def _read(node: Any, grid: Tensor | None) -> Site:
    fn, value = node["fn"], node["value"]
    if site_is_factor(node):
        return Site("factor", tuple(value.shape), tuple(fn.batch_shape), (), ())
    kind: Kind = "latent"
    if node["infer"].get("_deterministic") or (node["is_observed"] and is_delta(fn)):
        kind = "deterministic"
    elif node["is_observed"]:
        kind = "observed"
    shape, batch = tuple(fn.batch_shape + fn.event_shape), tuple(fn.batch_shape)
    if kind == "deterministic":
        shape = tuple(value.shape)
        batch = shape[: max(0, value.ndim - fn.event_dim)]
        if not batch and _fills_plates(node, shape):  # pyro.deterministic takes all axes for event axes
            batch = shape
    times = None
    if grid is not None and len(shape) >= 2 and grid.shape[0] - shape[-2] in (0, 1):
        times = grid[: shape[-2]]
    data = None
    if kind == "observed":
        if torch.broadcast_shapes(value.shape, shape) != shape:
            raise ShapeError(
                f"the values that site {node['name']!r} observes have more elements than its distribution",
                got=f"shape {tuple(value.shape)}",
                expected=shape,
                hint="expand the parameters of the distribution to the shape of the data",
            )
        data = value.expand(shape)
    elements = shape[: len(shape) - fn.base_dist.event_dim] if isinstance(fn, dist.Independent) else batch
    seen = _seen(node, elements) if kind == "observed" else None
    return Site(
        kind, shape, batch, elements, _plates(node, batch), times, node["infer"].get("path"), data, seen
    )


def _seen(node: Any, elements: tuple[int, ...]) -> Tensor | None:
    """Return which elements of an observed site count, by the masks around it and inside its distribution."""
    fn = node["fn"]
    masks = [(node["mask"], len(fn.event_shape))]
    while isinstance(fn, _Wrapper):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, len(fn.event_shape)))
        fn = fn.base_dist
    seen: Tensor | None = None
    # Axes of one value are those that no distribution declares independent.
    own = len(node["fn"].batch_shape + node["fn"].event_shape) - len(elements)
    for mask, event_dim in masks:
        if mask is None or mask is True:
            continue
        value = torch.as_tensor(mask, dtype=torch.bool)
        value = value.reshape(*value.shape, *(1,) * (event_dim - own)).expand(elements).cpu()
        seen = value if seen is None else seen & value
    return None if seen is None or bool(seen.all()) else seen


def _fills_plates(node: Any, shape: tuple[int, ...]) -> bool:
    sizes = {frame.dim: frame.size for frame in node["cond_indep_stack"] if frame.vectorized}
    return len(shape) == len(sizes) and all(sizes.get(i - len(shape)) == size for i, size in enumerate(shape))


def _plates(node: Any, batch: tuple[int, ...]) -> tuple[str | None, ...]:
    names = {frame.dim: frame for frame in node["cond_indep_stack"] if frame.vectorized}
    found: list[str | None] = []
    for axis, size in enumerate(batch):
        frame = names.get(axis - len(batch))
        found.append(frame.name if frame is not None and frame.size == size else None)
    return tuple(found)
