"""Speed of inference with fractional and Brownian latent SDEs, as ratios in one run.

    OMP_NUM_THREADS=1 python benchmarks/fractional/run.py [--only gaussian lorenz memory] [--smoke]

Results are added to ``benchmarks/fractional/results/speed.json`` section by section; ``table.py`` makes the table of the
documentation out of all files of that folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, race
from lorenz import DT, END, PeerLatentSDE, as_series, data, ours
from tightness import tightness

import stochdyn as sd
from stochdyn.core import StateNetwork
from stochdyn.fractional import (
    AffineDrift,
    GaussianELBO,
    GaussianPosterior,
    MarkovNoise,
)

RESULTS = Path(__file__).parent / "results" / "speed.json"


def _gradient(objective: sd.Objective, trained: torch.nn.Module) -> Callable[[], Any]:
    parameters = tuple(trained.parameters())
    return lambda: torch.autograd.grad(objective(None).loss, parameters)


def gaussian_against_simulated(smoke: bool) -> list[dict[str, Any]]:
    """Time a gradient of posterior (c) against the simulated control posterior, 200 steps, a linear model and a double well."""
    steps, repeats = (20, 1) if smoke else (200, 12)
    ts = torch.linspace(0, 2, steps + 1)
    noise = MarkovNoise(0.3, None, 2.0, 2.0 / steps)
    values = torch.tensor([0.3, -0.1, 0.4, 0.8, 0.5])
    data_ = sd.GaussianObservations(ts, ts[[s * steps // 20 for s in (3, 5, 10, 15, 20)]], values, 0.1)
    rows = []
    for name, drift in (
        ("linear", AffineDrift(-torch.eye(1))),
        ("double well", lambda t, x: 4 * x * (1 - x**2)),
    ):
        prior = sd.DiffusionMeasure(torch.zeros(1), sd.SDE(drift, 1.0, noise))
        closed = GaussianELBO(GaussianPosterior(prior, ts), data_, 8)
        contenders = {"Gaussian": lambda o=closed: torch.autograd.grad(o(None).loss, list(o.parameters()))}
        for width in (64, 200, 1000):
            net = StateNetwork(1 + noise.num_states, 1, (width, width), zero_last=True)
            loss = sd.PathELBO(prior, prior.controlled(net), data_, num_particles=32, estimator="rate")
            contenders[f"simulated, network {width}-{width}"] = _gradient(loss, net)
        heavy = {name: contenders.pop(name) for name in list(contenders) if "1000" in name}
        seconds = race(contenders, repeats) | race(heavy, 1 if smoke else 2)
        rows.append(
            {
                "model": name,
                "steps": steps,
                "particles of the simulated": 32,
                "seconds": seconds,
                "ratio": {k: v / seconds["Gaussian"] for k, v in seconds.items() if k != "Gaussian"},
            }
        )
        print(rows[-1]["model"], rows[-1]["ratio"], flush=True)
    return rows


def lorenz(smoke: bool, batch: int, iterations: int) -> dict[str, Any]:
    """Time an iteration at the example's size, and the way to the bound on unseen series that the peer reaches."""
    full = 32 if smoke else 1024
    ts, values = data(full, 0)
    peer = PeerLatentSDE()
    models = {name: ours(name) for name in ("matching", "tight")}
    series = as_series(ts, values)
    contenders = {"torchsde": lambda: torch.autograd.grad(-peer.elbo(ts, values), list(peer.parameters()))}
    for name, model in models.items():
        contenders[f"stochdyn, {name}"] = lambda m=model: torch.autograd.grad(
            m(series).loss, [p for p in m.parameters() if p.requires_grad]
        )
    seconds = race(contenders, 1 if smoke or not iterations else 3)
    result: dict[str, Any] = {"batch": full, "seconds an iteration": seconds}
    result["ratio an iteration"] = {k: seconds["torchsde"] / v for k, v in seconds.items() if k != "torchsde"}
    print(result, flush=True)
    if not iterations:
        return result
    count = 16 if smoke else batch
    ts, values = data(count, 1)
    held_ts, held = data(256, 2)
    torch.manual_seed(0)
    peer = PeerLatentSDE()
    optimiser = torch.optim.Adam(peer.parameters(), lr=5e-3)
    begin, track = time.process_time(), []
    spent = 0.0
    for step in range(2 if smoke else iterations):
        optimiser.zero_grad()
        (-peer.elbo(ts, values)).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1e3)
        optimiser.step()
        if step % 20 == 19 or step == (1 if smoke else iterations - 1):
            spent += time.process_time() - begin
            with torch.no_grad():
                track.append(
                    {"iteration": step + 1, "seconds": spent, "elbo": float(peer.elbo(held_ts, held))}
                )
            begin = time.process_time()
            print("torchsde", track[-1], flush=True)
    target = max(row["elbo"] for row in track)
    race_: dict[str, Any] = {"batch": count, "target": target, "torchsde": track}
    limit = track[-1]["seconds"]
    for name in models:
        model, rows = _train_to(name, (ts, values), (held_ts, held), target, limit, smoke)
        reached = rows[-1]["elbo"] > target
        race_[f"stochdyn, {name}"] = {
            "track": rows, "reached": reached, "ratio": limit / rows[-1]["seconds"] if reached else None
        }  # fmt: skip
        if name == "matching":
            race_["matching on a fine grid"] = _on_a_fine_grid(model, held_ts, held[:64], 2 if smoke else 16)
            print(race_["matching on a fine grid"], flush=True)
    return result | {"race": race_}


def _train_to(
    name: str,
    seen: tuple[torch.Tensor, torch.Tensor],
    held: tuple[torch.Tensor, torch.Tensor],
    target: float,
    limit: float,
    smoke: bool,
) -> tuple[Any, list[dict[str, float]]]:
    """Train until the bound of unseen series is above the target, or as long as the peer was trained."""
    torch.manual_seed(0)
    model = ours(name)
    series, held_series = as_series(*seen), as_series(*held)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    spent, rows = 0.0, []
    while spent < limit:
        begin = time.process_time()
        for _ in range(2 if smoke else 20):
            optimiser.zero_grad()
            model(series).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            optimiser.step()
        spent += time.process_time() - begin
        with torch.no_grad():
            value = -sum(float(model(held_series).loss) for _ in range(4)) / 4
        rows.append({"iteration": (2 if smoke else 20) * (len(rows) + 1), "seconds": spent, "elbo": value})
        print(f"stochdyn, {name}", rows[-1], flush=True)
        if value > target or smoke:
            break
    return model, rows


def _on_a_fine_grid(model: Any, ts: torch.Tensor, values: torch.Tensor, finer: int) -> dict[str, float]:
    """Hold the bound of continuous time against true weights of paths that are simulated in small steps."""
    fine, series = ours("matching", DT / finer), as_series(ts, values)
    own = fine.state_dict()
    fine.load_state_dict({k: v if v.shape == own[k].shape else own[k] for k, v in model.state_dict().items()})
    with torch.no_grad():
        weights = fine.posterior.draw(fine, series, 1).log_weight
        bound = -sum(float(model(series).loss) for _ in range(20)) / 20
    return {
        "steps": round(END * finer / DT), "series": len(values), "bound": bound, "simulated": float(weights.mean()),
        "stderr": float(weights.std() / len(values) ** 0.5),
    }  # fmt: skip


# Linux hands ru_maxrss down from the parent process; VmHWM is the process's own.
_CHILD = """
import sys; sys.path.insert(0, {folder!r})
import pathlib, re, resource, torch
torch.set_num_threads(1)
from run import memory_problem
status = pathlib.Path("/proc/self/status")
def peak():
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss, parameters = memory_problem({name!r}, 8, 4); torch.autograd.grad(loss(), parameters)
loss, parameters = memory_problem({name!r}, {steps}, {batch})
before = peak()
torch.autograd.grad(loss(), parameters)
print((peak() - before) / 1024)
"""


def memory_problem(
    name: str, steps: int, batch: int
) -> tuple[Callable[[], torch.Tensor], list[torch.nn.Parameter]]:
    """Return loss and parameters of a contender on the Lorenz model with so many steps."""
    ts, values = data(batch, 0)
    dt = 2.0 / steps
    if name == "torchsde":
        peer = PeerLatentSDE(dt)
        return lambda: -peer.elbo(ts, values), list(peer.parameters())
    posterior, _, rest = name.partition(", ")
    model, series = ours(posterior, dt, bool(rest)), as_series(ts, values)
    return lambda: model(series).loss, [p for p in model.parameters() if p.requires_grad]


def memory(smoke: bool) -> dict[str, Any]:
    """Growth of the peak memory by one gradient of the Lorenz model at 1000 steps, each in its own process."""
    steps, batch = (40, 8) if smoke else (1000, 128)
    sizes = {}
    for name in ("torchsde", "tight", "tight, recomputed segments", "matching"):
        code = _CHILD.format(folder=str(Path(__file__).parent), name=name, steps=steps, batch=batch)
        out = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        )
        sizes[name] = float(out.stdout)
        print(name, sizes[name], flush=True)
    return {
        "steps": steps,
        "batch": batch,
        "MiB": sizes,
        "share of torchsde": {
            k: v / max(sizes["torchsde"], 1e-9) for k, v in sizes.items() if k != "torchsde"
        },
    }


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", nargs="*", default=["gaussian", "tightness", "memory", "lorenz"])
    parser.add_argument("--batch", type=int, default=128, help="series of the race on the Lorenz model")
    parser.add_argument(
        "--iterations",
        type=int,
        default=300,
        help="iterations that torchsde is given there; 0 leaves the race out",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sections = {
        "gaussian": lambda: gaussian_against_simulated(options.smoke),
        "tightness": lambda: tightness(options.smoke),
        "memory": lambda: memory(options.smoke),
        "lorenz": lambda: lorenz(options.smoke, options.batch, options.iterations),
    }
    out = options.out or (None if options.smoke else RESULTS)
    for name in options.only:
        found = sections[name]()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            known = json.loads(out.read_text()) if out.exists() else {}
            out.write_text(
                json.dumps(
                    known | {"machine": machine("torchsde", "pyro-ppl", "jax", "diffrax"), name: found},
                    indent=1,
                )
                + "\n",
                encoding="utf-8",
            )


if __name__ == "__main__":
    main()
