"""The shipped network: coverage by number of states and label error, and the discrete flashing ratchet without training on it.

    OMP_NUM_THREADS=1 python benchmarks/jumps/amortised.py --data FOLDER

FOLDER holds ``dfr_V1_2000paths.npz`` of the foundation inference model's published data (array ``states``, 2000 paths of 100 points,
2.5/99 apart) and ``dfr_counts.json``, the transitions counted in all 10 000 of its paths.
Beside the network stands exact maximum likelihood on the same contexts.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import best_time, machine, panel_of

from stochdyn.jumps import AmortisedRates, fit_rates

RESULTS = Path(__file__).parent / "results" / "amortised.json"
LEVELS = (0.5, 0.8, 0.95)
DT = 2.5 / 99


def coverage(network: AmortisedRates, num: int, told: bool) -> list[dict[str, Any]]:
    """Return coverage of the rates of links on fresh data sets, 100 series of 50 visits, by number of states and label error.

    Small numbers of states have more data sets, so that every row has about as many rates; a label error of None is drawn as in training.
    """
    rows = []
    for size in range(network.prior.num_states[0], network.prior.num_states[1] + 1):
        for error in (0.0, 0.1, None):
            source = torch.Generator().manual_seed(1000 * size + int(100 * (1.0 if error is None else error)))
            right, z_all = [], []
            for _ in range(max(1, round(30 / (size * (size - 1)))) * num // 24):
                data = network.prior.sample(size, 24, source, num_series=100, length=50, label_error=error)
                seen = data.seen
                if not told:
                    seen = seen._replace(label_error=torch.full_like(seen.label_error, math.nan))
                with torch.no_grad():
                    out = network.encoder(seen)
                z_all.append(((data.log_rates - out.mean) / out.log_std.exp())[data.links])
                off = ~torch.eye(size, dtype=torch.bool)
                right.append(((out.link_logit > 0) == data.links)[:, off].float().mean())
            z = torch.cat(z_all)
            half = [math.sqrt(2) * float(torch.erfinv(torch.tensor(level))) for level in LEVELS]
            inside = [float((z.abs() < h).float().mean()) for h in half]
            rows.append(
                {
                    "states": size,
                    "label_error": error,
                    "told": told,
                    "rates": len(z),
                    "coverage": [round(c, 4) for c in inside],
                    "spread": round(float(z.std()), 3),
                    "links": round(float(torch.stack(right).mean()), 3),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def ratchet_rates(v: float = 1.0, switch: float = 1.0, off: float = 1.0) -> np.ndarray:
    """Return the rates of the discrete flashing ratchet, states 0 to 2 with the potential on and 3 to 5 with it off."""
    q = np.zeros((6, 6))
    for i in range(3):
        for j in range(3):
            if i != j:
                q[i, j], q[3 + i, 3 + j] = math.exp(-v * (j - i) / 2), off
        q[i, 3 + i] = q[3 + i, i] = switch
    return q


def parameters(rates: np.ndarray) -> np.ndarray:
    """Return potential, switching and free rate ``(n, 3)`` of estimated generators ``(n, 6, 6)``."""
    log = np.log(rates.clip(1e-12))
    # weights of the long arm twice those of the short ones: least squares of log rates in V
    v = (log[:, 1, 0] + log[:, 2, 1] - log[:, 0, 1] - log[:, 1, 2] + 2 * (log[:, 2, 0] - log[:, 0, 2])) / 6
    switch = np.mean([rates[:, i, j] for i, j in ((0, 3), (1, 4), (2, 5), (3, 0), (4, 1), (5, 2))], 0)
    free = np.mean([rates[:, i, j] for i in (3, 4, 5) for j in (3, 4, 5) if i != j], 0)
    return np.stack([v, switch, free], -1)


def resampled(counts: dict[str, Any], source: np.random.Generator) -> np.ndarray:
    """Return 300 chains of 100 states with the transitions counted in all 10 000 published paths."""
    p = np.array(counts["counts"], dtype=float)
    cumulative = (p / p.sum(1, keepdims=True)).cumsum(1)
    first = np.array(counts["first"], dtype=float)
    states = [source.choice(6, 300, p=first / first.sum())]
    for _ in range(99):
        states.append((source.random((300, 1)) > cumulative[states[-1]]).sum(1).clip(max=5))
    return np.stack(states, 1)


def ratchet(
    network: AmortisedRates, paths: np.ndarray, counts: dict[str, Any], contexts: int
) -> dict[str, Any]:
    """Return errors over random contexts of 300 paths, of the network alone and of exact maximum likelihood."""
    truth = ratchet_rates()
    off, zero = ~np.eye(6, dtype=bool), (truth == 0) & ~np.eye(6, dtype=bool)
    source = np.random.default_rng(0)
    jobs = {
        "network": lambda p: network.posterior(p).rates,
        "exact": lambda p: fit_rates(p, num_draws=0).rates,
        "posterior": lambda p: fit_rates(p).rates,
    }
    found: dict[str, list[np.ndarray]] = {name: [] for name in jobs}
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(contexts):
        panel = panel_of(paths[source.choice(len(paths), 300, replace=False)], DT, 6)
        for name, job in jobs.items():
            spent[name].append(best_time(lambda j=job, p=panel: j(p), 2))
            found[name].append(job(panel).numpy())
    out: dict[str, Any] = {
        "contexts": contexts,
        "published": {"rmse": 0.1652, "bias": 0.1308, "zeros": 0.1399},
    }
    for name, values in found.items():
        error = np.stack(values) - truth
        out[name] = {
            "rmse": float(np.sqrt((error[:, off] ** 2).mean())),
            "bias": float(np.sqrt((error.mean(0)[off] ** 2).mean())),
            "zeros": float(np.sqrt((error[:, zero] ** 2).mean())),
            "milliseconds": float(1000 * np.median(spent[name])),
        }
    whole = fit_rates(panel_of(paths, DT, 6), num_draws=0).rates.numpy()[None]
    again = [
        fit_rates(panel_of(resampled(counts, source), DT, 6), num_draws=0).rates.numpy()
        for _ in range(contexts)
    ]
    out["parameters"] = {
        name: {"mean": values.mean(0).tolist(), "std": values.std(0).tolist()}
        for name, values in (
            ("contexts", parameters(np.stack(found["exact"]))),
            ("the 2000 paths at once", parameters(whole)),
            ("contexts of chains with the transitions of all 10 000 paths", parameters(np.stack(again))),
        )
    }
    return out


def main() -> None:
    """Run what is asked for, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--num", type=int, default=288)
    parser.add_argument("--contexts", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = AmortisedRates.load()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.num:
        found["coverage"] = coverage(network, options.num, True) + coverage(network, options.num, False)
    if options.data is not None:
        with np.load(options.data / "dfr_V1_2000paths.npz") as file:
            paths = file["states"].astype(int)
        counts = json.loads((options.data / "dfr_counts.json").read_text())["1"]
        found["ratchet"] = ratchet(network, paths, counts, options.contexts)
        print(json.dumps(found["ratchet"]))
    found["machine"] = machine("scipy")
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
