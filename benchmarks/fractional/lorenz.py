"""The latent SDE of torchsde's Lorenz example, in torchsde and here, with the sizes of that example."""

from __future__ import annotations

import math

import torch
import torchsde
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.fractional import (
    ControlMethod,
    GaussianDecoder,
    LatentSDE,
    MatchingMethod,
    PosteriorMethod,
    Series,
    TightMethod,
)

__all__ = ["DT", "END", "SCALE", "PeerLatentSDE", "as_series", "data", "ours"]

LATENT, CONTEXT, HIDDEN, SCALE, END, COUNT, DT = 4, 64, 128, 0.01, 2.0, 100, 0.01


def data(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return times ``(100,)`` and normalised noisy stochastic Lorenz paths ``(batch, 100, 3)``."""
    g = torch.Generator().manual_seed(seed)
    ts = torch.linspace(0, END, COUNT)
    fine = 10
    lag = float(ts[1]) / fine
    x = torch.randn(batch, 3, generator=g)
    strength = torch.tensor([0.1, 0.28, 0.3])
    rows = [x]
    for n in range((COUNT - 1) * fine):
        a, b, c = x.unbind(-1)
        force = torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)
        x = x + force * lag + strength * x * math.sqrt(lag) * torch.randn(batch, 3, generator=g)
        if (n + 1) % fine == 0:
            rows.append(x)
    values = torch.stack(rows, 1)
    values = (values - values.mean((0, 1))) / values.std((0, 1))
    return ts, values + SCALE * torch.randn(values.shape, generator=g)


class PeerLatentSDE(nn.Module):
    """A latent SDE on torchsde: recurrent encoder, drift with context, its prior's drift, diagonal diffusion of each component."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, dt: float = DT) -> None:
        super().__init__()
        self.dt = dt
        self.gru, self.to_context = nn.GRU(3, HIDDEN), nn.Linear(HIDDEN, CONTEXT)
        self.start = nn.Linear(CONTEXT, 2 * LATENT)

        def net(width: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(width, HIDDEN),
                nn.Softplus(),
                nn.Linear(HIDDEN, HIDDEN),
                nn.Softplus(),
                nn.Linear(HIDDEN, LATENT),
            )

        self.posterior, self.prior = net(LATENT + CONTEXT), net(LATENT)
        self.strengths = nn.ModuleList(
            nn.Sequential(nn.Linear(1, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 1), nn.Sigmoid())
            for _ in range(LATENT)
        )
        self.decoder = nn.Linear(LATENT, 3)
        self.start_mean, self.start_log_scale = (nn.Parameter(torch.zeros(LATENT)) for _ in range(2))

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the posterior's drift, told of the observations from t on."""
        place = int(torch.searchsorted(self.ts, t, right=True).clamp_max(COUNT - 1))
        return self.posterior(torch.cat([z, self.context[place]], -1))

    def h(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the prior's drift."""
        return self.prior(z)

    def g(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the diffusion."""
        return torch.cat([net(part) for net, part in zip(self.strengths, z.split(1, -1), strict=True)], -1)

    def elbo(self, ts: Tensor, values: Tensor) -> Tensor:
        """Return the bound ``()``, averaged over series."""
        states = self.gru(values.movedim(1, 0).flip(0))[0].flip(0)
        self.ts, self.context = ts, self.to_context(states)
        mean, log_scale = self.start(self.context[0]).chunk(2, -1)
        z0 = mean + log_scale.exp() * torch.randn_like(mean)
        z, log_ratio = torchsde.sdeint(self, z0, ts, dt=self.dt, logqp=True, method="euler")
        fit = torch.distributions.Normal(self.decoder(z), SCALE).log_prob(values.movedim(1, 0)).sum((0, 2))
        q = torch.distributions.Normal(mean, log_scale.exp())
        p = torch.distributions.Normal(self.start_mean, self.start_log_scale.exp())
        kl = torch.distributions.kl_divergence(q, p).sum(-1)
        return (fit - log_ratio.sum(0) - kl).mean()


def ours(posterior: str, dt: float = DT, checkpoint: bool = False) -> LatentSDE:
    """Return the library's model of the same sizes; its grid has the peer's steps."""
    ts = torch.linspace(0, END, round(END / dt) + 1)
    hidden = (HIDDEN, HIDDEN)
    method: PosteriorMethod = MatchingMethod(hidden, CONTEXT)
    if posterior != "matching":
        kind = {"control": ControlMethod, "tight": TightMethod}[posterior]
        method = kind(hidden, CONTEXT, method=sd.core.Euler(checkpoint=checkpoint))
    return LatentSDE(
        3, LATENT, ts, noise="brownian", drift=(HIDDEN, HIDDEN), diffusion="state", posterior=method,
        decoder=GaussianDecoder(torch.nn.Linear(LATENT, 3), 3, SCALE, learn_obs_scale=False),
    )  # fmt: skip


def as_series(ts: Tensor, values: Tensor) -> Series:
    """Return the data as the library takes them."""
    return Series.regular(ts, values)
