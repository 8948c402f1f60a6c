"""Simulated panels of jump processes: what the amortised posterior of rates is trained on, and what it sees of a panel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_positive_int, check_real
from stochdyn.errors import InvalidInputError
from stochdyn.jumps.uniformisation import paired_transition

__all__ = ["LAGS", "JumpPrior", "LagCounts", "count_transitions"]

#: Lags, in visits, at which transitions are counted.
LAGS = (1, 2, 4, 8)


class LagCounts(NamedTuple):
    """What the network sees of panels: transitions between visits that lie one or more visits apart.

    Attributes:
        counts: Transitions from each state to each other per lag, ``(B, M, S, S)``.
        gap: The mean time between the two visits per lag, ``(B, M)``.
        variation: The standard deviation of that time over its mean, ``(B, M)``.
        num_series: The number of series, ``(B,)``.
        label_error: The probability of a wrong label, ``(B,)``; NaN where it isn't known.
    """

    counts: Tensor
    gap: Tensor
    variation: Tensor
    num_series: Tensor
    label_error: Tensor


def count_transitions(states: Tensor, owner: Tensor, sets: int, num_states: int) -> Tensor:
    """Count transitions of rows of visits at every lag, ``(B, M, S, S)``.

    Args:
        states: Observed states ``(R, L)``, or -1 after the last visit of a row.
        owner: The data set that each row belongs to, ``(R,)``.
        sets: The number of data sets B.
        num_states: The number of states S.
    """
    size, counts = num_states**2, []
    for lag in LAGS:
        before, after = states[:, :-lag], states[:, lag:]
        cell = (owner[:, None] * num_states + before) * num_states + after
        counts.append(torch.bincount(cell[after >= 0], minlength=sets * size).float().reshape(sets, size))
    return torch.stack(counts, 1).reshape(sets, len(LAGS), num_states, num_states)


class Simulated(NamedTuple):
    """Data sets and the truth behind them.

    Attributes:
        seen: What the network sees.
        log_rates: Logarithms of the rates ``(B, S, S)``; only those of links mean something.
        links: Which jumps are possible, ``(B, S, S)``.
    """

    seen: LagCounts
    log_rates: Tensor
    links: Tensor


@dataclass(frozen=True)
class JumpPrior:
    r"""The law of jump processes and of panels that the amortised posterior is trained on.

    Each jump is possible with a probability that is itself uniform; log rates of possible jumps are standard normal, which
    sets the unit of time, and the interval between visits is log-uniform in that unit. Half of the data sets have equal
    intervals. A visit's label is wrong, and then any other one, with a probability that is zero in a third of the data sets.

    Args:
        num_states: The smallest and the largest number of states.
        link: The smallest and the largest probability that a jump is possible.
        num_series: The smallest and the largest number of series, log-uniform.
        length: The smallest and the largest number of visits of a series.
        dt: The shortest and the longest mean interval between visits, in units of the median waiting time of a link.
        label_error: The largest probability of a wrong label.
    """

    num_states: tuple[int, int] = (2, 8)
    link: tuple[float, float] = (0.4, 1.0)
    num_series: tuple[int, int] = (5, 300)
    length: tuple[int, int] = (20, 100)
    dt: tuple[float, float] = (0.01, 0.3)
    label_error: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("num_states", "link", "num_series", "length", "dt"):
            low, high = getattr(self, name)
            check_real(low, f"{name}[0]", above=0.0)
            check_real(high, f"{name}[1]", above=0.0)
            if low > high:
                raise InvalidInputError(f"{name} must hold the smaller end first", got=(low, high))
        check_positive_int(self.num_states[0], "num_states[0]", 2)
        check_real(self.label_error, "label_error", minimum=0.0)

    def sample(
        self,
        num_states: int,
        sample_shape: int,
        generator: torch.Generator | int | None = None,
        num_series: int | None = None,
        length: int | None = None,
        label_error: float | None = None,
        dt: float | None = None,
    ) -> Simulated:
        """Draw data sets with their truth.

        Args:
            num_states: The number of states S.
            sample_shape: The number of data sets B.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
            num_series: The number of series of all data sets; drawn if None.
            length: The number of visits per series; drawn if None, once for all data sets.
            label_error: The probability of a wrong label, known to the network; drawn if None, and then half of the
                data sets hide it.
            dt: The interval between visits; drawn if None.
        """
        sets, g, size = sample_shape, as_generator(generator), num_states

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=g)

        def between(low: float, high: float, n: int) -> Tensor:
            return torch.exp(math.log(low) + uniform(n) * (math.log(high) - math.log(low)))

        eye = torch.eye(size, dtype=torch.bool)
        chance = self.link[0] + uniform(sets) * (self.link[1] - self.link[0])
        links = (uniform(sets, size, size) < chance[:, None, None]) & ~eye
        log_rates = torch.randn(sets, size, size, generator=g)
        off = log_rates.exp() * links
        q = off - torch.diag_embed(off.sum(-1))
        many = (
            between(*self.num_series, sets).round().long()
            if num_series is None
            else torch.full((sets,), num_series)
        )
        visits = (
            int(torch.randint(self.length[0], self.length[1] + 1, (), generator=g))
            if length is None
            else length
        )
        interval = between(*self.dt, sets) if dt is None else torch.full((sets,), dt)
        # unequal intervals are exponential, with a shortest one so that no two visits fall together
        stretch = 0.05 - 0.95 * torch.log1p(-uniform(sets, visits - 1))
        regular = uniform(sets) < 0.5
        gaps = interval[:, None] * torch.where(regular[:, None], torch.ones_like(stretch), stretch)
        p = paired_transition(q.double(), gaps.double().mT).transpose(0, 1).float()
        owner = torch.arange(sets).repeat_interleave(many)
        states = _chains(p, owner, visits, g)
        if label_error is None:
            error = self.label_error * uniform(sets) * (uniform(sets) < 2.0 / 3.0)
            told = torch.where(uniform(sets) < 0.5, error, torch.full_like(error, math.nan))
        else:
            error = torch.full((sets,), float(label_error))
            told = error
        wrong = uniform(*states.shape) < error[owner, None]
        other = (states + torch.randint(1, max(size, 2), states.shape, generator=g)) % size
        states = torch.where(wrong, other, states)
        ts = torch.cat([torch.zeros(sets, 1), gaps.cumsum(-1)], -1)
        spans = [ts[:, lag:] - ts[:, :-lag] for lag in LAGS]
        seen = LagCounts(
            count_transitions(states, owner, sets, size),
            torch.stack([span.mean(-1) for span in spans], -1),
            torch.stack([span.std(-1, correction=0) / span.mean(-1) for span in spans], -1),
            many,
            told,
        )
        return Simulated(seen, log_rates, links)


def _chains(p: Tensor, owner: Tensor, visits: int, g: torch.Generator | None) -> Tensor:
    """Draw states ``(R, L)`` from uniform starts."""
    size = p.shape[-1]
    level = p.cumsum(-1)[..., :-1].contiguous()
    state = torch.randint(size, owner.shape, generator=g)
    states = [state]
    for k in range(visits - 1):
        row = level[:, k].reshape(-1, size - 1)[owner * size + state]
        state = (torch.rand(len(owner), 1, generator=g) > row).sum(-1)
        states.append(state)
    return torch.stack(states, -1)
