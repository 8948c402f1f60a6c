r"""Groups of points that a plan hardly joins to the rest, and the exact balance of the mass between them.

Sinkhorn's iteration moves mass into such a group, an outlier and its partner say, at a rate as small as what joins it to
the rest. A shift of the potentials of a whole group, by :math:`\varepsilon d_G` up in its rows and down in its columns,
leaves the plan inside of it as it is. The best shifts solve the dual problem of the groups,

.. math:: \max_d\ \sum_G(a_G-b_G)\,d_G-\sum_{G\ne H}P_{GH}\,e^{d_G-d_H},

which is concave, and whose maximum along each coordinate has a closed form.

Reference: Osborne (1960), On pre-conditioning of matrices, for the balance; Vaněk, Mandel & Brezina (1996), Algebraic
multigrid by smoothed aggregation, for groups found from the largest entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["Blocks", "balanced_shifts", "find_groups", "log_flows"]

Blocks = Callable[[], Iterator[tuple[slice, Tensor]]]

# A group is closed if it exchanges less than this share of its mass with the rest.
_SHARE = 0.3
# Shifts, in units of the regularisation, that the iteration makes in a few rounds by itself.
_STILL = 0.1
# So much fewer groups than points make it worth the while to sum the plan over groups.
_SHRINK = 0.1
_ROUNDS = 5
_CYCLES = 20


def find_groups(
    plan: Blocks, rows: Tensor, columns: Tensor, nodes: Tensor | None = None
) -> tuple[Tensor, Tensor, int]:
    """Return labels ``(n,)`` of rows and ``(m,)`` of columns, 0, 1, ... for groups that exchange little, and their number.

    Every point starts as a group of its own. A group that exchanges more than a share of its mass joins the one to which
    its largest entry outside leads, until there is none.

    Args:
        plan: Yields the plan in blocks of rows ``(k, m)``.
        rows: The plan's row sums ``(n,)``.
        columns: The plan's column sums ``(m,)``.
        nodes: Labels ``(n + m,)`` of what starts as one; every point for itself if None.
    """
    n, mass = len(rows), torch.cat([rows, columns]).double()
    if nodes is None:
        # points without mass are of no group, and go with any
        nodes = torch.where(mass > 0, torch.arange(len(mass), device=mass.device), mass.argmax())
    labels = nodes = torch.unique(nodes, return_inverse=True)[1]
    count = int(labels.max()) + 1
    while True:
        outside, entry, partner = _outside(plan, nodes, n)
        total = mass.new_zeros(count).index_add_(0, nodes, mass)
        exchanged = mass.new_zeros(count).index_add_(0, nodes, outside)
        is_open = exchanged > _SHARE * total
        best = mass.new_zeros(count).scatter_reduce_(0, nodes, entry, "amax")
        joins = ((entry > 0) & (entry == best[nodes]) & is_open[nodes]).nonzero()[:, 0]
        if not len(joins):
            return labels[: len(rows)], labels[len(rows) :], count
        ends = nodes[joins].cpu().numpy(), nodes[partner[joins]].cpu().numpy()
        links = coo_array((np.ones(len(joins)), ends), shape=(count, count))
        count, found = connected_components(links, directed=False)
        merged = torch.as_tensor(found, device=mass.device).long()
        labels, nodes = merged[labels], merged[nodes]
        if count <= _SHRINK * len(nodes):
            # few enough: from here on the plan between groups is all that is needed
            flows = _flows(plan, nodes[:n], nodes[n:], count)
            plan, n, mass = _whole(flows), count, torch.cat([flows.sum(1), flows.sum(0)])
            nodes = torch.arange(count, device=mass.device).repeat(2)


def _whole(matrix: Tensor) -> Blocks:
    return lambda: iter([(slice(0, len(matrix)), matrix)])


def _flows(plan: Blocks, rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """The mass ``(count, count)`` that goes from the rows of a group to the columns of another."""
    flows = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    for own, block in plan():
        by_group = block.new_zeros(block.shape[0], count).index_add_(1, columns, block)
        flows.index_add_(0, rows[own], by_group.double())
    return flows


def _outside(plan: Blocks, labels: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every row, then every column: its mass outside its group, its largest entry there, and where that is."""
    own, other = labels[:n], labels[n:]
    by_rows: list[tuple[Tensor, Tensor, Tensor]] = []
    mass = torch.zeros(len(other), dtype=torch.float64, device=labels.device)
    entry, partner = torch.zeros_like(mass), torch.zeros_like(other)
    for rows, block in plan():
        outside = block.masked_fill(own[rows, None] == other, 0)
        by_rows.append((outside.sum(1).double(), *outside.max(1)))
        mass += outside.sum(0)
        largest, index = outside.max(0)
        larger = largest > entry
        entry = torch.where(larger, largest.double(), entry)
        partner = torch.where(larger, index + rows.start, partner)
    first, second, third = (torch.cat(parts) for parts in zip(*by_rows, strict=True))
    return torch.cat([first, mass]), torch.cat([second.double(), entry]), torch.cat([third + n, partner])


def log_flows(log_plan: Blocks, rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """Return the logarithm ``(count, count)`` of the mass that goes from the rows of a group to the columns of another."""
    flows = torch.full((count, count), -torch.inf, dtype=torch.float64, device=rows.device)
    for own, block in log_plan():
        by_group = _log_sums(block.mT, columns, count).mT
        flows = torch.logaddexp(flows, _log_sums(by_group, rows[own], count))
    return flows


def _log_sums(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return logarithms ``(count, k)`` of sums of ``exp(values (n, k))`` over the rows of each label."""
    index = labels[:, None].expand_as(values)
    largest = values.new_full((count, values.shape[1]), -torch.inf).scatter_reduce_(0, index, values, "amax")
    scale = torch.where(largest.isfinite(), largest, 0)
    parts = (values - scale.gather(0, index)).exp()
    return scale + torch.zeros_like(scale).scatter_add_(0, index, parts).log()


def balanced_shifts(flows: Tensor, excess: Tensor) -> Tensor:
    """Return the shifts ``(K,)`` that balance every group, in units of the regularisation.

    Groups that are nearer to each other than to others move together first, and so do groups of those.

    Args:
        flows: The logarithms of the flows between groups, ``(K, K)``.
        excess: The mass that each group's rows should have over that of its columns, ``(K,)``.
    """
    between = flows.clone().fill_diagonal_(-torch.inf)
    levels = []
    near = between
    while True:
        labels, count = _near(near)
        if count in {1, len(near)}:
            break
        levels.append((labels, count))
        near = _between(near, labels, count)
    shifts = torch.zeros_like(excess)
    for _ in range(_CYCLES):
        move = _cycle(between + shifts[:, None] - shifts, excess, levels)
        shifts = shifts + move
        if float(move.abs().max()) < _STILL:
            break
    return shifts - shifts[0]


def _cycle(between: Tensor, excess: Tensor, levels: list[tuple[Tensor, int]]) -> Tensor:
    """Balance the groups of groups, then the groups; returns the shifts ``(K,)``."""
    if not levels:
        return _one_by_one(between, excess)
    (labels, count), *rest = levels
    total = torch.zeros(count, dtype=excess.dtype, device=excess.device).index_add_(0, labels, excess)
    together = _cycle(_between(between, labels, count), total, rest)[labels]
    return together + _one_by_one(between + together[:, None] - together, excess)


def _between(between: Tensor, labels: Tensor, count: int) -> Tensor:
    """Logarithms of the flows ``(count, count)`` between groups of groups."""
    return _log_sums(_log_sums(between.mT, labels, count).mT, labels, count).fill_diagonal_(-torch.inf)


def _near(between: Tensor) -> tuple[Tensor, int]:
    """Groups of groups ``(K,)`` that exchange more inside than with others, and their number."""
    count = len(between)
    plan = torch.nan_to_num((between - between.amax()).exp())
    nodes = torch.arange(count, device=between.device).repeat(2)
    rows, _, found = find_groups(_whole(plan), plan.sum(1), plan.sum(0), nodes)
    return rows, found


def _one_by_one(between: Tensor, excess: Tensor) -> Tensor:
    """Balance one group after the other, in rounds until they stand still; returns the shifts ``(K,)``."""
    flows: NDArray[np.float64] = between.cpu().numpy()
    incoming = np.ascontiguousarray(flows.T)
    more = excess.cpu().numpy()
    with np.errstate(divide="ignore"):
        log_more = np.log(0.5 * np.abs(more))
    shifts = np.zeros(len(flows))
    for _ in range(_ROUNDS):
        largest = 0.0
        for k in range(len(flows)):
            out = _log_sum(flows[k] - shifts) + shifts[k]
            into = _log_sum(incoming[k] + shifts) - shifts[k]
            if not (np.isfinite(out) and np.isfinite(into)):
                continue
            # out e^x - into e^-x = excess at sinh(x + (log out - log into) / 2) = excess / (2 sqrt(out into))
            ratio = log_more[k] - 0.5 * (out + into)
            move = np.sign(more[k]) * np.logaddexp(ratio, 0.5 * np.logaddexp(2 * ratio, 0)) + 0.5 * (
                into - out
            )
            shifts[k] += move
            largest = max(largest, abs(move))
        if largest < _STILL:
            break
    return torch.as_tensor(shifts, device=between.device)


def _log_sum(values: NDArray[np.float64]) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum())) if np.isfinite(top) else float(top)
