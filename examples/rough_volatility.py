"""How rough is a volatility? Posterior of the Hurst index of a log realised variance, simulated or out of a CSV file.

    python examples/rough_volatility.py
    python examples/rough_volatility.py --csv FILE --column NAME --returns 78

It prints the posterior with and without the two corrections that matter (averages over the day, errors of the realised variance) and
draws the posteriors to ``outputs/rough_volatility.png``.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import torch
from torch import Tensor

import stochdyn as sd


def load(path: Path, column: str) -> Tensor:
    """Return the positive values of a column, in the order of the file."""
    with path.open(newline="", encoding="utf-8") as file:
        values = [float(row[column]) for row in csv.DictReader(file) if row[column].strip()]
    series = torch.tensor(values, dtype=torch.float64)
    if not bool((series > 0).all()):
        raise SystemExit("realised variances must be positive")
    return series


def main() -> None:
    """Read the command line, infer, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="a file with realised variances; simulated ones if left out")
    parser.add_argument("--column", default="realised_variance")
    parser.add_argument("--returns", type=int, default=78, help="returns per day behind each value")
    parser.add_argument("--days", type=int, default=500, help="days to simulate")
    parser.add_argument("--hurst", type=float, default=0.1, help="index of the simulation")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/rough_volatility.png"), help="file of the figure"
    )
    arguments = parser.parse_args()
    if arguments.csv is not None:
        realised = load(arguments.csv, arguments.column)
    else:
        generator = torch.Generator().manual_seed(0)
        realised = sd.fractional.rough_volatility(
            arguments.days, arguments.hurst, returns_per_day=arguments.returns, generator=generator
        ).realised
    error = math.sqrt(2 / arguments.returns)
    analyses = {
        "averages with errors": {"obs_scale": error, "averaged": True},
        "averages, errors learned": {"obs_scale": None, "averaged": True},
        "averages without errors": {"obs_scale": 0.0, "averaged": True},
        "samples without errors": {"obs_scale": 0.0, "averaged": False},
    }
    draws = {}
    for name, options in analyses.items():
        idata = sd.fractional.infer_roughness(realised.log(), num_draws=arguments.draws, **options)
        hurst = torch.as_tensor(idata.posterior["hurst"].values).flatten()
        draws[name] = hurst
        print(f"{name:26s} hurst {hurst.mean():.3f} sd {hurst.std():.3f}  k-hat {idata.attrs['khat']:.2f}")
    draw(realised, draws, None if arguments.csv else arguments.hurst, arguments.out)
    print(f"wrote {arguments.out}")


def draw(realised: Tensor, draws: dict[str, Tensor], truth: float | None, path: Path) -> None:
    """Draw the series and the posteriors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    left.plot(realised.log(), lw=0.7)
    left.set(xlabel="day", ylabel="log realised variance")
    for name, hurst in draws.items():
        right.hist(hurst.numpy(), bins=40, density=True, histtype="step", label=name)
    if truth is not None:
        right.axvline(truth, color="black", ls=":", label="truth")
    right.set(xlabel="Hurst index", ylabel="posterior density", xlim=(0, None))
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
