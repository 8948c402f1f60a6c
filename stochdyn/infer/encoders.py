"""Networks of path guides: an encoder that reads the data backwards, and a control network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from stochdyn.core.sde.grids import time_column

__all__ = ["ControlNetwork", "LikelihoodEncoder"]


class LikelihoodEncoder(nn.Module):
    r"""Summarise, at every grid point, what the data from there on say about the path.

    It reads no data format. Its input is the second-order expansion of the log-likelihood around a
    reference path: where there is an observation, of whatever kind, the expansion has a pseudo-observation
    :math:`H^{-1}h` of precision :math:`H`, and elsewhere it is zero. So irregular times, missing values,
    masks and non-Gaussian likelihoods need nothing from the user.

    Args:
        dim: ``d``, components of the path.
        width: size of the summary.
    """

    def __init__(self, dim: int, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(3 * dim + 1, width)
        self.width = width

    def forward(self, ts: Tensor, reference: Tensor, precision: Tensor, linear: Tensor) -> Tensor:
        """Return summaries ``(T, *batch, width)``.

        Args:
            ts: ``(T,)`` or ``(*batch, T)``.
            reference: ``(T, *batch, d)`` reference path.
            precision: ``(T, *batch, d, d)``.
            linear: ``(T, *batch, d)``.
        """
        diagonal = torch.diagonal(precision, dim1=-2, dim2=-1)
        seen = (diagonal > 1e-12).to(reference.dtype)
        pull = linear - (precision @ reference.unsqueeze(-1)).squeeze(-1)
        gap = torch.where(seen > 0, pull / diagonal.clamp_min(1e-12), torch.zeros_like(pull))
        gap = torch.sign(gap) * torch.log1p(gap.abs())
        first, last = ts[..., :1], ts[..., -1:]
        position = time_column((ts - first) / (last - first), reference).expand_as(reference[..., :1])
        features = torch.cat([gap, seen, torch.log1p(diagonal), position], -1)
        flat = features.flip(0).reshape(features.shape[0], -1, features.shape[-1])
        return self.gru(flat)[0].flip(0).reshape(*reference.shape[:-1], self.width)


class ControlNetwork(nn.Module):
    """A tanh network of time, state and context, zero at the start of training.

    Args:
        state_size: components of the state.
        out_size: components of the control.
        hidden: widths of the hidden layers.
        context_size: components of the context; 0 for none.
        start: first time of the grid.
        span: length of the grid, which scales time.
    """

    def __init__(
        self,
        state_size: int,
        out_size: int,
        hidden: Sequence[int] = (32,),
        context_size: int = 0,
        start: float = 0.0,
        span: float = 1.0,
    ) -> None:
        super().__init__()
        self.start = start
        self.span = span
        sizes = (state_size + 1 + context_size, *hidden)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        last = nn.Linear(sizes[-1], out_size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, t: Tensor, state: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``(..., out_size)``; ``t`` broadcasts with ``state[..., :1]``, so does ``context``."""
        clock = ((t - self.start) / self.span).expand(state[..., :1].shape)
        parts = [clock, state]
        if context is not None:
            parts.append(context.expand(*state.shape[:-1], context.shape[-1]))
        return self.layers(torch.cat(parts, -1))
