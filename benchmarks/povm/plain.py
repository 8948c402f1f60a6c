"""What the fast parts are measured against: sampling that re-runs the prefix, and a sum over all of every bond's outcomes."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.core import all_configurations, encode
from stochdyn.povm import AutoregressiveTransformer

__all__ = ["plain_local_rate", "sample_by_prefixes"]


@torch.no_grad()
def sample_by_prefixes(net: AutoregressiveTransformer, n: int, generator: torch.Generator) -> Tensor:
    """Draw strings ``(n, N)``, running the network on the whole prefix for every site."""
    reference, _ = net._references()
    b = torch.full((n, 1), net.num_outcomes)
    for i in range(net.num_sites):
        x = net.embedding(b) + net.positions[: i + 1]
        for layer in net.layers:
            x = layer(x, None)
        logits = net.read_out(net.norm(x[:, -1])) + reference[0, i]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        b = torch.cat([b, drawn], 1)
    return b[:, 1:]


@torch.no_grad()
def plain_local_rate(
    net: AutoregressiveTransformer, bonds: list[tuple[int, int]], matrix: Tensor, a: Tensor
) -> Tensor:
    """Local rates from a forward pass for each of the ``K**2`` outcomes of every bond, the unchanged ones included.

    One bond matrix ``(K**2, K**2)`` holds the one-site terms too.
    """
    k = net.num_outcomes
    pairs = all_configurations(2, k)
    own = net._whole(a, None)
    total = torch.zeros(a.shape[0], dtype=own.dtype)
    for bond in bonds:
        b = a[:, None].repeat(1, k * k, 1)
        b[:, :, list(bond)] = pairs
        other = net._whole(b.reshape(-1, a.shape[1]), None).reshape(a.shape[0], k * k)
        rates = matrix[encode(a[:, list(bond)], k)].to(own.dtype)
        total += (rates * (other - own[:, None]).exp()).sum(1)
    return total
