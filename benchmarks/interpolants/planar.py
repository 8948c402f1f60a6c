"""Three data sets in the plane, and the laws that a learned score makes of them, by histogram distances."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.interpolants import OU, PotentialNetwork, ReverseDiffusion, ScoreMatching, histogram_w2

Sampler = Callable[[int], Tensor]

# Wasserstein distances of Deveney et al. (2025), recomputed from the histograms published with their code:
# weight of the residual -> ODE to truth, SDE to truth, ODE to SDE. Potentials of three layers of 80, 3 million samples.
PUBLISHED: dict[str, dict[float, tuple[float, float, float]]] = {
    "blob": {
        0.0: (0.1047, 0.0467, 0.1077),
        0.1: (0.0777, 0.0542, 0.0557),
        1.0: (0.0727, 0.0654, 0.0539),
        10.0: (0.1312, 0.1264, 0.0470),
    },
    "circles": {
        0.0: (0.1198, 0.0476, 0.1158),
        0.1: (0.0859, 0.0576, 0.0727),
        1.0: (0.0910, 0.0674, 0.0556),
        10.0: (0.0968, 0.0954, 0.0413),
    },
    "checkerboard": {
        0.0: (0.1563, 0.0607, 0.1649),
        0.1: (0.1067, 0.0734, 0.0846),
        1.0: (0.1069, 0.1075, 0.0594),
        10.0: (0.1818, 0.1793, 0.0459),
    },
}


def blob(n: int) -> Tensor:
    """Nine Gaussians on a diamond."""
    centers = [(-2, -2), (-2, 2), (2, -2), (2, 2), (0, 0), (4, 0), (-4, 0), (0, 4), (0, -4)]
    return 0.65 * (
        torch.tensor(centers, dtype=torch.float32)[torch.randint(9, (n,))] + 0.2**0.5 * torch.randn(n, 2)
    )


def circles(n: int) -> Tensor:
    """Two rings of Gaussian width."""
    radius = torch.tensor([0.65, 1.4])[torch.randint(2, (n,))] + 0.1 * torch.randn(n)
    angle = 2 * torch.pi * torch.rand(n)
    return 2 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)


def checkerboard(n: int) -> Tensor:
    """Eight squares of a board of sixteen, on [-3, 3]^2."""
    column, row = torch.randint(4, (n,)), torch.randint(2, (n,))
    corner = torch.stack([column, 2 * row + column % 2], -1)
    return 1.5 * (corner + torch.rand(n, 2)) - 3


DATA: dict[str, Sampler] = {"blob": blob, "circles": circles, "checkerboard": checkerboard}


class Fresh(sd.Objective):
    """An objective on new data in every step."""

    def __init__(self, inner: sd.Objective, draw: Callable[[], Tensor]) -> None:
        super().__init__()
        self.inner, self.draw = inner, draw

    def forward(self, batch: Any = None) -> sd.ObjectiveValue:
        """Evaluate the inner objective on a new batch."""
        return self.inner(self.draw())


def cosine(steps: int) -> Callable[..., Any]:
    """A learning rate that falls to zero along a quarter of a cosine."""
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Adam in one kernel."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def train(
    name: str, fp_weight: Any, steps: int, batch: int, width: int = 80, seed: int = 0, progress: bool = False
) -> tuple[ScoreMatching, float]:
    """Fit a potential of three layers; returns the objective and the processor seconds it took."""
    begin = time.process_time()
    torch.manual_seed(seed)
    draw = DATA[name]
    process = OU(horizon=4.0, start=5e-4)
    phi = PotentialNetwork.from_data(process, draw(200_000), width=width)
    diff = ScoreMatching(process, phi, fp_weight=fp_weight)
    sd.fit(
        Fresh(diff, lambda: draw(batch)),
        steps=steps,
        lr=4e-3,
        seed=seed,
        optimizer=adam,
        scheduler=cosine(steps),
        progress=progress,
    )
    return diff, time.process_time() - begin


def distances(name: str, rev: ReverseDiffusion, n: int, seed: int = 1) -> dict[str, float]:
    """Distances between truth, ODE and SDE by histograms of ``n`` points each, and of ten times as many of the truth."""
    torch.manual_seed(seed)
    truth = DATA[name](10 * n)
    ode = rev.sample(n, "ode", 50, batch_size=20_000)
    sde = rev.sample(n, "sde", 100, batch_size=20_000)
    return {
        "ode_truth": histogram_w2(ode, truth),
        "sde_truth": histogram_w2(sde, truth),
        "ode_sde": histogram_w2(ode, sde),
    }


def floors(name: str, n: int, seed: int = 2) -> dict[str, float]:
    """The same distances for points of the truth in place of both laws: what sampling alone amounts to."""
    torch.manual_seed(seed)
    first, second = DATA[name](n), DATA[name](n)
    return {"to_truth": histogram_w2(first, DATA[name](10 * n)), "of_pair": histogram_w2(first, second)}


def residual_on_data(name: str, diff: ScoreMatching, n: int = 20_000) -> float:
    """Mean squared residual a unit of log signal-to-noise ratio, on noised data."""
    torch.manual_seed(2)
    x0 = DATA[name](n)
    t = diff.draw_times(n, x0)
    x = diff.process.perturb(t, x0, torch.randn_like(x0))
    with torch.no_grad():
        r = diff.fokker_planck_residual(t, x)
    rate = diff.process.squared_diffusion(t) / (2 * diff.process.variance(t))
    return (r / rate.squeeze(-1)).square().mean().item()
