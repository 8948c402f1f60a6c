"""Volatility of four stock markets: can daily closing values tell how rough it is, and do falls raise it?

    python examples/stock_volatility.py

Five daily returns make one variance per week, whose logarithm averages over the week and has an error of known size. The Hurst index of
what is behind it comes from the exact likelihood, with that error and with an error that is learnt. It prints both posteriors, a check of
the fit, and the correlation of returns with the change of volatility, and draws them to ``outputs/stock_volatility.png``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy.special import polygamma

import stochdyn as sd

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"DAX": "#0072B2", "SMI": "#D55E00", "CAC": "#009E73", "FTSE": "#CC79A7"}
#: The standard deviation of the logarithm of a variance that was estimated from five Gaussian returns.
ERROR = float(polygamma(1, 2.5)) ** 0.5


def main() -> None:
    """Fit, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--weeks", type=int, default=371)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/stock_volatility.png"), help="file of the figure"
    )
    arguments = parser.parse_args()

    table = sd.datasets.stock_indices()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1.5, 1), layout="constrained")
    years = 1991.5 + np.arange(arguments.weeks) / 52
    generator = np.random.default_rng(0)
    for k, (name, colour) in enumerate(COLOURS.items()):
        returns = np.diff(np.log(table[name]))[: 5 * arguments.weeks].reshape(-1, 5)
        # Of the variance of a day; its error has a mean of its own, which the level takes up.
        log_variance = np.log(np.square(returns).mean(1))
        # Leverage: returns of a week with the change of the log variance around it, resampled by weeks.
        pair = np.stack([returns.sum(1)[1:-1], log_variance[2:] - log_variance[:-2]])
        picks = generator.integers(pair.shape[1], size=(1000, pair.shape[1]))
        leverage = [np.corrcoef(pair[:, pick])[0, 1] for pick in picks]
        print(f"{name}: leverage {_interval(leverage)}")
        for form, label, error in (("-", "known", ERROR), (":", "learnt", None)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of outliers, which the line below tells
                fit = sd.fractional.infer_roughness(
                    log_variance, obs_scale=error, averaged=True, num_draws=arguments.draws, progress=False
                )
            hurst = fit.posterior["hurst"].values.ravel()
            print(
                f"  error {label:6s} Hurst index {_interval(hurst)}; outliers, p = {fit.attrs['check_outlier']:.0e}"
            )
            low, middle, high = np.quantile(hurst, [0.05, 0.5, 0.95])
            place = k + (0.15 if error is None else -0.15)
            right.plot([low, high], [place, place], color=colour, ls=form, lw=2.5)
            right.plot(middle, place, "o", color=colour, mfc=colour if error else "white")
            right.text(high + 0.02, place, f"error {label}", va="center", fontsize=8)
        left.plot(years, log_variance / 2 + np.log(100) - 1.6 * k, color=colour, lw=0.8)
    left.set(xlabel="year", ylabel="log volatility, apart by 1.6", xlim=(years[0], years[-1]))
    right.set(xlabel="Hurst index, median and 90 % interval", xlim=(0, 1), yticks=range(4), ylim=(3.5, -0.5))
    right.set_yticklabels(list(COLOURS))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


def _interval(values: object) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
