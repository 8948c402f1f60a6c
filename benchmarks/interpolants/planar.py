"""Three data sets in the plane, and the laws that a learned score makes of them, by histogram distances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from laws_2d import BINS, BOUND, Gaussian2d, Score, histogram_distance, ode_histogram, sde_histogram
from torch import Tensor

import stochdyn as sd
from stochdyn.interpolants import OU, AffineProcess, NoisedMixture, PotentialNetwork, ScoreMatching

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


CENTERS = [
    (-2.0, -2.0),
    (-2.0, 2.0),
    (2.0, -2.0),
    (2.0, 2.0),
    (0.0, 0.0),
    (4.0, 0.0),
    (-4.0, 0.0),
    (0.0, 4.0),
    (0.0, -4.0),
]


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


def make(name: str, fp_weight: float, width: int = 80, seed: int = 0) -> ScoreMatching:
    """An untrained potential of three layers in its objective."""
    torch.manual_seed(seed)
    process = OU(horizon=4.0, start=5e-4)
    phi = PotentialNetwork.from_data(process, DATA[name](200_000), width=width)
    return ScoreMatching(process, phi, fp_weight=fp_weight)


def train(
    name: str,
    diff: ScoreMatching,
    steps: int,
    batch: int,
    folder: Path | None = None,
    until: int | None = None,
) -> int:
    """Train for ``steps``, or up to ``until`` of them, continuing from the folder; returns where it stands."""
    fresh = Fresh(diff, lambda: DATA[name](batch))
    until = steps if until is None else min(until, steps)
    sd.fit(
        fresh,
        steps=until,
        lr=4e-3,
        optimizer=adam,
        scheduler=cosine(steps),
        progress=False,
        checkpoint=folder,
        resume=folder is not None,
        checkpoint_every=steps,
    )
    return until


def prior_of(diff: ScoreMatching) -> Gaussian2d:
    """The normal law that sampling starts from."""
    base = diff.generator().prior.base_dist
    return Gaussian2d(base.loc, base.scale)


def blob_truth(process: AffineProcess) -> NoisedMixture:
    """The exact marginals of the nine Gaussians."""
    return NoisedMixture(
        process, torch.ones(9), 0.65 * torch.tensor(CENTERS), torch.full((9,), 0.65**2 * 0.2)
    )


def horizon_law(truth: NoisedMixture) -> Gaussian2d:
    """The normal law with the moments of centred data at the horizon."""
    t, process = torch.tensor(truth.process.horizon), truth.process
    variance = truth.means.square().mean(0) + truth.eigenvalues.mean(0)
    return Gaussian2d(torch.zeros(2), (process.scale(t).square() * variance + process.variance(t)).sqrt())


def distances(
    truth: np.ndarray, process: AffineProcess, score: Score, prior: Gaussian2d, smoke: bool = False
) -> dict[str, float]:
    """Distances between truth, ODE and SDE."""
    ode = ode_histogram(process, score, prior, *((8, 5) if smoke else (16, 80)))
    sde = sde_histogram(process, score, prior, 3 if smoke else 120)
    return {
        "ode_truth": histogram_distance(ode, truth),
        "sde_truth": histogram_distance(sde, truth),
        "ode_sde": histogram_distance(ode, sde),
    }


def true_histogram(name: str, draws: int = 60) -> np.ndarray:
    """Histogram of the data: in closed form for the Gaussians, else of many million points."""
    edges = torch.linspace(-BOUND, BOUND, BINS + 1, dtype=torch.float64)
    if name == "blob":
        spread = 0.65 * 0.2**0.5
        mass = torch.special.ndtr((edges[:, None, None] - 0.65 * torch.tensor(CENTERS)) / spread).diff(dim=0)
        return torch.einsum("ik,jk->ij", mass[..., 0], mass[..., 1]).numpy() / len(CENTERS)
    torch.manual_seed(0)
    total = sum(torch.histogramdd(DATA[name](1_000_000).double(), [edges, edges]).hist for _ in range(draws))
    return (total / total.sum()).numpy()  # type: ignore[union-attr]


def floors(name: str, truth: np.ndarray, points: int = 3_000_000) -> dict[str, float]:
    """What sampling alone amounts to at the published number of points: to the truth, and of a pair."""
    torch.manual_seed(1)
    edges = torch.linspace(-BOUND, BOUND, BINS + 1, dtype=torch.float64)
    pair = [torch.histogramdd(DATA[name](points).double(), [edges, edges]).hist.numpy() for _ in range(2)]
    return {"to_truth": histogram_distance(pair[0], truth), "of_pair": histogram_distance(*pair)}


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
