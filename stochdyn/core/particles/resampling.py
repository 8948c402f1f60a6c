"""Systematic resampling: weighted points become equally weighted ones, each taken as often as its weight says, up to one."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_positive_int
from stochdyn.core.law.marginals import Generator

__all__ = ["comb_indices", "comb_offset", "effective_size", "systematic", "take_particles"]

# From this many draws on it costs less to count the teeth beyond each point than to look for the point of each.
_MANY = 1000


def systematic(log_weights: Tensor, num_draws: int | None = None, generator: Generator = None) -> Tensor:
    r"""Draw indices of weighted points, in increasing order, by one uniform number for all of them.

    Point :math:`i` of weight :math:`w_i` is taken :math:`\lfloor Sw_i\rfloor` or :math:`\lceil Sw_i\rceil` times, with mean
    :math:`Sw_i`, where :math:`S` is the number of draws: the spread is far below that of independent draws. Nothing waits for
    the device.

    Args:
        log_weights: The logarithms of the weights ``(n, *batch)``, up to a constant per member of the batch.
        num_draws: The number of draws; None for ``n``.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        The indices ``(num_draws, *batch)``.

    Example:
        >>> systematic(torch.tensor([0.5, 0.25, 0.25]).log(), 4, generator=0)
        tensor([0, 0, 1, 2])

    Reference:
        J. Carpenter, P. Clifford and P. Fearnhead, Improved particle filter for nonlinear problems, 1999.
    """
    count = log_weights.shape[0]
    draws = count if num_draws is None else num_draws
    check_positive_int(draws, "num_draws")
    source = as_generator(generator, log_weights.device)
    # Sums of many weights need double precision, whatever the states have.
    weights = torch.softmax(log_weights.detach().double(), 0)
    return comb_indices(weights, comb_offset(log_weights, source), draws)


def comb_offset(log_weights: Tensor, generator: torch.Generator | None, count: int | None = None) -> Tensor:
    """Return a uniform number for each member of the batch, ``(*batch, 1)``, or ``count`` of them on an axis in front."""
    lead = () if count is None else (count,)
    shape = (*lead, *log_weights.shape[1:], 1)
    return torch.rand(shape, dtype=torch.float64, device=log_weights.device, generator=generator)


def comb_indices(weights: Tensor, offset: Tensor, draws: int) -> Tensor:
    """Return the indices ``(draws, *batch)`` of the points under the teeth ``offset + 0, 1, ...`` of a comb.

    Args:
        weights: The weights ``(n, *batch)``, up to a factor per member of the batch.
        offset: The place of the first tooth, ``(*batch, 1)``, between 0 and 1.
        draws: The number of teeth.
    """
    total = weights.movedim(0, -1).cumsum(-1, dtype=torch.float64)
    share = total / total[..., -1:]
    last = weights.shape[0] - 1
    if draws < _MANY:
        comb = torch.arange(draws, dtype=torch.float64, device=total.device) + offset
        index = torch.searchsorted(share, comb / draws, right=True)
    else:
        # Tooth j lies beyond point i where j >= ceil(S c_i - u), so the index is the number of such points: no search.
        edges = (share * draws - offset).ceil_().long()
        counts = edges.new_zeros(*edges.shape[:-1], draws + 1)
        index = counts.scatter_add_(-1, edges, torch.ones_like(edges)).cumsum(-1)[..., :draws]
    return index.clamp_max_(last).movedim(-1, 0)


def effective_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Return the number of equally weighted points that weighted ones are worth, :math:`1/\sum_iw_i^2`.

    Args:
        log_weights: The logarithms of the weights ``(n, *batch)``, up to a constant per member of the batch.
        dim: The axis of the points, where it isn't the first one.

    Returns:
        ``(*batch,)``, between 1 and n.

    Reference:
        Kish, "Survey sampling", 1965.
    """
    return torch.softmax(log_weights, dim).square().sum(dim).reciprocal()


def take_particles(x: Tensor, index: Tensor) -> Tensor:
    """Return the particles of given indices.

    Args:
        x: The particles ``(n, *batch, *event)``.
        index: The indices ``(m, *batch)``.

    Returns:
        ``(m, *batch, *event)``.
    """
    if index.ndim == 1:
        if x.numel() == x.shape[0]:  # four times as fast as one row after the other
            return x.reshape(-1).index_select(0, index).reshape(-1, *x.shape[1:])
        return x.index_select(0, index)
    index = index.reshape(*index.shape, *(1,) * (x.ndim - index.ndim))
    return x.gather(0, index.expand(index.shape[0], *x.shape[1:]))
