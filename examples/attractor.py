"""Reconstruct a chaotic attractor from noisy readings with gaps, by a latent SDE that is then left to run by itself.

    python examples/attractor.py [--system lorenz63 | rossler | lorenz96]

The data are 200 stretches of 50 readings with errors of a tenth of a standard deviation; half of the values are missing. A latent SDE is
trained on them without simulating a path, and runs on freely from the end of stretches that it hasn't seen. The program prints how far the
visited states and the power spectra are from those of the true system, beside the distances between two paths of the true
system, and draws them to ``outputs/attractor.png``. It takes some two minutes of processor time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.datasets import lorenz63, lorenz96, rossler
from stochdyn.diagnostics import power_spectrum_distance, state_space_divergence
from stochdyn.fractional import GaussianDecoder, LatentSDE, MatchingMethod, Series, forecast, posterior_paths

# the system, the time between readings, the two components that are drawn, and how visited states are counted
SYSTEMS = {
    "lorenz63": (lorenz63, 0.04, (0, 2), "bins"),
    "rossler": (rossler, 0.2, (0, 1), "bins"),
    "lorenz96": (lorenz96, 0.05, (0, 1), "mixture"),
}
WINDOW = 50


def build(dim: int, times: Tensor) -> LatentSDE:
    """Return a latent SDE in the coordinates of the readings, on a grid four times as fine."""
    torch.manual_seed(0)
    ts = torch.linspace(0, float(times[-1]), 4 * (len(times) - 1) + 1)
    return LatentSDE(
        dim, dim, ts, noise="brownian", drift=(100, 100), decoder=GaussianDecoder(nn.Identity(), dim, 0.2),
        posterior=MatchingMethod((64, 64), 64, num_times=5, method="heun"),
    )  # fmt: skip


def main() -> None:
    """Simulate, train, run freely, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", choices=list(SYSTEMS), default="lorenz63")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--run", type=int, default=1000, help="readings' lengths of each of 20 free paths")
    parser.add_argument("--out", type=Path, default=Path("outputs/attractor.png"), help="file of the figure")
    options = parser.parse_args()
    make, dt, shown, count_by = SYSTEMS[options.system]

    seen, held = make(WINDOW * options.windows, dt, generator=0), make(20 * WINDOW, dt, generator=1)
    center, unit = seen.x.mean(0), seen.x.std(0)
    times = dt * torch.arange(WINDOW)

    def scaled(x: Tensor, length: int) -> Tensor:
        return ((x - center) / unit).float().unflatten(0, (-1, length))

    train, start = (Series.regular(times, scaled(s.observe(0.1, share=0.5), WINDOW)) for s in (seen, held))
    model = build(seen.x.shape[-1], times)
    sd.fit(
        model, train, steps=options.steps, lr=1e-2, batch_size=min(64, len(train)), clip_norm=100.0,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=options.steps + 1),
    )  # fmt: skip

    lead = 100
    later = times[-1] + dt * torch.arange(1, lead + options.run + 1)
    free = forecast(model, start, later, num_draws=1, seed=0, noise=False)[0][:, lead:]
    truth, other = (scaled(make(20 * options.run, dt, generator=k).x, options.run) for k in (2, 3))
    for name, paths in (("another path of the system", other), ("the model", free)):
        visited = float(state_space_divergence(truth, paths, count_by))
        spectra = float(power_spectrum_distance(truth, paths, 5.0))
        print(f"{name:28s} state space divergence {visited:.2f} nats, distance of spectra {spectra:.3f}")
    path = posterior_paths(model, start, 200, seed=0).path.x[:, 0]
    draw(times, model.ts, start.values[0], start.mask[0], path, truth, free, shown, options.out)
    print(f"wrote {options.out}")


def draw(
    times: Tensor,
    ts: Tensor,
    values: Tensor,
    mask: Tensor,
    path: Tensor,
    truth: Tensor,
    free: Tensor,
    shown: tuple[int, int],
    out: Path,
) -> None:
    """Draw a stretch with its posterior, both attractors, and a spectrum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), constrained_layout=True)
    first, second = shown
    low, middle, high = path[..., first].quantile(torch.tensor([0.025, 0.5, 0.975]), dim=0)
    axes[0].fill_between(ts, low, high, color="#0072B2", alpha=0.25, lw=0, label="95 % of the posterior")
    axes[0].plot(ts, middle, color="#0072B2", lw=1)
    read = mask[:, first]
    axes[0].plot(times[read], values[read, first], "o", ms=3, color="black", label="read")
    axes[0].set(xlabel="time", ylabel="first component", title="a stretch of readings")
    axes[0].legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    for axis, paths, name, colour in ((axes[1], truth, "truth", "#333333"), (axes[2], free, "model, running freely", "#D55E00")):  # fmt: skip
        for one in paths[:4]:
            axis.plot(one[:, first], one[:, second], color=colour, lw=0.4, alpha=0.7)
        axis.set(title=name, xlabel=f"component {first + 1}", ylabel=f"component {second + 1}")
        axis.set(xlim=(-3, 3), ylim=(-3, 3.5))
    frequency = torch.fft.rfftfreq(truth.shape[1], float(times[1]))
    for paths, name, colour in ((truth, "truth", "#333333"), (free, "model", "#D55E00")):
        power = torch.fft.rfft(paths[..., second] - paths[..., second].mean(), dim=1).abs().square().mean(0)
        axes[3].semilogy(frequency[1:], power[1:] / power.sum(), color=colour, lw=1, label=name)
    axes[3].set(xlabel="frequency", title=f"power spectrum, component {second + 1}")
    axes[3].legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
