"""A latent SDE with learnt Hurst indices, from short irregular series with gaps.

Two latent components with different roughness drive three observed channels. Each series is seen at times of its own, and a
quarter of the values is missing. A Gaussian posterior, which takes no loop over time, is trained together with
the equation; then the latent paths of one series, its predictions and a forecast are drawn, and importance weights say how tight the
bound is.

Run it from anywhere: ``python examples/fractional_latent.py [--steps 1500] [--out DIR]``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.diagnostics import plot_paths, plot_training
from stochdyn.fractional import GaussianMethod, LatentSDE, MarkovNoise, Series, evidence, forecast, predict

HURST = (0.25, 0.8)
END, STEPS, NOISE = 2.0, 60, 0.05
LOADING = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, -0.7]])


def simulate(count: int, generator: torch.Generator) -> tuple[Series, Tensor, Tensor]:
    """Return series, the fine grid and the clean observations on it, ``(count, T, 3)``."""
    ts = torch.linspace(0, END, 4 * STEPS + 1)
    noise = MarkovNoise(torch.tensor(HURST), None, END, END / len(ts), per_channel=True)
    sde = sd.SDE(lambda t, x: -1.5 * x, torch.tensor([0.6, 0.6]), noise)
    x = sd.DiffusionMeasure(torch.zeros(2), sde).sample(ts, (count,), generator).x
    clean = x @ LOADING.T
    rows = []
    for path in clean:
        size = int(torch.randint(18, 30, (), generator=generator))
        seen = torch.randperm(len(ts) - 1, generator=generator)[:size].sort().values + 1
        values = path[seen] + NOISE * torch.randn(size, 3, generator=generator)
        hidden = torch.rand(size, 3, generator=generator) < 0.25
        rows.append((ts[seen], values.masked_fill(hidden, float("nan"))))
    return Series.of(rows), ts, clean


def main() -> None:
    """Simulate, train, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    options = parser.parse_args()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    warnings.simplefilter("ignore", sd.errors.ApproximationWarning)
    torch.manual_seed(0)
    series, fine, clean = simulate(options.series, torch.Generator().manual_seed(0))
    model = LatentSDE(
        3, 2, torch.linspace(0, END, STEPS + 1), drift=(32,), posterior=GaussianMethod(context=32, num_particles=4),
    )  # fmt: skip
    start = time.process_time()
    result = sd.fit(model, series, steps=options.steps, batch_size=50, lr=5e-3, clip_norm=100.0)
    print(f"trained in {time.process_time() - start:.0f} processor seconds")
    assert model.hurst is not None
    print(
        "Hurst indices",
        sorted(round(h, 3) for h in model.hurst.tolist()),
        "truth",
        HURST,
        "(up to the mixing of components)",
    )
    print("observation noise", [round(s, 3) for s in model.decoder.obs_scale.tolist()], "truth", NOISE)
    few = Series(series.times[:20], series.values[:20], series.mask[:20])
    found = evidence(model, few, 500)
    print(
        f"bound {found.elbo.mean():.2f}, importance-weighted {found.log_evidence.mean():.2f} nats per series, median k-hat {found.khat.median():.2f}"
    )
    one = Series(series.times[:1], series.values[:1], series.mask[:1])
    grid = model.ts[1:]
    inside = predict(model, one, grid, num_draws=300, seed=0)[:, 0]
    later = END + 0.05 * torch.arange(1, 11)
    ahead = forecast(model, one, later, num_draws=300, seed=0)[:, 0]
    figure, axes = plt.subplots(2, 2, figsize=(12, 7))
    for channel, ax in enumerate(axes.flat[:3]):
        seen = one.mask[0, :, channel]
        plot_paths(
            torch.cat([grid, later]),
            torch.cat([inside[..., channel], ahead[..., channel]], 1),
            observations=(one.times[0][seen], one.values[0, :, channel][seen]),
            forecast_from=END,
            ax=ax,
        )
        ax.plot(fine, clean[0, :, channel], color="black", linewidth=0.8, label="truth")
        ax.set_title(f"channel {channel + 1}")
        ax.legend(fontsize=8)
    plot_training(result, ax=axes[1, 1])
    options.out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(options.out / "fractional_latent.png", dpi=120)
    print(f"wrote {options.out / 'fractional_latent.png'}")


if __name__ == "__main__":
    main()
