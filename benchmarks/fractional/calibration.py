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
from functools import cache
from pathlib import Path

import numpy as np
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


def _latent_data(g: torch.Generator) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return times and values of the latent equation above, and the parameters behind them."""
    ts = torch.linspace(0, 4, 41, dtype=F64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed_of(g))
    with torch.no_grad():
        drawn = pyro.poutine.trace(latent_model).get_trace(ts, None)
    truth = {name: float(drawn.nodes[name]["value"]) for name in ("hurst", "rate", "scale")}
    return ts, drawn.nodes["y"]["value"], truth


def latent(g: torch.Generator) -> dict[str, float]:
    """The latent equation above by the default guide of ``fit_posterior``."""
    ts, y, truth = _latent_data(g)
    post = sd.infer.fit_posterior(latent_model, ts, y, num_draws=DRAWS, seed=seed_of(g), progress=False)
    return {name: posterior_rank(post.idata.posterior[name], value) for name, value in truth.items()} | {
        "khat": post.khat
    }


@cache
def _latent_grid() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the nodes of the parameters, and spectra and axes of the path's covariance for every index and rate, at scale 1."""
    ts = torch.linspace(0, 4, 41, dtype=F64)
    log = torch.linspace(-2.2, 2.2, 60, dtype=F64)
    nodes = {
        "hurst": 0.05 + 0.9 * (torch.arange(40, dtype=F64) + 0.5) / 40,
        "rate": log.exp(),
        "scale": log.exp(),
    }
    noise = sd.fractional.MarkovNoise(nodes["hurst"], horizon=float(ts[-1]), dt=float(ts[1]))
    cov = torch.nn.functional.pad(noise.covariance(ts[1:]), (1, 0, 1, 0))
    increments = cov.diff(dim=-1).diff(dim=-2)
    # x_{n+1} = (1 - rate dt) x_n + dB: the path is a triangular matrix times the increments.
    lag = torch.arange(40)[:, None] - torch.arange(40)
    stay = (1 - nodes["rate"] * float(ts[1]))[:, None, None]
    walk = torch.where(lag >= 0, stay ** lag.clamp_min(0), 0.0)
    spectra, axes = torch.linalg.eigh(walk @ increments[:, None] @ walk.mT)
    return nodes, spectra.clamp_min(0.0), axes


def latent_exact(g: torch.Generator) -> dict[str, float]:
    """The same data sets by quadrature over the three parameters, the path integrated out exactly."""
    _, y, truth = _latent_data(g)
    nodes, spectra, axes = _latent_grid()
    turned = (axes.mT @ y[:, None])[..., 0]
    variance = nodes["scale"].square()[:, None] * spectra[:, :, None] + 0.01
    log_density = -0.5 * (turned[:, :, None].square() / variance + variance.log()).sum(-1)
    for axis, name in ((1, "rate"), (2, "scale")):
        prior = -2 * nodes[name].log().square()
        log_density = log_density + prior.reshape(-1, *(1,) * (2 - axis))
    density = torch.softmax(log_density.flatten(), 0).reshape(log_density.shape)
    found = {}
    for axis, (name, x) in enumerate(nodes.items()):
        share = density.sum([k for k in range(3) if k != axis])
        x, value = (x, truth[name]) if name == "hurst" else (x.log(), math.log(truth[name]))
        edges = x[0] + (x[1] - x[0]) * (torch.arange(len(x) + 1) - 0.5)
        below = torch.nn.functional.pad(share.cumsum(0), (1, 0))
        found[name] = float(np.interp(value, edges.numpy(), below.numpy()))
    return found


KINDS: dict[str, Callable[[torch.Generator], dict[str, float]]] = {
    "series_100": _series(100),
    "series_1000": _series(1000),
    "gaps": gaps,
    "several": several,
    "tracks": tracks,
    "roughness": roughness,
    "fou": fou,
    "latent": latent,
    "latent_exact": latent_exact,
}


if __name__ == "__main__":
    run_calibration(KINDS, RESULTS, __doc__)
