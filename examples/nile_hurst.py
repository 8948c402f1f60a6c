"""How long do floods remember? The Hurst index of 663 years of Nile minima, held against exact answers.

1. The series as fractional Gaussian noise: a Pyro model with priors on Hurst index, mean and scale, fitted by
   stock SVI.
2. The level as a latent fractional Ornstein-Uhlenbeck path observed with noise: its posterior by
   AutoPathGuide, its evidence bound beside the exact Kalman evidence, and a forecast of 50 years.

Run it from anywhere: ``python examples/nile_hurst.py [--out DIR]``. It writes a figure and the posterior as
NetCDF.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import arviz as az
import matplotlib
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_median
from torch import Tensor
from tqdm import trange

import stochdyn as sd
from stochdyn.fractional import FractionalGaussianNoise, FractionalOU, HurstLikelihood, MarkovNoise, fit_fgn
from stochdyn.infer import AutoPathGuide, predict_path, sample_path

FORECAST = 50


def noise_model(level: Tensor, table: HurstLikelihood) -> None:
    """Yearly minima as fractional Gaussian noise; the table makes its exact likelihood cheap."""
    hurst = pyro.sample("hurst", dist.Uniform(0.0, 1.0))
    # Sampled in units of its prior, so that one learning rate suits all sites.
    mean = pyro.deterministic(
        "mean", 1100.0 + 300.0 * pyro.sample("mean_standard", dist.Normal(0.0, 1.0)), event_dim=0
    )
    scale = pyro.sample("scale", dist.LogNormal(math.log(100.0), 1.0))
    pyro.sample(
        "level", FractionalGaussianNoise(hurst, mean, scale, level.shape[-1], likelihood=table), obs=level
    )


def fit(model, guide, args: tuple, steps: int, lr: float, elbo: Trace_ELBO, name: str) -> list[float]:
    """Fit a guide with the stock classes and a progress bar; returns the bound at every step."""
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / steps)}), elbo)
    bounds = []
    bar = trange(steps, desc=name, mininterval=1.0)
    for _ in bar:
        bounds.append(-svi.step(*args))
        bar.set_postfix(elbo=f"{bounds[-1]:.2f}", refresh=False)
    return bounds


def level_parameters(ts: Tensor, level: Tensor) -> dict[str, Tensor]:
    """Maximise the exact Kalman evidence of the latent level over its parameters."""
    start = torch.tensor([1.5, 0.0, math.log(60.0), math.log(30.0)], dtype=torch.float64)
    raw = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([raw], max_iter=25, line_search_fn="strong_wolfe")

    def unpack(raw: Tensor) -> dict[str, Tensor]:
        return {
            "hurst": torch.sigmoid(raw[0]),
            "rate": raw[1].exp(),
            "scale": raw[2].exp(),
            "noise": raw[3].exp(),
            "mean": level.mean(),
        }

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -kalman_evidence(unpack(raw), ts, level)
        loss.backward()
        return loss

    optimiser.step(closure)
    return {k: v.detach() for k, v in unpack(raw).items()}


def level_noise(hurst: Tensor, ts: Tensor) -> MarkovNoise:
    """The driving noise, with memory for the years of the record and of the forecast."""
    return MarkovNoise(hurst, horizon=float(ts[-1] - ts[0]) + FORECAST, dt=1.0)


def kalman_evidence(p: dict[str, Tensor], ts: Tensor, level: Tensor, method: str = "euler") -> Tensor:
    """Exact log evidence of the latent level, on the yearly grid or in continuous time."""
    start = torch.distributions.Normal(p["mean"], torch.full_like(p["mean"], 120.0))
    ou = FractionalOU(
        p["rate"],
        p["mean"],
        p["scale"],
        p["hurst"],
        level_noise(p["hurst"], ts),
        initial=start,
        start_time=float(ts[0]),
        method=method,
    )
    return ou.log_evidence(ts, level, p["noise"])


def level_model(ts: Tensor, level: Tensor, p: dict[str, Tensor]) -> None:
    """A latent fractional Ornstein-Uhlenbeck level, observed with noise."""
    sde = sd.SDE(
        lambda t, x: -p["rate"] * (x - p["mean"]), sd.Scalar(p["scale"]), noise=level_noise(p["hurst"], ts)
    )
    start = dist.Normal(p["mean"].expand(1), 120.0).to_event(1)
    path = sample_path("path", sde, start, ts)
    pyro.sample("level", dist.Normal(path[..., 0], p["noise"]).to_event(1), obs=level)


def draw_figure(
    years: Tensor, level: Tensor, fan: sd.infer.PathDraws, hurst: Tensor, exact, file: Path
) -> None:
    """Data with the posterior path and the forecast, and the posterior of the Hurst index."""
    from matplotlib import pyplot as plt

    from stochdyn.diagnostics import plot_density, plot_paths

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(3, 1), layout="constrained")
    plot_paths(
        fan.ts,
        fan.x[..., 0],
        observations=(years, level),
        forecast_from=float(years[-1]),
        ax=left,
        label="latent level",
    )
    left.set(
        xlabel="year",
        ylabel="lowest level at the Roda gauge (cm)",
        title="Nile minima, 622 to 1284, and 50 years on",
    )
    plot_density(hurst, references={"maximum likelihood": float(exact.hurst)}, xlabel="Hurst index", ax=right)
    right.set_title("Posterior of the Hurst index")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> dict[str, float]:
    """Run both models and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("nile_hurst"), help="folder for the figure and the NetCDF file"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    began = time.perf_counter()
    pyro.set_rng_seed(options.seed)
    pyro.clear_param_store()
    years, level = (torch.as_tensor(v, dtype=torch.float64) for v in sd.datasets.nile_minima())

    print("1. Yearly minima as fractional Gaussian noise")
    exact, args = fit_fgn(level), (level, HurstLikelihood(level))
    guide = AutoMultivariateNormal(noise_model, init_loc_fn=init_to_median(num_samples=50), init_scale=0.05)
    particles = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    fit(noise_model, guide, args, 1500, 0.03, particles, "fractional Gaussian noise")
    idata = sd.to_inference_data(noise_model, guide, args=args, num_draws=1000, seed=options.seed)
    print(az.summary(idata, var_names=["hurst", "mean", "scale"], kind="stats", round_to=4))
    weights = torch.as_tensor(idata.sample_stats["log_weight"].values).flatten()
    evidence = sd.diagnostics.importance_evidence(weights)
    khat = sd.infer.khat(noise_model, guide, args=args, num_draws=1000, seed=options.seed)
    hurst = torch.as_tensor(idata.posterior["hurst"].values).flatten()
    print(
        f"exact maximum likelihood: hurst {exact.hurst:.4f} (standard error {exact.stderr:.4f}), "
        f"mean {exact.mean:.2f}, scale {exact.scale:.2f}, log-likelihood {exact.log_likelihood:.3f}"
    )
    print(f"variational posterior:    hurst {hurst.mean():.4f} (standard deviation {hurst.std():.4f})")
    print(
        f"bound {weights.mean():.3f}, log evidence {evidence.log_evidence:.3f} "
        f"(by importance sampling, standard error {evidence.stderr:.3f}), k-hat {khat:.2f}"
    )

    print("\n2. A latent fractional Ornstein-Uhlenbeck level, observed with noise")
    p = level_parameters(years, level)
    print(
        "parameters that maximise the exact evidence: "
        + ", ".join(f"{k} {float(v):.4g}" for k, v in p.items())
    )
    path_guide = AutoPathGuide(level_model, hidden=())
    args = (years, level, p)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    bounds = fit(level_model, path_guide, args, 100, 1e-3, elbo, "latent level")
    bound = sum(bounds[-20:]) / 20
    kalman = float(kalman_evidence(p, years, level))
    continuous = float(kalman_evidence(p, years, level, "exact"))
    path_khat = sd.infer.khat(level_model, path_guide, args=args, num_draws=1000, seed=options.seed)
    print(
        f"bound {bound:.3f}, exact Kalman evidence {kalman:.3f} on the same yearly grid "
        f"(these parameters in continuous time: {continuous:.3f}), k-hat {path_khat:.2f}"
    )

    grid = torch.arange(float(years[0]), float(years[-1]) + FORECAST + 1, dtype=torch.float64)
    fan = predict_path(level_model, path_guide, "path", grid, args=args, num_draws=1000, seed=options.seed)
    last = fan.x[:, -1, 0]
    print(
        f"forecast for the year {int(grid[-1])}: {last.mean():.0f} cm, 90 % between "
        f"{last.quantile(0.05):.0f} and {last.quantile(0.95):.0f}"
    )
    idata.to_netcdf(str(options.out / "nile_hurst.nc"))
    draw_figure(years, level, fan, hurst, exact, options.out / "nile_hurst.png")
    seconds = time.perf_counter() - began
    print(f"\nwrote nile_hurst.nc and nile_hurst.png to {options.out}/ after {seconds:.0f} s")
    return {
        "hurst": float(hurst.mean()),
        "hurst_sd": float(hurst.std()),
        "mean": float(idata.posterior["mean"].mean()),
        "khat": khat,
        "bound": bound,
        "kalman": kalman,
        "path_khat": path_khat,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
