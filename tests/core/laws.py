"""Small laws with known answers, shared by the tests of the core."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.core import NoiseProcess, NoiseSteps

F64 = torch.float64


class ExactMemory(NoiseProcess):
    r"""``Z = sum_k w_k (Y_k - Y_k(0))`` with ``dY_k = -g_k Y_k dt + dW``, stepped exactly."""

    def __init__(self, speeds: list[float], weights: list[float], stationary: bool = False) -> None:
        super().__init__()
        self.register_buffer("g", torch.tensor(speeds, dtype=F64))
        self.w = torch.nn.Parameter(torch.tensor(weights, dtype=F64))
        self.num_states = len(speeds)
        self.stationary = stationary

    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        dt = (ts[1:] - ts[:-1]).to(F64)[:, None]
        both = self.g[:, None] + self.g
        with_dw = -torch.expm1(-self.g * dt) / self.g
        covariance = -torch.expm1(-both * dt[..., None]) / both
        residual = covariance - with_dw[:, :, None] * with_dw[:, None, :] / dt[..., None]
        values, vectors = torch.linalg.eigh(residual)
        load = torch.cat([(with_dw / dt)[:, None], vectors.mT], 1)
        variance = torch.cat([dt, values.clamp_min(0)], 1)
        decay = torch.exp(-self.g * dt)
        steps = NoiseSteps(variance, load @ self.w, self.w * (decay - 1), decay, load)
        return steps.to(dtype)

    def num_innovations(self, ts: Tensor) -> int:
        return 1 + self.num_states

    def initial_factor(self, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        if not self.stationary:
            return None
        return torch.linalg.cholesky(1 / (self.g[:, None] + self.g)).mT.to(dtype)

    def covariance(self, ts: Tensor) -> Tensor:
        """Return the exact covariance ``(T, T)`` of ``Z`` (for a start at rest, or with all the past)."""
        g, w = self.g, self.w.detach()
        both = g[:, None] + g
        s, t = torch.minimum(ts[:, None], ts), torch.maximum(ts[:, None], ts)
        total = torch.zeros_like(s)
        for j in range(len(g)):
            for k in range(len(g)):
                if self.stationary:
                    # Increments since 0 of states with Cov(Y_j(t), Y_k(s)) = exp(-g_j (t - s)) / (g_j + g_k)
                    early, late = ts[None, :], ts[:, None]
                    gap = late - early
                    cross = torch.where(gap >= 0, torch.exp(-g[j] * gap), torch.exp(g[k] * gap))
                    value = cross - torch.exp(-g[j] * late) - torch.exp(-g[k] * early) + 1
                    total += w[j] * w[k] * value / both[j, k]
                else:
                    value = torch.exp(-g[j] * (t - s)) * -torch.expm1(-both[j, k] * s) / both[j, k]
                    total += w[j] * w[k] * value
        return total


class EulerMemory(NoiseProcess):
    """The same process with Euler steps of its memory states: one increment a step and nothing else."""

    def __init__(self, speeds: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("g", speeds.to(F64))
        self.register_buffer("w", weights.to(F64))
        self.num_states = speeds.shape[0]

    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        dt = (ts[1:] - ts[:-1]).to(F64)[:, None]
        steps = NoiseSteps(
            dt,
            self.w.sum().expand(dt.shape[0], 1),
            -self.w * self.g * dt,
            1 - self.g * dt,
            torch.ones(dt.shape[0], 1, self.num_states, dtype=F64),
        )
        return steps.to(dtype)

    def initial_factor(self, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        return None


def log_log_slope(steps: list[float], errors: list[float]) -> float:
    """Return the slope of a least-squares line through log error over log step."""
    x = torch.tensor(steps, dtype=F64).log()
    y = torch.tensor(errors, dtype=F64).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def within(estimate: Tensor, truth: Tensor | float, stderr: Tensor, sigmas: float = 4.0) -> bool:
    """Return whether all estimates lie near the truth; 4 sigmas give one false alarm in 16 000 each."""
    return bool(((estimate - truth).abs() <= sigmas * stderr).all())
