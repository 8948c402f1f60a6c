r"""Simulation-free divergence of a posterior given by its marginals (SDE matching), for Brownian noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn.core.sde.coefficients import Diagonal, Matrix, Scalar
from stochdyn.core.sde.equation import SDE, spatial_divergence
from stochdyn.errors import InvalidInputError

__all__ = ["marginal_drift", "matching_rate"]

Marginal = Callable[[Tensor], tuple[Tensor, Tensor]]


def marginal_drift(sde: SDE, marginal: Marginal, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return points of Gaussian marginals and the drift there of the diffusion that has these marginals.

    With :math:`x=m(t)+s(t)\epsilon` the paths of fixed :math:`\epsilon` have the velocity
    :math:`\dot m+\dot s\epsilon`. A diffusion of strength G has the same marginals if its drift is

    .. math:: f=\dot m+\dot s\,\epsilon+\tfrac12\nabla\cdot(GG^\top)-\tfrac12GG^\top\epsilon/s .

    Args:
        sde: gives G; Brownian noise.
        marginal: maps times ``t (L, *batch, 1)`` to mean and standard deviation ``(L, *batch, d)``.
        t: ``(L, *batch, 1)``.
        noise: standard normals ``(L, *batch, d)``.

    Returns:
        ``x`` and ``f``, ``(L, *batch, d)`` each.

    Raises:
        InvalidInputError: if the noise has memory: such a law would have infinite divergence.

    Reference:
        G. Bartosh, D. Vetrov and C. A. Naesseth, SDE matching, ICML 2025, section 4.
    """
    if sde.noise.num_states:
        raise InvalidInputError(
            "marginals alone don't make a posterior for noise with memory",
            hint="take a control of the noise: stochdyn.fractional.GaussianPosterior needs no simulation either",
        )
    t = t.contiguous()
    one = torch.ones_like(t)
    (mean, scale), (mean_slope, scale_slope) = torch.func.jvp(marginal, (t,), (one,))[:2]
    x = mean + scale * noise
    g = sde.diffusion(t, x)
    score = -noise / scale
    if isinstance(g, Scalar | Diagonal):
        spread = g.apply(g.apply(score))
    else:
        spread = (g.covariance(x.shape[-1]).to(x) @ score.unsqueeze(-1)).squeeze(-1)
    drift = mean_slope + scale_slope * noise + 0.5 * spread
    if sde.state_dependent:
        drift = drift + 0.5 * spatial_divergence(sde, t, x)
    return x, drift


def matching_rate(sde: SDE, marginal: Marginal, t: Tensor, noise: Tensor) -> Tensor:
    r"""Return the divergence per unit time from the SDE's law, :math:`\tfrac12|G^{-1}(f-b)|^2`, at drawn points.

    Its mean over time and over the marginals, times the length of time, is the divergence of the paths. No path is
    simulated, and the cost doesn't grow with the number of steps. It is that of continuous time: no time step is paid for.

    Args:
        sde: the prior.
        marginal: see :func:`marginal_drift`.
        t: ``(L, *batch, 1)``.
        noise: ``(L, *batch, d)``.

    Returns:
        ``(L, *batch)``.

    Example:
        >>> sde = SDE(lambda t, x: -x, 1.0)
        >>> t = torch.rand(5, 1)
        >>> stationary = lambda t: (torch.zeros_like(t), torch.full_like(t, 0.5**0.5))
        >>> bool(matching_rate(sde, stationary, t, torch.randn(5, 1)).max() < 1e-6)
        True
    """
    x, drift = marginal_drift(sde, marginal, t, noise)
    g = sde.diffusion(t, x)
    if isinstance(g, Matrix) and g.value.shape[-1] < x.shape[-1]:
        raise InvalidInputError(
            "marginals need noise on every component", got=f"{g.value.shape[-1]} channels"
        )
    return 0.5 * g.solve(drift - sde.drift(t, x)).square().sum(-1)
