"""How far models are from the data by exact densities: a mixture in 128 dimensions, and the checkerboard."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from data import checkerboard, checkerboard_log_prob
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.interpolants import (
    FieldNetwork,
    Fields,
    GaussianMixture,
    GaussianMixtureInterpolant,
    Interpolant,
    InterpolantGenerator,
    InterpolantRegression,
    optimal_epsilon,
)
from stochdyn.interpolants.starts import Starts, standard_normal

__all__ = ["measure_checkerboard", "measure_mixture"]

PAIRS = (("velocity", "denoiser"), ("velocity", "score"), ("v", "denoiser"), ("v", "score"))
LABEL = {"velocity": "b", "v": "v", "denoiser": "η", "score": "s"}


class Whitened(nn.Module):
    """A network that sees states of unit variance, and whose output is scaled back."""

    def __init__(self, dim: int, width: int, depth: int, scale0: float, scale1: float, out: float) -> None:
        super().__init__()
        self.net = FieldNetwork(dim, width, depth)
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        self.scale0, self.scale1, self.out = scale0, scale1, out

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the field."""
        size = ((1 - t) ** 2 * self.scale0**2 + t**2 * self.scale1**2 + t * (1 - t)).sqrt()
        y = x / size
        return self.out * (self.net(2 * t - 1, y) + self.linear(y))


def _train(
    it: Interpolant,
    names: tuple[str, str],
    nets: dict[str, nn.Module],
    x0: Tensor,
    x1: Tensor,
    steps: int,
    batch: int,
) -> float:
    objective = InterpolantRegression(it, **{n: nets[n] for n in names}, antithetic=True)  # type: ignore[arg-type]
    start = time.process_time()
    result = sd.fit(
        objective, (x0, x1), steps=steps, lr=2e-3, batch_size=batch, progress=False, ema=0.998,
        optimizer=lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True), clip_norm=100.0,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2e-3, steps, pct_start=0.1),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.copy_((result.ema or {})[name])
    return time.process_time() - start


def _model(it: Interpolant, networks: dict[str, Callable[..., Tensor]], dim: int) -> InterpolantGenerator:
    return InterpolantGenerator(Fields(it, networks), Starts(standard_normal(dim)))


def _flow_kl(model: InterpolantGenerator, x: Tensor, log_prob: Tensor, steps: int) -> dict[str, float]:
    with torch.no_grad():
        gap = log_prob - model.log_prob(x, steps=steps, method="heun")
    return {"KL": float(gap.mean()), "stderr": float(gap.std() / len(gap) ** 0.5)}


def _sde_kl(
    model: InterpolantGenerator, x: Tensor, log_prob: Tensor, epsilon: Any, steps: int, paths: int
) -> dict[str, float]:
    g = torch.Generator().manual_seed(7)
    weights = model.sde_log_prob(x, epsilon, steps, num_paths=paths, method="transition", generator=g)
    gap = log_prob - weights.log_prob
    return {
        "KL": float(gap.mean()),
        "stderr": float(gap.std() / len(gap) ** 0.5),
        "effective paths": float(weights.effective_size.mean()),
    }


def _kernel_kl(x: Tensor, y: Tensor) -> float:
    """The paper's metric: kernel densities of the first two coordinates, KL by E[log r - (1/r - 1)]."""
    from scipy.stats import gaussian_kde

    p, q = (gaussian_kde(z[:, :2].double().numpy().T) for z in (x, y))
    points = x[:, :2].double().numpy().T
    a, b = torch.from_numpy(p.logpdf(points)), torch.from_numpy(q.logpdf(points)).clamp(min=-700)
    return float((a - b - ((b - a).exp() - 1)).mean())


def measure_mixture(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """The five modes in 128 dimensions: every pair of fields and several strengths of noise, beside exact fields."""
    dim, n = (8, 200) if smoke else (128, 2000)
    tests, paths, grid = (20, 4, 20) if smoke else (100, 8, 150)
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, dim, dim, generator=g)
    means = 7.5 * torch.randn(5, dim, generator=g)
    law = GaussianMixture(torch.full((5,), 0.2), means, w.mT @ w / dim + torch.eye(dim))
    it = Interpolant("linear", "brownian")
    truth = GaussianMixtureInterpolant(it, None, law)
    pool = 2000 if smoke else 100_000
    x0, x1 = torch.randn(pool, dim, generator=g), law.draw(pool, g)
    spread = float(x1.var(0).mean().sqrt())
    torch.manual_seed(0)
    out = {"velocity": spread, "v": spread, "denoiser": 1.0, "score": 1.0}
    width, depth = (32, 2) if smoke else (256, 3)
    nets = {k: Whitened(dim, width, depth, 1.0, spread, out[k]) for k in out}
    seconds = [_train(it, names, nets, x0, x1, steps, 256) for names in (PAIRS[0], PAIRS[3])]
    test, fresh, starts = law.draw(tests, g), law.draw(n, g), torch.randn(n, dim, generator=g)
    log_prob = law.log_prob(test)
    exact = _model(it, {"velocity": truth.velocity, "denoiser": truth.denoiser}, dim)
    held = torch.randn(300, dim, generator=g), law.draw(300, g)
    rows: list[dict[str, Any]] = []
    contenders: list[tuple[str, InterpolantGenerator]] = [("exact", exact)]
    for pair in PAIRS:
        contenders.append((" and ".join(LABEL[k] for k in pair), _model(it, {k: nets[k] for k in pair}, dim)))
    for name, model in contenders:
        levels: list[tuple[str, Any]] = [("0", 0.0), ("1", 1.0)]
        if name == "exact":
            levels.append(("4", 4.0))
        else:
            levels.append(("optimal", optimal_epsilon(model, truth, *held, num_times=20)))
        for label, epsilon in levels:
            begin = time.process_time()
            draws = model.sample(n, epsilon, 10 if smoke else 50, x0=starts,
                                 generator=torch.Generator().manual_seed(3))  # fmt: skip
            row: dict[str, Any] = {"fields": name, "epsilon": label, "kernel KL": _kernel_kl(fresh, draws)}
            if label == "0":
                row |= _flow_kl(model, test[: tests // 4], log_prob[: tests // 4], 30)
            else:
                row |= _sde_kl(model, test, log_prob, epsilon, grid, paths)
                row["girsanov bound"] = (
                    float(model_bound(model, held, epsilon, truth)) if name != "exact" else 0.0
                )
            row["seconds"] = round(time.process_time() - begin, 1)
            rows.append(row)
            print(row, flush=True)
    return {"dim": dim, "steps": steps, "batch": 256, "network": f"{depth} x {width}", "draws": n, "test points": tests,
            "paths": paths, "training seconds": seconds, "rows": rows}  # fmt: skip


def model_bound(model: InterpolantGenerator, held: tuple[Tensor, Tensor], epsilon: Any, truth: Any) -> Tensor:
    """Girsanov's bound with the true fields."""
    from stochdyn.interpolants import kl_bound

    return kl_bound(model, *held, epsilon, truth, num_times=20).mean


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

    def denoiser(self, t: Tensor, x: Tensor) -> Tensor:
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


def measure_checkerboard(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """The checkerboard: flow and SDE by exact density, beside exact fields."""
    tests, paths, grid = (50, 4, 20) if smoke else (400, 16, 120)
    g = torch.Generator().manual_seed(0)
    pool = 2000 if smoke else 200_000
    x0, x1 = torch.randn(pool, 2, generator=g), checkerboard(pool, g)
    test = checkerboard(tests, g)
    log_prob = checkerboard_log_prob(test)
    rows: list[dict[str, Any]] = []
    seconds = []
    for gamma in ("brownian", "zero"):
        it = Interpolant("linear", gamma)
        torch.manual_seed(0)
        names = ("velocity", "denoiser") if gamma == "brownian" else ("velocity",)
        nets = {k: FieldNetwork(2, 32 if smoke else 128, 4) for k in names}
        seconds.append(_train(it, names, nets, x0, x1, steps, 512))  # type: ignore[arg-type]
        contenders: list[tuple[str, InterpolantGenerator]] = [("learnt", _model(it, dict(nets), 2))]
        if gamma == "brownian":
            exact = ExactCheckerboard(it)
            contenders.insert(
                0, ("exact", _model(it, {"velocity": exact.velocity, "denoiser": exact.denoiser}, 2))
            )
        for name, model in contenders:
            for label, epsilon in (("0", 0.0), ("0.5", 0.5), ("1", 1.0)):
                if gamma == "zero" and epsilon:
                    continue
                begin = time.process_time()
                row: dict[str, Any] = {"gamma": gamma, "fields": name, "epsilon": label}
                if label == "0":
                    row |= _flow_kl(model, test, log_prob, grid // 2)
                else:
                    row |= _sde_kl(model, test, log_prob, epsilon, grid, paths)
                row["seconds"] = round(time.process_time() - begin, 1)
                rows.append(row)
                print(row, flush=True)
    return {"steps": steps, "batch": 512, "network": "4 x 128", "test points": tests, "paths": paths, "grid": grid,
            "training seconds": seconds, "rows": rows}  # fmt: skip
