"""How long do floods remember? The Hurst index of 663 years of Nile minima, held against exact answers.

1. The series as fractional Gaussian noise: a Pyro model with priors on Hurst index, mean and scale, fitted by
   stock SVI.
2. The level as a fractional Ornstein-Uhlenbeck process in continuous time, observed with error: parameters that maximise its
   exact evidence, its posterior path between the years, and a forecast of 50 years. A grid of Euler steps comes to the same evidence
   only with many steps per year.
3. What memory buys: decades that were held out, forecast by fractional noise, an autoregression and white noise.

Run it from anywhere: ``python examples/nile_hurst.py [--out DIR]``. It writes two figures and the posterior as
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
from scipy.linalg import toeplitz
from torch import Tensor
from tqdm import trange

import stochdyn as sd
from stochdyn.core import PathSample
from stochdyn.fractional import (
    FractionalGaussianNoise,
    FractionalOU,
    HurstLikelihood,
    MarkovNoise,
    fgn_autocovariance,
    fit_fgn,
)

FORECAST = 50
#: Years from which the parameters of the forecasts are learnt, and length of what is forecast.
LEARNT, AHEAD = 300, 10
#: What halving the Euler step may change in the evidence, in nats.
CLOSE = 0.1


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


def level_law(p: dict[str, Tensor], ts: Tensor, method: str = "exact") -> FractionalOU:
    """The latent level: in continuous time, or as the Euler scheme on a grid would have it."""
    noise = MarkovNoise(p["hurst"], horizon=float(ts[-1] - ts[0]) + FORECAST, dt=1.0)
    start = torch.distributions.Normal(p["mean"], torch.full_like(p["mean"], 120.0))
    return FractionalOU(
        p["rate"],
        p["mean"],
        p["scale"],
        p["hurst"],
        noise,
        initial=start,
        start_time=float(ts[0]),
        method=method,
    )


def kalman_evidence(p: dict[str, Tensor], ts: Tensor, level: Tensor) -> Tensor:
    """Exact log evidence of the latent level in continuous time."""
    return level_law(p, ts).log_evidence(ts, level, p["noise"])


def euler_evidence(p: dict[str, Tensor], ts: Tensor, level: Tensor, per_year: int) -> float:
    """The same for Euler steps, so many per year."""
    grid = ts[0] + torch.arange((len(ts) - 1) * per_year + 1, dtype=ts.dtype) / per_year
    seen, y = torch.zeros(len(grid), dtype=torch.bool), torch.zeros_like(grid)
    seen[::per_year], y[::per_year] = True, level
    return float(level_law(p, ts, "euler").log_evidence(grid, y, p["noise"], mask=seen))


def steps_per_year(p: dict[str, Tensor], ts: Tensor, level: Tensor) -> tuple[int, float]:
    """Halve the Euler step until that changes the evidence by less than CLOSE; returns steps per year and evidence."""
    count, before = 1, euler_evidence(p, ts, level, 1)
    while count < 256:
        now = euler_evidence(p, ts, level, 2 * count)
        if abs(now - before) < CLOSE:
            break
        count, before = 2 * count, now
    return 2 * count, now


def forecasts(level: Tensor) -> dict[str, tuple[float, Tensor]]:
    """Mean and autocovariance ``(n,)`` of three stationary models, by maximum likelihood on the first LEARNT years."""
    past, n = level[:LEARNT], len(level)
    fractional = fit_fgn(past)
    x = past - past.mean()
    phi = (x[1:] @ x[:-1]) / (x[:-1] @ x[:-1])
    variance = (x[1:] - phi * x[:-1]).square().mean() / (1 - phi**2)
    lags = torch.arange(n, dtype=level.dtype)
    return {
        "fractional noise": (
            fractional.mean,
            fractional.scale**2 * fgn_autocovariance(n, torch.tensor(fractional.hurst, dtype=level.dtype)),
        ),
        "AR(1)": (float(past.mean()), variance * phi**lags),
        "white noise": (float(past.mean()), x.square().mean() * (lags == 0)),
    }


def conditional(mean: float, r: Tensor, level: Tensor, begin: int, ahead: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the ``ahead`` years from ``begin`` on, given all years before, under a stationary Gaussian law."""
    cov = torch.as_tensor(toeplitz(r[: begin + ahead].numpy()))
    old, new = slice(0, begin), slice(begin, begin + ahead)
    pull = torch.linalg.solve(cov[old, old], cov[old, new]).T
    return mean + pull @ (level[old] - mean), cov[new, new] - pull @ cov[old, new]


def held_out_scores(level: Tensor) -> dict[str, Tensor]:
    """Log predictive density of every later decade, given all that came before it."""
    scores: dict[str, Tensor] = {}
    for name, (mean, r) in forecasts(level).items():
        rows = []
        for begin in range(LEARNT, len(level) - AHEAD + 1, AHEAD):
            m, cov = conditional(mean, r, level, begin, AHEAD)
            law = torch.distributions.MultivariateNormal(m, cov)
            rows.append(law.log_prob(level[begin : begin + AHEAD]))
        scores[name] = torch.stack(rows)
    return scores


def draw_figure(years: Tensor, level: Tensor, fan: PathSample, hurst: Tensor, exact, file: Path) -> None:
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
    for ax, columns in ((left, 5), (right, 1)):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=columns, frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_memory(years: Tensor, level: Tensor, scores: dict[str, Tensor], file: Path) -> None:
    """Forecasts of every held-out decade by each model, and their scores, added up."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2), layout="constrained")
    left.plot(years[LEARNT:], level[LEARNT:], color="0.6", linewidth=0.8, label="readings")
    for colour, (name, (mean, r)) in zip(("C0", "C1", "C2"), forecasts(level).items(), strict=True):
        begins = range(LEARNT, len(level) - AHEAD + 1, AHEAD)
        means = torch.cat([conditional(mean, r, level, n, AHEAD)[0] for n in begins])
        left.plot(years[LEARNT : LEARNT + len(means)], means, color=colour, linewidth=1.5, label=name)
        gain = (scores[name] - scores["white noise"]).cumsum(0)
        ends = years[LEARNT + AHEAD - 1 :: AHEAD][: len(gain)]
        right.plot(ends, gain, color=colour, marker=".", label=name)
    left.set(
        xlabel="year",
        ylabel="lowest level (cm)",
        title="Means of forecasts ten years ahead, each given all years before its decade",
    )
    right.set(
        xlabel="end of the decade",
        ylabel="nats above white noise",
        title="Log score of held-out decades, added up",
    )
    for ax in (left, right):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=4, frameon=False, fontsize=9)
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

    print("\n2. A latent fractional Ornstein-Uhlenbeck level in continuous time, observed with error")
    p = level_parameters(years, level)
    print(
        "parameters that maximise the exact evidence: "
        + ", ".join(f"{k} {float(v):.4g}" for k, v in p.items())
    )
    kalman = float(kalman_evidence(p, years, level))
    per_year, euler = steps_per_year(p, years, level)
    print(
        f"log evidence {kalman:.3f}; Euler steps come to {euler:.3f} with {per_year} per year, where halving them changes it "
        f"by less than {CLOSE:g}, and to {euler_evidence(p, years, level, 1):.0f} with one"
    )
    grid = torch.arange(float(years[0]), float(years[-1]) + FORECAST + 0.1, 0.5, dtype=torch.float64)
    posterior = level_law(p, years).conditioned(years, level, p["noise"])
    fan = posterior.sample(grid, 1000, generator=options.seed)
    last = fan.x[:, -1, 0]
    print(
        f"forecast for the year {int(grid[-1])}: {last.mean():.0f} cm, 90 % between "
        f"{last.quantile(0.05):.0f} and {last.quantile(0.95):.0f}"
    )

    print(f"\n3. Decades from {int(years[LEARNT])} on, forecast with what {LEARNT} years taught")
    scores = held_out_scores(level)
    gaps = {}
    for name, score in scores.items():
        gap = score - scores["fractional noise"]
        gaps[name] = float(gap.sum())
        error = float(gap.std()) * math.sqrt(len(gap))
        print(
            f"{name:17s} log score {score.sum():.1f}, against fractional noise {gaps[name]:+.1f} +- {error:.1f}"
        )
    idata.to_netcdf(str(options.out / "nile_hurst.nc"))
    draw_figure(years, level, fan, hurst, exact, options.out / "nile_hurst.png")
    draw_memory(years, level, scores, options.out / "nile_memory.png")
    seconds = time.perf_counter() - began
    print(
        f"\nwrote nile_hurst.nc, nile_hurst.png and nile_memory.png to {options.out}/ after {seconds:.0f} s"
    )
    return {
        "hurst": float(hurst.mean()),
        "hurst_sd": float(hurst.std()),
        "mean": float(idata.posterior["mean"].mean()),
        "khat": khat,
        "kalman": kalman,
        "euler": euler,
        "ar1": gaps["AR(1)"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
