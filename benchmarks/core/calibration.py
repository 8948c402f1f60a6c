"""Is ``fit_posterior`` with its defaults calibrated? Coverage and ranks in four families of models, the truth drawn from the prior.

    OMP_NUM_THREADS=1 python benchmarks/core/calibration.py --count 200

Each data set has a seed of its own, and its ranks are added to the JSON file as soon as they are known: a run that is cut off goes on
where it was. ``calibration_table.py`` makes the table of the documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _calibration import DRAWS, F64, posterior_rank, run_calibration, seed_of

RESULTS = Path(__file__).parent / "results" / "calibration.json"
ZERO = torch.zeros((), dtype=F64)


def relaxation(times: Tensor, y: Tensor | None) -> None:
    """Thirty noisy values, at irregular times, of an Ornstein-Uhlenbeck process that starts in its steady state."""
    rate = pyro.sample("rate", dist.LogNormal(ZERO, 0.7))
    level = pyro.sample("level", dist.Normal(ZERO, 2.0))
    spread = pyro.sample("spread", dist.LogNormal(ZERO, 0.5))
    obs_scale = pyro.sample("obs_scale", dist.LogNormal(ZERO - 1.5, 0.5))
    noise = (2 * rate).sqrt() * spread
    law = sd.LinearGaussianMeasure(
        -rate[..., None, None], (rate * level)[..., None], noise[..., None, None], level[..., None],
        spread.square()[..., None, None],
    )  # fmt: skip
    pyro.sample("y", sd.infer.LinearObservations(law, times, obs_scale[..., None, None]), obs=y)


def subjects(panel: sd.Panel, y: Tensor | None) -> None:
    """Eight subjects that relax from 2 towards 1, each seen twelve times at times of its own; their rates have a law that is sought."""
    mean = pyro.sample("mean", dist.Normal(ZERO, 1.0))
    between = pyro.sample("between", dist.HalfNormal(ZERO + 0.5))
    noise = pyro.sample("noise", dist.LogNormal(ZERO - 0.5, 0.5))
    with pyro.plate("subject", len(panel)):
        effect = pyro.sample("effect", dist.Normal(ZERO, 1.0))
        rate = torch.exp(mean + between * effect)
        law = sd.LinearGaussianMeasure(
            -rate[..., None, None], rate[..., None], noise[..., None, None].expand(*rate.shape, 1, 1),
            torch.full((1,), 2.0, dtype=F64),
        )  # fmt: skip
        pyro.sample("y", sd.infer.LinearObservations(law, panel.times, 0.15), obs=y)


def growth(ts: Tensor, y: Tensor | None) -> None:
    """Counts of a population that grows to its capacity, in logarithms: a nonlinear path that is sampled, seen with Poisson noise."""
    rate = pyro.sample("rate", dist.LogNormal(ZERO, 0.5))
    capacity = pyro.sample("capacity", dist.LogNormal(ZERO + 1.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(ZERO - 1.5, 0.5))

    def drift(t: Tensor, x: Tensor) -> Tensor:
        return rate[..., None] * (1 - x.exp() / capacity[..., None]) - 0.5 * noise[..., None] ** 2

    x = sd.infer.sample_path("x", sd.SDE(drift, sd.Scalar(noise)), ts.new_full((1,), -1.0), ts)
    pyro.sample("y", dist.Poisson(10 * x[..., 2::2, 0].exp()).to_event(1), obs=y)


def channel(times: Tensor, y: Tensor | None) -> None:
    """A channel that opens and closes unseen, a hundred noisy currents: the path is summed out."""
    opening = pyro.sample("opening", dist.LogNormal(ZERO, 0.7))
    closing = pyro.sample("closing", dist.LogNormal(ZERO, 0.7))
    rows = torch.stack([-opening, opening], -1), torch.stack([closing, -closing], -1)
    law = sd.jumps.JumpMeasure(times.new_tensor([0.5, 0.5]), torch.stack(rows, -2))
    seen = sd.jumps.GaussianLevels(times.new_tensor([0.0, 1.0]), 0.5)
    pyro.sample("y", sd.jumps.HiddenJumps(law, times, seen), obs=y)


def _ranks(
    model: Callable[..., Any], first: Any, names: Sequence[str], g: torch.Generator
) -> dict[str, float]:
    """Draw parameters and data from the model, fit it to the data, and return the ranks of the parameters and k-hat."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed_of(g))
    with torch.no_grad():
        drawn = pyro.poutine.trace(model).get_trace(first, None).nodes
    post = sd.infer.fit_posterior(
        model, first, drawn["y"]["value"], num_draws=DRAWS, seed=seed_of(g), progress=False
    )
    ranks = {name: posterior_rank(post.idata.posterior[name], float(drawn[name]["value"])) for name in names}
    return ranks | {"khat": post.khat}


def _irregular(count: int, horizon: float, g: torch.Generator) -> Tensor:
    return (horizon * torch.rand(count, generator=g, dtype=F64)).sort().values


def _relaxation(g: torch.Generator) -> dict[str, float]:
    return _ranks(relaxation, _irregular(30, 15.0, g), ("rate", "level", "spread", "obs_scale"), g)


def _subjects(g: torch.Generator) -> dict[str, float]:
    times = [_irregular(12, 4.0, g) for _ in range(8)]
    panel = sd.Panel.from_arrays(times, [torch.zeros_like(t) for t in times])
    return _ranks(subjects, panel, ("mean", "between", "noise"), g)


def _growth(g: torch.Generator) -> dict[str, float]:
    return _ranks(growth, torch.linspace(0, 8, 33, dtype=F64), ("rate", "capacity", "noise"), g)


def _channel(g: torch.Generator) -> dict[str, float]:
    return _ranks(channel, torch.linspace(0, 20, 101, dtype=F64), ("opening", "closing"), g)


KINDS = {"relaxation": _relaxation, "subjects": _subjects, "growth": _growth, "channel": _channel}

if __name__ == "__main__":
    run_calibration(KINDS, RESULTS, __doc__)
