"""A trained prior in a Pyro model: NUTS with the noise as the random site beside NUTS through the density."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

import stochdyn as sd
from stochdyn.interpolants import (
    FieldNetwork,
    GaussianMixture,
    Interpolant,
    InterpolantGenerator,
    InterpolantRegression,
    WhitenedField,
)

__all__ = ["measure"]

SEEN, SCALE = torch.tensor([0.8, 0.9]), 0.5


def prior(kind: str, steps: int) -> InterpolantGenerator:
    """Train a flow of two modes in the plane."""
    torch.manual_seed(0)
    law = GaussianMixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.3 * torch.eye(2)
    )
    data, it = law.sample((4000,)), Interpolant("one-sided-linear")
    net = FieldNetwork(2) if kind == "FieldNetwork" else WhitenedField.from_data(it, "velocity", data)
    objective = InterpolantRegression(it, velocity=net)
    sd.fit(objective, data, steps=steps, batch_size=256, lr=3e-3, progress=False, seed=0)
    return objective.generator()


def programs(law: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the model with the point as the random site, and with its noise."""

    def density() -> None:
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, SCALE).to_event(1), obs=SEEN)

    def noise() -> None:
        x = law.noise_site("x")
        pyro.sample("y", dist.Normal(x, SCALE).to_event(1), obs=SEEN)

    return density, noise


def gradient_cost(programs: tuple[Callable[[], None], ...], count: int, rounds: int) -> list[float]:
    """Return the least processor time of a gradient of each program, in milliseconds, from interleaved blocks."""
    best = [float("inf")] * len(programs)
    ready = []
    for program in programs:
        start, potential, _, _ = initialize_model(program)
        ready.append((start, potential))
    for _ in range(rounds):
        for i, (start, potential) in enumerate(ready):
            clock = time.process_time()
            for _ in range(count):
                at = {k: v.detach().clone().requires_grad_() for k, v in start.items()}
                torch.autograd.grad(potential(at), list(at.values()))
            best[i] = min(best[i], (time.process_time() - clock) / count)
    return [1e3 * seconds for seconds in best]


def exact_moments(model: InterpolantGenerator, law: Any, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and deviations of the posterior under the trained prior, from weighted draws of the prior itself."""
    with torch.no_grad():
        x = law._carry(torch.randn(count, 2, generator=torch.Generator().manual_seed(1)), None)
    weight = torch.distributions.Normal(x, SCALE).log_prob(SEEN).sum(-1).softmax(0).unsqueeze(-1)
    mean = (weight * x).sum(0)
    return mean, (weight * (x - mean).square()).sum(0).sqrt()


def chain(program: Callable[[], None], law: Any, warmup: int, draws: int) -> dict[str, Any]:
    """Run a chain; the points, what it cost, and how many independent draws it is worth."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(program, max_tree_depth=5), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    clock = time.process_time()
    mcmc.run()
    cost = time.process_time() - clock
    found = mcmc.get_samples()
    with torch.no_grad():
        x = found["x"] if "x" in found else law._carry(found["x_noise"], None)
    size = float(pyro.ops.stats.effective_sample_size(x[None]).min()) if draws >= 4 else float(draws)
    return {
        "seconds": round(cost, 1), "effective": round(size, 1), "mean": x.mean(0).tolist(), "deviation": x.std(0).tolist(),
    }  # fmt: skip


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Measure gradients for two networks and some grids, and chains for one of them."""
    rows = []
    for kind in ("FieldNetwork", "WhitenedField"):
        model = prior(kind, steps)
        for method, num_steps in (("heun", 10), ("rk4", 10), ("rk4", 50)):
            law = model.distribution(num_steps, method)
            count = 1 if smoke else (4 if num_steps < 50 else 2)
            density, noise = gradient_cost(programs(law), count, 2 if smoke else 8)
            rows.append(
                {"network": kind, "method": method, "steps": num_steps, "density": density, "noise": noise,
                 "ratio": density / noise}
            )  # fmt: skip
            print(rows[-1], flush=True)
    model = prior("FieldNetwork", steps)
    law = model.distribution(10, "heun")
    mean, deviation = exact_moments(model, law, 1000 if smoke else 100_000)
    chains = {}
    for name, program in zip(("density", "noise"), programs(law), strict=True):
        chains[name] = chain(program, law, 2 if smoke else 100, 4 if smoke else 400)
        print(name, chains[name], flush=True)
    return {
        "gradients": rows, "chains": chains, "steps": steps, "exact": {"mean": mean.tolist(), "deviation": deviation.tolist()},
    }  # fmt: skip
