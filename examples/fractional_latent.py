"""A latent SDE with learnt Hurst indices, from short irregular series with gaps.

Two latent components with different roughness drive three observed channels through a rotation. Each series is seen at times of its
own, and a quarter of the values is missing. Drift, noise, Hurst indices, errors and the rotation are learnt: columns of the decoder stay
orthonormal, since any other mixture could hide in the latent space, and start at the principal axes. The posterior of the paths is
computed for each series from the linearised model, so there is no encoder to train. Then the paths of one series, its predictions and
a forecast are drawn, and importance weights say how tight the bound is.

Run it from anywhere: ``python examples/fractional_latent.py [--steps 300] [--out DIR]``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.diagnostics import plot_paths
from stochdyn.fractional import (
    GaussianDecoder,
    LatentSDE,
    LinearisedMethod,
    MarkovNoise,
    Series,
    evidence,
    forecast,
    predict,
)

HURST = (0.25, 0.8)
END, STEPS, FINER, NOISE = 2.0, 60, 4, 0.05
LOADING = torch.linalg.qr(torch.tensor([[1.0, 0.5], [-0.3, 1.0], [0.7, -0.7]])).Q


def simulate(count: int, generator: torch.Generator) -> tuple[Series, Tensor, Tensor]:
    """Return series, the fine grid of the simulation and the clean observations on it, ``(count, T, 3)``."""
    ts = torch.linspace(0, END, FINER * STEPS + 1)
    noise = MarkovNoise(torch.tensor(HURST), None, END, END / len(ts), per_channel=True)
    sde = sd.SDE(lambda t, x: -1.5 * x, torch.tensor([0.6, 0.6]), noise)
    x = sd.DiffusionMeasure(torch.zeros(2), sde).sample(ts, (count,), generator).x
    clean = x @ LOADING.T
    rows = []
    for path in clean:
        size = int(torch.randint(18, 30, (), generator=generator))
        seen = FINER * (torch.randperm(STEPS, generator=generator)[:size].sort().values + 1)
        values = path[seen] + NOISE * torch.randn(size, 3, generator=generator)
        hidden = torch.rand(size, 3, generator=generator) < 0.25
        rows.append((ts[seen], values.masked_fill(hidden, float("nan"))))
    return Series.of(rows), ts, clean


def main() -> None:
    """Simulate, train, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    options = parser.parse_args()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    series, fine, clean = simulate(options.series, torch.Generator().manual_seed(0))
    mean = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(2, 3, bias=False))
    complete = series.values[series.mask.all(-1)]
    mean.weight = torch.linalg.svd(complete, full_matrices=False).Vh[:2].T.contiguous()
    model = LatentSDE(
        3, 2, torch.linspace(0, END, STEPS + 1), drift=(16,), decoder=GaussianDecoder(mean, 3, 0.1),
        posterior=LinearisedMethod(1),
    )  # fmt: skip
    assert model.hurst is not None
    indices: list[Tensor] = []

    def note(state: Any) -> None:
        assert model.hurst is not None
        indices.append(model.hurst.detach().clone())

    start = time.process_time()
    sd.fit(
        model, series, steps=options.steps, batch_size=25, lr=0.1, clip_norm=100.0,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=options.steps + 1),
        callbacks=[note],
    )  # fmt: skip
    print(f"trained in {time.process_time() - start:.0f} processor seconds")
    print("Hurst indices", [round(h, 2) for h in model.hurst.tolist()], "truth", HURST)
    cosines = (mean.weight.detach() * LOADING).sum(0).abs()
    print("cosines of learnt and true columns", [round(c, 4) for c in cosines.tolist()])
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
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
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
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    last = axes[1, 1]
    for component, colour in enumerate(("C0", "C1")):
        last.plot(torch.stack(indices)[:, component], color=colour)
        last.axhline(HURST[component], color=colour, linestyle=":")
    last.set(xlabel="step of training", title="Hurst indices (dotted: truth)", ylim=(0, 1))
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "fractional_latent.png", dpi=120)
    print(f"wrote {options.out / 'fractional_latent.png'}")


if __name__ == "__main__":
    main()
