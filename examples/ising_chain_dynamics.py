"""A dissipative Ising chain switched on: networks follow its outcome probabilities, beside exact answers.

1. Six sites: the variational principle by sampling, and the exact evolution of the density matrix.
2. Sixty-four sites, where the density matrix would have 4**64 entries, by a window ansatz. Up to time 2 correlations
   haven't run around the ring, so its site averages are those of eight sites to 1e-8: exact answers where exact
   methods stop.
3. Sixteen sites by a transformer.

Run it from anywhere: ``python examples/ising_chain_dynamics.py [--sites 64] [--samples 1000] [--out DIR]``. It writes a
figure for each and prints the largest errors. The third part takes a few minutes; ``--quick`` leaves it out.
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
FINER = 10


def transformer(sites: int, strings: str | None, seed: int) -> sd.povm.Ansatz:
    """Make a small transformer."""
    torch.manual_seed(seed)
    return sd.povm.AutoregressiveTransformer(sites, layers=1, width=16, heads=2, strings=strings)


def evolve(
    net: sd.povm.Ansatz, samples: int, until: float, seed: int, dt: float | None = None
) -> sd.povm.Evolution:
    """Follow the chain from all spins up."""
    povm, model = sd.povm.Tetrahedral(), systems.ising(net.num_sites, coupling=2.0, field=1.0, decay=1.0)
    net = net.double().set_product_state(povm, "up")
    times = grid(until, 1)
    return sd.povm.evolve(net, model, povm, times, sd.povm.TDVP(dt=dt), samples, OBSERVABLES, seed=seed)


def grid(until: float, finer: int) -> torch.Tensor:
    """Return times every quarter, or finer."""
    return torch.linspace(0, until, finer * round(until / 0.25) + 1, dtype=torch.float64)


def truth_of(sites: int, until: float) -> exact.ExactEvolution:
    """Return the exact evolution of a short ring, on a finer grid of times."""
    return exact.evolve(systems.ising(sites), "up", grid(until, FINER), OBSERVABLES)


def report(name: str, run: sd.povm.Evolution, truth: dict[str, torch.Tensor]) -> None:
    """Print the largest errors."""
    errors = {k: float((run.expect[k] - truth[k]).abs().max()) for k in OBSERVABLES}
    listed = ", ".join(f"{k} {v:.1e}" for k, v in errors.items())
    print(f"{name}: largest errors {listed}; largest residual {float(run.residual.max()):.2f}; "
          f"{len(run.steps['t'])} steps, {run.seconds:.0f} s")  # fmt: skip


def main() -> None:
    """Read the command line and run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=64, help="of the long chain")
    parser.add_argument("--samples", type=int, default=1000, help="for the long chain")
    parser.add_argument("--horizon", type=float, default=2.0, help="last time, at most 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="leave the transformer on sixteen sites out")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figures")
    options = parser.parse_args()
    matplotlib.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)

    run = evolve(
        transformer(6, "translations+reflections", options.seed), 2000, options.horizon, options.seed
    )
    start = time.process_time()
    truth = truth_of(6, options.horizon)
    print(f"exact, 6 sites: {time.process_time() - start:.1f} s")
    at = {k: v[::FINER] for k, v in truth.expect.items()}
    report("6 sites", run, at)
    run.plot(exact=truth).savefig(options.out / "ising_chain_6.png", dpi=130)

    truth = truth_of(8, options.horizon)
    at = {k: v[::FINER] for k, v in truth.expect.items()}
    window = sd.povm.AutoregressiveWindow(options.sites, order=2)
    run = evolve(window, options.samples, options.horizon, options.seed, dt=0.05)
    report(f"{options.sites} sites", run, at)
    run.plot(exact=truth).savefig(options.out / f"ising_chain_{options.sites}.png", dpi=130)
    if not options.quick:
        run = evolve(transformer(16, None, options.seed), 500, options.horizon, options.seed)
        report("16 sites by a transformer", run, at)


if __name__ == "__main__":
    main()
