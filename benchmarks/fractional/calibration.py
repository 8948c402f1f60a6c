"""Are posteriors of the Hurst index calibrated? Coverage and ranks over data sets whose parameters are drawn from the prior.

    OMP_NUM_THREADS=1 python benchmarks/fractional/calibration.py --only series_100 tracks --count 200

Where a prior is improper (level, drift and scale) the answer doesn't depend on the value, so any will do: the posterior is invariant
under shifts and changes of unit. Everything else is drawn from the prior that the inference has. Each data set has a seed of its own, and
its rank is added to the JSON file as soon as it is known: a run that is cut off goes on where it was.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from scipy.linalg import toeplitz
from torch import Tensor

import stochdyn as sd
from stochdyn.fractional import (
    fou_autocovariance,
    infer_fou,
    infer_hurst,
    infer_roughness,
    sample_fbm,
    sample_fgn,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _calibration import DRAWS, F64, posterior_rank, run_calibration, seed_of

RESULTS = Path(__file__).parent / "results" / "calibration.json"


def _uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=F64)


def _series(n: int) -> Callable[[torch.Generator], dict[str, float]]:
    def run(g: torch.Generator) -> dict[str, float]:
        hurst = float(_uniform(g))
        y = 3 + 2 * sample_fgn(hurst, n, generator=g)
        idata = infer_hurst(y, num_draws=DRAWS, seed=seed_of(g), predictive=False, progress=False)
        return {"hurst": posterior_rank(idata.posterior["hurst"], hurst)}

    return run


def gaps(g: torch.Generator) -> dict[str, float]:
    """A series of 100 with a tenth of the values missing."""
    hurst = float(_uniform(g))
    y = sample_fgn(hurst, 100, generator=g)
    y[torch.randperm(100, generator=g)[:10]] = torch.nan
    idata = infer_hurst(y, num_draws=DRAWS, seed=seed_of(g), predictive=False, progress=False)
    return {"hurst": posterior_rank(idata.posterior["hurst"], hurst)}


def several(g: torch.Generator) -> dict[str, float]:
    """Ten series of 12 values with scales of their own."""
    hurst = float(_uniform(g))
    rows = [(k + 1) * sample_fgn(hurst, 12, generator=g) for k in range(10)]
    idata = infer_hurst(rows, num_draws=DRAWS, seed=seed_of(g), predictive=False, progress=False)
    return {"hurst": posterior_rank(idata.posterior["hurst"], hurst)}


def _observed(hurst: float, n: int, error: Tensor, g: torch.Generator) -> Tensor:
    """A path of unit scale with a drift, seen with errors, ``(n, axes)``."""
    axes = error.shape[-1]
    x = sample_fbm(hurst, n - 1, horizon=float(n - 1), sample_shape=axes, generator=g, dtype=F64).T
    x = x + error * torch.randn(n, axes, generator=g, dtype=F64)
    return x + torch.arange(n)[:, None] * torch.randn(axes, generator=g, dtype=F64)


def tracks(g: torch.Generator) -> dict[str, float]:
    """Thirty tracks of 20 to 60 points in the plane, with drifts and an unknown error of localisation for each axis."""
    hurst, share = float(_uniform(g)), _uniform(g, 2)
    error = (
        share / (2 * (1 - share))
    ).sqrt()  # the share of an increment's variance that comes from two errors
    rows = [_observed(hurst, int(torch.randint(20, 61, (), generator=g)), error, g) for _ in range(30)]
    post = infer_roughness(rows, num_draws=DRAWS, seed=seed_of(g), progress=False).posterior
    found = torch.as_tensor(post["obs_scale"].values)[0]
    return {
        "hurst": posterior_rank(post["hurst"], hurst),
        "obs_scale": float((found[:, 0] < error[0]).double().mean()),
    }


def roughness(g: torch.Generator) -> dict[str, float]:
    """One path of 200 points with a drift and unknown errors of observation."""
    hurst, share = float(_uniform(g)), _uniform(g, 1)
    error = (share / (2 * (1 - share))).sqrt()
    post = infer_roughness(
        _observed(hurst, 200, error, g)[:, 0], num_draws=DRAWS, seed=seed_of(g), progress=False
    ).posterior
    return {
        "hurst": posterior_rank(post["hurst"], hurst),
        "obs_scale": posterior_rank(post["obs_scale"], float(error)),
    }


def fou(g: torch.Generator) -> dict[str, float]:
    """A fractional Ornstein-Uhlenbeck series of 60 values with an unknown error of observation."""
    n, hurst = 60, float(_uniform(g))
    # The prior of rate * span is n / (n - 1) / log n / [(1 + r) (1 + r / n)], whose distribution function is inverted here.
    power = n ** float(_uniform(g))
    rate = (n * power - n) / (n - power) / (n - 1)
    error = math.tan(0.5 * math.pi * float(_uniform(g)))  # half-Cauchy, in deviations of a step
    lags = torch.arange(n, dtype=F64)
    if rate * (n - 1) > 1e-3:
        covariance = toeplitz(fou_autocovariance(lags, rate, hurst).numpy())
        root = torch.linalg.cholesky(
            torch.as_tensor(covariance) + 1e-12 * covariance[0, 0] * torch.eye(n, dtype=F64)
        )
        x = root @ torch.randn(n, generator=g, dtype=F64)
    else:
        x = sample_fbm(hurst, n - 1, horizon=float(n - 1), generator=g, dtype=F64)
    y = x + error * torch.randn(n, generator=g, dtype=F64)
    idata = infer_fou(lags, y, num_draws=DRAWS, seed=seed_of(g), progress=False)
    truth = {"hurst": hurst, "rate": rate, "obs_scale": error}
    ranks = {name: posterior_rank(idata.posterior[name], value) for name, value in truth.items()}
    return ranks | {"khat": float(idata.attrs["khat"])}


def latent_model(ts: Tensor, y: Tensor | None) -> None:
    """Forty noisy values of a latent path that fractional noise drives, with Hurst index, rate and scale unknown."""
    hurst = pyro.sample("hurst", dist.Uniform(ts.new_tensor(0.05), 0.95))
    rate = pyro.sample("rate", dist.LogNormal(ts.new_tensor(0.0), 0.5))
    scale = pyro.sample("scale", dist.LogNormal(ts.new_tensor(0.0), 0.5))
    noise = sd.fractional.MarkovNoise(hurst, horizon=float(ts[-1]), dt=float(ts[1]))
    sde = sd.SDE(lambda t, x: -rate[..., None] * x, sd.Scalar(scale), noise)
    x = sd.infer.sample_path("x", sde, ts.new_zeros(1), ts)
    pyro.sample("y", dist.Normal(x[..., 1:, 0], 0.1).to_event(1), obs=y)


def latent(g: torch.Generator) -> dict[str, float]:
    """The latent equation above by the default guide of ``fit_posterior``."""
    ts = torch.linspace(0, 4, 41, dtype=F64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed_of(g))
    with torch.no_grad():
        drawn = pyro.poutine.trace(latent_model).get_trace(ts, None)
    truth = {name: float(drawn.nodes[name]["value"]) for name in ("hurst", "rate", "scale")}
    post = sd.infer.fit_posterior(
        latent_model, ts, drawn.nodes["y"]["value"], num_draws=DRAWS, seed=seed_of(g), progress=False
    )
    return {name: posterior_rank(post.idata.posterior[name], value) for name, value in truth.items()} | {
        "khat": post.khat
    }


KINDS: dict[str, Callable[[torch.Generator], dict[str, float]]] = {
    "series_100": _series(100),
    "series_1000": _series(1000),
    "gaps": gaps,
    "several": several,
    "tracks": tracks,
    "roughness": roughness,
    "fou": fou,
    "latent": latent,
}


if __name__ == "__main__":
    run_calibration(KINDS, RESULTS, __doc__)
