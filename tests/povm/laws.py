"""Laws over outcome strings that several tests look at, and the test of a sampler against its law."""

from __future__ import annotations

import torch
from scipy import stats

from stochdyn.core import encode
from stochdyn.povm import (
    Ansatz,
    AutoregressiveInteractions,
    AutoregressiveTransformer,
    AutoregressiveWindow,
    FullTable,
    Strings,
)

STRINGS: dict[str, Strings | None] = {
    "natural": None,
    "translations": Strings.translations(4, reflections=False),
    "translations and reflections": Strings.translations(4),
    "reflections": Strings.reflection(4),
    "snake": Strings.snake((2, 2)),
    "snakes": Strings.snakes((2, 2)),
    "turn about z": Strings.relabelling(4, (3, 2, 1, 0)),
    "everything": Strings.translations(4) @ Strings.relabelling(4, (3, 2, 1, 0)),
}


def stirred(net: Ansatz, scale: float = 0.7, seed: int = 3) -> Ansatz:
    """Put an ansatz in float64 far from any product law."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(
                scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(1, p.shape[-1]) ** 0.5
            )
    return net


def transformer(depth: int, strings: Strings | str | None = None, sites: int = 4) -> Ansatz:
    torch.manual_seed(depth)
    return stirred(AutoregressiveTransformer(sites, layers=depth, width=8, heads=2, strings=strings))


def window(order: int, strings: Strings | str | None = None, sites: int = 4) -> Ansatz:
    return stirred(AutoregressiveWindow(sites, order, strings=strings))


def interactions(bodies: int, strings: Strings | str | None = None, sites: int = 4) -> Ansatz:
    return stirred(AutoregressiveInteractions(sites, bodies, strings=strings))


def table(sites: int = 4) -> Ansatz:
    return stirred(FullTable(sites), scale=10.0)


def fisher_p_value(net: Ansatz, draws: int, repeats: int, seed: int) -> float:
    """Repeated chi-squared tests of samples against all probabilities, combined by Fisher's method."""
    expected = net.probabilities() * draws
    generator = torch.Generator().manual_seed(seed)
    rare = expected < 8
    values = []
    for _ in range(repeats):
        a, _ = net.sample(draws, generator=generator)
        counts = torch.bincount(encode(a, net.num_outcomes), minlength=len(expected)).double()
        seen = torch.cat([counts[~rare], counts[rare].sum()[None]]) if rare.any() else counts
        wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]) if rare.any() else expected
        values.append(max(float(stats.chisquare(seen.numpy(), wanted.numpy()).pvalue), 1e-300))
    return float(stats.combine_pvalues(values, method="fisher").pvalue)
