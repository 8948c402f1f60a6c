"""Double well with fractional noise: posteriors of the path against a particle smoother.

    OMP_NUM_THREADS=1 python benchmarks/fractional/double_well.py

dX = 4 X (1 - X^2) dt + 0.6 dB^H from X(0) = -1 on [0, 4] with 200 Euler steps, observed at eight times with noise of standard
deviation 0.3. The reference is a bootstrap particle smoother in the space of path and memory states: several runs of 10^5
particles, pooled by their evidence, since the ancestors of one run are too few where the path changes wells.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import machine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import stochdyn as sd
from stochdyn.core import increment_scale, step_everywhere
from stochdyn.fractional import GaussianELBO, GaussianPosterior, MarkovNoise
from stochdyn.infer import AutoPathGuide, sample_path

RESULTS = Path(__file__).parent / "results" / "double_well.json"
STEPS, HORIZON, NOISE, STRENGTH = 200, 4.0, 0.3, 0.6
SEEN = torch.arange(25, STEPS + 1, 25)


def drift(t: Tensor, x: Tensor) -> Tensor:
    """Return the force of a double well with minima at -1 and 1."""
    return 4 * x * (1 - x**2)


def problem(hurst: float) -> tuple[sd.SDE, Tensor, Tensor, Tensor, Tensor]:
    """Return equation, start, grid, true path and observations (a path that changes wells)."""
    noise = MarkovNoise(hurst, None, HORIZON, HORIZON / STEPS)
    sde = sd.SDE(drift, STRENGTH, noise)
    ts = torch.linspace(0, HORIZON, STEPS + 1, dtype=torch.float64)
    x0 = torch.tensor([-1.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    paths = sd.DiffusionMeasure(x0, sde).sample(ts, (500,), g).x[..., 0]
    crossed = (paths[:, SEEN] > 0.5).sum(1)
    truth = paths[int((crossed - len(SEEN) // 2).abs().argmin())]
    return sde, x0, ts, truth, truth[SEEN] + NOISE * torch.randn(len(SEEN), generator=g, dtype=torch.float64)


def particle_smoother(
    sde: sd.SDE, x0: Tensor, ts: Tensor, y: Tensor, count: int, seed: int
) -> tuple[Tensor, Tensor, float]:
    """Return smoothed means and standard deviations ``(T,)`` and the log evidence."""
    g = torch.Generator().manual_seed(seed)
    states = sde.noise.num_states
    z = torch.cat([x0.expand(count, 1), x0.new_zeros(count, states)], -1)
    scale = increment_scale(sde, ts, 1, torch.float64)
    history = x0.new_empty(len(ts), count)
    history[0] = z[:, 0]
    log_evidence, place = 0.0, 0
    seen = {int(i): j for j, i in enumerate(SEEN)}
    for n in range(len(ts) - 1):
        e = scale[n] * torch.randn(count, scale.shape[1], generator=g, dtype=torch.float64)
        z = step_everywhere(sde, ts[n : n + 2], z[None], e[None])[0]
        history[n + 1] = z[:, 0]
        if n + 1 in seen:
            place = seen[n + 1]
            log_weight = dist.Normal(z[:, 0], NOISE).log_prob(y[place])
            log_evidence += float(torch.logsumexp(log_weight, 0)) - math.log(count)
            cumulative = torch.softmax(log_weight, 0).cumsum(0)
            points = (
                torch.arange(count, dtype=torch.float64) + torch.rand(1, generator=g, dtype=torch.float64)
            ) / count
            keep = torch.searchsorted(cumulative, points).clamp_max(count - 1)
            z = z[keep]
            history[: n + 2] = history[: n + 2, keep]
    return history.mean(1), history.std(1), log_evidence


def pooled(runs: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """Return independent smoothers as one, each with the weight of its evidence."""
    means, stds, evidence = zip(*runs, strict=True)
    logs = torch.tensor(evidence, dtype=torch.float64)
    w = torch.softmax(logs, 0)[:, None]
    mean = (w * torch.stack(means)).sum(0)
    second = (w * (torch.stack(stds).square() + torch.stack(means).square())).sum(0)
    log_evidence = float(torch.logsumexp(logs, 0)) - math.log(len(runs))
    return mean, (second - mean.square()).clamp_min(0).sqrt(), log_evidence


def weighted(x: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``(T,)`` of weighted paths ``(n, T)``."""
    w = torch.softmax(log_weight, 0)[:, None]
    mean = (w * x).sum(0)
    return mean, (w * (x - mean) ** 2).sum(0).sqrt()


def compare(mean: Tensor, std: Tensor, reference: tuple[Tensor, Tensor, float]) -> dict[str, float]:
    """Return errors against the smoother, away from the fixed start."""
    away = slice(10, None)
    return {
        "largest error of the mean, in posterior sd": float(
            ((mean - reference[0]).abs() / reference[1])[away].max()
        ),
        "mean error of the mean, in posterior sd": float(
            ((mean - reference[0]).abs() / reference[1])[away].mean()
        ),
        "mean relative error of the sd": float((std / reference[1] - 1).abs()[away].mean()),
    }


def gaussian(sde: sd.SDE, x0: Tensor, ts: Tensor, y: Tensor, steps: int, reference: Any) -> dict[str, Any]:
    """Fit posterior (c), whose steps are cheap: five times as many."""
    steps, lr = 5 * steps, 0.02
    torch.manual_seed(0)
    objective = GaussianELBO(
        GaussianPosterior(sd.DiffusionMeasure(x0, sde), ts),
        sd.GaussianObservations(ts, ts[SEEN], y, NOISE),
        16,
    )
    objective.posterior.linearise(objective.likelihood)
    begin = time.process_time()
    sd.fit(
        objective, steps=steps, lr=lr, progress=False, clip_norm=10.0,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, lr, steps, pct_start=0.1),
    )  # fmt: skip
    seconds = time.process_time() - begin
    with torch.no_grad():
        torch.manual_seed(1)
        path, log_ratio = objective.posterior.sample(20000)
        log_weight = objective.likelihood(path) + log_ratio
        plain = compare(objective.posterior.mean[:, 0], objective.posterior.variance[:, 0].sqrt(), reference)
        corrected = compare(*weighted(path.x[..., 0], log_weight), reference)
    return {
        "posterior": "Gaussian (c)",
        "steps": steps,
        "seconds": seconds,
        "elbo": float(log_weight.mean()),
        "importance-weighted evidence": float(torch.logsumexp(log_weight, 0)) - math.log(20000),
        **plain,
        "after importance weighting": corrected,
    }


def simulated(sde: sd.SDE, x0: Tensor, ts: Tensor, y: Tensor, steps: int, reference: Any) -> dict[str, Any]:
    """Fit posterior (b): linear feedback, free covariances and a control network, simulated."""

    def model() -> None:
        x = sample_path("x", sde, x0, ts)
        pyro.sample("y", dist.Normal(x[..., SEEN, 0], NOISE).to_event(1), obs=y)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoPathGuide(model, hidden=(32, 32))
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.1 ** (1 / steps)}), elbo)
    begin = time.process_time()
    for _ in range(steps):
        svi.step()
    seconds = time.process_time() - begin
    with torch.no_grad(), pyro.plate("draws", 20000):
        drawn = pyro.poutine.trace(guide).get_trace()
        replayed = pyro.poutine.trace(pyro.poutine.replay(model, drawn)).get_trace()
        replayed.compute_log_prob()
        drawn.compute_log_prob()
    log_weight = sum(replayed.nodes[n]["log_prob"] for n in ("x_dw", "y")) - drawn.nodes["x_dw"]["log_prob"]
    x = replayed.nodes["x"]["value"][..., 0]
    return {
        "posterior": "simulated, tight (b)",
        "steps": steps,
        "seconds": seconds,
        "elbo": float(log_weight.mean()),
        "importance-weighted evidence": float(torch.logsumexp(log_weight, 0)) - math.log(20000),
        **compare(x.mean(0), x.std(0), reference),
        "after importance weighting": compare(*weighted(x, log_weight), reference),
    }


def main() -> None:
    """Run both posteriors and the smoother."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--hurst", type=float, nargs="*", default=[0.3, 0.7])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=int, default=16, help="smoothers, an even number")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, steps, runs = (2000, 3, 2) if options.smoke else (100_000, options.steps, options.runs)
    rows = []
    for hurst in options.hurst[:1] if options.smoke else options.hurst:
        sde, x0, ts, truth, y = problem(hurst)
        begin = time.process_time()
        smoothers = [particle_smoother(sde, x0, ts, y, count, seed) for seed in range(runs)]
        halves = [pooled(smoothers[i::2]) for i in range(2)]
        reference = pooled(smoothers)
        row: dict[str, Any] = {
            "hurst": hurst,
            "particles": count,
            "runs": runs,
            "evidence": [half[2] for half in halves],
            "seconds of the smoother": time.process_time() - begin,
            "two single runs": compare(*smoothers[1][:2], smoothers[0]),
            "smoother against itself": compare(*halves[1][:2], halves[0]),
            "root mean square error of the smoothed mean": float(
                (reference[0] - truth).square().mean().sqrt()
            ),
        }
        row["posteriors"] = [f(sde, x0, ts, y, steps, reference) for f in (gaussian, simulated)]
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
    out = options.out or (None if options.smoke else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({"machine": machine("torchsde", "pyro-ppl", "jax", "diffrax"), "rows": rows}, indent=1)
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
