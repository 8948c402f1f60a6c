"""Flows between two-dimensional laws: distance to the target and straightness, beside TorchCFM."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from data import LAWS, Joined, selu_network
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.interpolants import Interpolant, InterpolantRegression, integrate_ode, time_grid

__all__ = ["CASES", "METHODS", "measure"]

CASES = (("8gaussians", "moons"), ("N", "8gaussians"), ("N", "moons"), ("moons", "8gaussians"))
METHODS = ("stochdyn, ot", "TorchCFM, ot", "TorchCFM, independent")
#: One recipe for all: batch, learning rate at the start of a cosine, decay of the average of the parameters.
BATCH, LR, DECAY = 256, 2e-3, 0.995


def _train_ours(x0: Tensor, x1: Tensor, steps: int, seed: int) -> tuple[nn.Module, float]:
    torch.manual_seed(seed)
    net = selu_network()
    objective = InterpolantRegression(Interpolant("linear", "zero"), velocity=Joined(net), coupling="ot")
    start = time.process_time()
    result = sd.fit(
        objective, (x0, x1), steps=steps, lr=LR, batch_size=BATCH, seed=seed, progress=False, ema=DECAY,
        optimizer=lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip
    seconds = time.process_time() - start
    average = {n.removeprefix("fields.networks.velocity.net."): v for n, v in (result.ema or {}).items()}
    net.load_state_dict(average)
    return net, seconds


def _train_theirs(x0: Tensor, x1: Tensor, steps: int, seed: int, transport: bool) -> tuple[nn.Module, float]:
    from torchcfm.conditional_flow_matching import (
        ConditionalFlowMatcher,
        ExactOptimalTransportConditionalFlowMatcher,
    )

    torch.manual_seed(seed)
    import numpy as np

    np.random.seed(seed)  # noqa: NPY002  (what POT's sampler draws from)
    net = selu_network()
    kind = ExactOptimalTransportConditionalFlowMatcher if transport else ConditionalFlowMatcher
    matcher = kind(sigma=0.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    )
    start = time.process_time()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(x0))
        index, order = order[:BATCH], order[BATCH:]
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0[index], x1[index])
        optimizer.zero_grad()
        (net(torch.cat([xt, t[:, None]], -1)) - ut).square().mean().backward()
        optimizer.step()
        cosine.step()
        average.update_parameters(net)
    seconds = time.process_time() - start
    return average.module, seconds


def _evaluate(net: nn.Module, x0: Tensor, x1: Tensor, squared_distance: float) -> dict[str, float]:
    """Distance between what the flow makes of ``x0`` and ``x1``, and the energy of its paths."""
    field = Joined(net)
    energy: list[Tensor] = []

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return field(t.expand(len(x), 1), x)

    with torch.no_grad():
        ts = time_grid(100, like=x0)
        path = integrate_ode(velocity, x0, ts, "rk4", trajectory=True)
        for t, x in zip(ts, path, strict=True):
            energy.append(velocity(t, x).square().sum(-1).mean())
    action = float(torch.trapezoid(torch.stack(energy), ts))
    w2 = sd.diagnostics.emd(path[-1], x1)
    return {
        "W2": w2,
        "W2 squared": w2**2,
        "energy": action,
        "NPE": abs(action - squared_distance) / squared_distance,
    }


def measure(smoke: bool, seeds: int, steps: int, methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """Train and evaluate every method on every pair of laws."""
    pool, test = (1000, 200) if smoke else (50_000, 1500)
    rows: list[dict[str, Any]] = []
    squares = {}
    for source, target in CASES:
        g = torch.Generator().manual_seed(12345)
        # the squared distance of the two laws, for the energy: the mean over several pairs of samples
        reference = [
            sd.diagnostics.emd(LAWS[source](test, g), LAWS[target](test, g)) ** 2
            for _ in range(1 if smoke else 4)
        ]
        squares[source, target] = sum(reference) / len(reference)
        rows.append({
            "source": source, "target": target, "W2 squared of the laws": squares[source, target],
            "spread of that": max(reference) - min(reference),
            "floor": sd.diagnostics.emd(LAWS[target](test, g), LAWS[target](test, g)),
        })  # fmt: skip
        print(rows[-1], flush=True)
    for seed, (source, target) in itertools.product(range(seeds), CASES):
        g = torch.Generator().manual_seed(1000 + seed)
        train = LAWS[source](pool, g), LAWS[target](pool, g)
        held_out = LAWS[source](test, g), LAWS[target](test, g)
        for method in methods:
            if method.startswith("stochdyn"):
                net, seconds = _train_ours(*train, steps, seed)
            else:
                net, seconds = _train_theirs(*train, steps, seed, ", ot" in method)
            row = {"source": source, "target": target, "seed": seed, "method": method, "seconds": seconds}
            row |= _evaluate(net, *held_out, squares[source, target])
            rows.append(row)
            print(
                f"{source} to {target}, seed {seed}, {method}: W2 {row['W2']:.3f}, NPE {row['NPE']:.4f}, "
                f"{seconds:.1f} s",
                flush=True,
            )
    return {
        "steps": steps,
        "batch": BATCH,
        "seeds": seeds,
        "test points": test,
        "learning rate": LR,
        "rows": rows,
    }
