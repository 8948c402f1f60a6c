"""One law of every kind of bridge, for the suite of laws and the tests beside it."""

from __future__ import annotations

from functools import cache

import torch

from stochdyn import PathMeasure
from stochdyn.bridges import (
    BridgeMatching,
    GaussianBridge,
    GaussianChainBridge,
    GrowingBridge,
    HiddenStateBridge,
    IPFBridge,
    LinearDrift,
    PartialBridge,
    PartialGaussianBridge,
    SchrodingerBridge,
    Snapshots,
    momentum,
)

F64 = torch.float64


def clouds(shift: float = 0.5, right: tuple[int, ...] = (10, 16, 22)) -> Snapshots:
    """Two branches that move, of which one grows."""
    g = torch.Generator().manual_seed(0)
    samples = [
        torch.cat(
            (
                torch.randn(30 - n, 1, generator=g, dtype=F64) * 0.3 - 1,
                torch.randn(n, 1, generator=g, dtype=F64) * 0.3 + 1,
            )
        )
        + shift * k
        for k, n in enumerate(right)
    ]
    return Snapshots([0.0, 0.6, 1.0], samples)


def linear() -> LinearDrift:
    family = LinearDrift(1).double()
    with torch.no_grad():
        family.weight.copy_(torch.tensor([[-0.5, 0.3]]))
    return family


def moments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.tensor([0.0, 0.6, 1.0], dtype=F64),
        torch.tensor([[0.0], [1.0], [0.5]], dtype=F64),
        torch.tensor([[[0.3]], [[0.1]], [[0.4]]], dtype=F64),
    )


def pushed(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The second component pushes the first one, and bends."""
    return torch.stack((x[..., 1] - 0.5 * x[..., 0], -torch.tanh(x[..., 1])), -1)


@cache
def solved(name: str) -> PathMeasure:
    """A law of each kind."""
    one = torch.ones(1, 1, dtype=F64)
    times, means, covs = moments()
    match name:
        case "brownian":
            return SchrodingerBridge(clouds(), diffusion=0.7).solve()
        case "linear":
            return SchrodingerBridge(clouds(), linear(), 0.7).solve()
        case "nonlinear":
            return SchrodingerBridge(clouds(), lambda t, x: -(x**3), 0.7).solve()
        case "corrected":
            return SchrodingerBridge(clouds(), lambda t, x: -(x**3), 0.7, corrections=4, dt=0.1).solve()
        case "relaxed":
            return SchrodingerBridge(clouds(), diffusion=0.7, relaxation=0.5).solve()
        case "growing":
            return GrowingBridge(clouds(), diffusion=0.5).solve()
        case "growing by half":
            return GrowingBridge(clouds(), 0.5, diffusion=0.5).solve()
        case "ipf":
            return IPFBridge(clouds(), None, 0.7, dt=0.1, max_iterations=3).solve()
        case "ipf by networks":
            return IPFBridge(clouds(), None, 0.7, dt=0.1, max_iterations=1, learner="neural").solve()
        case "matching":
            match = BridgeMatching(clouds(), 0.7, width=8, num_pairs=200, batch_size=64, refresh=10)
            return match.solve(20, progress=False)
        case "affine matching":
            return BridgeMatching(clouds(), 0.7, width=0, num_pairs=200, batch_size=64, refresh=10).solve(
                20, progress=False
            )
        case "partial":
            return PartialBridge(clouds(), *momentum(1, diffusion=2.0), num_hidden=10)
        case "hidden":
            start = torch.tensor([0.0, 0.5], dtype=F64), torch.diag(torch.tensor([1.2, 0.5], dtype=F64))
            return HiddenStateBridge(clouds(), pushed, 0.7, *start)
        case "partial gaussian":
            return PartialGaussianBridge(
                times, means, covs, torch.eye(1, 2, dtype=F64), *momentum(1, diffusion=2.0)
            )
        case "gaussian":
            return GaussianBridge(
                0 * one[0], 0.3 * one, one[0], 0.4 * one, 0.7, 1.0, -0.5 * one, 0.2 * one[0]
            )
        case "chain":
            return GaussianChainBridge(times, means, covs, 0.7, -0.5 * one)
    raise AssertionError(name)


NAMES = (
    "brownian", "linear", "nonlinear", "corrected", "relaxed", "growing", "growing by half", "ipf", "ipf by networks",
    "matching", "affine matching", "hidden", "partial", "partial gaussian", "gaussian", "chain",
)  # fmt: skip
