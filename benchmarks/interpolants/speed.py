"""Training steps per second beside TorchCFM, and what its plans and ours are worth."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from data import LAWS, Joined, selu_network
from torch import Tensor

from stochdyn.interpolants import EntropicCoupling, Interpolant, InterpolantRegression

__all__ = ["measure_coupling", "measure_speed"]

Step = Callable[[Tensor, Tensor], None]
#: Coupling, TorchCFM's class and its options, our coupling, how many steps a plan serves, and the target.
CASES: list[tuple[str, str, dict[str, Any], str, int, float | None]] = [
    ("independent", "ConditionalFlowMatcher", {"sigma": 0.0}, "independent", 1, 1.4),
    ("ot", "ExactOptimalTransportConditionalFlowMatcher", {"sigma": 0.0}, "ot", 1, None),
    ("ot", "ExactOptimalTransportConditionalFlowMatcher", {"sigma": 0.0}, "ot", 4, 3.0),
    (
        "entropic",
        "SchrodingerBridgeConditionalFlowMatcher",
        {"sigma": 1.0, "ot_method": "sinkhorn"},
        "entropic",
        1,
        None,
    ),
    (
        "entropic",
        "SchrodingerBridgeConditionalFlowMatcher",
        {"sigma": 1.0, "ot_method": "sinkhorn"},
        "entropic",
        8,
        5.0,
    ),
]


def our_step(coupling: str, reuse: int) -> Step:
    """Return a training step of ours."""
    torch.manual_seed(0)
    net = selu_network()
    gamma = "brownian" if coupling == "entropic" else "zero"
    # TorchCFM evaluates the network once a point, so we do
    objective = InterpolantRegression(
        Interpolant("linear", gamma), velocity=Joined(net), coupling=coupling, reuse=reuse, antithetic=False
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)

    def step(x0: Tensor, x1: Tensor) -> None:
        optimizer.zero_grad()
        objective((x0, x1)).loss.backward()
        optimizer.step()

    return step


def their_step(name: str, options: dict[str, Any]) -> Step:
    """Return a training step as in TorchCFM's tutorials."""
    import torchcfm.conditional_flow_matching as flow_matching

    torch.manual_seed(0)
    net, matcher = selu_network(), getattr(flow_matching, name)(**options)
    optimizer = torch.optim.Adam(net.parameters())

    def step(x0: Tensor, x1: Tensor) -> None:
        optimizer.zero_grad()
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        (net(torch.cat([xt, t[:, None]], -1)) - ut).square().mean().backward()
        optimizer.step()

    return step


def bare_step() -> Step:
    """Return a step of the network and its optimiser alone, on inputs and targets that cost nothing: the limit of any library."""
    torch.manual_seed(0)
    net = selu_network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    inputs = torch.randn(256, 3)

    def step(x0: Tensor, x1: Tensor) -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(inputs), x1).backward()
        optimizer.step()

    return step


def measure_speed(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Time blocks of steps in turn, and take the least processor time of each."""
    rows = []
    for size in (256,):
        for coupling, name, options, ours, reuse, target in CASES:
            block = 8 if smoke else 24
            repeats = 1 if smoke else (60 if coupling == "independent" else 14)
            contenders = {"stochdyn": our_step(ours, reuse), "TorchCFM": their_step(name, options)}
            if coupling == "independent":
                contenders["network alone"] = bare_step()
            g = torch.Generator().manual_seed(0)
            batches = [(LAWS["8gaussians"](size, g), LAWS["moons"](size, g)) for _ in range(block)]
            best = dict.fromkeys(contenders, float("inf"))
            for run in contenders.values():
                run(*batches[0])
            for _ in range(repeats):
                for who, run in contenders.items():
                    start = time.process_time()
                    for batch in batches:
                        run(*batch)
                    best[who] = min(best[who], (time.process_time() - start) / block)
            row = {
                "batch": size, "coupling": coupling, "reuse": reuse, "target": target if size == 256 else None,
                "steps per second": {k: 1 / v for k, v in best.items()}, "ratio": best["TorchCFM"] / best["stochdyn"],
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    return {"rows": rows, "network": "three hidden layers of 64, SELU", "task": "8gaussians to moons"}


def measure_coupling(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Entropic plans at small strengths: marginal errors, distinct points, means; TorchCFM's and ours."""
    from torchcfm.conditional_flow_matching import SchrodingerBridgeConditionalFlowMatcher

    rows = []
    for sigma in (0.1, 0.2, 0.5, 1.0):
        g = torch.Generator().manual_seed(1)
        x0, x1 = LAWS["8gaussians"](256, g), LAWS["moons"](256, g)
        start = time.process_time()
        coupling = EntropicCoupling(2 * sigma**2)
        plan = coupling.plan(x0, x1)
        partner = coupling.pair(x0, x1)
        ours = {
            "marginal error": float(plan.marginal_error),
            "distinct sources": len(x0),
            "distinct targets": len(partner.unique()),
            "target mean": x1[partner].mean(0).tolist(),
            "seconds": time.process_time() - start,
        }
        torch.manual_seed(0)
        matcher = SchrodingerBridgeConditionalFlowMatcher(sigma=sigma, ot_method="sinkhorn")
        start = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            their_plan = torch.as_tensor(matcher.ot_sampler.get_map(x0, x1))
            a, b = matcher.ot_sampler.sample_plan(x0, x1)
        error = max(float((their_plan.sum(k) - 1 / 256).abs().sum()) for k in (0, 1))
        theirs = {
            "marginal error": error,
            "distinct sources": len(a.unique(dim=0)),
            "distinct targets": len(b.unique(dim=0)),
            "target mean": b.mean(0).tolist(),
            "warnings": sorted({str(w.category.__name__) for w in caught}),
            "seconds": time.process_time() - start,
        }
        rows.append({"sigma": sigma, "stochdyn": ours, "TorchCFM": theirs, "true mean": x1.mean(0).tolist()})
        print(rows[-1], flush=True)
    return {"batch": 256, "task": "8gaussians to moons", "rows": rows}
