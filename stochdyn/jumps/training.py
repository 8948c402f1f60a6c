"""The program that trained the network of :meth:`stochdyn.jumps.AmortisedRates.load`.

    OMP_NUM_THREADS=1 python -m stochdyn.jumps.training --out amortised.safetensors

About five minutes of one processor. The same options give the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from stochdyn._lending import lent
from stochdyn.jumps.amortised import AmortisedRates
from stochdyn.run import fit

__all__ = ["train"]


def train(steps: int, seed: int = 0, progress: bool = True) -> AmortisedRates:
    """Train a network on simulated panels.

    Args:
        steps: The number of steps of 32 data sets.
        seed: The seed of weights and data.
        progress: Whether a bar is shown.
    """
    with lent(seed):
        network = AmortisedRates()
    fit(
        network,
        steps=steps,
        lr=2e-3,
        seed=seed,
        progress=progress,
        clip_norm=1.0,
        optimizer=torch.optim.AdamW,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 2e-3, steps, pct_start=0.1
        ),
    )
    network.learn_range(generator=seed)
    return network


def main() -> None:
    """Train, say how long it took, and write the weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    network = train(options.steps, options.seed)
    spent = time.process_time() - begin
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(
        state,
        options.out,
        {"steps": str(options.steps), "seed": str(options.seed), "seconds": f"{spent:.0f}"},
    )
    sys.stdout.write(f"{spent:.0f} s of processor time, {options.out.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
