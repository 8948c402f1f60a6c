"""Two-dimensional laws of the benchmarks, and the machine that they run on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

__all__ = ["LAWS", "checkerboard", "checkerboard_log_prob", "machine", "selu_network"]


def normal(n: int, generator: torch.Generator) -> Tensor:
    """Standard normal points."""
    return torch.randn(n, 2, generator=generator)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussians on a circle of radius five, of variance sqrt(0.1)."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centres = 5 * torch.stack([angle.cos(), angle.sin()], -1)
    return centres + 0.1**0.25 * torch.randn(n, 2, generator=generator)


def moons(n: int, generator: torch.Generator) -> Tensor:
    """Two interleaved half circles with noise of 0.2, scaled by three and shifted by minus one."""
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return 3 * (torch.stack([x, y], -1) + 0.2 * torch.randn(n, 2, generator=generator)) - 1


LAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "N": normal,
    "8gaussians": eight_gaussians,
    "moons": moons,
}


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Eight squares of side two on [-4, 4] x [-4, 4]."""
    x = 4 * torch.rand(n, generator=generator) - 2
    y = torch.rand(n, generator=generator) - 2 * torch.randint(2, (n,), generator=generator)
    return 2 * torch.stack([x, y + torch.remainder(x.floor(), 2)], -1)


def checkerboard_log_prob(x: Tensor) -> Tensor:
    """Log density of the checkerboard: uniform on its squares."""
    u, v = (0.5 * x).unbind(-1)
    inside = (u.abs() <= 2) & (v >= -2) & (v <= 2)
    square = torch.remainder(v.floor() + u.floor(), 2) == 0
    return torch.where(inside & square, -math.log(32.0), -math.inf)


def selu_network(dim: int = 2, width: int = 64) -> nn.Sequential:
    """The network of TorchCFM's tutorials, of time and state joined: three hidden layers with SELU."""
    return nn.Sequential(
        nn.Linear(dim + 1, width), nn.SELU(), nn.Linear(width, width), nn.SELU(),
        nn.Linear(width, width), nn.SELU(), nn.Linear(width, dim),
    )  # fmt: skip


class Joined(nn.Module):
    """Calls a network of time and state joined as ``net(t, x)``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the field."""
        return self.net(torch.cat([x, t], -1))
