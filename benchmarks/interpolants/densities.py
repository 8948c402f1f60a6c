"""How far models are from the data by their own densities, and how they are trained."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.interpolants import (
    Fields,
    Interpolant,
    InterpolantGenerator,
    InterpolantRegression,
    WhitenedField,
    kl_bound,
    optimal_epsilon,
)
from stochdyn.interpolants.sampling import Starts, standard_normal

PAIRS = (
    ("velocity", "noise_prediction"),
    ("velocity", "score"),
    ("path_velocity", "noise_prediction"),
    ("path_velocity", "score"),
)
LABEL = {"velocity": "b", "path_velocity": "path_velocity", "noise_prediction": "η", "score": "s"}


def learn(
    it: Interpolant, names: tuple[str, ...], x0: Tensor, x1: Tensor, steps: int, batch: int, **network: Any
) -> tuple[dict[str, nn.Module], float]:
    """Train fields side by side; returns their averaged networks and the processor time."""
    torch.manual_seed(0)
    nets = {name: WhitenedField.from_data(it, name, x1, x0, **network) for name in names}
    antithetic = it.has_latent or None
    objective = InterpolantRegression(it, **nets, antithetic=antithetic)  # type: ignore[arg-type]
    start = time.process_time()
    result = sd.fit(
        objective, (x0, x1), steps=steps, lr=2e-3, batch_size=batch, progress=False, ema=0.998,
        optimizer=lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True), clip_norm=100.0,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2e-3, steps, pct_start=0.1),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.copy_((result.ema or {})[name])
    return dict(nets), time.process_time() - start


#: The pairs that are trained side by side: together all four fields.
TRAINED = (PAIRS[0], PAIRS[3])


def learn_pairs(
    it: Interpolant,
    x0: Tensor,
    x1: Tensor,
    steps: int,
    batch: int,
    pairs: tuple[tuple[str, str], ...] = TRAINED,
    **network: Any,
) -> tuple[dict[str, nn.Module], list[float]]:
    """Train pairs of fields; returns networks and processor times."""
    nets: dict[str, nn.Module] = {}
    seconds = []
    for pair in pairs:
        made, spent = learn(it, pair, x0, x1, steps, batch, **network)
        nets |= made
        seconds.append(spent)
    return nets, seconds


def model_of(it: Interpolant, networks: dict[str, Any], dim: int) -> InterpolantGenerator:
    """Return the model of these fields, started in the standard normal."""
    return InterpolantGenerator(Fields(it, networks), Starts(standard_normal(dim)))


def contenders(
    it: Interpolant, truth: Any, nets: dict[str, nn.Module], dim: int
) -> dict[str, InterpolantGenerator]:
    """Return models of the exact fields and of every pair of fields that was learnt."""
    made = {
        "exact": model_of(it, {"velocity": truth.velocity, "noise_prediction": truth.noise_prediction}, dim)
    }
    for pair in PAIRS:
        if set(pair) <= set(nets):
            made[" and ".join(LABEL[k] for k in pair)] = model_of(it, {k: nets[k] for k in pair}, dim)
    return made


def levels(
    model: InterpolantGenerator,
    exact: InterpolantGenerator,
    held: tuple[Tensor, Tensor],
    fixed: tuple[float, ...],
) -> dict[str, Any]:
    """Return strengths of noise by name: some numbers, and for a learnt model the best of Girsanov's bound."""
    made: dict[str, Any] = {f"{number:g}": number for number in fixed}
    if model is not exact:
        made["optimal"] = optimal_epsilon(model, exact, *held, num_times=20)
    return made


def girsanov(
    model: InterpolantGenerator, exact: InterpolantGenerator, held: tuple[Tensor, Tensor], epsilon: Any
) -> float:
    """Return Girsanov's bound with the true fields, in nats."""
    return float(kl_bound(model, *held, epsilon, exact, num_times=20).mean)


def flow_kl(model: InterpolantGenerator, x: Tensor, log_prob: Tensor, steps: int) -> dict[str, float]:
    """Return KL(truth to flow) from points of the truth."""
    with torch.no_grad():
        gap = log_prob - model.log_prob(x, num_steps=steps, method="heun")
    return {"KL": float(gap.mean()), "stderr": float(gap.std() / len(gap) ** 0.5)}


def sde_kl(
    model: InterpolantGenerator, x: Tensor, log_prob: Tensor, epsilon: Any, steps: int, paths: int
) -> dict[str, float]:
    """Return an upper estimate of KL(truth to SDE) from weighted paths."""
    g = torch.Generator().manual_seed(7)
    weights = model.sde_log_prob(x, epsilon, steps, num_particles=paths, method="transition", generator=g)
    gap = log_prob - weights.log_prob
    return {
        "KL": float(gap.mean()),
        "stderr": float(gap.std() / len(gap) ** 0.5),
        "effective paths": float(weights.effective_size.mean()),
    }


def kernel_kl(x: Tensor, y: Tensor, points: int = 5000) -> dict[str, float]:
    """Return the paper's metric: kernel densities of the first two coordinates, KL by E[log r - (1/r - 1)]."""
    from scipy.stats import gaussian_kde

    p, q = (gaussian_kde(z[:, :2].double().numpy().T) for z in (x, y))
    at = x[:points, :2].double().numpy().T
    a, b = torch.from_numpy(p.logpdf(at)), torch.from_numpy(q.logpdf(at)).clamp(min=-700)
    terms = a - b - ((b - a).exp() - 1)
    return {"kernel KL": float(terms.mean()), "kernel stderr": float(terms.std() / len(terms) ** 0.5)}
