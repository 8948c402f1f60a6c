"""Three chaotic attractors reconstructed from noisy readings with gaps: a latent SDE beside a linear law and persistence.

    OMP_NUM_THREADS=1 python benchmarks/fractional/attractors.py [--only rossler] [--smoke]

A model sees 200 stretches of 50 readings, with errors of a tenth of a standard deviation and half of the values missing. Then it runs
freely from the end of stretches it hasn't seen, and the states that it visits and their spectra are compared with those of the true
system. Every result is added to ``results/attractors.json`` as soon as it is known, and training goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.core import SpectralDrift
from stochdyn.datasets import ChaoticSeries, lorenz63, lorenz96, rossler
from stochdyn.diagnostics import power_spectrum_distance, rmse, state_space_divergence
from stochdyn.fractional import GaussianDecoder, LatentSDE, MatchingMethod, Series, forecast

RESULTS = Path(__file__).parent / "results" / "attractors.json"
OBS_SCALE, SHARE, WINDOW, FINER = 0.1, 0.5, 50, 4
AHEAD, BANDWIDTH = 5, 5.0


@dataclass(frozen=True)
class System:
    """A system, the time between two readings, and how its states are counted."""

    make: Callable[..., ChaoticSeries]
    dt: float
    count_by: str
    read: int | None = None  # how many components are ever read, the first ones; None for all


SYSTEMS = {
    "lorenz63": System(lorenz63, 0.04, "bins"),
    "rossler": System(rossler, 0.2, "bins"),
    "lorenz96": System(lorenz96, 0.05, "mixture"),
    "lorenz63 without z": System(lorenz63, 0.04, "bins", 2),
}


@dataclass(frozen=True)
class Size:
    """How much is simulated and trained: stretches to learn from, paths that run freely, their steps, steps of training."""

    windows: int = 200
    paths: int = 20
    run: int = 1000
    lead: int = 100
    steps: int = 2000
    linear_steps: int = 200


SMOKE = Size(windows=8, paths=2, run=30, lead=2, steps=2, linear_steps=2)


class Data:
    """Readings and truth of one system, in units of its standard deviations."""

    def __init__(self, system: System, size: Size) -> None:
        self.times, self.read = system.dt * torch.arange(WINDOW), system.read
        seen = system.make(WINDOW * size.windows, system.dt, generator=0)
        self.center, self.unit = seen.x.mean(0), seen.x.std(0)
        self.train = self.windows(seen)
        length = WINDOW + AHEAD
        held = system.make(size.paths * length, system.dt, generator=1)
        states = self.scaled(held.x).unflatten(0, (-1, length))
        read = self.scaled(held.observe(OBS_SCALE, SHARE)).unflatten(0, (-1, length))
        self.held, self.ahead = Series.regular(self.times, read[:, :WINDOW]), states[:, WINDOW:]
        self.truth = [
            self.scaled(system.make(size.paths * size.run, system.dt, generator=k).x).unflatten(
                0, (-1, size.run)
            )
            for k in (2, 3)
        ]
        self.dim, self.velocity = seen.x.shape[-1], seen.velocity

    def scaled(self, x: Tensor) -> Tensor:
        """Return what may be read, in units of standard deviations, single precision."""
        return ((x - self.center) / self.unit).float()[..., : self.read]

    def windows(self, series: ChaoticSeries) -> Series:
        """Return readings, cut into stretches."""
        read = self.scaled(series.observe(OBS_SCALE, SHARE))
        return Series.regular(self.times, read.unflatten(0, (-1, WINDOW)))


def later(data: Data, count: int) -> Tensor:
    """Return the times of ``count`` readings after a stretch."""
    dt = float(data.times[1])
    return data.times[-1] + dt * torch.arange(1, count + 1)


# ------------------------------------------------------------------------------------------- the latent SDE


def latent_model(data: Data) -> LatentSDE:
    """Build a latent SDE on a grid four times as fine as the readings, in their coordinates if all components are read."""
    torch.manual_seed(0)
    seen = data.ahead.shape[-1]
    ts = torch.linspace(0, float(data.times[-1]), FINER * (WINDOW - 1) + 1)
    mean = nn.Identity() if seen == data.dim else nn.Linear(data.dim, seen)
    return LatentSDE(
        seen, data.dim, ts, noise="brownian", drift=(100, 100), decoder=GaussianDecoder(mean, seen, 0.2),
        posterior=MatchingMethod((64, 64), 64, num_times=5, method="heun"),
    )  # fmt: skip


def latent(data: Data, size: Size, checkpoint: Path | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Train, run freely and forecast; returns free paths, forecasts and what was learnt."""
    model = latent_model(data)
    sd.fit(
        model, data.train, steps=size.steps, lr=1e-2, batch_size=min(64, len(data.train)), clip_norm=100.0,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=size.steps + 1),
        checkpoint=checkpoint, resume=checkpoint is not None,
    )  # fmt: skip
    free = forecast(model, data.held, later(data, size.lead + size.run), 1, seed=0, noise=False)[0]
    near = forecast(model, data.held, later(data, AHEAD), 100, seed=0, noise=False).mean(0)
    found: dict[str, Any] = {
        "noise of the readings": model.decoder.obs_scale.tolist(),
        "diffusion": model.strength().tolist(),
    }
    if data.read is None:
        with torch.no_grad():
            x = data.truth[0].flatten(0, -2)[::7]
            right = data.velocity(x.double() * data.unit + data.center) / data.unit
            error = (model.sde.drift(data.times[0], x) - right).square().sum() / right.square().sum()
        found["relative error of the drift"] = float(error.sqrt())
    return free[:, size.lead :], near, found


# ------------------------------------------------------------------------------------------- the linear law


class Modes(sd.Objective):
    """Minus the exact log evidence of as many linear modes as the system has components, averaged over stretches."""

    def __init__(self, dim: int, seen: int, span: float) -> None:
        super().__init__()
        pairs = dim // 2
        rates = torch.full((dim - 2 * pairs,), 10 / span)
        frequencies = 2 * torch.pi / span * torch.logspace(0.3, 1, pairs)
        self.drift = SpectralDrift(rates, 3 / span * torch.ones(pairs), frequencies, learn=True)
        self.emission = nn.Parameter(torch.linalg.qr(torch.randn(dim, dim)).Q[:seen])
        self.log_scale = nn.Parameter(torch.full((seen,), 0.2).log())

    def arguments(self, series: Series) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return what the law is conditioned on: times, values, error, emission and mask."""
        return series.times[0], series.values, self.log_scale.exp(), self.emission, series.mask

    def forward(self, batch: Series) -> sd.ObjectiveValue:
        """Return minus the log evidence."""
        evidence = self.drift.law().log_evidence(*self.arguments(batch)).mean()
        return sd.ObjectiveValue(-evidence, {"elbo": evidence.detach()}, "evidence_lower")


def linear(data: Data, size: Size) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Fit linear modes by exact evidence; returns free paths, forecasts and what was learnt."""
    torch.manual_seed(0)
    objective = Modes(data.dim, data.ahead.shape[-1], float(data.times[-1]))
    sd.fit(objective, data.train, steps=size.linear_steps, lr=0.03, batch_size=min(64, len(data.train)))
    with torch.no_grad():
        law = objective.drift.law()
        ts = float(data.times[1]) * torch.arange(size.run)
        free = law.sample(ts, size.paths, generator=0).x @ objective.emission.mT
        known = law.conditioned(*objective.arguments(data.held))
        near = known.mean(later(data, AHEAD)) @ objective.emission.mT
    return free, near, {"eigenvalues": [str(v) for v in objective.drift.eigenvalues().tolist()]}


def persistence(data: Data, size: Size) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Hold the latest value of every component that was read."""
    seen = data.held.mask
    place = torch.arange(WINDOW)[:, None] * seen
    last = data.held.values.gather(1, place.amax(1, keepdim=True))
    return last.expand(-1, size.run, -1), last.expand(-1, AHEAD, -1), {}


def scores(data: Data, count_by: str, free: Tensor) -> dict[str, float]:
    """Return both distances of paths that run freely from the truth."""
    return {
        "state space divergence": float(state_space_divergence(data.truth[0], free, count_by)),
        "power spectrum distance": float(power_spectrum_distance(data.truth[0], free, BANDWIDTH)),
    }


def main() -> None:
    """Run every method on every system that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--checkpoints", type=Path, default=Path("outputs/attractors"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = SMOKE if options.smoke else Size()
    state = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for name in options.only:
        system, own = SYSTEMS[name], state.setdefault("systems", {}).setdefault(name, {})
        data = Data(system, size)
        folder = None if options.smoke else options.checkpoints / name
        methods: dict[str, Callable[[], tuple[Tensor, Tensor, dict[str, Any]]]] = {
            "truth": lambda d=data: (d.truth[1], d.ahead, {}),
            "persistence": lambda d=data: persistence(d, size),
            "linear": lambda d=data: linear(d, size),
            "latent": lambda d=data, f=folder: latent(d, size, f),
        }
        for method, run in methods.items():
            if method in own:
                continue
            start = time.process_time()
            free, near, found = run()
            own[method] = scores(data, system.count_by, free) | {
                f"error after {AHEAD} readings": float(rmse(near[:, -1], data.ahead[:, -1])),
                "seconds": round(time.process_time() - start, 1),
            } | found  # fmt: skip
            print(name, method, own[method], flush=True)
            state["machine"], state["steps"], state["count by"] = machine(), size.steps, {
                k: s.count_by for k, s in SYSTEMS.items()
            }  # fmt: skip
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
