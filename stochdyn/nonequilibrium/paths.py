"""Entropy produced along trajectories of a steady state whose current is known."""

from __future__ import annotations

from torch import Tensor

from stochdyn._checks import as_tensor, as_time_grid, check_choice, check_type
from stochdyn.core.forward.divergences import divergence, value_and_divergence
from stochdyn.core.law.path import Path
from stochdyn.errors import ShapeError, UnavailableError
from stochdyn.nonequilibrium.current import SteadyCurrent

__all__ = ["dissipation", "mismatch"]


def dissipation(
    paths: Tensor | Path, ts: Tensor | None, current: SteadyCurrent, method: str = "trapezoid"
) -> Tensor:
    r"""Return the entropy produced along trajectories of the steady state, ``(*sample,)``.

    .. math::
        S&=\int v\cdot D^+\circ(dX-f_{rev}\,dt)-\int(\nabla\cdot f_{rev}+f_{rev}\cdot\nabla\log\rho)\,dt &&\text{(trapezoid)}\\
        S&=\int v\cdot D^+(dX-F\,dt)+\int v\cdot D^+v\,dt &&\text{(girsanov)}

    The first is in the sense of Stratonovich, by the trapezoid rule; its second integral vanishes for even components. The
    second, in the sense of Itô, is the log density of the path with respect to the law of drift :math:`F-2v`, and is for even components.
    With the exact score both tend to the same number, with an error of first order in the step. The trapezoid rule also
    holds for recorded trajectories and for noise that depends on the state, where the log-ratio of Euler densities of a path and its
    reversal is wrong at order one; the second form feels every error of the noise's strength at order one. With a learnt
    score their difference is :func:`mismatch`.

    Args:
        paths: The states, ``(*sample, T, d)``, or paths that a law drew.
        ts: The times, ``(T,)``; None for those of the paths.
        current: The steady current.
        method: ``"trapezoid"``, right for data, or ``"girsanov"``, whose mean of :math:`e^{-S}` is one on Euler paths at any step.

    Raises:
        ShapeError: If states and times don't fit each other.
        UnavailableError: If ``"girsanov"`` is asked for with odd components.
        DiffusionMismatchError: If entropy production is infinite.
    """
    check_choice(method, ("trapezoid", "girsanov"), "method")
    x, dt = _trajectories(paths, ts, current)
    odd = current.signs(x) is not None
    if method == "girsanov":
        if odd:
            raise UnavailableError(
                "the second form is for components that are even under time reversal",
                hint="P.reverse(score, T, rho, parity).log_rn(path.reversed(parity), P.backward(T, rho, parity)) is the same with momenta",
            )
        start = x[..., :-1, :]
        before = current.evaluate(start)
        drift = current.sde.slope(current.time(start), start).detach()
        step = x[..., 1:, :] - start - drift * dt
        return (before.dual.detach() * (step + before.velocity.detach() * dt)).sum((-2, -1))
    at = current.evaluate(x)
    dual = at.dual.detach()
    middle = 0.5 * (dual[..., 1:, :] + dual[..., :-1, :])
    step = x[..., 1:, :] - x[..., :-1, :]
    if not odd:
        return (middle * step).sum((-2, -1))
    reversible = at.reversible.detach()
    step = step - 0.5 * (reversible[..., 1:, :] + reversible[..., :-1, :]) * dt
    rate = divergence(lambda y: current._split(y)[1], x) + (reversible * at.score).sum(-1)
    return (middle * step).sum((-2, -1)) - _integral(rate.detach(), dt)


def mismatch(paths: Tensor | Path, ts: Tensor | None, current: SteadyCurrent) -> Tensor:
    r"""Return how far the two forms of :func:`dissipation` are apart along trajectories for a score that isn't exact, ``(*sample,)``.

    .. math:: \int(\nabla\cdot v+v\cdot\nabla\log\rho)\,dt

    The integrand is the residual of the stationary Fokker-Planck equation, which is zero for the exact score.

    Args:
        paths: The states, ``(*sample, T, d)``, or paths that a law drew.
        ts: The times, ``(T,)``; None for those of the paths.
        current: The current of even components.

    Raises:
        UnavailableError: If a component is odd.
    """
    x, dt = _trajectories(paths, ts, current)
    if current.signs(x) is not None:
        raise UnavailableError("the mismatch is defined for components that are even under time reversal")
    v, spread = value_and_divergence(lambda y: current.evaluate(y).velocity, x)
    return _integral((spread + (v * current._score_at(x)).sum(-1)).detach(), dt)


def _trajectories(paths: Tensor | Path, ts: Tensor | None, current: SteadyCurrent) -> tuple[Tensor, Tensor]:
    """Return states ``(*sample, T, d)`` and the lengths ``(T-1, 1)`` of their steps."""
    check_type(current, SteadyCurrent, "current")
    if isinstance(paths, Path):
        ts = paths.ts if ts is None else ts
        paths = paths.x
    x = as_tensor(paths, "paths").detach()
    grid = as_time_grid(ts, like=x)
    if x.ndim < 2 or x.shape[-2] != len(grid):
        raise ShapeError("paths must be (*sample, T, d)", got=tuple(x.shape), expected=f"T = {len(grid)}")
    current._at(x[..., 0, :])
    return x, (grid[1:] - grid[:-1]).to(x).unsqueeze(-1)


def _integral(rate: Tensor, dt: Tensor) -> Tensor:
    """Return the integral of ``rate (*sample, T)`` over time by the trapezoid rule."""
    return (0.5 * (rate[..., 1:] + rate[..., :-1]) * dt.squeeze(-1)).sum(-1)
