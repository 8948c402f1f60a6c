"""Flows that know their population, on populations that were never seen, beside flows that don't and trivial predictions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import invwishart
from torch import Tensor

import stochdyn as sd
from stochdyn.core.law.path import Estimate
from stochdyn.datasets import GaussianDenoising, drug_screen, letters
from stochdyn.interpolants import (
    FieldNetwork,
    GraphEncoder,
    KernelMeans,
    OwnUnits,
    PopulationGenerator,
    PopulationRegression,
    Populations,
    SampleEncoder,
    SetEncoder,
    Surroundings,
    compare_populations,
    population_baselines,
)

__all__ = ["measure"]


def train(
    data: Populations, encoder: SampleEncoder | None, steps: int, lr: float, batch_size: int, num_points: int,
    width: int, coupling: str = "paired", around: Surroundings | None = None,
) -> tuple[PopulationGenerator, dict[str, float]]:  # fmt: skip
    """Train a flow, and say what it cost."""
    torch.manual_seed(0)
    size = sum(0 if part is None else part.out for part in (encoder, around)) + data.treatment_dim
    objective = PopulationRegression(
        data.dim, encoder, coupling, around=around, treatment_dim=data.treatment_dim, num_points=num_points,
        velocity=FieldNetwork(data.dim, width=width, depth=3, condition_dim=size),
    )  # fmt: skip
    start = time.process_time()
    sd.fit(
        objective, data, steps=steps, batch_size=batch_size, lr=lr, progress=False, seed=0,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip
    return objective.generator(), {"processor seconds": round(time.process_time() - start, 1), "steps": steps}


# How the variances along the two axes of a population are drawn from a uniform number, and the log density that they have. Whether "a scale of
# 0.2 to 2" is one of variances or of widths makes a factor of four in the least error that there is.
READINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "variances log-uniform": (lambda u: 0.2 * 10**u, lambda v: -v.log(), (0.2, 2.0)),
    "widths log-uniform": (lambda u: (0.2 * 10**u).square(), lambda v: -v.log(), (0.04, 4.0)),
}


def gaussian_laws(reading: str, count: int, generator: torch.Generator) -> list[GaussianDenoising]:
    """Random Gaussian populations in the plane: means in [-2, 2], axes turned at random, scales of 0.2 to 2, noise of 0.5."""
    variances, laws = READINGS[reading][0], []
    for _ in range(count):
        mean = 4 * torch.rand(2, generator=generator) - 2
        turn = torch.linalg.qr(torch.randn(2, 2, generator=generator))[0]
        root = turn * variances(torch.rand(2, generator=generator)).sqrt()
        laws.append(GaussianDenoising(mean.tolist(), (root @ root.mT).tolist()))
    return laws


FIRST = next(iter(READINGS))
TIMES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)


def least_error(
    reading: str, laws: list[GaussianDenoising], count: int, generator: torch.Generator, num_draws: int = 3000
) -> Tensor:
    """Return the error of the best possible field, law by law: that of the posterior mean, given ``count`` points and how laws are drawn.

    Under a flat prior the posterior of mean and covariance is normal-inverse-Wishart; its draws are weighted by the true prior. The density
    of the covariance is that of its eigenvalues over their distance.
    """
    _, log_prior, (low, high) = READINGS[reading]
    random = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    errors = []
    for law in laws:
        y = law.sample(count, generator)[0].double()
        mean = y.mean(0)
        scatter = ((y - mean).mT @ (y - mean)).numpy()
        noisy = torch.as_tensor(invwishart.rvs(count - 4, scatter, num_draws, random_state=random))
        normal = torch.as_tensor(random.standard_normal((num_draws, 2, 1)))
        means = mean + (torch.linalg.cholesky(noisy / count) @ normal)[..., 0]
        variances = torch.linalg.eigvalsh(noisy) - law.obs_scale**2
        inside = ((variances > low) & (variances < high)).all(-1) & (means.abs() < 2).all(-1)
        means, variances = means[inside], variances[inside]
        weights = (log_prior(variances).sum(-1) - (variances[:, 1] - variances[:, 0]).log()).softmax(0)
        clean = noisy[inside] - law.obs_scale**2 * torch.eye(2, dtype=torch.float64)
        each = []
        for t in TIMES:
            x = torch.lerp(*law.sample(60, generator), t).double()
            left = (1 - t) * law.obs_scale
            precision = torch.linalg.inv(clean + left**2 * torch.eye(2, dtype=torch.float64))
            field = -left * law.obs_scale * torch.einsum("kij,knj->kni", precision, x - means[:, None])
            off = torch.einsum("k,kni->ni", weights, field) - law.velocity(t, x)
            each.append(off.square().sum(-1).mean())
        errors.append(torch.stack(each).mean())
    return torch.stack(errors)


def field_error(
    model: PopulationGenerator, laws: list[GaussianDenoising], count: int, generator: torch.Generator
) -> Tensor:
    """Return the mean squared error of the velocity on the path, law by law, knowing ``count`` points."""
    errors = []
    for law in laws:
        x0, x1 = law.sample(2000, generator)
        known = law.sample(count, generator)[0]
        each = []
        for t in TIMES:
            x = torch.lerp(x0, x1, t)
            with torch.no_grad():
                off = model.velocity(t, x, population=known) - law.velocity(t, x.double())
            each.append(off.square().sum(-1).mean())
        errors.append(torch.stack(each).mean())
    return torch.stack(errors)


def gaussians(smoke: bool, steps: int) -> dict[str, Any]:
    """Measure the error of the field on unseen Gaussian populations, for two laws of populations, beside the least that there is."""
    rows = []
    for reading in READINGS:
        g = torch.Generator().manual_seed(0)
        laws, unseen = (
            gaussian_laws(reading, 20 if smoke else 200, g),
            gaussian_laws(reading, 4 if smoke else 20, g),
        )
        pairs = [law.sample(500, g) for law in laws]
        data = Populations([a for a, _ in pairs], [b for _, b in pairs])
        torch.manual_seed(1)
        models: list[tuple[str, SampleEncoder | None, OwnUnits | None]] = [
            ("blind", None, None),
            ("means of features", SetEncoder(2, moments=False), None),
            ("with moments", SetEncoder(2), None),
            ("with moments and own units", SetEncoder(2), OwnUnits(2)),
        ]
        # of the other law the best alone
        for name, encoder, around in models if reading == FIRST else models[-1:]:
            torch.manual_seed(1)
            model, cost = train(data, encoder, steps, 3e-3, 20, 128, 64, around=around)
            error = {n: field_error(model, unseen, n, torch.Generator().manual_seed(7)) for n in KNOWN}
            rows.append({"law": reading, "model": name, **_errors(error), **cost})
        # over other populations, many of them, so that it has an error of its own
        many = gaussian_laws(reading, 4 if smoke else 60, torch.Generator().manual_seed(8))
        least = {n: least_error(reading, many, n, torch.Generator().manual_seed(9)) for n in KNOWN}
        same = {n: least_error(reading, unseen, n, torch.Generator().manual_seed(9)) for n in KNOWN}
        rows.append({"law": reading, "model": "least possible, these twenty", **_errors(same)})
        rows.append({"law": reading, "model": "least possible, 60 others", **_errors(least)})
    return {"rows": rows}


KNOWN = (32, 128, 2000)


def _errors(found: dict[int, Tensor]) -> dict[str, dict[int, float]]:
    """Return means over populations and their standard errors, by the number of points known."""
    each = {n: Estimate.of(values.double()) for n, values in found.items()}
    return {
        "error": {n: float(e.mean) for n, e in each.items()},
        "stderr": {n: float(e.stderr) for n, e in each.items()},
    }


def rotated(angle: float) -> GaussianDenoising:
    """A Gaussian of variances 1 and 0.05, turned."""
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    cov = turn @ torch.diag(torch.tensor([1.0, 0.05], dtype=torch.float64)) @ turn.mT
    return GaussianDenoising([0.0, 0.0], cov)


def gaussian_w2(x: Tensor, law: GaussianDenoising) -> float:
    """Return the transport distance between the Gaussian with the moments of points and a law."""
    x = x.double()
    values, vectors = torch.linalg.eigh(law.cov)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.mT
    cov = torch.cov(x.mT)
    cross = torch.linalg.eigvalsh(root @ cov @ root).clamp(min=0).sqrt().sum()
    square = (x.mean(0) - law.mean).square().sum() + cov.trace() + law.cov.trace() - 2 * cross
    return float(square.clamp(min=0).sqrt())


def turned(smoke: bool, steps: int) -> dict[str, Any]:
    """Measure what becomes of turned Gaussians, for which the best field that is blind to the turn is far off."""
    g = torch.Generator().manual_seed(0)
    angles = (math.pi * torch.rand(20 if smoke else 200, generator=g)).tolist()
    pairs = [rotated(a).sample(500, g) for a in angles]
    data = Populations([a for a, _ in pairs], [b for _, b in pairs])
    rows = []
    for name, encoder in (("blind", None), ("with moments", SetEncoder(2))):
        torch.manual_seed(1)
        model, cost = train(data, encoder, steps, 3e-3, 20, 64, 64)
        distances = {}
        for angle in (0.0, 0.7, 1.9):
            x0 = rotated(angle).sample(4000, torch.Generator().manual_seed(3))[0]
            distances[angle] = gaussian_w2(model.sample(x0, 20), rotated(angle))
        rows.append({"model": name, "w2": distances, **cost})
    x0 = rotated(0.0).sample(4000, torch.Generator().manual_seed(3))[0]
    rows.append({"model": "identity", "w2": {0.0: gaussian_w2(x0, rotated(0.0))}})
    return {"rows": rows}


def spelled(smoke: bool, steps: int) -> dict[str, Any]:
    """Measure the transport distance W1 of denoised letters from clean ones: seen letters, and two that never were.

    Every flow has at most 100 processor seconds.
    """
    count = 2 if smoke else 40
    names = "ABCDEFGHIJKLMNOPQRSTUVWZ"
    seen = letters(names, count, generator=0)
    data = Populations(seen.starts, seen.targets)
    tests = {
        "seen": letters(names, 1, size=400, generator=11),
        "X": letters("X", 3 if smoke else 10, size=400, generator=12),
        "Y": letters("Y", 3 if smoke else 10, size=400, generator=13),
    }
    models = {}
    # what lies around a point costs twice the time of a step
    cases: list[tuple[str, SampleEncoder | None, KernelMeans | None, int]] = [
        ("blind", None, None, steps),
        ("set and what lies around", SetEncoder(2, width=64, out=32), KernelMeans(2), steps // 2),
        ("set", SetEncoder(2, width=64, out=32), None, steps),
        ("graph", GraphEncoder(2, width=32, out=32), None, steps),
    ]
    for name, encoder, around, number in cases:
        torch.manual_seed(1)
        models[name] = train(data, encoder, number, 2e-3, 10, 256, 128, around=around)
    rows = []
    for part, clouds in tests.items():
        predicted: dict[str, list[Tensor]] = {
            name: [model.sample(x, 20) for x in clouds.starts] for name, (model, _) in models.items()
        }
        base = [population_baselines(data, x) for x in clouds.starts]
        predicted |= {name: [b[name] for b in base] for name in base[0]}
        # against the clean cloud that the noise was added to, of the same size, as the published metric is
        distances = {
            name: torch.tensor(
                [sd.diagnostics.emd(a[: len(b)], b, 1) for a, b in zip(group, clouds.targets, strict=True)],
                dtype=torch.float64,
            )
            for name, group in predicted.items()
        }
        for name, values in distances.items():
            own, gain = Estimate.of(values), Estimate.of(values - distances["blind"])
            paired = "" if name == "blind" else f"{float(gain.mean):+.4f} ± {float(gain.stderr):.4f}"
            rows.append(
                {
                    "part": part, "model": name, "distance": float(own.mean), "stderr": float(own.stderr),
                    "against blind": paired,
                }
            )  # fmt: skip
    return {
        "rows": rows, "cost": {name: cost for name, (_, cost) in models.items()}, "count": count, "steps": steps,
        "metric": "W1",
    }  # fmt: skip


def screened(smoke: bool, steps: int) -> dict[str, Any]:
    """Measure held-out patients under treatments that others had, with cells that aren't paired."""
    screen = drug_screen(8 if smoke else 60, 3, 300)
    held = screen.subject >= (6 if smoke else 48)
    known, rest = (mask.nonzero().squeeze(-1).tolist() for mask in (~held, held))
    data = Populations(
        [screen.starts[i] for i in known], [screen.targets[i] for i in known], screen.treatments[known]
    )
    predicted: dict[str, list[Tensor]] = {}
    costs = {}
    for name, encoder in (("blind", None), ("set", SetEncoder(4))):
        torch.manual_seed(1)
        model, costs[name] = train(data, encoder, steps, 3e-3, 16, 64, 64, coupling="ot")
        predicted[name] = [model.sample(screen.starts[i], 20, treatment=screen.treatments[i]) for i in rest]
    base = [population_baselines(data, screen.starts[i], screen.treatments[i]) for i in rest]
    predicted |= {name: [b[name] for b in base] for name in base[0]}
    target = [screen.targets[i] for i in rest]
    found = {name: compare_populations(group, target) for name, group in predicted.items()}
    rows = []
    for name, result in found.items():
        gain = result.minus(found["blind"])
        rows.append(
            {
                "model": name, "distance": float(result.distance.mean), "floor": float(result.floor.mean),
                "excess": float(result.excess.mean), "interval": result.interval(),
                "against blind": {"mean": float(gain.mean), "stderr": float(gain.stderr)},
            }
        )  # fmt: skip
    return {"rows": rows, "cost": costs}


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Measure all four families."""
    return {
        "gaussians": gaussians(smoke, 20 if smoke else 2500),
        "rotated": turned(smoke, 20 if smoke else 1000),
        "letters": spelled(smoke, 20 if smoke else 2400),
        "drug screen": screened(smoke, 20 if smoke else 1000),
    }
