"""Jump processes against other packages, in one run: processor time, one thread, the least of several repetitions.

    OMP_NUM_THREADS=1 python benchmarks/jumps/race.py

Needs hmmlearn, deeptime, GillesPy2 (with scons and a compiler) and rebop beside stochdyn; a peer that isn't there is left out of the table.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from common import best_time, machine, panel_of
from scipy.sparse.linalg import expm_multiply

import stochdyn as sd
from stochdyn.jumps import (
    GaussianLevels,
    JumpMeasure,
    PanelData,
    ReactionNetwork,
    fit_rates,
    log_evidence,
    transition,
)

RESULTS = Path(__file__).parent / "results" / "race.json"
D = torch.float64


def generator(size: int) -> torch.Tensor:
    """Return a generator with exit rates of some 2.5."""
    q = torch.rand(size, size, dtype=D, generator=torch.Generator().manual_seed(0))
    q.fill_diagonal_(0.0)
    return q - torch.diag(q.sum(-1))


def with_gradient(f: Callable[[torch.Tensor], torch.Tensor], q: torch.Tensor) -> Callable[[], object]:
    """Return a job: a value and its gradient in the generator."""

    def job() -> object:
        leaf = q.clone().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)

    return job


def gaps(repeats: int) -> list[dict[str, Any]]:
    """30 000 distinct gaps of six states."""
    q, source = generator(6), torch.Generator().manual_seed(1)
    dt = torch.rand(30_000, dtype=D, generator=source) * 2
    weight = torch.rand(30_000, 6, 6, dtype=D, generator=source)
    ours = best_time(with_gradient(lambda a: (transition(a, dt) * weight).sum(), q), repeats)
    theirs = best_time(
        with_gradient(lambda a: (torch.matrix_exp(a * dt[:, None, None]) * weight).sum(), q), repeats
    )
    return [row("30 000 gaps, 6 states, value and gradient", ours, "torch.matrix_exp", theirs, 30)]


def hidden(repeats: int) -> list[dict[str, Any]]:
    """300 series of 100 noisy levels of six states."""
    q, source = generator(6), torch.Generator().manual_seed(2)
    start = torch.full((6,), 1 / 6, dtype=D)
    seen = GaussianLevels(torch.arange(6, dtype=D), 0.7)
    regular = torch.arange(100, dtype=D) * 0.2
    own = torch.rand(300, 100, dtype=D, generator=source).mul(0.4).cumsum(-1)
    y = torch.rand(300, 100, dtype=D, generator=source) * 5

    def ours(times: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda a: log_evidence(JumpMeasure(start, a), times, y, seen).sum()

    def pyros(times: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def value(a: torch.Tensor) -> torch.Tensor:
            gap = torch.cat([torch.zeros_like(times[..., :1]), times.diff(dim=-1)], -1)
            p = transition(a, gap.reshape(-1)).reshape(*gap.shape, 6, 6)
            # DiscreteHMM has a transition before the first observation
            law = dist.DiscreteHMM(start.log(), p.clamp(min=1e-300).log(), dist.Normal(seen.levels, 0.7))
            return law.log_prob(y).sum()

        return value

    rows = []
    for name, times, bar in (("equal gaps", regular, 3.0), ("gaps of their own", own, 1.5)):
        mine = best_time(with_gradient(ours(times), q), repeats)
        other = best_time(with_gradient(pyros(times), q), repeats)
        rows.append(
            row(f"hidden evidence and gradient, 300 x 100, {name}", mine, "Pyro DiscreteHMM", other, bar)
        )
    try:
        from hmmlearn.hmm import GaussianHMM
    except ImportError:
        return rows
    model = GaussianHMM(6, "spherical", init_params="")
    model.startprob_, model.transmat_ = start.numpy(), transition(q, 0.2).numpy()
    model.means_, model.covars_ = np.arange(6.0)[:, None], np.full(6, 0.49)
    flat, lengths = y.reshape(-1, 1).numpy(), [100] * 300
    other = best_time(lambda: model.score(flat, lengths), repeats)
    mine = best_time(with_gradient(ours(regular), q), repeats)
    rows.append(
        row("the same, equal gaps, against a value without gradient", mine, "hmmlearn score", other, 1 / 1.3)
    )
    return rows


def markov_models(repeats: int) -> list[dict[str, Any]]:
    """Posterior rates of 300 series of 100 states, and ten iterations of a hidden model, beside deeptime's at one lag."""
    try:
        from deeptime.markov import TransitionCountEstimator
        from deeptime.markov.hmm import GaussianOutputModel, HiddenMarkovModel, MaximumLikelihoodHMM
        from deeptime.markov.msm import BayesianMSM
    except ImportError:
        return []
    q, source = generator(6), torch.Generator().manual_seed(3)
    p = transition(q, 0.2)
    states = [torch.randint(6, (300,), generator=source)]
    for _ in range(99):
        states.append(torch.multinomial(p[states[-1]], 1, generator=source)[:, 0])
    seen = torch.stack(states, -1).numpy()
    panel = panel_of(seen, 0.2, 6)
    counts = TransitionCountEstimator(1, "effective").fit(list(seen)).fetch_model()
    rows = []
    for name, reversible in (("", False), (", in detailed balance", True)):
        ours = best_time(lambda r=reversible: fit_rates(panel, reversible=r), repeats)
        theirs = best_time(
            lambda r=reversible: BayesianMSM(100, reversible=r).fit(counts),
            repeats,
        )
        rows.append(
            row(
                f"1000 posterior draws of 30 rates, 300 x 100 states{name}",
                ours,
                "deeptime BayesianMSM, 100 draws of transition probabilities at one lag",
                theirs,
                1.0,
            )
        )
    levels = GaussianLevels(torch.arange(6, dtype=D), 0.7)
    y = torch.as_tensor(seen) + 0.7 * torch.randn(300, 100, dtype=D, generator=source)
    start, times = torch.full((6,), 1 / 6, dtype=D), torch.arange(100, dtype=D) * 0.2
    gradient = with_gradient(lambda a: log_evidence(JumpMeasure(start, a), times, y, levels).sum(), q)
    ours = 10 * best_time(gradient, repeats)
    output = GaussianOutputModel(6, np.arange(6.0), np.full(6, 0.7))
    model = HiddenMarkovModel(p.numpy(), output, initial_distribution=start.numpy())
    series = list(y.numpy())
    # with so small an accuracy all ten iterations are made
    theirs = best_time(lambda: MaximumLikelihoodHMM(model, 1, maxit=10, accuracy=-1e30).fit(series), repeats)
    rows.append(
        row(
            "hidden evidence and gradient, ten times", ours, "deeptime HMM, ten iterations of EM", theirs, 1.0
        )
    )
    return rows


def simulation(repeats: int) -> list[dict[str, Any]]:
    """1000 paths of a gene that switches, to T = 20."""
    network = ReactionNetwork(
        ["Off -> On", "On -> Off", "On -> On + P", "P -> 0"], [0.6, 1.4, 12.0, 1.0], {"Off": 1}
    )
    ours = best_time(lambda: network.sample([20.0], 1000, 0), repeats)
    rows = []
    try:
        import rebop

        other = rebop.Gillespie()
        other.add_reaction(0.6, ["Off"], ["On"])
        other.add_reaction(1.4, ["On"], ["Off"])
        other.add_reaction(12.0, ["On"], ["On", "P"])
        other.add_reaction(1.0, ["P"], [])
        theirs = best_time(
            lambda: [other.run({"Off": 1}, tmax=20, nb_steps=1, rng=k) for k in range(1000)], repeats
        )
        rows.append(row("1000 exact paths of a gene, T = 20", ours, "rebop, path by path", theirs, 1.0))
    except ImportError:
        pass
    try:
        import gillespy2

        model = gillespy2.Model(name="gene")
        rates = [gillespy2.Parameter(name=f"k{i}", expression=v) for i, v in enumerate((0.6, 1.4, 12.0, 1.0))]
        off, on, p = (
            gillespy2.Species(name=n, initial_value=v) for n, v in (("Off", 1), ("On", 0), ("P", 0))
        )
        model.add_parameter(rates)
        model.add_species([off, on, p])
        sides = (({off: 1}, {on: 1}), ({on: 1}, {off: 1}), ({on: 1}, {on: 1, p: 1}), ({p: 1}, {}))
        model.add_reaction(
            [
                gillespy2.Reaction(name=f"r{i}", reactants=a, products=b, rate=rates[i])
                for i, (a, b) in enumerate(sides)
            ]
        )
        model.timespan(gillespy2.TimeSpan([0.0, 20.0]))
        solver = gillespy2.NumPySSASolver(model=model)
        begin = time.process_time()
        model.run(solver=solver, number_of_trajectories=50, seed=1)
        theirs = 20 * (time.process_time() - begin)
        rows.append(
            row(
                "1000 exact paths of a gene, T = 20",
                ours,
                "GillesPy2 in NumPy (50 paths, times 20)",
                theirs,
                1.0,
            )
        )
    except Exception as error:  # a peer that doesn't run is left out
        warnings.warn(f"GillesPy2 didn't run: {error}", stacklevel=1)
    return rows


def projection(repeats: int) -> list[dict[str, Any]]:
    """An epidemic of 100 on 101 x 101 counts of susceptible and infected."""
    network = ReactionNetwork(["S + I -> 2 I", "I -> 0"], [0.3 / 100, 0.1], {"S": 98, "I": 2})
    truncated = network.truncate({"S": 98, "I": 100})
    p = np.zeros(len(truncated.grid))
    p[98 * 101 + 2] = 1.0
    turned = truncated.generator.T.tocsr()
    ours = best_time(lambda: truncated.propagate(p, 20.0), repeats)
    theirs = best_time(lambda: expm_multiply(turned * 20.0, p), repeats)
    return [row("law of an epidemic at t = 20, 9999 counts", ours, "scipy expm_multiply", theirs, 1.0)]


def posteriors() -> list[dict[str, Any]]:
    """Times that stand alone: the heart-transplant panel, and posterior paths."""
    panel = PanelData(sd.datasets.heart_transplants()._asdict(), "subject", "years", "state", exact_entry=[4])
    mask = np.zeros((4, 4), dtype=bool)
    for i, j in ((0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (2, 1), (2, 3)):
        mask[i, j] = True
    fits: list[Any] = []
    spent = best_time(lambda: fits.append(fit_rates(panel, mask, prior=(-1.0, 1.5), seed=len(fits))), 5)
    law = JumpMeasure([0.5, 0.3, 0.2], [[0.0, 1.0, 0.3], [0.4, 0.0, 2.0], [0.8, 0.5, 0.0]])
    times, y = [0.2, 0.5, 1.3, 2.0, 3.1], [0.1, -0.3, 1.2, 1.9, 0.4]
    post = law.conditioned(times, y, GaussianLevels([0.0, 1.0, 2.0], 0.5))
    paths = best_time(lambda: post.sample_record(3.5, 20_000, 0), 3)
    return [
        {
            "job": "heart transplants: maximum and posterior of 7 rates",
            "seconds": spent,
            "bar": 1.5,
            "deviance": -2 * fits[0].log_likelihood,
            "khat": [round(fit.khat, 2) for fit in fits],
            "effective": [round(fit.effective) for fit in fits],
        },
        {"job": "20 000 posterior paths given five noisy levels", "seconds": paths, "bar": 1.0},
    ]


def row(job: str, ours: float, peer: str, theirs: float, bar: float) -> dict[str, Any]:
    """Return one race; the bar is the ratio that was asked for."""
    return {
        "job": job,
        "seconds": ours,
        "peer": peer,
        "peer_seconds": theirs,
        "ratio": theirs / ours,
        "bar": bar,
    }


def main() -> None:
    """Run all races and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for job in (gaps, hidden, markov_models, simulation, projection):
        found_here = job(options.repeats)
        rows += found_here
        print("\n".join(json.dumps(one) for one in found_here), flush=True)
    alone = posteriors()
    print(json.dumps(alone), flush=True)
    found = {
        "machine": machine("scipy", "pyro-ppl", "hmmlearn", "deeptime", "gillespy2", "rebop"),
        "races": rows,
        "alone": alone,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
