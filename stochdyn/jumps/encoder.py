"""A network from counted transitions to a posterior of rates and links, equivariant under relabelling of the states."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochdyn._checks import check_positive_int
from stochdyn.jumps.simulated_prior import LAGS, LagCounts

__all__ = ["Encoded", "RateEncoder"]


class Encoded(NamedTuple):
    """A posterior per ordered pair of states.

    Attributes:
        link_logit: Log odds that the jump is possible, ``(B, S, S)``.
        mean: The mean of the log rate of a possible jump, ``(B, S, S)``.
        log_std: The logarithm of its standard deviation, ``(B, S, S)``.
        summary: What the network has pooled from the whole data set, ``(B, width)``.
    """

    link_logit: Tensor
    mean: Tensor
    log_std: Tensor
    summary: Tensor


class RateEncoder(nn.Module):
    """Rounds of message passing between ordered pairs of states, with the same weights for every pair and number of states.

    Relabelling the states relabels the answer, and another unit of time changes the rates by their unit, both
    by construction: the network sees dimensionless numbers, and corrects a crude estimate of every rate.

    Args:
        width: The width of the layers.
        num_rounds: The number of rounds.
    """

    def __init__(self, width: int = 80, num_rounds: int = 3) -> None:
        super().__init__()
        check_positive_int(width, "width")
        check_positive_int(num_rounds, "num_rounds")
        self.pairs = nn.Linear(3 * len(LAGS) + 2, width)
        self.whole = nn.Linear(2 * len(LAGS) + 5, width)
        self.rounds = nn.ModuleList(_Round(width) for _ in range(num_rounds))
        self.head = nn.Linear(width, 3)

    def forward(self, seen: LagCounts) -> Encoded:
        """Return the posterior of data sets ``B``."""
        counts = seen.counts
        size = counts.shape[-1]
        rows = counts.sum(-1, keepdim=True)
        share = (counts + 0.1) / (rows + 0.1 * size)
        crude = self._crude(share[:, 0], seen.gap[:, 0])
        eye = torch.eye(size, dtype=counts.dtype, device=counts.device).expand(len(counts), -1, -1)
        jumps = crude + seen.gap[:, 0, None, None].log()  # expected jumps per interval: dimensionless
        features = torch.cat(
            [
                torch.log1p(counts).movedim(1, -1) / 4.0,
                share.log().movedim(1, -1) / 4.0,
                (torch.log1p(rows) / 8.0).expand_as(counts).movedim(1, -1),
                eye[..., None],
                jumps[..., None] / 4.0,
            ],
            -1,
        )
        known = ~torch.isnan(seen.label_error)
        error = torch.where(known, seen.label_error, torch.zeros_like(seen.label_error))
        totals = counts.sum((-3, -2, -1))
        whole = torch.cat(
            [
                (seen.gap / seen.gap[:, :1]).log() / 2.0,
                seen.variation,
                torch.stack(
                    [
                        seen.num_series.to(counts.dtype).log() / 4.0,
                        torch.log1p(totals) / 8.0,
                        torch.full_like(totals, size / 8.0),
                        10.0 * error,
                        known.to(counts.dtype),
                    ],
                    -1,
                ),
            ],
            -1,
        )
        h = F.silu(self.pairs(features) + self.whole(whole)[:, None, None])
        for layer in self.rounds:
            h = layer(h)
        out = self.head(h)
        return Encoded(
            out[..., 0],
            crude + out[..., 1],
            (out[..., 2] - 1.0).clamp(-6.0, 2.0),
            h.mean((1, 2)),
        )

    @staticmethod
    def _crude(share: Tensor, gap: Tensor) -> Tensor:
        """Return logarithms of crude rates: the exit rate from the share that stays, divided like the jumps that are seen."""
        stay = share.diagonal(dim1=-2, dim2=-1).clamp(0.02, 1 - 1e-6)
        exits = -stay.log() / gap[:, None]
        return (exits / (1 - stay)).log()[..., None] + share.log()


class _Round(nn.Module):
    """One round: every pair hears of its reverse, of its two states and of the whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pair = nn.Linear(width, 2 * width)
        self.state = nn.Linear(3 * width, 2 * width, bias=False)
        self.whole = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        forth, back = self.pair(h).chunk(2, -1)
        pooled = torch.cat([h.mean(2), h.mean(1), h.diagonal(dim1=1, dim2=2).mT], -1)
        source, target = self.state(pooled).chunk(2, -1)
        message = forth + back.transpose(1, 2) + source[:, :, None] + target[:, None]
        message = message + self.whole(h.mean((1, 2)))[:, None, None]
        return h + self.out(F.silu(self.norm(message)))


def log_density(encoded: Encoded, log_rates: Tensor, links: Tensor) -> Tensor:
    """Return the log density ``(B,)`` of true links and rates under the posterior."""
    off = ~torch.eye(links.shape[-1], dtype=torch.bool, device=links.device)
    link = -F.binary_cross_entropy_with_logits(
        encoded.link_logit, links.to(log_rates.dtype), reduction="none"
    )
    z = (log_rates - encoded.mean) * torch.exp(-encoded.log_std)
    rate = -0.5 * z**2 - encoded.log_std - 0.5 * math.log(2 * math.pi)
    return (torch.where(links, rate, torch.zeros_like(rate)) + link).mul(off).sum((-2, -1))
