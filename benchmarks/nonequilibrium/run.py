"""Entropy production against exact answers: from trajectories alone, by networks of currents, and by learnt scores.

    OMP_NUM_THREADS=1 python benchmarks/nonequilibrium/run.py
    OMP_NUM_THREADS=1 python benchmarks/nonequilibrium/run.py beads neep ring pair swimmers trajectories counts

Each part writes ``results/PART.json``; ``table.py`` makes the table of the documentation from them. All options are the defaults.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import stochdyn as sd
from stochdyn import nonequilibrium as ne
from stochdyn.core import Hutchinson

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def chain() -> ne.LinearSteadyState:
    """Return five beads between baths of temperatures 1 and 10."""
    force = torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1) - 2 * torch.eye(5)
    return ne.LinearSteadyState(force, torch.diag((2 * torch.linspace(1, 10, 5)).sqrt()))


def decay(steps: int) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """Return a learning rate that falls to zero over a run, along a cosine."""
    return partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)


def beads(smoke: bool) -> list[Row]:
    """Estimate from trajectories alone, many times, at two lengths: bias, scatter and coverage."""
    truth, rows = chain(), []
    for horizon, repeats in ((100.0, 200), (1000.0, 100)):
        repeats = 2 if smoke else repeats
        found, seconds = [], 0.0
        for seed in range(repeats):
            x = truth.law.sample(0.01 * torch.arange(int(100 * horizon)).double(), generator=seed).x
            start = time.process_time()
            found.append(ne.short_time_entropy(x, 0.01))
            seconds += time.process_time() - start
        rates = torch.tensor([f.rate for f in found])
        inside = sum(abs(f.rate - truth.rate) < 1.96 * f.stderr for f in found)
        rows.append(
            {
                "horizon": horizon, "repeats": repeats, "exact": truth.rate, "mean": float(rates.mean()),
                "sd": float(rates.std()), "bound": truth.smallest_stderr(horizon),
                "in_sample": float(torch.tensor([f.in_sample for f in found]).mean()), "coverage": inside / repeats,
                "seconds": seconds / repeats,
            }
        )  # fmt: skip
    return rows


def neep(smoke: bool) -> list[Row]:
    """Train currents by NEEP on ten thousand time units, and take the bound on as many that weren't seen."""
    truth, rows = chain(), []
    ts = 0.01 * torch.arange(500 if smoke else 100_000).double()
    train, test = (ne.neighbours(truth.law.sample(ts, 10, generator=seed).x.float()) for seed in (0, 1))
    cases: list[tuple[str, tuple[int, ...], float, int]] = [
        ("linear current", (), 0.0, 1500),
        ("linear current and network 64-64", (64, 64), 0.0, 1500),
        ("the same, alpha = -0.5", (64, 64), -0.5, 1500),
    ]
    for name, hidden, alpha, steps in cases:
        torch.manual_seed(0)
        start = time.process_time()
        objective = ne.NEEP(ne.CurrentNetwork(train[::97, 0], hidden), 0.01, alpha)
        sd.fit(
            objective, train, steps=3 if smoke else steps, lr=3e-3, batch_size=4096, seed=0, progress=False
        )
        seconds = time.process_time() - start
        bound = objective.bound(test)
        rows.append({"name": name, "bound": float(bound), "stderr": float(bound.stderr), "seconds": seconds})
    return rows


def ring(smoke: bool) -> list[Row]:
    """Follow Euler paths on a ring whose noise depends on the place, for a total time of 200 000, five times."""
    rows = []
    for force, seed in ((0.0, 0), *((1.0, seed) for seed in range(5))):
        system = sd.datasets.driven_ring(force, 1.0, 0.5)
        assert system.score is not None
        current, parts = ne.SteadyCurrent(system.sde, system.score), []
        start = time.process_time()
        for part in range(1 if smoke else 10):
            law = sd.DiffusionMeasure(system.sample(4 if smoke else 2000, 100 * seed + part), system.sde)
            path = law.sample(torch.arange(0, 10.0, 0.01).double(), generator=1000 + 100 * seed + part)
            s = ne.dissipation(path, None, current) / 9.99
            # what must not be used: the ratio of the Euler densities of a path and its reversal
            x = path.x
            step = x[:, 1:] - x[:, :-1]

            def density(y: torch.Tensor, move: torch.Tensor, sde: sd.SDE = system.sde) -> torch.Tensor:
                t = torch.zeros((), dtype=torch.float64)
                drift, noise = sde.drift(t, y), sde.diffusion(t, y).value
                return -0.5 * (move - 0.01 * drift).square() / (0.01 * noise.square()) - noise.log()

            ratio = (density(x[:, :-1], step) - density(x[:, 1:], -step)).sum((1, 2)) / 9.99
            parts.append(torch.stack([s, ratio], -1))
        every = torch.cat(parts)
        rows.append(
            {
                "force": force, "seed": seed, "exact": system.entropy_production, "trapezoid": float(every[:, 0].mean()),
                "stderr": float(every[:, 0].std() / len(every) ** 0.5), "euler_ratio": float(every[:, 1].mean()),
                "seconds": time.process_time() - start,
            }
        )  # fmt: skip
    return rows


def pair(smoke: bool) -> list[Row]:
    """Learn the score of a pair of swimmers from 20 000 snapshots five times, and once with the residual."""
    number = 50 if smoke else 20_000
    system, rows = sd.datasets.swimmer_pair(), []
    assert system.entropy_production is not None
    for seed in range(1 if smoke else 5):
        x, y = system.sample(number, 2 * seed), system.sample(number, 2 * seed + 1)
        rule = ne.sum_rule(system.sde, y, base=system.base_score)
        for weight, steps in ((0.0, 800), (0.1, 600))[: 1 if seed else 2]:
            torch.manual_seed(seed)
            start = time.process_time()
            score = ne.SteadyScore(x, base=system.base_score, periods=system.periods)
            objective = ne.SteadyScoreMatching(system.sde, score, fp_weight=weight)
            sd.fit(
                objective, x, steps=2 if smoke else steps, lr=2e-3, scheduler=decay(steps),
                batch_size=min(1024, number), seed=seed, progress=False,
            )  # fmt: skip
            seconds = time.process_time() - start
            current = ne.SteadyCurrent(system.sde, score)
            total = ne.entropy_production_rate(current, y)
            parts = ne.entropy_production_rate(current, y, by={"x": [0], "g": [1]})
            residual = sd.core.FokkerPlanck(system.sde).residual(
                objective.flow, 0.0, y[:2000], stationary=True
            )
            rows.append(
                {
                    "seed": seed, "weight": weight, "exact": system.entropy_production, "total": float(total),
                    "x": float(parts["x"]), "g": float(parts["g"]), "rule": float(rule), "rule_stderr": float(rule.stderr),
                    "residual": float(residual.detach().square().mean().sqrt()), "seconds": seconds,
                    "asymmetry": float(objective.conservativity(y[:2000], generator=0).share),
                }
            )  # fmt: skip
    return rows


def swimmers(smoke: bool) -> list[Row]:
    """Learn a local score of sixteen swimmers in a trap; the example does sixty-four."""
    number, snapshots, steps, batch_size = (3, 20, 2, 8) if smoke else (16, 2000, 900, 64)
    trap = sd.datasets.trapped_swimmers(number)
    states = trap.sample(snapshots, generator=0).float()
    train, test = states[: snapshots * 3 // 4], states[snapshots * 3 // 4 :]
    torch.manual_seed(0)
    start = time.process_time()
    score = ne.ParticleScore(num_extra=2, cutoff=3.5, base=trap.base_score)
    sde = sd.SDE(trap.sde.drift, sd.Diagonal(torch.tensor([0.2] * 4).sqrt().repeat(number)))
    objective = ne.SteadyScoreMatching(sde, score, method=Hutchinson(num_probes=1))
    sd.fit(
        objective, train, steps=steps, lr=3e-3, scheduler=decay(steps), batch_size=batch_size, seed=0,
        progress=False,
    )  # fmt: skip
    seconds = time.process_time() - start
    rate, rule = (
        ne.entropy_production_rate(ne.SteadyCurrent(sde, score), test),
        ne.sum_rule(sde, test, base=trap.base_score),
    )
    return [
        {
            "swimmers": number, "score": float(rate) / number, "score_stderr": float(rate.stderr) / number,
            "rule": float(rule) / number, "rule_stderr": float(rule.stderr) / number, "seconds": seconds,
        }
    ]  # fmt: skip


def trajectories(smoke: bool) -> list[Row]:
    """Estimate the rate of each of sixteen swimmers from trajectories alone, by currents of pairs: 100 of length 10, in steps of .01."""
    number, runs, chunks, stretch = (3, 40, 1, 40) if smoke else (16, 100, 10, 400)
    trap = sd.datasets.trapped_swimmers(number)
    x, source = trap.sample(runs, generator=3), torch.Generator().manual_seed(53)
    states = [x[:, None]]
    for _ in range(chunks):
        # every fourth of Heun's steps is seen, so that the steps that are seen are those of the equation
        law = sd.DiffusionMeasure(x, trap.sde, method=sd.core.Heun())
        path = law.sample(0.0025 * torch.arange(stretch + 1).double(), generator=source).x
        x = path[:, -1]
        states.append(path[:, 4::4].clone())
    groups = {str(i): list(range(4 * i, 4 * i + 4)) for i in range(number)}
    start = time.process_time()
    found = ne.short_time_entropy(torch.cat(states, 1), 0.01, ne.PairCurrents(2, cutoff=3.0), by=groups)
    parts = torch.tensor(list(found.parts.values()))
    return [
        {
            "swimmers": number, "rate": found.rate / number, "stderr": found.stderr / number,
            "per_lag": {lag: value / number for lag, value in found.per_lag.items()}, "in_sample": found.in_sample / number,
            "lowest": float(parts.min()), "highest": float(parts.max()), "spread": float(parts.std()),
            "seconds": time.process_time() - start,
        }
    ]  # fmt: skip


@dataclass
class _One:
    counts: torch.Tensor
    ts: torch.Tensor


def counts(smoke: bool) -> list[Row]:
    """Estimate from the counted jumps of a three-state cycle, many times."""
    rates = sd.jumps.RateMatrix(torch.tensor([[0, 2, 0.5], [1, 0, 4], [3, 0.5, 0]]).double())
    law, exact, rows = sd.jumps.JumpMeasure(rates.stationary(), rates), float(rates.entropy_production()), []
    for horizon, repeats in ((30.0, 400), (100.0, 400), (1000.0, 200)):
        record = law.sample_record(horizon, 4 if smoke else repeats, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [ne.entropy_from_counts(_One(n, record.ts)) for n in record.counts]
        values = torch.tensor([float(f) for f in found])
        inside = sum(abs(float(f) - exact) < 1.96 * float(f.stderr) for f in found)
        rows.append(
            {
                "horizon": horizon, "repeats": len(found), "exact": exact, "mean": float(values.mean()),
                "sd": float(values.std()), "coverage": inside / len(found),
            }
        )  # fmt: skip
    return rows


PARTS: dict[str, Callable[[bool], list[Row]]] = {
    "beads": beads,
    "neep": neep,
    "ring": ring,
    "pair": pair,
    "swimmers": swimmers,
    "trajectories": trajectories,
    "counts": counts,
}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        rows = PARTS[part](options.smoke)
        for row in rows:
            print(part, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if not options.smoke:
            report = {"machine": machine("stochdyn"), "rows": rows}
            (RESULTS / f"{part}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
