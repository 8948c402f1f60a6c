"""Log probabilities of many strings at once, every shared prefix evaluated once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.core.forward.outcomes import encode

if TYPE_CHECKING:
    from stochdyn.povm.ansatz.autoregressive import AutoregressiveAnsatz

__all__ = ["evaluate_prefixes", "unique_strings"]

_WORD = 62


def unique_strings(a: Tensor, num_outcomes: int) -> tuple[Tensor, Tensor]:
    """Return the distinct strings ``(m, N)`` in lexicographic order, and the place of every row ``(n,)`` among them.

    Any number of sites; strings too long for one integer are sorted word by word.

    Example:
        >>> unique, place = unique_strings(torch.tensor([[1, 0], [0, 1], [1, 0]]), 2)
        >>> unique.tolist(), place.tolist()
        ([[0, 1], [1, 0]], [1, 0, 1])
    """
    bits = max(1, (num_outcomes - 1).bit_length())
    words = [encode(part, num_outcomes) for part in a.split(_WORD // bits, dim=1)]
    if len(words) == 1:
        code, place = words[0].sort()
        fresh = torch.ones_like(code, dtype=torch.bool)
        fresh[1:] = code[1:] != code[:-1]
    else:
        place = torch.arange(a.shape[0], device=a.device)
        for word in reversed(words):
            place = place[word[place].argsort(stable=True)]
        fresh = torch.ones(a.shape[0], dtype=torch.bool, device=a.device)
        ordered = torch.stack([word[place] for word in words], 1)
        fresh[1:] = (ordered[1:] != ordered[:-1]).any(1)
    inverse = torch.empty_like(place).scatter_(0, place, fresh.cumsum(0) - 1)
    return a[place[fresh]], inverse


def evaluate_prefixes(net: AutoregressiveAnsatz, b: Tensor, reference: Tensor, rows: int) -> Tensor:
    r"""Return log probabilities ``(m,)`` of distinct strings in lexicographic order, without gradients.

    Neighbours in this order share long prefixes. A string branches off its predecessor at the first site where
    they differ: up to there it shares the conditionals, so

    .. math:: \log P(b) = \underbrace{\log P(b_1\dots b_f)}_{\text{known from the branch}} + \sum_{i>f}\log
        P(b_i\mid b_{<i}),

    and only the last part is computed, with the keys and values of the branch copied once. All strings of
    length ``N`` then cost about ``1/(3N)`` of evaluating each (with four outcomes); outcomes connected to one
    sample, about half.

    Args:
        net: The network that gives conditionals step by step.
        b: The distinct strings ``(m, N)`` in lexicographic order, as the network reads them.
        reference: The log probabilities ``(N, K)`` that are added to the logits.
        rows: The largest number of strings that are evaluated at a time.
    """
    with torch.no_grad():
        return torch.cat([_evaluate(net, part, reference) for part in b.split(rows)])


def _evaluate(net: AutoregressiveAnsatz, b: Tensor, reference: Tensor) -> Tensor:
    m, sites = b.shape
    first = torch.full((m,), -1, dtype=torch.long, device=b.device)
    if m > 1:
        first[1:] = (b[1:] != b[:-1]).int().argmax(1)
    # Strings in the order in which they branch off: those alive at a step are the leading rows.
    order = first.argsort(stable=True)
    alive = torch.searchsorted(first[order], torch.arange(sites + 1, device=b.device)).tolist()
    position = torch.empty_like(order).scatter_(0, order, torch.arange(m, device=b.device))
    rank = torch.arange(m, device=b.device)
    ordered = b[order]
    total = torch.zeros(m, dtype=reference.dtype, device=b.device)
    cache = net.start(m)
    for i in range(sites):
        now, later = alive[i], alive[i + 1]
        logits = net.next_logits(cache, ordered[:now, :i], i, now) + reference[i]
        conditional = logits.log_softmax(-1)
        if later > now:
            # the last string before each newcomer that was alive at this step
            latest = torch.where(first < i, rank, -1).cummax(0)[0]
            source = position[latest[order[now:later]]]
            total[now:later] = total[source] + conditional[source, ordered[now:later, i]]
            net.branch(cache, source, slice(now, later), i + 1)
        total[:now] += conditional.gather(1, ordered[:now, i, None])[:, 0]
    return total[position]
