"""The Euler density of paths in state space, where there is one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochdyn._checks import values_are_checked
from stochdyn.core.law.initial import InitialLaw
from stochdyn.core.sde.coefficients import Coefficient, Diagonal, Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import steps_of, time_column
from stochdyn.errors import SingularDiffusionError

__all__ = ["check_has_density", "euler_log_prob", "time_column"]


def check_has_density(sde: SDE, coefficient: Coefficient, dim: int) -> None:
    """Raise SingularDiffusionError unless paths of the equation have a density in state space.

    Whether a square matrix is regular is looked at only where values are checked.
    """
    if sde.noise.num_states:
        raise SingularDiffusionError(
            "a path driven by noise with memory has no density in state space",
            hint="sample its driving increments: stochdyn.infer.sample_path",
        )
    if isinstance(coefficient, Matrix):
        coefficient.log_det(dim)
        if not values_are_checked():
            return
        # Every component in its own unit.
        rows = coefficient.value.detach()
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        smallest = torch.linalg.svdvals(rows)[..., -1]
        if bool((smallest <= 1e-7).any()):
            raise SingularDiffusionError(
                "the diffusion is singular, so paths have no density in state space",
                got=f"smallest singular value {smallest.min().item():g} of the matrix with rows of length one",
                hint="work in noise space: log_rn, kl, or sample_path(..., noise_space=True) in a Pyro model",
            )


def euler_log_prob(sde: SDE, initial: InitialLaw, ts: Tensor, x: Tensor) -> Tensor:
    r"""Return the log density of paths under the Euler scheme, with that of a random start.

    .. math:: \log p_0(x_0) + \sum_n \log N\big(x_{n+1};\ x_n + (b + G u)\Delta_n,\ s^2 G G^\top \Delta_n\big)

    Args:
        sde: The equation, with its control.
        initial: The law of the first point; a fixed start adds nothing.
        ts: The grid of times of a path, ``(T,)`` or ``(*batch, T)``.
        x: The states ``(*batch, T, d)``.

    Returns:
        ``(*batch,)``.

    Raises:
        SingularDiffusionError: If there is no density.
    """
    states = x.movedim(-2, 0)
    before, after = states[:-1], states[1:]
    t, dt = time_column(ts[..., :-1], before), steps_of(ts, before)
    g = sde.diffusion(t, before)
    dim = x.shape[-1]
    check_has_density(sde, g, dim)
    if sde.state_dependent:
        # A diffusion may vanish where the start doesn't show it: there the path has no density.
        g.check()
    excess = after - before - sde.drift(t, before) * dt
    if sde.control is not None:
        u, precision = sde.control.at(t, before)
        if u is not None:
            excess = excess - g.apply(u) * dt
        if precision is not None:
            g = _narrowed(g, torch.rsqrt(1 + precision * dt))
    squares = (g.solve(excess) ** 2).sum(-1) / dt.squeeze(-1)
    log_scale = g.log_det(dim) + 0.5 * dim * dt.log().squeeze(-1)
    steps = -0.5 * squares - log_scale - 0.5 * dim * math.log(2 * math.pi)
    return initial.log_prob(states[0]) + steps.sum(0)


def _narrowed(g: Coefficient, scale: Tensor) -> Coefficient:
    """Return the coefficient whose channels are scaled by ``scale (..., m)``."""
    if isinstance(g, Matrix):
        return Matrix(g.value * scale.unsqueeze(-2))
    return Diagonal(g.apply(scale))
