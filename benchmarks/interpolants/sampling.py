"""How many evaluations of the network a sample takes: our integrators against Euler's method with 100 steps."""

from __future__ import annotations

from typing import Any

import torch
from data import LAWS
from transport import CASES, _train_ours

import stochdyn as sd
from stochdyn.interpolants import integrate_ode, time_grid

__all__ = ["measure"]

#: Method, steps and evaluations.
RUNS = (
    ("euler", 100, 100),
    ("midpoint", 5, 10),
    ("midpoint", 10, 20),
    ("heun", 10, 20),
    ("heun", 25, 50),
    ("rk4", 10, 40),
)


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Train one flow a pair of laws and seed, and sample it in several ways from the same starts."""
    pool, test = (1000, 200) if smoke else (50_000, 1500)
    rows = []
    for source, target in CASES:
        for seed in range(seeds):
            g = torch.Generator().manual_seed(2000 + seed)
            net, _ = _train_ours(LAWS[source](pool, g), LAWS[target](pool, g), steps, seed)
            x0, x1 = LAWS[source](test, g), LAWS[target](test, g)
            with torch.no_grad():
                for method, count, evaluations in RUNS:
                    x = integrate_ode(
                        lambda t, x, net=net: net(torch.cat([x, t.expand(len(x), 1)], -1)),
                        x0,
                        time_grid(count),
                        method,
                    )
                    rows.append({
                        "source": source, "target": target, "seed": seed, "method": method, "steps": count,
                        "evaluations": evaluations, "W2": sd.diagnostics.emd(x, x1),
                    })  # fmt: skip
                    print(rows[-1], flush=True)
    return {"training steps": steps, "test points": test, "rows": rows}
