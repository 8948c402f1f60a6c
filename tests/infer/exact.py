"""Exact laws of linear equations on a grid, written out step by step and independent of the solvers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core import NoiseProcess, NoiseSteps

F64 = torch.float64


@dataclass
class LinearPath:
    """A Gaussian path ``mean + factor u`` with ``u ~ N(0, I)``: ``mean (T, d)``, ``factor (T, d, R)``."""

    mean: Tensor
    factor: Tensor

    def observed(self, times: Tensor, emission: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean ``(n,)`` and covariance of ``emission @ x`` at grid indices, one number each."""
        e = torch.eye(self.mean.shape[-1], dtype=F64)[0] if emission is None else emission
        rows = torch.einsum("d,tdr->tr", e, self.factor[times])
        return self.mean[times] @ e, rows @ rows.T

    def evidence(self, y: Tensor, times: Tensor, sd: float, emission: Tensor | None = None) -> Tensor:
        """Return ``log p(y)`` for ``y_i ~ N(e x(t_i), sd^2)``."""
        mean, cov = self.observed(times, emission)
        cov = cov + sd**2 * torch.eye(len(times), dtype=F64)
        return torch.distributions.MultivariateNormal(mean, cov).log_prob(y)

    def smooth(self, y: Tensor, times: Tensor, sd: float) -> tuple[Tensor, Tensor]:
        """Return posterior means and standard deviations ``(T, d)``."""
        mean, cov = self.observed(times)
        cov = cov + sd**2 * torch.eye(len(times), dtype=F64)
        cross = torch.einsum("tdr,sr->tds", self.factor, self.factor[times][:, 0])
        gain = torch.linalg.solve(cov, cross.mT).mT if cross.ndim == 2 else cross @ torch.linalg.inv(cov)
        post = self.mean + gain @ (y - mean)
        var = (self.factor**2).sum(-1) - (gain * cross).sum(-1)
        return post, var.clamp_min(0).sqrt()

    def dense(self) -> torch.distributions.MultivariateNormal:
        """Return the law of the path after its first point, flattened."""
        flat = self.factor[1:].flatten(0, 1)
        return torch.distributions.MultivariateNormal(self.mean[1:].flatten(), flat @ flat.T)


def linear_path(
    drift: Tensor,
    diffusion: Tensor,
    ts: Tensor,
    start: Tensor,
    start_cov: Tensor | None = None,
    noise: NoiseProcess | None = None,
    offset: Tensor | None = None,
) -> LinearPath:
    """Return the law of the Euler scheme of ``dx = (A x + b) dt + G dZ``.

    Args:
        drift: ``A (d, d)``.
        diffusion: ``G (d, m)``.
        ts: ``(T,)``.
        start: ``(d,)`` mean of the start.
        start_cov: ``(d, d)`` its covariance, 0 if None.
        noise: the driving process, Brownian motion if None.
        offset: ``b (d,)``.
    """
    d, m = diffusion.shape
    steps = ts.shape[0] - 1
    b = torch.zeros(d, dtype=F64) if offset is None else offset
    coefficients: NoiseSteps | None = None if noise is None else noise.steps(ts, dtype=F64)
    k = 0 if noise is None else noise.num_states
    r = 1 if coefficients is None else coefficients.variance.shape[1]
    past = None if noise is None else noise.initial_factor(dtype=F64, device=ts.device)
    q = 0 if past is None else past.shape[0]
    width = d + m * q + steps * m * r
    x_mean, x = start.clone(), torch.zeros(d, width, dtype=F64)
    if start_cov is not None:
        x[:, :d] = torch.linalg.cholesky(start_cov)
    memory = torch.zeros(m, k, width, dtype=F64)
    for c in range(m):
        for j in range(q):
            memory[c, :, d + c * q + j] = past[j]
    means, factors = [x_mean], [x]
    for n in range(steps):
        dt = ts[n + 1] - ts[n]
        dz = torch.zeros(m, width, dtype=F64)
        after = memory.clone()
        for c in range(m):
            e = torch.zeros(r, width, dtype=F64)
            for j in range(r):
                sd = dt.sqrt() if coefficients is None else coefficients.variance[n, j].sqrt()
                e[j, d + m * q + (n * m + c) * r + j] = sd
            if coefficients is None:
                dz[c] = e[0]
                continue
            dz[c] = coefficients.recall[n] @ memory[c] + coefficients.gain[n] @ e
            after[c] = coefficients.decay[n][:, None] * memory[c] + coefficients.load[n].T @ e
        x_mean = x_mean + (drift @ x_mean + b) * dt
        x = x + drift @ x * dt + diffusion @ dz
        memory = after
        means.append(x_mean)
        factors.append(x)
    return LinearPath(torch.stack(means).detach(), torch.stack(factors).detach())


class TwoStates(NoiseProcess):
    """Noise with memory: ``dZ = sum_k w_k dY_k``, ``dY_k = -g_k Y_k dt + dW``, by Euler steps, R = 1."""

    num_states = 2

    def __init__(self, weights: Tensor | None = None, past: bool = False) -> None:
        super().__init__()
        self.speeds = torch.tensor([0.5, 4.0], dtype=F64)
        self.weights = torch.tensor([0.8, 0.6], dtype=F64) if weights is None else weights
        self.past = past

    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        dt = (ts[1:] - ts[:-1]).to(F64)
        n = dt.shape[0]
        w = self.weights
        gain = w.sum(-1, keepdim=True).expand(n, *w.shape[:-1], 1)
        recall = -(w * self.speeds) * dt.reshape(n, *(1,) * w.ndim)
        decay = 1 - self.speeds * dt[:, None]
        load = torch.ones(n, 1, 2, dtype=F64)
        return NoiseSteps(*(c.to(dtype) for c in (dt[:, None], gain, recall, decay, load)))

    def initial_factor(self, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        if not self.past:
            return None
        cov = 1 / (self.speeds[:, None] + self.speeds)
        return torch.linalg.cholesky(cov).mT.to(device=device, dtype=dtype)
