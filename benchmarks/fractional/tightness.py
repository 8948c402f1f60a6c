"""How close each posterior of a linear model comes to the exact evidence, at 100 steps."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.core import StateNetwork
from stochdyn.fractional import (
    AffineDrift,
    FractionalOU,
    GaussianDecoder,
    GaussianELBO,
    GaussianMethod,
    GaussianPosterior,
    LatentSDE,
    MarkovNoise,
    PosteriorMethod,
    Series,
    TightMethod,
)
from stochdyn.infer import AutoPathGuide, sample_path

__all__ = ["tightness"]

SD = 0.1
VALUES = (0.3, 0.4, 0.5)


def _by_guide(sde: sd.SDE, ts: Tensor, index: list[int], y: Tensor) -> float:
    """Return the bound of AutoPathGuide, which is the tight posterior (b), as it is made."""

    def model() -> None:
        x = sample_path("x", sde, torch.zeros(1, dtype=torch.float64), ts)
        pyro.sample("y", dist.Normal(x[..., index, 0], SD).to_event(1), obs=y)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = pyro.infer.Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        return -float(elbo.loss(model, AutoPathGuide(model)))


def _by_encoder(
    method: PosteriorMethod, sde: sd.SDE, ts: Tensor, index: list[int], y: Tensor, train: int
) -> tuple[float, float]:
    """Return the exact evidence with a normal start, and the bound of a posterior that is read off the series by networks."""
    torch.manual_seed(0)
    start = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(y[:1]), 1.0), 1)
    data = sd.GaussianObservations(ts, ts[index], y, SD)
    exact = GaussianELBO(GaussianPosterior(sd.DiffusionMeasure(start, sde), ts), data)
    exact.posterior.linearise(data)
    model = LatentSDE(
        1, 1, ts, noise=sde.noise, drift=sde.drift, diffusion=1.0, posterior=method,
        decoder=GaussianDecoder(torch.nn.Identity(), 1, SD, learn_obs_scale=False),
    ).double()  # fmt: skip
    for parameter in (model.start_mean, model.start_log_scale, *model.sde.parameters()):
        parameter.requires_grad_(False)
    series = Series.regular(ts[index], y[None, :, None])
    sd.fit(
        model,
        series,
        steps=train,
        lr=0.01,
        progress=False,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, train, 1e-4),
    )
    with torch.no_grad():
        return float(exact(None).terms["elbo"]), float(
            model.posterior.draw(model, series, 4000).log_weight.mean()
        )


def tightness(smoke: bool) -> list[dict[str, Any]]:
    """Return gaps to the exact evidence of the linear model: of posteriors (a), (b), (c), and of amortised ones."""
    steps, train = (20, 5) if smoke else (100, 400)
    rows = []
    for hurst in (0.3, 0.7):
        ts = torch.linspace(0, 2, steps + 1, dtype=torch.float64)
        noise = MarkovNoise(hurst, None, 2.0, 2.0 / steps)
        index = [steps // 4, steps // 2, steps]
        values = torch.tensor(VALUES, dtype=torch.float64)
        data = sd.GaussianObservations(ts, ts[index], values, SD)
        sde = sd.SDE(AffineDrift(-torch.eye(1, dtype=torch.float64)), 1.0, noise)
        prior = sd.DiffusionMeasure(torch.zeros(1, dtype=torch.float64), sde)
        mask, y = torch.zeros(steps + 1, dtype=torch.bool), torch.zeros(steps + 1, dtype=torch.float64)
        mask[index], y[index] = True, values
        law = FractionalOU(1.0, 0.0, 1.0, hurst, noise=noise, method="euler")
        exact = float(law.log_evidence(ts, y, SD, mask=mask))
        row: dict[str, Any] = {"hurst": hurst, "steps": steps, "evidence": exact}
        row["gap of (b), AutoPathGuide"] = exact - _by_guide(sde, ts, index, values)
        closed = GaussianELBO(GaussianPosterior(prior, ts), data)
        sd.fit(
            closed,
            steps=10 * train,
            lr=0.03,
            progress=False,
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.01 ** (0.1 / train)),
        )
        row["gap of (c), trained from the prior"] = exact - float(closed(None).terms["elbo"])
        closed.posterior.linearise(data)
        row["gap of (c), linearised"] = exact - float(closed(None).terms["elbo"])
        net = StateNetwork(1 + sde.noise.num_states, 1, zero_last=True).double()
        simulated = sd.PathELBO(prior, prior.controlled(net), data, 32)
        sd.fit(simulated, steps=train, lr=3e-3, progress=False)
        with torch.no_grad():
            row["gap of the control posterior (a)"] = exact - float(simulated.evidence(4000)[1].mean())
        for kind, method in (("tight", TightMethod), ("gaussian", GaussianMethod)):
            evidence, bound = _by_encoder(method(num_particles=16), sde, ts, index, values, 5 * train)
            row[f"gap of LatentSDE, {kind}"] = evidence - bound
        rows.append(row)
        print(row, flush=True)
    return rows
