"""The encoder of path guides, which reads the data backwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochdyn.core.sde.grids import time_column

__all__ = ["LikelihoodEncoder"]


class LikelihoodEncoder(nn.Module):
    r"""Summarise, at every grid point, what the data from there on say about the path.

    It reads no data format. Its input is the second-order expansion of the log-likelihood around a
    reference path: where there is an observation, of whatever kind, the expansion has a pseudo-observation
    :math:`H^{-1}h` of precision :math:`H`, and elsewhere it is zero. So irregular times, missing values,
    masks and non-Gaussian likelihoods need nothing from the user.

    Args:
        dim: ``d``, components of the path.
        width: The size of the summary.
    """

    def __init__(self, dim: int, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(3 * dim + 1, width)
        self.width = width

    def forward(
        self, ts: Tensor, reference: Tensor, precision: Tensor, linear: Tensor, unit: Tensor | None = None
    ) -> Tensor:
        """Return summaries ``(T, *batch, width)``.

        Args:
            ts: ``(T,)`` or ``(*batch, T)``.
            reference: ``(T, *batch, d)`` reference path.
            precision: ``(T, *batch, d, d)``.
            linear: ``(T, *batch, d)``.
            unit: ``(*batch, d)`` the spread of the components, in which the network counts; None for ones.
        """
        diagonal = torch.diagonal(precision, dim1=-2, dim2=-1)
        pull = linear - (precision @ reference.unsqueeze(-1)).squeeze(-1)
        if unit is not None:
            diagonal, pull = diagonal * unit**2, pull * unit
        seen = (diagonal > 0).to(reference.dtype)
        gap = torch.where(
            seen > 0, pull / torch.where(seen > 0, diagonal, torch.ones_like(pull)), torch.zeros_like(pull)
        )
        gap = torch.sign(gap) * torch.log1p(gap.abs())
        first, last = ts[..., :1], ts[..., -1:]
        position = time_column((ts - first) / (last - first), reference).expand_as(reference[..., :1])
        features = torch.cat([gap, seen, torch.log1p(diagonal), position], -1)
        flat = features.flip(0).reshape(features.shape[0], -1, features.shape[-1])
        return self.gru(flat)[0].flip(0).reshape(*reference.shape[:-1], self.width)
