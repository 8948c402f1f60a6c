"""Speed and memory of the time loop, each as a ratio against torchsde measured in the same run.

Both sides integrate the same equation with the same modules: one state driven through four memory states by one
Brownian motion ("five states"), a 64-64 tanh control network on time and all states, and the divergence of the control as
part of the loss. torchsde carries the divergence as a further state; here it is computed from the path, for all steps at once.

``python benchmarks/core/run.py [--smoke] [--out FILE.json]``; ``python benchmarks/core/table.py`` writes the table of the docs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchsde
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.core.girsanov import NoiseLaw, rate
from stochdyn.core.transition import steps_of, time_column

SPEEDS = (0.05, 0.3684, 2.7144, 20.0)
WEIGHTS = (0.6, 0.3, 0.5, 0.9)


class Network(nn.Module):
    """The control network of both sides."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs + 1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Return ``(..., 1)``."""
        return self.layers(torch.cat([t.expand(z[..., :1].shape), z], -1))


class Linear(nn.Module):
    """The drift of the five states: memory decays, and what it loses moves the first state."""

    def __init__(self) -> None:
        super().__init__()
        speeds, weights = torch.tensor(SPEEDS), torch.tensor(WEIGHTS)
        matrix = torch.zeros(5, 5)
        matrix[0, 0] = -0.7
        matrix[0, 1:] = -weights * speeds
        matrix[1:, 1:] = -torch.diag(speeds)
        self.register_buffer("transposed", matrix.T.contiguous())
        self.register_buffer("gain", torch.cat([weights.sum()[None], torch.ones(4)])[:, None])

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift, ``(..., 5)``."""
        return x @ self.transposed


class TorchsdeProblem(nn.Module):
    """The same law for torchsde, with the divergence as a sixth state."""

    sde_type = "ito"

    def __init__(self, network: nn.Module | None, drift: Linear, noise_type: str) -> None:
        super().__init__()
        self.network, self.base, self.noise_type = network, drift, noise_type
        self.size = 5 if network is None else 6

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Drift."""
        if self.network is None:
            return self.base(t, y)
        x = y[:, :5]
        u = self.network(t, x)
        return torch.cat([self.base(t, x) + u * self.base.gain[:, 0], 0.5 * u**2], 1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """Diffusion, ``(batch, size, 1)``."""
        gain = self.base.gain if self.size == 5 else torch.cat([self.base.gain, torch.zeros(1, 1)])
        return gain.expand(y.shape[0], self.size, 1)


def ours(
    network: nn.Module | None, drift: Linear, batch: int, steps: int, checkpoint: bool = False
) -> Tensor:
    """Loss by this library."""
    law = sd.DiffusionMeasure(torch.zeros(batch, 5), sd.SDE(drift, sd.Matrix(drift.gain)))
    if network is None:
        return law.sample(torch.linspace(0, 1, steps + 1)).x[:, -1].square().mean()
    path = law.controlled(network).sample(torch.linspace(0, 1, steps + 1), checkpoint=checkpoint)
    before = path.leading()[:-1]
    if "control" in path.aux:
        u = path.aux["control"].movedim(-2, 0)
    else:
        u = network(time_column(path.ts[:-1], before), before)
    kl = rate(NoiseLaw(u), NoiseLaw(), steps_of(path.ts, before))
    return path.x[:, -1].square().mean() + kl.mean()


def theirs(network: nn.Module | None, drift: Linear, batch: int, steps: int, noise_type: str) -> Tensor:
    """Loss by torchsde, with its own default Brownian motion."""
    problem = TorchsdeProblem(network, drift, noise_type)
    y0 = torch.zeros(batch, problem.size)
    end = torchsde.sdeint(problem, y0, torch.tensor([0.0, 1.0]), dt=1.0 / steps, method="euler")[-1]
    loss = end[:, :5].square().mean()
    return loss if network is None else loss + end[:, 5].mean()


def compare(
    contenders: dict[str, Callable[[], Tensor]], repeats: int, backward: bool
) -> dict[str, dict[str, float]]:
    """Time all contenders in turn, several times; the least processor time of each counts."""
    best = {name: {"forward_ms": float("inf"), "total_ms": float("inf")} for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            began = time.process_time()
            loss = run()
            middle = time.process_time()
            if backward:
                loss.backward()
            end = time.process_time()
            row = best[name]
            row["forward_ms"] = min(row["forward_ms"], 1e3 * (middle - began))
            row["total_ms"] = min(row["total_ms"], 1e3 * (end - began))
    return best


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Return the most memory that tensors kept for back-propagation take, recomputed segments included."""
    held: dict[int, int] = {}
    peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal peak
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            held[self.key] = held.get(self.key, 0) + 1
            sizes[self.key] = tensor.untyped_storage().nbytes()
            peak = max(peak, sum(sizes[k] for k in held))

        def __del__(self) -> None:
            held[self.key] -= 1
            if not held[self.key]:
                del held[self.key]

    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run().backward()
    return peak


def main() -> None:
    """Run all comparisons and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, steps, many, repeats = (16, 10, 20, 1) if options.smoke else (1024, 200, 1000, 5)
    network, drift = Network(5), Linear()
    rows = []

    def row(name: str, target: str, count: int, net: nn.Module | None, key: str) -> None:
        contenders = {
            "stochdyn": lambda: ours(net, drift, batch, count),
            "torchsde general": lambda: theirs(net, drift, batch, count, "general"),
            "torchsde scalar": lambda: theirs(net, drift, batch, count, "scalar"),
            "torchsde additive": lambda: theirs(net, drift, batch, count, "additive"),
        }
        times = compare(contenders, repeats if count == steps else max(1, repeats - 3), net is not None)
        peers = {n: t[key] / times["stochdyn"][key] for n, t in times.items() if n != "stochdyn"}
        rows.append({"name": name, "target": target, "steps": count, "times": times, "ratios": peers})
        print(name, {n: round(r, 2) for n, r in peers.items()}, flush=True)

    row("control network, forward and backward", "2", steps, network, "total_ms")
    row("trivial drift, forward", "15", steps, None, "forward_ms")
    row("control network, 1000 steps, forward and backward", "5", many, network, "total_ms")
    row("trivial drift, 1000 steps, forward", "5", many, None, "forward_ms")
    plain = saved_bytes(lambda: ours(network, drift, batch, steps))
    checkpointed = saved_bytes(lambda: ours(network, drift, batch, steps, checkpoint=True))
    memory = {"plain_bytes": plain, "checkpointed_bytes": checkpointed, "ratio": checkpointed / plain}
    print("memory", memory)
    report = {
        "smoke": options.smoke,
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "torchsde": torchsde.__version__,
            "python": platform.python_version(),
        },
        "setting": {"batch": batch, "states": 5, "network": "64-64 tanh", "dtype": "float32"},
        "rows": rows,
        "memory": memory,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
