r"""Log-ratios and divergences of path measures on a grid (Girsanov), by three estimators.

Every law here drives the same base equation with increments :math:`e_n\sim N(u_n\Delta_n, s_n^2\Delta_n)` given the past, where the
control :math:`u` and the scale :math:`s` depend on the state. In noise space the log-ratio of two such laws is a
sum of log-ratios of Gaussian densities, whether or not the diffusion is degenerate:

.. math::
    \log\frac{dQ}{dP} = \log\frac{q_0}{p_0}(x_0)
      + \sum_n \log\frac{N(e_n; u^Q_n\Delta_n, (s^Q_n)^2\Delta_n)}{N(e_n; u^P_n\Delta_n, (s^P_n)^2\Delta_n)} .
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._transforms import as_leaf, recording

__all__ = ["ESTIMATORS", "NoiseLaw", "density", "explicit_stop", "rate", "stl"]

ESTIMATORS = ("density", "rate", "stl")


@dataclass(frozen=True)
class NoiseLaw:
    """The conditional law of the increments given the state at every step.

    Attributes:
        drift: The drift ``u (N, *batch, m)``, or None for 0.
        precision: The extra precision ``alpha (N, *batch, m)`` with variance factor ``1 / (1 + alpha dt)``, or None for
            0.
    """

    drift: Tensor | None = None
    precision: Tensor | None = None

    def _mean(self, dt: Tensor) -> Tensor | float:
        return 0.0 if self.drift is None else self.drift * dt

    def _log_growth(self, dt: Tensor) -> Tensor | float:
        """Return minus the log of the variance factor, ``log(1 + alpha dt)``."""
        return 0.0 if self.precision is None else torch.log1p(self.precision * dt)

    def log_ratio_to_base(self, e: Tensor, dt: Tensor) -> Tensor:
        """Return ``log N(e; u dt, s^2 dt) - log N(e; 0, dt)``, ``(N, *batch, m)``."""
        if self.precision is None:
            if self.drift is None:
                return torch.zeros_like(e)
            return self.drift * (e - 0.5 * self.drift * dt)
        # With s^2 = 1 / (1 + alpha dt): -log s - (e - u dt)^2 / (2 s^2 dt) + e^2 / (2 dt).
        growth = torch.log1p(self.precision * dt)
        return 0.5 * growth - 0.5 * ((e - self._mean(dt)) ** 2 * torch.exp(growth) - e**2) / dt


def density(q: NoiseLaw, p: NoiseLaw, e: Tensor, dt: Tensor) -> Tensor:
    """Return the exact log-ratio ``(*batch,)`` on increments ``e (N, *batch, m)`` with steps ``dt (N, 1, ..., 1)``."""
    return _total(q.log_ratio_to_base(e, dt) - p.log_ratio_to_base(e, dt))


def rate(q: NoiseLaw, p: NoiseLaw, dt: Tensor) -> Tensor:
    r"""Return the sum of the conditional divergences of every step, whose mean under Q is the divergence.

    .. math:: \sum_n \tfrac12\left[\frac{|u^Q-u^P|^2\Delta}{s_P^2} + \frac{s_Q^2}{s_P^2} - 1 - \log\frac{s_Q^2}{s_P^2}\right]
    """
    # Means differ by (u_Q - u_P) dt, and log s_Q^2 / s_P^2 = log(1 + alpha_P dt) - log(1 + alpha_Q dt).
    gap = q._mean(dt) - p._mean(dt)
    growth_p = p._log_growth(dt)
    log_ratio = torch.as_tensor(growth_p - q._log_growth(dt), dtype=dt.dtype, device=dt.device)
    weight = torch.exp(torch.as_tensor(growth_p, dtype=dt.dtype, device=dt.device))
    return _total(0.5 * (gap**2 / dt * weight + torch.expm1(log_ratio) - log_ratio))


def stl(q_log: Callable[[Tensor, Tensor], Tensor], e: Tensor, z: Tensor) -> Tensor:
    """Return ``q_log(e, z)`` with the gradient of its explicit parameters stopped ("sticking the landing").

    The value is exact. The gradient flows through the increments ``e`` and the states ``z`` alone: the part it leaves out
    has mean zero under Q, and near the optimum it is most of the noise. No parameter needs to be known or detached, so
    any callable will do.

    Args:
        q_log: A function that maps increments and states to a log density summed over the steps, ``(*batch,)``.
        e: The increments ``(N, *batch, m)`` on the graph.
        z: The states ``(N, *batch, ...)`` on the graph.

    Reference:
        Roeder, Wu and Duvenaud, "Sticking the landing", 2017; for SDEs: Xu et al., "Infinitely deep Bayesian neural
        networks with stochastic differential equations", 2022.
    """
    return explicit_stop(lambda inputs: q_log(*inputs), (e, z))


def explicit_stop(f: Callable[[tuple[Tensor, ...]], Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """Return ``f(inputs)`` whose gradient reaches ``inputs`` but nothing else that ``f`` depends on."""
    if not torch.is_grad_enabled() or not any(i.requires_grad for i in inputs):
        with torch.no_grad():
            return f(inputs)
    with recording():
        leaves = tuple(as_leaf(i) for i in inputs)
        value = f(leaves)
        if not value.requires_grad:
            return value
        slopes = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    value = value.detach()
    for slope, leaf, original in zip(slopes, leaves, inputs, strict=True):
        if slope is not None and original.requires_grad:
            # Zero in value, and one slope away in gradient.
            change = (slope * (original - leaf.detach())).sum(-1)
            value = value + _sum_to(change, value.shape)
    return value


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum the leading time axis, and nothing else, down to ``shape``."""
    while x.ndim > len(shape):
        x = x.sum(0)
    return x


def _total(x: Tensor) -> Tensor:
    """Sum over steps and channels."""
    return x.sum(-1).sum(0)
