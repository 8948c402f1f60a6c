"""The checkerboard: every pair of fields and several strengths of noise, by density, beside exact fields."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from data import checkerboard, checkerboard_log_prob
from densities import contenders, flow_kl, girsanov, learn, learn_pairs, levels, model_of, sde_kl
from torch import Tensor

from stochdyn.interpolants import Interpolant

__all__ = ["ExactCheckerboard", "measure"]


class ExactCheckerboard:
    """Fields of the linear interpolant from the standard normal to the checkerboard, in closed form."""

    def __init__(self, it: Interpolant) -> None:
        self.it = it
        corners = [
            (x, y) for x, y in itertools.product(range(-4, 4, 2), range(-4, 4, 2))
            if (x // 2 + y // 2) % 2 == 0
        ]  # fmt: skip
        self.low = torch.tensor(corners, dtype=torch.float64)

    def _mean(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[x1 | x] and the variance of x given x1."""
        t, x = torch.as_tensor(t, dtype=torch.float64), x.double()
        t = t.clamp(1e-6, 1 - 1e-9)
        variance = (1 - t) ** 2 + self.it.gamma.square(t)
        spread = (variance.sqrt() / t).unsqueeze(-2) if t.ndim else variance.sqrt() / t
        centre = (x / t).unsqueeze(-2)
        a, b = (self.low - centre) / spread, (self.low + 2 - centre) / spread
        # differences of normal distribution functions in whichever tail is accurate
        flip = torch.where(a > 0, -1.0, 1.0)
        lo, hi = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)
        log_hi, log_lo = torch.special.log_ndtr(hi), torch.special.log_ndtr(lo)
        log_mass = log_hi + torch.log(-torch.expm1((log_lo - log_hi).clamp(max=-1e-300)))
        phi = [(-0.5 * u.square() - 0.5 * math.log(2 * math.pi) - log_mass).exp() for u in (lo, hi)]
        inner = centre + flip * spread * (phi[0] - phi[1])
        inner = torch.minimum(torch.maximum(inner, self.low), self.low + 2)
        share = log_mass.sum(-1, keepdim=True).softmax(-2)
        return (share * inner).sum(-2), variance

    def noise_prediction(self, t: Tensor, x: Tensor) -> Tensor:
        """E[z | x]."""
        mean, variance = self._mean(t, x)
        time = torch.as_tensor(t, dtype=torch.float64)
        return (self.it.gamma.value(time) * (x - time * mean) / variance).to(x)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """E[dx/dt | x]."""
        mean, variance = self._mean(t, x)
        time = torch.as_tensor(t, dtype=torch.float64)
        rate = 0.5 * self.it.gamma.square_derivative(time) - (1 - time)
        return (mean + rate * (x - time * mean) / variance).to(x)


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Train both pairs of fields, and a velocity without a latent."""
    tests, paths, grid = (50, 4, 20) if smoke else (400, 16, 120)
    batch, network = 1024, {"width": 256, "depth": 3, "frequencies": 64}
    if smoke:
        batch, network = 64, {"width": 32, "depth": 2, "frequencies": 8}
    g = torch.Generator().manual_seed(0)
    pool = 2000 if smoke else 200_000
    x0, x1 = torch.randn(pool, 2, generator=g), checkerboard(pool, g)
    test = checkerboard(tests, g)
    held = torch.randn(4000, 2, generator=g), checkerboard(4000, g)
    log_prob = checkerboard_log_prob(test)
    it, plain = Interpolant("linear", "brownian"), Interpolant("linear", "zero")
    nets, seconds = learn_pairs(it, x0, x1, steps, batch, **network)
    without, spent = learn(plain, ("velocity",), x0, x1, steps, batch, **network)
    seconds.append(spent)
    models = contenders(it, ExactCheckerboard(it), nets, 2)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)

    for name, model in models.items():
        for label, epsilon in levels(model, models["exact"], held, (0.0, 0.5, 1.0)).items():
            row: dict[str, Any] = {"gamma": "brownian", "fields": name, "epsilon": label}
            if label == "0":
                row |= flow_kl(model, test, log_prob, grid // 2)
            else:
                row |= sde_kl(model, test, log_prob, epsilon, grid, paths)
                row["girsanov bound"] = girsanov(model, models["exact"], held, epsilon)
            add(row)
    add({"gamma": "zero", "fields": "b", "epsilon": "0"}
        | flow_kl(model_of(plain, without, 2), test, log_prob, grid // 2))  # fmt: skip
    return {"steps": steps, "batch": batch, "network": network, "test points": tests, "paths": paths, "grid": grid,
            "training seconds": seconds, "rows": rows}  # fmt: skip
