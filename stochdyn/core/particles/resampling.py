"""Systematic resampling: weighted points become equally weighted ones, each taken as often as its weight says, up to one."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_positive_int
from stochdyn.core.law.marginals import Generator

__all__ = ["effective_size", "systematic", "take_particles"]


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
    total = weights.movedim(0, -1).cumsum(-1)
    shape = (*total.shape[:-1], 1)
    offset = torch.rand(shape, dtype=torch.float64, device=total.device, generator=source)
    comb = torch.arange(draws, dtype=torch.float64, device=total.device) + offset
    index = torch.searchsorted(total / total[..., -1:], comb / draws, right=True)
    return index.clamp_max_(count - 1).movedim(-1, 0)


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
        return x.index_select(0, index)
    index = index.reshape(*index.shape, *(1,) * (x.ndim - index.ndim))
    return x.gather(0, index.expand(index.shape[0], *x.shape[1:]))
