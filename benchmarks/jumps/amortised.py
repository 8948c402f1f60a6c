"""The shipped network: coverage by number of states and label error, and the discrete flashing ratchet without training on it.

    OMP_NUM_THREADS=1 python benchmarks/jumps/amortised.py --data FOLDER

FOLDER holds ``dfr_V1_2000paths.npz`` of the foundation inference model's published data (array ``paths`` of states, 2000 paths of
100 points, 2.5/99 apart). Beside the network stands exact maximum likelihood on the same contexts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, panel_of

from stochdyn.jumps import AmortisedRates, fit_rates

RESULTS = Path(__file__).parent / "results" / "amortised.json"
LEVELS = (0.5, 0.8, 0.95)
DT = 2.5 / 99


def coverage(network: AmortisedRates, num: int, told: bool) -> list[dict[str, Any]]:
    """Return coverage of the rates of links on fresh data sets, 100 series of 50 visits, by number of states and label error."""
    rows = []
    for size in range(network.prior.num_states[0], network.prior.num_states[1] + 1):
        for error in (0.0, 0.1):
            source = torch.Generator().manual_seed(1000 * size + int(100 * error))
            inside, right, z_all = [], [], []
            for _ in range(num // 24):
                data = network.prior.sample(size, 24, source, num_series=100, length=50, label_error=error)
                seen = data.seen
                if not told:
                    seen = seen._replace(label_error=torch.full_like(seen.label_error, math.nan))
                with torch.no_grad():
                    out = network.encoder(seen)
                z = ((data.log_rates - out.mean) / out.log_std.exp())[data.links]
                z_all.append(z)
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


def ratchet(network: AmortisedRates, paths: np.ndarray, contexts: int) -> dict[str, Any]:
    """Return errors over random contexts of 300 paths, of the network alone and of exact maximum likelihood."""
    truth = ratchet_rates()
    off, zero = ~np.eye(6, dtype=bool), (truth == 0) & ~np.eye(6, dtype=bool)
    source = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {"network": [], "exact": []}
    spent: dict[str, list[float]] = {"network": [], "exact": []}
    for _ in range(contexts):
        panel = panel_of(paths[source.choice(len(paths), 300, replace=False)], DT, 6)
        for name, job in (
            ("network", lambda p=panel: network.posterior(p).rates),
            ("exact", lambda p=panel: fit_rates(p, num_draws=2).rates),
        ):
            begin = time.process_time()
            found[name].append(job().numpy())
            spent[name].append(time.process_time() - begin)
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
    exact = np.stack(found["exact"])
    log = np.log(exact.clip(1e-12))
    # weights of the long arm twice those of the short ones: least squares of log rates in V
    v = (log[:, 1, 0] + log[:, 2, 1] - log[:, 0, 1] - log[:, 1, 2] + 2 * (log[:, 2, 0] - log[:, 0, 2])) / 6
    out["exact"]["v"] = [float(v.mean()), float(v.std())]
    out["exact"]["switch"] = float(
        np.mean([exact[:, i, j] for i, j in ((0, 3), (1, 4), (2, 5), (3, 0), (4, 1), (5, 2))])
    )
    out["exact"]["off"] = float(np.mean([exact[:, i, j] for i in (3, 4, 5) for j in (3, 4, 5) if i != j]))
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
        found["ratchet"] = ratchet(network, paths, options.contexts)
        print(json.dumps(found["ratchet"]))
    found["machine"] = machine("scipy")
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
