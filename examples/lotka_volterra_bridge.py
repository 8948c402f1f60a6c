"""Who ate whom? Lotka-Volterra from snapshots of strangers: trajectories, parameters per iteration, held-out snapshots.

Fifty fresh animals are seen at each of nine times, never the same twice. Every second snapshot is held out; from the
others the Schrödinger bridge and its reference are refined in turn, starting from no drift at all.

Run it from anywhere: ``python examples/lotka_volterra_bridge.py [--data LV_data.npy] [--out DIR] [--draws N]``. With
``--data`` it reads an array ``(9, n, 2)`` of snapshots at times 0 to 8 instead of simulating them. It writes a figure.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

import stochdyn as sd
from stochdyn.bridges import LotkaVolterra, SchrodingerBridge, Snapshots, plot_trajectories, refine

TRUTH = {"alpha": 1.0, "beta": 0.4, "gamma": 0.4, "delta": 0.1}


def load(path: Path | None, seed: int) -> Snapshots:
    """Return all nine snapshots."""
    if path is None:
        data = sd.datasets.lotka_volterra(50, generator=seed)
        return Snapshots(data.times, data.samples)
    arrays = np.load(path)
    return Snapshots(np.arange(float(len(arrays))), [torch.as_tensor(x) for x in arrays])


def scores(bridge: SchrodingerBridge, held_out: list) -> list[float]:
    """W2 between draws of the bridge and each snapshot it hasn't seen."""
    g = torch.Generator().manual_seed(0)
    return [sd.diagnostics.emd(bridge.marginal(s.time).sample(500, g), s.sample, p=2) for s in held_out]


def figure(
    fit: sd.bridges.Refinement, plain: SchrodingerBridge, held_out: list, posterior, out: Path
) -> None:
    """Draw bridges before and after the refinement, and what happened between."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    for axis, bridge, title in zip(
        axes[0], (plain, fit.measure), ("Brownian reference", "refined reference"), strict=True
    ):
        plot_trajectories(bridge, bridge.snapshots, 60, held_out=held_out, axis=axis)
        axis.set(title=title, xlabel="prey", ylabel="predators")
    fit.history.plot(truth=TRUTH, axes=axes[1])
    if posterior is not None:
        last = len(fit.history)
        for name in TRUTH:
            low, high = np.quantile(posterior[name].values, [0.05, 0.95])
            axes[1, 1].plot([last + 0.4] * 2, [low, high], color="black", linewidth=2)
    out.mkdir(parents=True, exist_ok=True)
    plt.savefig(out / "lotka_volterra_bridge.png", dpi=130)
    print(f"wrote {out / 'lotka_volterra_bridge.png'}")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="an array (9, n, 2) of snapshots")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--draws", type=int, default=0, help="draws of the posterior over the parameters; none by default"
    )
    args = parser.parse_args()
    matplotlib.use("Agg")

    everything = load(args.data, args.seed)
    train, held_out = everything.hold_out(1, 3, 5, 7)
    plain = SchrodingerBridge(train, diffusion=0.1).solve()
    start = time.process_time()
    fit = refine(train, LotkaVolterra(), diffusion=0.1, method=sd.bridges.Sinkhorn(accelerate=True))
    print(f"refined in {time.process_time() - start:.1f} s of processor time; {fit.history.stopped}")
    for k, iteration in enumerate(fit.history, 1):
        values = "  ".join(f"{name} {float(value):.4f}" for name, value in iteration.parameters.items())
        print(f"{k:2d}  objective {iteration.objective:9.4f}  {values}")
    print("truth                    ", "  ".join(f"{name} {value:.4f}" for name, value in TRUTH.items()))
    print("held-out W2, Brownian    ", [round(s, 3) for s in scores(plain, held_out)])
    print("held-out W2, refined     ", [round(s, 3) for s in scores(fit.measure, held_out)])
    fresh = sd.datasets.lotka_volterra(250, generator=99).samples[1::2]
    floor = [sd.diagnostics.emd(a, s.sample, p=2) for a, s in zip(fresh, held_out, strict=True)]
    print("W2 of fresh animals      ", [round(s, 3) for s in floor])
    posterior = None
    if args.draws:
        posterior = fit.posterior(args.draws)["posterior"]
        for name in TRUTH:
            low, high = np.quantile(posterior[name].values, [0.05, 0.95])
            print(f"{name}: 90 % interval {low:.4f} to {high:.4f}")
    figure(fit, plain, held_out, posterior, args.out)


if __name__ == "__main__":
    main()
