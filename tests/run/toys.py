"""Small objectives whose training is known, shared by the tests of training."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stochdyn.objectives import Objective, ObjectiveValue


class Regression(Objective):
    """Least squares for batches ``(x, y)`` by a small network."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.net = nn.Sequential(
            nn.Linear(3, 8, dtype=dtype), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1, dtype=dtype)
        )
        with torch.no_grad():
            for p in self.net.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=dtype))

    def forward(self, batch: Any = None) -> ObjectiveValue:
        x, y = batch
        error = (self.net(x) - y).square().mean()
        return ObjectiveValue(error, {"error": error.detach()})


class Noisy(Regression):
    """Draws from every kind of global generator in each evaluation, and has a buffer that it changes."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Any = None) -> ObjectiveValue:
        self.calls += 1
        value = super().forward(batch)
        jitter = random.random() + float(np.random.rand()) + float(np.random.randn()) + random.gauss(0, 1)
        return ObjectiveValue(value.loss * (1 + 0.01 * jitter), value.terms)


class Quadratic(Objective):
    """Half the squared distance of a vector to a target; gradient ``theta - target``."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros_like(target))
        self.register_buffer("target", target)

    def forward(self, batch: Any = None) -> ObjectiveValue:
        return ObjectiveValue(0.5 * (self.theta - self.target).square().sum())


class Scripted(Objective):
    """Reports given losses, one after the other; its only parameter counts the steps with SGD and lr 1."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(()))
        self.losses = losses

    def forward(self, batch: Any = None) -> ObjectiveValue:
        done = round(self.count.item())
        return ObjectiveValue(self.losses[done] - (self.count - self.count.detach()))


def regression_data(n: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(11)
    x = torch.randn(n, 3, generator=g, dtype=dtype)
    return x, x.sum(-1, keepdim=True).sin()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in module.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
