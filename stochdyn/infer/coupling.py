r"""Observations that couple times, such as averages, sums and differences: what feedback has to remember of the path for them.

The log-likelihood of such an observation is a function of one number, :math:`m=\sum_t v_t\cdot x_t`, so its second-order
expansion is :math:`-\tfrac12(\sum_tv_t\cdot x_t)^2` up to scale and a linear term. A law whose increments answer to the
present state alone can't follow it; one that also answers to the sum so far,

.. math:: a_t=\kappa_ta_{t-1}+v_t\cdot x_t,

can, and exactly so. Observations whose times don't overlap share one sum, which :math:`\kappa_t=0` starts afresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Coupling", "CouplingPlan", "element_log_probs", "find_coupling"]

# What counts as no coupling, relative to the largest curvature: rounding of second derivatives.
_ROUNDING = 1e3


@dataclass(frozen=True)
class Coupling:
    """The sums that feedback remembers.

    Attributes:
        rows: ``v (T, *batch, R, d)``.
        keep: ``kappa (T, R)``, 0 where a sum starts afresh and 1 elsewhere.
        first: ``(T, R)`` where the sum of each time began.
    """

    rows: Tensor
    keep: Tensor
    first: Tensor

    @property
    def size(self) -> int:
        """``R``."""
        return self.keep.shape[-1]

    def to(self, like: Tensor) -> Coupling:
        """Return the same in the precision of ``like``."""
        return Coupling(self.rows.to(like), self.keep.to(like), self.first)

    def detach(self) -> Coupling:
        """Return the same cut off from the graph."""
        return Coupling(self.rows.detach(), self.keep, self.first)

    def step(self, n: int, before: Tensor | None, x: Tensor) -> Tensor:
        """Return the sums ``(*batch, R)`` at grid point ``n``, from those at the point before."""
        new = (self.rows[n] @ x.unsqueeze(-1)).squeeze(-1)
        return new if before is None else torch.addcmul(new, self.keep[n], before)

    def sums(self, x: Tensor) -> Tensor:
        """Return the sums ``(T', *sample, *batch, R)`` along the first points ``x (T', *sample, *batch, d)`` of paths."""
        count = x.shape[0]
        rows = self.rows[:count]
        rows = rows.reshape(count, *(1,) * (x.ndim + 1 - rows.ndim), *rows.shape[1:])
        total = (rows @ x.unsqueeze(-1)).squeeze(-1).cumsum(0)
        earlier = torch.cat([torch.zeros_like(total[:1]), total])
        start = self.first[:count].reshape(count, *(1,) * (x.ndim - 2), -1)
        return total - earlier.gather(0, start.expand_as(total))


@dataclass(frozen=True)
class CouplingPlan:
    """Which elements of which sites couple times, and how they share sums.

    Attributes:
        sites: The names of the sites.
        slots: For each sum, the elements that it serves: ``(site, index)``.
        segment: ``(T, R)`` the element of each time, -1 for none.
    """

    sites: tuple[str, ...]
    slots: tuple[tuple[tuple[str, int], ...], ...]
    segment: Tensor

    def read(self, elements: Mapping[str, Tensor], leaf: Tensor, keep_graph: bool) -> tuple[Coupling, Tensor]:
        """Return the sums and the ends of the observations, ``(T, *batch, R)``: one where an observation is complete.

        Args:
            elements: The log densities ``(K, *batch)`` of the elements of each site.
            leaf: The path ``(T, *batch, d)``.
            keep_graph: Whether gradients reach what the likelihood depends on.
        """
        generator = torch.Generator(leaf.device).manual_seed(0)
        rows = []
        for r, slot in enumerate(self.slots):
            total = sum(elements[site][k].sum() for site, k in slot)
            assert isinstance(total, Tensor)
            slope = torch.autograd.grad(total, leaf, create_graph=True)[0]
            # A direction of every observation: H u is then its row, up to scale.
            noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=leaf.device)
            size = slope.detach().abs().amax(0, keepdim=True).clamp_min(torch.finfo(leaf.dtype).tiny)
            u = slope.detach() / size + 0.1 * noise
            image = torch.autograd.grad(
                (slope * u).sum(), leaf, retain_graph=True, create_graph=keep_graph, allow_unused=True
            )[0]
            image = torch.zeros_like(leaf) if image is None else -image
            segment = self.segment[:, r]
            held = segment.clamp_min(0)
            inside = (segment >= 0).reshape(-1, *(1,) * (leaf.ndim - 1))
            image = torch.where(inside, image, torch.zeros_like(image))
            part = (u * image).sum(-1)
            weight = part.new_zeros(len(slot), *part.shape[1:]).index_add(0, held, part)
            good = weight > 0
            scale = torch.where(good, weight, torch.ones_like(weight)).rsqrt() * good
            rows.append(image * scale[held].unsqueeze(-1))
        stacked = torch.stack(rows, -2)
        if not keep_graph:
            stacked = stacked.detach()
        return Coupling(stacked, self._keep().to(leaf), self._first()), self._ends().to(leaf)

    def _keep(self) -> Tensor:
        before = torch.cat([torch.full_like(self.segment[:1], -1), self.segment[:-1]])
        return (self.segment == before) & (self.segment >= 0)

    def _first(self) -> Tensor:
        times = torch.arange(self.segment.shape[0], device=self.segment.device).unsqueeze(-1)
        return torch.where(self._keep(), torch.zeros_like(times), times).cummax(0).values

    def _ends(self) -> Tensor:
        after = torch.cat([self.segment[1:], torch.full_like(self.segment[:1], -1)])
        return (self.segment != after) & (self.segment >= 0)


def element_log_probs(site: Any, batch: torch.Size, scale: Tensor | float) -> Tensor:
    """Return the log densities ``(K, *batch)`` of the elements of a site, for paths of the given batch shape."""
    values, events = _elements(site["fn"], site["value"])
    mask = site["mask"]
    if mask is not None:
        mask = torch.as_tensor(mask)
        values = torch.where(_beside(mask, events), values, torch.zeros_like(values))
    values = values * _beside(torch.as_tensor(site["scale"] / scale), events)
    lead = values.ndim - events
    # Axes that the path doesn't have count elements, as event axes do.
    own = ([1] * lead + list(batch))[len(batch) :]
    count = [i for i in range(lead) if own[i] == 1 and values.shape[i] != 1]
    axes = [*count, *range(lead, values.ndim)]
    values = (
        values.unsqueeze(0)
        if not axes
        else values.movedim(axes, list(range(len(axes)))).flatten(0, len(axes) - 1)
    )
    for i in count:
        values = values.unsqueeze(1 + i)
    return values


def _elements(fn: Any, value: Tensor) -> tuple[Tensor, int]:
    """Return log densities before events are summed, and the number of event axes among theirs."""
    if isinstance(fn, dist.Independent):
        inner, events = _elements(fn.base_dist, value)
        return inner, events + fn.reinterpreted_batch_ndims
    if isinstance(fn, dist.MaskedDistribution):
        inner, events = _elements(fn.base_dist, value)
        mask = _beside(torch.as_tensor(fn._mask), events)
        return torch.where(mask, inner, torch.zeros_like(inner)), events
    return fn.log_prob(value), 0


def _beside(x: Tensor, events: int) -> Tensor:
    """Give ``x`` event axes of size one on the right."""
    return x.reshape((*x.shape, *(1,) * events))


def find_coupling(sites: Iterable[Any], leaf: Tensor, scale: Tensor | float) -> CouplingPlan | None:
    """Find the observations that couple times, or return None.

    Args:
        sites: The sites of the likelihood, run at the path.
        leaf: The path ``(T, *batch, d)``, on the graph.
        scale: The scale of the path's own site.
    """
    found: list[tuple[str, int, int, int]] = []
    names = []
    for site in sites:
        elements = element_log_probs(site, leaf.shape[1:-1], scale)
        slope = _slope(elements.sum(), leaf)
        if slope is None or not _couples(slope, leaf):
            continue
        names.append(site["name"])
        for k in range(elements.shape[0]):
            touched = _touched(elements[k], leaf)
            if touched is not None:
                found.append((site["name"], k, *touched))
    if not found:
        return None
    return _share(found, tuple(names), leaf.shape[0], leaf.device)


def _slope(total: Tensor, leaf: Tensor) -> Tensor | None:
    if not total.requires_grad:
        return None
    slope = torch.autograd.grad(total, leaf, create_graph=True, allow_unused=True)[0]
    return slope if slope is not None and slope.requires_grad else None


def _curvature_along(slope: Tensor, leaf: Tensor, u: Tensor) -> Tensor:
    image = torch.autograd.grad((slope * u).sum(), leaf, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(leaf) if image is None else image


def _couples(slope: Tensor, leaf: Tensor) -> bool:
    """Return whether the second derivative has blocks between different times, by one random direction."""
    generator = torch.Generator(leaf.device).manual_seed(0)
    u = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=leaf.device)
    # Odd and even times apart: without coupling, what one half does is all that happens to it.
    half = torch.rand(leaf.shape[0], generator=generator, device=leaf.device) < 0.5
    half = half.reshape(-1, *(1,) * (leaf.ndim - 1))
    image = _curvature_along(slope, leaf, torch.where(half, u, torch.zeros_like(u)))
    across = torch.where(half, torch.zeros_like(image), image).abs().max()
    tolerance = _ROUNDING * torch.finfo(leaf.dtype).eps
    return bool(across > tolerance * image.abs().max())


def _touched(element: Tensor, leaf: Tensor) -> tuple[int, int] | None:
    """Return the first and the last time that an element's curvature touches."""
    slope = _slope(element.sum(), leaf)
    if slope is None:
        return None
    generator = torch.Generator(leaf.device).manual_seed(1)
    u = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=leaf.device)
    size = _curvature_along(slope, leaf, u).abs().flatten(1).amax(1)
    times = (size > _ROUNDING * torch.finfo(leaf.dtype).eps * size.max()).nonzero().flatten()
    return (int(times[0]), int(times[-1])) if len(times) else None


def _share(
    found: list[tuple[str, int, int, int]], names: tuple[str, ...], count: int, device: torch.device
) -> CouplingPlan:
    """Let elements whose times don't overlap share a sum: the first one that is free, in order of their beginnings."""
    slots: list[list[tuple[str, int]]] = []
    busy: list[int] = []
    segments: list[list[int]] = []
    for name, k, first, last in sorted(found, key=lambda item: item[2:]):
        free = next((r for r, end in enumerate(busy) if end < first), None)
        if free is None:
            free = len(slots)
            slots.append([])
            busy.append(-1)
            segments.append([-1] * count)
        segments[free][first : last + 1] = [len(slots[free])] * (last + 1 - first)
        slots[free].append((name, k))
        busy[free] = last
    segment = torch.tensor(segments, device=device).T.contiguous()
    return CouplingPlan(names, tuple(map(tuple, slots)), segment)
