"""Calls under the rough Bergomi model: the library's simulation against one that shares nothing with it.

    OMP_NUM_THREADS=1 python benchmarks/fractional/rough_bergomi.py [--smoke]

The other computation draws the Brownian motion and its fractional integral jointly from their exact covariance (by Cholesky), and averages the
formula of Black given the path that drives the variance (Romano and Touzi). It has the library's grid, so both have the same
prices, whatever the error of the grid; a second grid, twice as fine, shows that.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import machine
from scipy.special import hyp2f1, ndtr

from stochdyn.fractional import rough_volatility

RESULTS = Path(__file__).parent / "results" / "rough_bergomi.json"
# Hurst index, volatility of volatility, correlation and forward variance; the first is that of Bayer, Friz and Gatheral (2016).
MODELS = [(0.07, 1.9, -0.9, 0.235**2), (0.3, 1.0, -0.5, 0.04)]
STRIKES = [0.8, 1.0, 1.2]


def joint_root(hurst: float, steps: int, horizon: float) -> np.ndarray:
    """Cholesky factor of the covariance of the fractional integral after each step and the increments of the Brownian motion."""
    t = horizon * np.arange(1, steps + 1) / steps
    a = hurst + 0.5
    low, high = np.minimum.outer(t, t), np.maximum.outer(t, t)
    # 2H int_0^s (s - u)^(H - 1/2) (t - u)^(H - 1/2) du for s <= t
    level = 2 * hurst * low**a * high ** (hurst - 0.5) / a * hyp2f1(0.5 - hurst, 1, a + 1, low / high)
    # sqrt(2H) int over step j of (t_i - u)^(H - 1/2) du
    begin, end = t - t[0], t
    gap = [np.clip(t[:, None] - edge[None], 0, None) ** a for edge in (begin, end)]
    cross = math.sqrt(2 * hurst) * (gap[0] - gap[1]) / a
    whole = np.block([[level, cross], [cross.T, horizon / steps * np.eye(steps)]])
    return np.linalg.cholesky(whole + 1e-13 * np.eye(2 * steps))


def conditional(model: tuple[float, float, float, float], steps: int, count: int, seed: int) -> np.ndarray:
    """Prices of the calls and their standard errors ``(2, strikes)`` over one year, spot 1."""
    hurst, eta, rho, xi = model
    root, rng = joint_root(hurst, steps, 1.0), np.random.default_rng(seed)
    t, dt, rows = np.arange(steps) / steps, 1.0 / steps, []
    for _ in range(max(1, count // 10_000)):
        drawn = rng.standard_normal((min(count, 10_000), 2 * steps)) @ root.T
        before = np.pad(drawn[:, : steps - 1], ((0, 0), (1, 0)))
        v = xi * np.exp(eta * before - 0.5 * eta**2 * t ** (2 * hurst))
        # Given the Brownian motion W of the variance, log S is normal: the rest of the noise is independent of it.
        spot = np.exp(rho * (np.sqrt(v) * drawn[:, steps:]).sum(1) - 0.5 * rho**2 * v.sum(1) * dt)
        width = np.sqrt((1 - rho**2) * v.sum(1) * dt)
        prices = []
        for strike in STRIKES:
            d = np.log(spot / strike) / width
            prices.append(spot * ndtr(d + width / 2) - strike * ndtr(d - width / 2))
        # The spot has the mean 1: what it tells about the price is taken out.
        rows.append(np.stack([*prices, spot], 1))
    return _with_control(np.concatenate(rows))


def library(model: tuple[float, float, float, float], steps: int, count: int, seed: int) -> np.ndarray:
    """The same by ``rough_volatility``, from the payoffs alone."""
    hurst, eta, rho, xi = model
    rows = []
    for part in range(max(1, count // 10_000)):
        paths = rough_volatility(
            1, hurst, volatility_of_volatility=eta, forward_variance=xi, leverage=rho, returns_per_day=steps,
            sample_shape=min(count, 10_000), generator=seed + part,
        )  # fmt: skip
        spot = paths.log_price[:, -1].exp().numpy()
        rows.append(np.stack([*(np.clip(spot - k, 0, None) for k in STRIKES), spot], 1))
    return _with_control(np.concatenate(rows))


def _with_control(rows: np.ndarray) -> np.ndarray:
    payoff, spot = rows[:, :-1], rows[:, -1:] - 1
    slope = (payoff * spot).mean(0) / np.square(spot).mean()
    left = payoff - slope * spot
    return np.stack([left.mean(0), left.std(0) / math.sqrt(len(left))])


def main() -> None:
    """Price every call in both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    count = 2000 if options.smoke else 200_000
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        for steps in (10, 20) if options.smoke else (100, 200):
            start = time.process_time()
            mine = library(model, steps, count, 1)
            middle = time.process_time()
            other = conditional(model, steps, count, 2)
            rows.append({
                "model": model, "steps": steps, "paths": count, "strikes": STRIKES, "library": mine.tolist(),
                "conditional": other.tolist(), "seconds": [middle - start, time.process_time() - middle],
            })  # fmt: skip
            z = (mine[0] - other[0]) / np.hypot(mine[1], other[1])
            print(model, steps, mine[0].round(5), other[0].round(5), "z", z.round(2), flush=True)
    report = {"machine": machine(), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
