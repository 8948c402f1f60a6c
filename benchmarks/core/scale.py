"""Throughput from a thousand to a million series: reading a Parquet file, exact evidence with its gradient, an amortised posterior.

Run it with one thread (it needs pyarrow, and about a gigabyte of disk for the largest file):

    OMP_NUM_THREADS=1 nice python benchmarks/core/scale.py

It writes ``benchmarks/core/results/scale.json`` after every size; ``benchmarks/core/scale_table.py`` makes the table of the
documentation out of that file. ``--smoke`` runs everything on tiny sizes and writes nothing unless told to.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from measure import machine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

import stochdyn as sd

RESULTS = Path(__file__).parent / "results" / "scale.json"
TIMES, BATCH, BLOCK = 20, 1000, 10_000
RATE, NOISE, OBS = 0.8, 0.6, 0.2


def write(path: Path, count: int) -> None:
    """Write Ornstein-Uhlenbeck series from zero, each at irregular times of its own, block by block."""
    import pyarrow
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    writer = None
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        t = (np.arange(TIMES) + rng.uniform(0.1, 0.9, (size, TIMES))) * 0.5
        x, last, y = np.zeros(size), np.zeros(size), np.empty((size, TIMES))
        for n in range(TIMES):
            decay = np.exp(-RATE * (t[:, n] - last))
            spread = np.sqrt((1 - decay**2) * NOISE**2 / (2 * RATE))
            x, last = decay * x + spread * rng.standard_normal(size), t[:, n]
            y[:, n] = x + OBS * rng.standard_normal(size)
        who = np.repeat(np.arange(first, first + size), TIMES)
        table = pyarrow.table({"id": who, "t": t.ravel(), "y": y.ravel().astype(np.float32)})
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=len(who))
    assert writer is not None
    writer.close()


def model(panel: sd.Panel, total: int) -> None:
    """Latent paths with a common rate."""
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    law = sd.SDE(lambda t, x: -rate[..., None, None] * x, NOISE)
    grid = panel.grid(dt=0.25, start=0.0)
    with pyro.plate("series", total, subsample=torch.arange(len(panel))):
        x = sd.infer.sample_path("x", law, torch.zeros(1), grid)
        panel.observe("y", dist.Normal(panel.at(x)[..., 0], OBS))


def trained(batches: sd.infer.PanelBatches, steps: int) -> tuple[Any, float]:
    """Return a guide whose encoder was trained on batches, and the processor seconds that it took."""
    start = time.process_time()

    def known(panel: sd.Panel) -> None:
        model(panel, batches.num_series)

    pyro.set_rng_seed(0)
    guide = sd.infer.AutoPathGuide(known, rest=AutoMultivariateNormal)
    sd.fit(Trace_ELBO()(known, guide), batches, steps=steps, lr=0.01, progress=False)
    return guide, time.process_time() - start


def evidence(panel: sd.Panel) -> None:
    """Take the gradient of the exact evidence in rate and noise."""
    rate = torch.tensor(RATE, requires_grad=True)
    noise = torch.tensor(NOISE, requires_grad=True)
    law = sd.LinearGaussianMeasure.ornstein_uhlenbeck(rate=rate, diffusion=noise, initial_mean=torch.zeros(1))
    site = sd.infer.LinearObservations(law, panel.times, OBS)
    torch.autograd.grad(site.log_prob(panel.values).sum(), [rate, noise])


def measure(path: Path, count: int, work: dict[str, Callable[[sd.Panel], object]]) -> dict[str, Any]:
    """Go once through all series in batches, and return processor seconds of every part."""
    spent = dict.fromkeys(("reading", *work), 0.0)
    batches = iter(sd.infer.PanelBatches.from_parquet(path, "id", "t", "y", batch_size=min(BATCH, count)))
    done = 0
    while True:
        start = time.process_time()
        panel = next(batches, None)
        spent["reading"] += time.process_time() - start
        if panel is None:
            break
        done += len(panel)
        for name, run in work.items():
            start = time.process_time()
            run(panel)
            spent[name] += time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "series": done,
        "seconds": spent,
        "megabytes": memory,
        "file megabytes": path.stat().st_size / 2**20,
    }


def main() -> None:
    """Measure all sizes, smallest first, so that memory that grows would show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--largest", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    sizes = [20, 40] if options.smoke else [n for n in (10**3, 10**4, 10**5, 10**6) if n <= options.largest]
    out = options.out if options.out is not None else None if options.smoke else RESULTS
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "panel.parquet"
        write(path, sizes[0])
        size = 5 if options.smoke else 100
        steps = 2 if options.smoke else 300
        start = sd.infer.PanelBatches.from_parquet(path, "id", "t", "y", batch_size=size)
        guide, seconds = trained(start, steps)
        training = {"series per second": steps * size / seconds, "batch": size, "steps": steps}
        print(f"training: {training['series per second']:.0f} series per second")

        @torch.no_grad()
        def posterior(panel: sd.Panel) -> None:
            guide(panel)

        for k, count in enumerate(sizes):
            if k:
                write(path, count)
            rows.append(measure(path, count, {"evidence": evidence, "posterior": posterior}))
            each = ", ".join(f"{n} {rows[-1]['series'] / s:.0f}" for n, s in rows[-1]["seconds"].items())
            print(f"{count} series: per second {each}; {rows[-1]['megabytes']:.0f} MB", flush=True)
            result = {
                "machine": machine(),
                "smoke": options.smoke,
                "times": TIMES,
                "batch": BATCH,
                "training": training,
                "rows": rows,
            }
            if out is not None:
                out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
