"""Forecast an oscillation from readings at irregular times, by a linear law of damped modes with exact evidence.

    python examples/mode_forecast.py

A noisy van der Pol oscillator is read at random times. What it does is nonlinear in its state, but nearly linear in a few modes: a
fundamental and its harmonics. Their rates and frequencies are fitted by exact evidence, and forecasts with intervals follow in closed
form. It prints scores beside persistence and a relaxing process without oscillations, and draws the forecast to
``outputs/mode_forecast.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.signal import lombscargle
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.core import SpectralDrift


class Modes(sd.Objective):
    """Minus the exact log evidence of a sum of modes."""

    def __init__(self, times: Tensor, y: Tensor, frequencies: Tensor) -> None:
        super().__init__()
        unit = 1 / (times[-1] - times[0])
        self.times, self.y = times, y[:, None]
        count = len(frequencies)
        self.drift = SpectralDrift(10 * unit[None], 3 * unit.expand(count), frequencies, learn=True)
        size = y.std() / (count + 1) ** 0.5
        self.emission = nn.Parameter(size * torch.ones(1, self.drift.dim, dtype=y.dtype))
        self.log_scale = nn.Parameter((0.3 * y.std()).log())

    def forward(self, batch: None = None) -> sd.ObjectiveValue:
        """Return minus the log evidence."""
        evidence = self.drift.law().log_evidence(self.times, self.y, self.log_scale.exp(), self.emission)
        return sd.ObjectiveValue(-evidence, {"elbo": evidence.detach()}, "evidence_lower")

    @torch.no_grad()
    def forecast(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of readings at later times."""
        law = self.drift.law().conditioned(self.times, self.y, self.log_scale.exp(), self.emission)
        mean = (law.mean(times) @ self.emission.mT)[:, 0]
        variance = (self.emission @ law.covariance(times) @ self.emission.mT)[:, 0, 0]
        return mean, (variance + (2 * self.log_scale).exp()).sqrt()


def simulate(horizon: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return readings of a van der Pol oscillator at random times."""

    def drift(t: Tensor, x: Tensor) -> Tensor:
        place, speed = x.unbind(-1)
        return torch.stack([speed, 1.5 * (1 - place.square()) * speed - place], -1)

    oscillator = sd.DiffusionMeasure(
        torch.tensor([2.0, 0.0]).double(), sd.SDE(drift, torch.tensor([[0.0], [0.15]]).double())
    )
    dt = 0.01
    path = oscillator.sample(dt * torch.arange(int(horizon / dt) + 1).double(), generator=seed)
    index = torch.randperm(len(path.ts), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    noise = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return path.ts[index], path.x[index, 0] + 0.2 * noise


def peaks(times: Tensor, y: Tensor, count: int) -> Tensor:
    """Return the strongest frequencies of a periodogram, one after the other with those before taken out."""
    grid = np.linspace(2 * np.pi / float(times[-1] - times[0]), 8.0, 4000)
    left, found = (y - y.mean()).numpy(), []
    for _ in range(count):
        best = grid[int(np.argmax(lombscargle(times.numpy(), left, grid)))]
        wave = np.stack([np.sin(best * times.numpy()), np.cos(best * times.numpy())], 1)
        left = left - wave @ np.linalg.lstsq(wave, left, rcond=None)[0]
        found.append(best)
    return torch.tensor(found, dtype=torch.float64)


def main() -> None:
    """Simulate, fit, forecast, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readings", type=int, default=400)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/mode_forecast.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    times, y = simulate(120.0, arguments.readings, 0)
    seen = times < 100
    fits = {}
    for name, count in (("modes", 3), ("relaxation alone", 0)):
        objective = Modes(times[seen], y[seen], peaks(times[seen], y[seen], count))
        sd.fit(objective, steps=arguments.steps, lr=0.05, seed=0)
        fits[name] = objective
        print(f"{name}: log evidence {-float(objective().loss.detach()):.1f}")
    print("frequencies", [round(v, 3) for v in fits["modes"].drift.log_angular_frequencies.exp().tolist()])
    later, truth = times[~seen], y[~seen]
    near = later < 107
    for name, objective in fits.items():
        mean, sd_ = objective.forecast(later)
        score = torch.distributions.Normal(mean, sd_).log_prob(truth)
        inside = ((truth - mean).abs() < 1.96 * sd_).double().mean()
        error = (truth - mean).square()[near].mean().sqrt()
        print(
            f"{name:18s} rms over a period {error:.2f}, log score per reading {score.mean():.2f}, 95 % intervals hold {inside:.0%}"
        )
    print(f"{'persistence':18s} rms over a period {(truth - y[seen][-1]).square()[near].mean().sqrt():.2f}")
    draw(times, y, fits["modes"], arguments.out)
    print(f"wrote {arguments.out}")


def draw(times: Tensor, y: Tensor, fit: Modes, path: Path) -> None:
    """Draw the last readings, the forecast and held out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.4), constrained_layout=True)
    grid = torch.linspace(100, 120, 400, dtype=torch.float64)
    mean, sd_ = fit.forecast(grid)
    axis.fill_between(
        grid, mean - 1.96 * sd_, mean + 1.96 * sd_, color="#0072B2", alpha=0.2, lw=0, label="95 % interval"
    )
    axis.plot(grid, mean, color="#0072B2", label="forecast")
    shown = times > 75
    axis.plot(
        times[shown & (times < 100)], y[shown & (times < 100)], "o", ms=3.5, color="black", label="read"
    )
    axis.plot(
        times[times >= 100], y[times >= 100], "o", ms=3.5, mfc="none", color="#D55E00", label="held out"
    )
    axis.axvline(100, color="#999999", lw=1)
    axis.set(xlabel="time", ylabel="position", xlim=(75, 120))
    axis.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
