"""The bridge experiment: posteriors of X given X(2) = 0, against the exact law of unit fractional Brownian motion.

    OMP_NUM_THREADS=1 python benchmarks/fractional/bridge.py

X starts at 0, dX = -theta X dt + dB^H, and X(2) = 0 is observed with standard deviation 0.1. Beside the library's
setting stands that of Daems et al. (2024): five states between 0.05 and 20 tuned for a horizon of 6, weights of the
unnormalised process, 200 Euler steps, and a control that shares the prior's diffusion, here at the optimum that no
training can pass.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import machine
from exact_bridge import exact_bridge

import stochdyn as sd
from stochdyn.fractional import (
    AffineDrift,
    GaussianELBO,
    GaussianPosterior,
    MarkovNoise,
    geometric_speeds,
    optimal_weights,
    variance_constant,
)

RESULTS = Path(__file__).parent / "results" / "bridge.json"
END, SCALE, STEPS = 2.0, 0.1, 200
AT = [0.5, 1.0, 1.5]


def objective(hurst: float, theta: float, kind: str, steps: int) -> GaussianELBO:
    """Build prior, data and a Gaussian posterior that starts at the prior."""
    noise = MarkovNoise(hurst, horizon=END, dt=END / steps, kind=kind)
    ts = torch.linspace(0, END, steps + 1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    prior = sd.DiffusionMeasure(
        zero, sd.SDE(AffineDrift(-theta * torch.eye(1, dtype=torch.float64)), 1.0, noise)
    )
    return GaussianELBO(GaussianPosterior(prior, ts), sd.GaussianObservations(ts, ts[-1:], zero, SCALE))


def summary(value: GaussianELBO, steps: int) -> tuple[list[float], float]:
    """Return standard deviations at a quarter, half and three quarters, and the bound."""
    with torch.no_grad():
        std = value.posterior.variance.sqrt()[:, 0]
        return [float(std[i * steps // 4]) for i in (1, 2, 3)], float(value(None).terms["elbo"])


def library(hurst: float, theta: float, kind: str, train: int = 0) -> tuple[list[float], float]:
    """Return the answers of the Gaussian posterior: linearised, or trained from the prior for ``train`` steps."""
    value = objective(hurst, theta, kind, STEPS)
    if train:
        sd.fit(
            value,
            steps=train,
            lr=0.03,
            progress=False,
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.01 ** (1 / train)),
        )
    else:
        value.posterior.linearise(value.likelihood)
    return summary(value, STEPS)


def published_setting(hurst: float, theta: float) -> tuple[list[float], float]:
    """Return the same for the optimum of a control that shares the diffusion, under an Euler scheme."""
    speeds = geometric_speeds(5, 0.05, 20.0)
    w = optimal_weights(hurst, speeds, 6.0, "I")[0] * variance_constant(torch.tensor(hurst), "I").sqrt()
    dt, size = END / STEPS, 6
    move = torch.zeros(size, size, dtype=torch.float64)
    move[0, 0] = 1 - theta * dt
    move[0, 1:] = -w * speeds * dt
    move[1:, 1:] = torch.diag(1 - speeds * dt)
    kick = torch.cat([w.sum()[None], torch.ones(5, dtype=torch.float64)])
    # response of X(T) to a state, and to a kick, from each step on
    rows = [torch.eye(size, dtype=torch.float64)[0]]
    for _ in range(STEPS):
        rows.append(rows[-1] @ move)
    rows = rows[::-1]
    h = torch.stack([rows[n + 1] @ kick for n in range(STEPS)])
    later = SCALE**2 + dt * (h**2).flip(0).cumsum(0).flip(0) - dt * h**2
    rho = h**2 * dt / later
    cov = torch.zeros(size, size, dtype=torch.float64)
    cov[1:, 1:] = 1 / (speeds[:, None] + speeds[None, :])
    # the law of the past of the noise given the data is free in this family
    seen = cov @ rows[0]
    total = rows[0] @ seen + later[0] + h[0] ** 2 * dt
    cov = cov - torch.outer(seen, seen) / total
    std = []
    for n in range(STEPS):
        if n in (STEPS // 4, STEPS // 2, 3 * STEPS // 4):
            std.append(math.sqrt(cov[0, 0]))
        feedback = -torch.outer(kick, rows[n]) * h[n] * dt / (later[n] + h[n] ** 2 * dt)
        cov = (move + feedback) @ cov @ (move + feedback).T + dt * torch.outer(kick, kick)
    bound = -0.5 * math.log(2 * math.pi * total) - 0.5 * float((rho - torch.log1p(rho)).sum())
    return std, bound


def main() -> None:
    """Run all settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--theta", type=float, nargs="*", default=[0.0, 1.0, 2.0], help="other rates in the file are kept"
    )
    parser.add_argument(
        "--train", type=int, default=2000, help="steps of training from the prior; 0 leaves it out"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", sd.errors.ApproximationWarning)
    start = time.process_time()
    hursts = [0.3, 0.7] if options.smoke else [round(0.1 * i, 1) for i in range(1, 10)]
    rows: list[dict[str, Any]] = []
    for theta in options.theta:
        for hurst in hursts:
            for kind in ("I", "II"):
                std, evidence = exact_bridge(
                    hurst, theta, kind, AT, END, 0.0, SCALE, 200 if options.smoke else 1200
                )
                mine, bound = library(hurst, theta, kind)
                row = {
                    "theta": theta,
                    "hurst": hurst,
                    "kind": kind,
                    "exact std": std,
                    "exact evidence": float(evidence),
                    "std": mine,
                    "elbo": bound,
                    "worst relative error of std": max(
                        abs(a / b - 1) for a, b in zip(mine, std, strict=True)
                    ),
                    "elbo less evidence": bound - float(evidence),
                }
                if kind == "I":
                    theirs, other = published_setting(hurst, theta)
                    row |= {
                        "published setting std": theirs,
                        "published setting elbo": other,
                        "published setting worst relative error of std": max(
                            abs(a / b - 1) for a, b in zip(theirs, std, strict=True)
                        ),
                    }
                rows.append(row)
            print(theta, hurst, [round(r["worst relative error of std"], 4) for r in rows[-2:]], flush=True)
    trained: list[dict[str, Any]] = []
    for hurst, theta in ((0.3, 1.0), (0.7, 1.0)) if options.train else ():
        steps = 20 if options.smoke else options.train
        linearised, trained_to = library(hurst, theta, "II"), library(hurst, theta, "II", steps)
        trained.append(
            {
                "hurst": hurst,
                "theta": theta,
                "kind": "II",
                "steps": steps,
                "elbo linearised": linearised[1],
                "elbo trained from the prior": trained_to[1],
            }
        )
        print(trained[-1], flush=True)
    out = options.out or (None if options.smoke else RESULTS)
    known = (
        json.loads(out.read_text(encoding="utf-8"))
        if out is not None and out.exists()
        else {"rows": [], "trained": []}
    )
    rows = [r for r in known["rows"] if r["theta"] not in options.theta] + rows
    report = {
        "machine": machine("torchsde", "pyro-ppl", "jax", "diffrax"),
        "seconds of the last run": round(time.process_time() - start, 1),
        "steps": STEPS,
        "rows": rows,
        "trained": trained or known["trained"],
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
