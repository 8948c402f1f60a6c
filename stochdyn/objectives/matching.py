r"""Simulation-free divergence of a posterior given by its marginals (SDE matching), for Brownian noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn._checks import check_callable, check_nonempty, check_type
from stochdyn.core.sde.coefficients import Diagonal, Matrix, Scalar
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.reversal import spatial_divergence
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["marginal_drift", "matching_rate"]

Marginal = Callable[[Tensor], tuple[Tensor, Tensor]]


def marginal_drift(sde: SDE, marginal: Marginal, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return points of Gaussian marginals and the drift there of the diffusion that has these marginals.

    With :math:`x=m(t)+s(t)\epsilon` the paths of fixed :math:`\epsilon` have the velocity
    :math:`\dot m+\dot s\epsilon`. A diffusion of strength G has the same marginals if its drift is

    .. math:: f=\dot m+\dot s\,\epsilon+\tfrac12\nabla\cdot(GG^\top)-\tfrac12GG^\top\epsilon/s .

    Args:
        sde: The equation that gives the strength G of the noise, which must be Brownian.
        marginal: A function of times ``t (L, *batch, 1)`` that returns mean and standard deviation ``(L, *batch, d)``.
        t: The times ``(L, *batch, 1)``.
        noise: Standard normal draws ``(L, *batch, d)``.

    Returns:
        ``x`` and ``f``, ``(L, *batch, d)`` each.

    Raises:
        InvalidInputError: If the noise has memory: such a law would have infinite divergence.
        ShapeError: If ``t`` and ``noise`` don't fit each other.

    Reference:
        G. Bartosh, D. Vetrov and C. A. Naesseth, SDE matching, ICML 2025, section 4.
    """
    check_type(sde, SDE, "sde")
    check_callable(marginal, "marginal", "a function of times")
    check_type(t, Tensor, "t")
    check_nonempty(t, "t")
    check_type(noise, Tensor, "noise")
    if not (t.is_floating_point() and noise.is_floating_point()):
        raise InvalidInputError("t and noise must be floating", got=f"{t.dtype} and {noise.dtype}")
    if t.ndim != noise.ndim or t.shape[:-1] != noise.shape[:-1]:
        raise ShapeError(
            "t and noise don't fit each other", got=f"{tuple(t.shape)} and {tuple(noise.shape)}",
            expected="(L, *batch, 1) and (L, *batch, d)",
        )  # fmt: skip
    if sde.noise.num_states:
        raise InvalidInputError(
            "marginals alone don't make a posterior for noise with memory",
            hint="take a control of the noise: stochdyn.fractional.GaussianPosterior needs no simulation either",
        )
    # x = m + s e moves along m' + s' e; both slopes by one forward derivative in time.
    t = t.contiguous()
    one = torch.ones_like(t)
    (mean, scale), (mean_slope, scale_slope) = torch.func.jvp(marginal, (t,), (one,))[:2]
    x = mean + scale * noise
    g = sde.diffusion(t, x)
    # A Gaussian's score at x is -e / s; half of GG' times it turns the velocity into the drift of the diffusion.
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
        sde: The prior.
        marginal: A function of times that gives mean and standard deviation, as in :func:`marginal_drift`.
        t: The times ``(L, *batch, 1)``.
        noise: Standard normal draws ``(L, *batch, d)``.

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
