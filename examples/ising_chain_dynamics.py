"""A dissipative Ising chain switched on: a transformer follows its outcome probabilities, first beside exact answers.

1. Six sites: the variational principle by sampling, and the exact evolution of the density matrix.
2. Sixteen sites, where the density matrix would have 4**16 entries. Up to time 2 correlations haven't run around the
   ring, so its site averages are those of eight sites to 1e-8: exact answers where exact methods stop.

Run it from anywhere: ``python examples/ising_chain_dynamics.py [--sites 16] [--samples 500] [--out DIR]``. It writes a
figure for each and prints the largest errors. The second part takes a few minutes; ``--quick`` leaves it out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import torch

import stochdyn as sd
from stochdyn.povm import exact, systems

OBSERVABLES = ["X", "Y", "Z"]


def evolve(sites: int, strings: str | None, samples: int, until: float, seed: int) -> sd.povm.Evolution:
    """Follow the chain from all spins up."""
    povm, model = sd.povm.Tetrahedral(), systems.ising(sites, coupling=2.0, field=1.0, decay=1.0)
    torch.manual_seed(seed)
    net = sd.povm.AutoregressiveTransformer(sites, layers=1, width=16, heads=2, strings=strings).double()
    net.set_product_state(povm, "up")
    times = torch.linspace(0, until, round(until / 0.25) + 1, dtype=torch.float64)
    return sd.povm.evolve(
        net, model, povm, times, method="tdvp", num_samples=samples, observables=OBSERVABLES, seed=seed
    )


def report(name: str, run: sd.povm.Evolution, truth: dict[str, torch.Tensor]) -> None:
    """Print the largest errors."""
    errors = {k: float((run.expect[k] - truth[k]).abs().max()) for k in OBSERVABLES}
    listed = ", ".join(f"{k} {v:.1e}" for k, v in errors.items())
    print(f"{name}: largest errors {listed}; largest residual {float(run.residual.max()):.2f}; "
          f"{len(run.steps['t'])} steps, {run.seconds:.0f} s of processor time")  # fmt: skip


def main() -> None:
    """Read the command line and run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=16, help="of the long chain")
    parser.add_argument("--samples", type=int, default=500, help="for the long chain")
    parser.add_argument("--until", type=float, default=2.0, help="last time, at most 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="only the short chain")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figures")
    options = parser.parse_args()
    matplotlib.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)

    run = evolve(6, "translations+reflections", 2000, options.until, options.seed)
    start = time.process_time()
    truth = exact.evolve(systems.ising(6), "up", torch.linspace(0, options.until, 101), OBSERVABLES)
    print(f"exact, 6 sites: {time.process_time() - start:.1f} s of processor time")
    at = {k: v[torch.searchsorted(truth.times, run.times - 1e-9)] for k, v in truth.expect.items()}
    report("6 sites", run, at)
    run.plot(exact=truth).savefig(options.out / "ising_chain_6.png", dpi=130)
    if options.quick:
        return

    run = evolve(options.sites, None, options.samples, options.until, options.seed)
    truth = exact.evolve(systems.ising(8), "up", torch.linspace(0, options.until, 101), OBSERVABLES)
    at = {k: v[torch.searchsorted(truth.times, run.times - 1e-9)] for k, v in truth.expect.items()}
    report(f"{options.sites} sites", run, at)
    figure = run.plot(exact=truth)
    figure.savefig(options.out / f"ising_chain_{options.sites}.png", dpi=130)


if __name__ == "__main__":
    main()
